"""The `model.fusion` section: how several modalities meet; and the small encoders that a modality may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vfmseg.errors import show
from vfmseg.recipe.base import LARGEST_WIDTH, MOST_BLOCKS, Name, Number, Problem, Section, Whole

Width = Annotated[Whole, Field(ge=1, le=LARGEST_WIDTH)]

LARGEST_SHIFT = 256  # pixels that a modality may lie beside its place


def _all_last_or_numbers(value: Any) -> Any:
    """As it is; a plain union would tell each of its parts as a finding of its own."""
    numbers = isinstance(value, list | tuple) and all(type(n) is int and 1 <= n <= MOST_BLOCKS for n in value)
    if value not in ("all", "last") and not (numbers and value):
        raise ValueError("must be all, last, or numbers of the encoder's maps from 1 (shallow), such as [2, 4]")
    return value


class CoregisterSection(Section):
    """Further modalities are moved onto the first by a shift that training finds."""

    max_shift: Annotated[Number, Field(gt=0, le=1e6, examples=[8])]
    """The largest shift along each axis."""
    unit: Literal["pixels", "metres"] = "pixels"
    """Pixels of the reference grid, or metres, which needs scenes with a CRS."""
    modalities: Annotated[tuple[Name, ...] | None, Field(min_length=1, max_length=64)] = None
    """Those that are moved; left out: all but the first."""

    def _problems(self) -> Iterator[Problem]:
        if self.unit == "pixels" and self.max_shift > LARGEST_SHIFT:
            yield Problem("max_shift", f"= {self.max_shift:g} must be at most {LARGEST_SHIFT} pixels")


class _AnyFusion(Section):
    """Keys of every fusion of features or answers."""

    name: str
    coregister: CoregisterSection | None = None
    """Moves modalities onto the first before they meet."""


class StackFusion(Section):
    """The bands of all modalities as one image: a pixel counts where all of them are valid."""

    name: Literal["stack"]


class LinearFusion(_AnyFusion):
    """Features are put side by side, added, or averaged with learned weights."""

    name: Literal["linear"]
    op: Literal["concat", "sum", "weighted"] = "weighted"
    at: Annotated[
        Literal["all", "last"]
        | Annotated[tuple[Annotated[Whole, Field(ge=1, le=MOST_BLOCKS)], ...], Field(min_length=1, max_length=64)],
        BeforeValidator(_all_last_or_numbers),
    ] = "all"
    """Which of the encoder's maps are fused and handed to the decoder, numbers from 1 (shallow)."""

    def _problems(self) -> Iterator[Problem]:
        if not isinstance(self.at, str) and any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            yield Problem("at", f"= {show(list(self.at))} must rise from shallow to deep; try {sorted(set(self.at))}")


class RefineSection(Section):
    """Scores are smoothed along the edges of a modality."""

    guide: Name
    """The modality, such as an elevation model."""
    iterations: Annotated[Whole, Field(ge=1, le=100)] = 5
    """How often; each reaches 4 pixels further."""


class DecisionFusion(_AnyFusion):
    """Each modality has a decoder of its own, and their answers are joined pixel by pixel."""

    name: Literal["decision"]
    op: Literal["mean", "weighted", "product"] = "mean"
    """Mean of the probabilities, with learned weights of classes, or product of experts."""
    refine: RefineSection | None = None


class AttentionFusion(_AnyFusion):
    """Cells of one modality look at those of the others, in windows."""

    name: Literal["attention"]
    mode: Literal["single", "mutual"] = "mutual"
    """One modality asks the others, or each asks all others."""
    query: Name | None = None
    """With mode single: who asks; left out: the first."""
    window: Annotated[Whole, Field(ge=1, le=256)] = 8
    """Cells of the feature map a side."""
    width: Width = 64
    heads: Annotated[Whole, Field(ge=1, le=128)] = 4

    def _problems(self) -> Iterator[Problem]:
        if self.query is not None and self.mode == "mutual":
            yield Problem("query", "is not used by mode mutual, where each modality asks; drop it")
        if self.width % self.heads:
            yield Problem("width", f"= {self.width} must be a multiple of heads = {self.heads}")


class SeFusion(_AnyFusion):
    """Each modality weighs its own channels, then all are added."""

    name: Literal["se"]
    reduction: Annotated[Whole, Field(ge=1, le=1024)] = 16
    """The inner layer has channels / reduction numbers."""


class GatedFusion(_AnyFusion):
    """At each cell a number from 0 to 1 says how much of a modality passes."""

    name: Literal["gated"]
    mode: Literal["independent", "complementary", "cross"] = "complementary"
    """By own features; shares that sum to 1; by the others' features."""


class ReconstructionFusion(_AnyFusion):
    """A weighted mean; in training small decoders must rebuild features from others."""

    name: Literal["reconstruction"]
    mode: Literal["self", "cross"] = "cross"
    """Own features from the fused ones, or a modality's from another's."""
    weight: Annotated[Number, Field(gt=0)] = 0.1
    """Of this loss beside that of the labels."""
    width: Width = 64
    recover: Annotated[bool, Field(strict=True)] = False
    """Keep the decoders (mode cross), so that they stand in for a missing modality."""

    def _problems(self) -> Iterator[Problem]:
        if self.recover and self.mode == "self":
            yield Problem("recover", "= true needs mode: cross, which rebuilds a modality from others")


class AlignmentFusion(_AnyFusion):
    """The mean of the modalities; in training a loss draws their features together."""

    name: Literal["alignment"]
    by: Literal["contrastive", "mmd", "coral", "projection"] = "contrastive"
    weight: Annotated[Number, Field(gt=0)] = 0.1
    """Of this loss beside that of the labels."""
    width: Width = 64
    temperature: Annotated[Number, Field(gt=0)] = 0.1


FusedSection = (
    LinearFusion | DecisionFusion | AttentionFusion | SeFusion | GatedFusion | ReconstructionFusion | AlignmentFusion
)
FusionSection = Annotated[StackFusion | FusedSection, Field(discriminator="name")]


class SideEncoderSection(Section):
    """A small encoder that learns from nothing: `conv`, or `spectral` for images of many bands."""

    name: Literal["conv", "spectral"]
    width: Annotated[Whole, Field(ge=4, le=1024)] = 32
    """Channels of its first layer; the last has four times as many."""
