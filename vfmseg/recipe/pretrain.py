"""The recipe of `vfmseg pretrain`: unlabelled scenes, an encoder, and what it learns from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from vfmseg.errors import nearest
from vfmseg.recipe.base import LARGEST_WIDTH, MOST_BLOCKS, Flag, Name, Number, Problem, RecipePath, Section, Whole
from vfmseg.recipe.data import ModalitySection
from vfmseg.recipe.model import EncoderSection, FullAdapter, LoraAdapter, NewEncoder, PretrainedEncoder
from vfmseg.recipe.probe import ProbeSection
from vfmseg.recipe.run import RunSection
from vfmseg.recipe.unlabelled import UnlabelledSection

Weight = Annotated[Number, Field(ge=0)]


class PretrainedSection(Section):
    """What is trained."""

    encoder: Annotated[PretrainedEncoder, Field(examples=[{"name": "new"}])]
    """A new one, or pretrained weights to go on from."""
    adapter: Annotated[FullAdapter | LoraAdapter, Field(discriminator="name")] = FullAdapter(name="full")
    """full: all of the encoder learns; lora: the weights stay, and low-rank updates are merged into what is written."""

    def _problems(self) -> Iterator[Problem]:
        if self.encoder.name == "new" and self.adapter.name != "full":
            yield Problem(
                "adapter", "= 'lora' is for published weights; random ones learn as a whole: use {name: full}"
            )


class MaskedDecoder(Section):
    """The light decoder of masked pretraining, which is not kept."""

    width: Annotated[Whole, Field(ge=16, le=LARGEST_WIDTH)] = 192
    """Channels, a multiple of 4 and of the heads."""
    depth: Annotated[Whole, Field(ge=1, le=MOST_BLOCKS)] = 2
    heads: Annotated[Whole, Field(ge=1, le=128)] = 3

    def _problems(self) -> Iterator[Problem]:
        if self.width % 4 or self.width % self.heads:
            yield Problem("width", f"= {self.width} must be a multiple of 4 and of heads = {self.heads}")


class MaeSection(Section):
    """The pixels of hidden patches are told from the visible ones (He et al. 2022)."""

    weight: Weight = 1.0
    mask: Literal["random", "block", "incomplete", "spectral"] = "random"
    """Patches drawn one by one, in rectangles, or with some pixels of each left visible; spectral: whole bands."""
    ratio: Annotated[Number, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that is hidden, or of the bands."""
    groups: Literal["own", "same"] | None = None
    """Where bands enter in groups: each is hidden by a mask of its own, or all by the same; left out: own."""
    inside: Annotated[Number | None, Field(gt=0, lt=1)] = None
    """With mask incomplete: share of a hidden patch's pixels that is hidden; left out: 0.6."""
    normalise: Literal["patch", "band", "none"] = "patch"
    """What gets mean 0 and variance 1 before it is to be told: each patch, each band of a patch, or nothing."""
    decoder: MaskedDecoder = MaskedDecoder()

    def _problems(self) -> Iterator[Problem]:
        if self.inside is not None and self.mask != "incomplete":
            yield Problem("inside", f"= {self.inside:g} is for mask: incomplete; drop it")


class DistillSection(Section):
    """The tokens follow those of a frozen teacher."""

    weight: Weight = 1.0
    teacher: EncoderSection
    """Its `layers` are the ones to follow, as many as those of the encoder."""
    masked: Flag = False
    """The student does not see what `mae` hides, and follows the teacher there all the same."""


class ObjectivesSection(Section):
    """What is minimised: one or several, each with its weight."""

    mae: MaeSection | None = None
    distill: DistillSection | None = None

    def _problems(self) -> Iterator[Problem]:
        if self.mae is None and self.distill is None:
            yield Problem("", "names nothing to learn; add mae or distill")
        elif not any(one.weight for one in (self.mae, self.distill) if one is not None):
            yield Problem("", "weighs all it names with 0, so that nothing would be learned; give one a weight above 0")
        if self.distill is not None and self.distill.masked and self.mae is None:
            yield Problem("distill.masked", "= true needs objectives.mae, whose masks hide something; add it")


class PretrainRecipe(Section):
    """One run from unlabelled scenes to an encoder."""

    name: Annotated[Name, Field(examples=["aerial-vit"])]
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Everything random derives from it."""
    data: UnlabelledSection
    model: PretrainedSection
    objectives: ObjectivesSection
    train: RunSection = RunSection()
    probe: ProbeSection | None = None
    """Labelled sets by which the best encoder is chosen; left out: the newest is the best."""
    pictures: Annotated[Whole, Field(ge=0, le=64, examples=[4])] = 0
    """Windows of which `objectives.mae` is drawn after each scored epoch: as they are, masked, rebuilt."""
    output_dir: Annotated[RecipePath, Field(examples=["runs/aerial-vit"])]
    """Folder of the run: encoders, metrics, the resolved recipe."""

    def _problems(self) -> Iterator[Problem]:
        encoder = self.model.encoder
        if isinstance(encoder, NewEncoder) and encoder.patch > self.data.tile:
            yield Problem(
                "model.encoder.patch",
                f"= {encoder.patch} is larger than data.tile = {self.data.tile}; expected several patches in a window: "
                "take a smaller patch or a larger tile",
            )
        if self.objectives.distill is not None and self.data.draw:
            yield Problem(
                "objectives.distill",
                "has a teacher that knows red, green and blue, and data.draw shows it any bands of "
                f"{', '.join(self.data.draw)}; name three (data.modalities.NAME.bands), or use objectives.mae alone",
            )
        for name in self.train.augment.radiometry:
            if name not in self.data.modalities:
                place = f"train.augment.radiometry.{name}"
                yield Problem(place, f"is not one of data.modalities; {nearest(name, self.data.modalities)}")
        if self.pictures and self.objectives.mae is None:
            yield Problem("pictures", f"= {self.pictures} are of what objectives.mae rebuilds; add it, or drop them")
        if self.probe is not None:
            yield from self.probe.unknown(self.data.modalities)
            for title, one in self.probe.sets.items():
                for name in sorted(one.modalities() & set(self.data.draw)):
                    yield Problem(
                        f"probe.sets.{title}",
                        f"has {name}, of which the encoder takes {self.data.draw[name]} drawn bands (data.draw) "
                        "and not those of the set; give it a modality of that many bands, or drop it",
                    )
        yield from grouping_problems(self.data.modalities, self.objectives.mae, "objectives.mae")


def grouping_problems(
    modalities: Mapping[str, ModalitySection], mae: MaeSection | None, place: str
) -> Iterator[Problem]:
    """What of `mae` does not fit modalities whose bands are, or are not, in groups. `place`: of it in the recipe."""
    if mae is None:
        return
    grouped = any(one.groups for one in modalities.values())
    if mae.groups is not None and not grouped:
        yield Problem(f"{place}.groups", f"= '{mae.groups}' is for data.modalities.NAME.groups; add those, or drop it")
    if grouped and mae.mask not in ("random", "block"):
        yield Problem(
            f"{place}.mask",
            f"= '{mae.mask}' hides parts of tokens, and tokens of groups of bands are hidden as a whole; use random or "
            "block, or drop data.modalities.NAME.groups",
        )
