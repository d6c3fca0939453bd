"""The `data` section of pretraining: modalities, and where the scenes without labels come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, cast

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic import ValidationInfo as Info

from vfmseg.errors import nearest, show
from vfmseg.recipe.base import Number, Problem, Section, Whole
from vfmseg.recipe.data import (
    LARGEST_TILE,
    MOST_BANDS,
    ModalitySection,
    TileSide,
    in_order_of,
    name_problems,
    unknown_problems,
    weight_problems,
)
from vfmseg.recipe.splits import MOST_SOURCES, SOURCE_KEYS, Files, FlatSource, Weight, foreign_keys

Factor = Annotated[Number, Field(gt=0)]


class SceneSource(FlatSource):
    """Images named by globs, files, folders or lists; those of several modalities are paired by their names."""

    model_config = ConfigDict(extra="allow", json_schema_extra=foreign_keys(["weight"]))
    __pydantic_extra__: dict[str, Files]

    weight: Weight = None
    """In a list of sources: its part of the windows drawn; left out: as its area."""

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        for name in self.images:
            if name in SOURCE_KEYS:
                yield Problem(
                    name,
                    "is not a key of scenes to pretrain on (weight, and one key per modality): they have no labels, "
                    "and are files; drop it",
                )


SceneSources = Annotated[
    Annotated[SceneSource, Tag("one")]
    | Annotated[tuple[SceneSource, ...], Field(min_length=1, max_length=MOST_SOURCES), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, (list, tuple)) else "one"),
]
"""One source, or several in a list."""


class UnlabelledSection(Section):
    """Modalities and scenes to pretrain on. Each source has some of the modalities, and nobody's labels."""

    modalities: Annotated[
        dict[str, ModalitySection], Field(min_length=1, max_length=64, examples=[{"rgb": {"bands": [1, 2, 3]}}])
    ]
    """One or several kinds of image; the first that a scene has is its grid."""
    scenes: Annotated[SceneSources, Field(examples=[{"rgb": "open/**/*.tif"}])]
    """Scenes of any size: files, or a list of such sources, which may have weights."""
    tile: TileSide = 224
    """Side of the windows that the model sees, in pixels."""
    scale: tuple[Factor, Factor] = (0.5, 2.0)
    """Smallest and largest side of what a window shows of a scene, in tiles; it is resized to one."""
    draw: dict[str, Annotated[Whole, Field(ge=1, le=MOST_BANDS)]] = Field(default_factory=dict, examples=[{"cube": 3}])
    """{modality: bands that a window shows of it}, drawn anew for each window of each epoch; left out: all."""
    samples_per_epoch: Whole | None = Field(default=None, ge=1, le=10**7, examples=[20000])
    """Windows drawn per epoch; left out: as many as cover the scenes once."""
    workers: Annotated[Whole, Field(ge=0, le=256)] = 0
    """Processes that read beside the training; 0 reads in the training process."""

    @field_validator("scenes")
    @classmethod
    def _order_modalities(cls, found: SceneSources, info: Info) -> SceneSources:
        return cast("SceneSources", in_order_of(found, list(info.data.get("modalities", ()))))

    def sources(self) -> dict[str, SceneSource]:
        """{its key below `data`: source} in order: `scenes`, or `scenes.0`, `scenes.1` of a list."""
        if isinstance(self.scenes, tuple):
            return {f"scenes.{number}": source for number, source in enumerate(self.scenes)}
        return {"scenes": self.scenes}

    def _problems(self) -> Iterator[Problem]:
        yield from name_problems(self.modalities)
        sources = self.sources()
        unknown = [one for place, source in sources.items() for one in unknown_problems(place, source, self.modalities)]
        yield from unknown
        for name in self.modalities:
            # one that is misspelt in a source is told of there
            if not unknown and not any(name in source.images for source in sources.values()):
                yield Problem(
                    f"modalities.{name}", "is in no source of data.scenes; say where its images are, or drop it"
                )
        yield from self._draw_problems()
        yield from weight_problems({place: source.weight for place, source in sources.items()})
        yield from scale_problems(self.scale, self.tile)

    def _draw_problems(self) -> Iterator[Problem]:
        for name, count in self.draw.items():
            place = f"draw.{name}"
            if name not in self.modalities:
                yield Problem(place, f"is not one of data.modalities; {nearest(name, self.modalities)}")
                continue
            modality = self.modalities[name]
            if modality.count is not None and count >= modality.count:
                yield Problem(place, f"= {count} must be below the {modality.count} bands of {name}; drop it for all")
            if modality.groups is not None:
                yield Problem(place, f"= {count} is of all bands, and modalities.{name}.groups divides them; drop one")
            if modality.normalize == "encoder":
                yield Problem(
                    place, f"= {count}: bands that are drawn have a mean and std each; drop modalities.{name}.normalize"
                )


def scale_problems(scale: tuple[float, float], tile: int) -> Iterator[Problem]:
    """Of `scale`: it does not rise, or makes windows of a tile of so many pixels that cannot be read."""
    low, high = scale
    if low > high:
        yield Problem("scale", f"= {show(list(scale))} must be [smallest, largest]; try {[high, low]}")
    elif tile * high > LARGEST_TILE or tile * low < 1:
        yield Problem(
            "scale",
            f"= {show(list(scale))} of data.tile = {tile} makes windows of {tile * low:g} to {tile * high:g} px a "
            f"side; expected 1 to {LARGEST_TILE}",
        )
