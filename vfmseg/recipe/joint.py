"""The `train.unlabelled` section: what is learned beside segmentation, from windows without labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pydantic import Field

from vfmseg.errors import nearest
from vfmseg.recipe.base import Problem, Section
from vfmseg.recipe.data import weight_problems
from vfmseg.recipe.pretrain import DistillSection, MaeSection
from vfmseg.recipe.splits import SOURCE_KEYS
from vfmseg.recipe.unlabelled import Factor, SceneSource, SceneSources, scale_problems

PLACE = "train.unlabelled"


class JointSection(Section):
    """Masked modelling or distillation beside segmentation. What only it needs is not kept."""

    scenes: SceneSources | None = Field(default=None, examples=[{"rgb": "more/**/*.tif"}])
    """Scenes of any size: files, or a list of such sources; left out: those of data.train, without their labels."""
    scale: tuple[Factor, Factor] = (0.5, 2.0)
    """Smallest and largest side of what a window shows of a scene, in tiles; it is resized to one."""
    mae: MaeSection | None = Field(default=None, examples=[{"weight": 0.2, "ratio": 0.75}])
    distill: DistillSection | None = None

    def sources(self) -> dict[str, SceneSource]:
        """{its key below `train.unlabelled`: source} in order; empty where the scenes are those of data.train."""
        if isinstance(self.scenes, tuple):
            return {f"scenes.{number}": source for number, source in enumerate(self.scenes)}
        return {} if self.scenes is None else {"scenes": self.scenes}

    def learned(self) -> tuple[MaeSection | None, DistillSection | None]:
        """Those that weigh something; None for the others, of which nothing is built."""
        mae, distill = self.mae, self.distill
        return (mae if mae and mae.weight else None), (distill if distill and distill.weight else None)

    def _problems(self) -> Iterator[Problem]:
        if self.mae is None and self.distill is None:
            yield Problem("", "names nothing to learn; add mae or distill")
        if self.distill is not None and self.distill.masked and self.mae is None:
            yield Problem("distill.masked", f"= true needs {PLACE}.mae, whose masks hide something; add it")
        yield from weight_problems({place: source.weight for place, source in self.sources().items()})


def joint_problems(
    section: JointSection,
    modalities: Sequence[str],
    own: Collection[str],
    stacked: bool,
    tile: int,
    upscale: float,
) -> Iterator[Problem]:
    """What of the section does not fit the rest of a recipe; keys from its root.

    `modalities` of data; `own`: those with an encoder of their own; `stacked`: all of them are one image. `tile` and
    `upscale`: data.tile and model.encoder.upscale.
    """
    for place, source in section.sources().items():
        for name in source.images:
            key = f"{PLACE}.{place}.{name}"
            if name not in modalities:
                yield Problem(key, f"is not one of data.modalities; {nearest(name, [*modalities, *SOURCE_KEYS])}")
            elif name in own:
                yield Problem(
                    key,
                    f"is not used: {name} has an encoder of its own (model.modalities), which learns from labels "
                    "alone; drop it",
                )
        for name in modalities if stacked else ():
            if name not in source.images:
                yield Problem(
                    f"{PLACE}.{place}.{name}",
                    f"is missing: fusion stack makes one image of {', '.join(modalities)}; say where its images are",
                )
    for problem in scale_problems(section.scale, tile):
        yield Problem(f"{PLACE}.{problem.key}", problem.text)
    mae, distill = section.learned()
    if mae is not None and upscale != 1:
        yield Problem(
            f"{PLACE}.mae",
            f"needs model.encoder.upscale = 1 instead of {upscale:g}, as the pixels themselves are to be told; "
            "set it so, or take distill instead",
        )
    elif distill is not None and distill.masked and upscale != 1:
        yield Problem(
            f"{PLACE}.distill.masked",
            f"= true needs model.encoder.upscale = 1 instead of {upscale:g}, as masks are of patches of the window; "
            "set it so, or masked: false",
        )
    if distill is not None and stacked and len(modalities) > 1:
        yield Problem(
            f"{PLACE}.distill",
            "is not for fusion stack: a teacher knows red, green and blue alone; take mae, or another fusion",
        )
