"""The `model` section: encoder, adapter, fusion and decoder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model

from vfmseg.catalog import CATALOG, FAMILIES, PUBLISHED_FAMILIES
from vfmseg.errors import show
from vfmseg.recipe.base import (
    LARGEST_WIDTH,
    MOST_BLOCKS,
    LocalOrHub,
    Name,
    Number,
    Problem,
    RecipePath,
    Section,
    Whole,
)
from vfmseg.recipe.fusion import FusedSection, FusionSection, SideEncoderSection, StackFusion

LARGEST_UPSCALE = 16.0  # of an image: it then takes 256 times the memory


Layers = Annotated[
    tuple[Annotated[Whole, Field(ge=1, le=MOST_BLOCKS)], ...] | None,
    Field(min_length=1, max_length=MOST_BLOCKS, examples=[[3, 6, 9, 12]]),
]


class _AnyEncoder(Section):
    """Keys of every encoder."""

    name: str
    layers: Layers = None
    """Blocks whose outputs the decoder gets, counted from 1; left out: the four quarter points."""
    upscale: Annotated[Number, Field(gt=0, le=LARGEST_UPSCALE)] = 1.0
    """The image is enlarged by this factor before the encoder: finer tokens for small objects, at a price."""
    input: Literal["widen", "project"] | None = None
    """How other than three bands enter the published weights."""

    def _problems(self) -> Iterator[Problem]:
        if self.layers and any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            suggestion = sorted(set(self.layers))
            yield Problem("layers", f"= {show(self.layers)} must rise from shallow to deep; try {show(suggestion)}")


class PublishedEncoder(_AnyEncoder):
    """Keys of the encoders with published weights; each family of the catalog has a section of its own name."""

    name: str
    checkpoint: LocalOrHub
    """Hub id, or a folder beside the recipe."""
    revision: Name | None = None
    """Branch, tag or commit of the hub id."""

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if self.revision and os.path.isabs(self.checkpoint):
            yield Problem("revision", f"is not used: {self.checkpoint} is no hub id; drop it")
        row = CATALOG.get(self.checkpoint)
        if row is None:
            return
        if row.family != self.name:
            yield Problem("checkpoint", f"= '{self.checkpoint}' is a {row.family} checkpoint; set name: {row.family}")
        elif self.layers and self.layers[-1] > row.depth:
            yield Problem("layers", f"= {show(self.layers)} reaches beyond the {row.depth} blocks of {self.checkpoint}")


def _section_of(family: str) -> type[PublishedEncoder]:
    """The section of one family: `name` is its own, and an example of a checkpoint is one of its."""
    checkpoint = next((row.checkpoint for row in CATALOG.values() if row.family == family), f"owner/{family}")
    about = PublishedEncoder.model_fields["checkpoint"].description
    return create_model(
        f"{family.capitalize()}Encoder",
        __base__=PublishedEncoder,
        __doc__=FAMILIES[family].about,
        name=(Literal[family], ...),  # type: ignore[arg-type]
        checkpoint=(LocalOrHub, Field(examples=[checkpoint], description=about)),
    )


class BuiltinEncoder(_AnyEncoder):
    """A small pretrained ViT that comes with the package; nothing is downloaded."""

    name: Literal["builtin"]
    checkpoint: ClassVar[None] = None  # as of the others: None stands for the one in the package
    revision: ClassVar[None] = None


class NewEncoder(Section):
    """A ViT in the layout of DINOv2, from random numbers. Its files are read as `{name: dinov2, checkpoint: ...}`."""

    name: Literal["new"]
    patch: Annotated[Whole, Field(ge=4, le=64)] = 14
    """Pixels a side of a patch."""
    width: Annotated[Whole, Field(ge=16, le=LARGEST_WIDTH)] = 256
    """Channels of a token."""
    depth: Annotated[Whole, Field(ge=1, le=MOST_BLOCKS)] = 8
    """Blocks."""
    heads: Annotated[Whole, Field(ge=1, le=128)] = 4
    """Of attention; the width is a multiple of them."""
    layers: Layers = None
    """Blocks whose tokens learn from a teacher, counted from 1; left out: the four quarter points."""

    def _problems(self) -> Iterator[Problem]:
        if self.width % self.heads:
            yield Problem("width", f"= {self.width} must be a multiple of heads = {self.heads}")


Targets = Annotated[tuple[Literal["q", "k", "v", "o", "mlp"], ...], Field(min_length=1, max_length=5)]


class _AnyAdapter(Section):
    """What every adapter has."""

    def settings(self) -> dict[str, Any]:
        """How it is put into an encoder: all of its keys but its name and what it starts from."""
        return self.model_dump(exclude={"name", "start"})


class NoAdapter(_AnyAdapter):
    """The encoder stays as published; only the decoder learns."""

    name: Literal["none"] = "none"


class FullAdapter(_AnyAdapter):
    """The whole encoder learns."""

    name: Literal["full"]


class LoraAdapter(_AnyAdapter):
    """Low-rank updates beside the frozen linear layers of the encoder."""

    name: Literal["lora"]
    rank: Annotated[Whole, Field(ge=1, le=LARGEST_WIDTH)] = 8
    alpha: Annotated[Number, Field(gt=0)] = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Targets = ("q", "v")
    """Which layers of each block: query, key, value, output of the attention, mlp."""
    start: Annotated[RecipePath | None, Field(examples=["runs/continual/best"])] = None
    """Folder of `vfmseg pretrain`, from whose LoRA of the same encoder this one starts; left out: from no change."""

    def _problems(self) -> Iterator[Problem]:
        if len(set(self.targets)) < len(self.targets):
            yield Problem("targets", f"= {show(self.targets)} must name each target once")


class BottleneckAdapter(_AnyAdapter):
    """A small trainable MLP beside the MLP of each block."""

    name: Literal["adapter"]
    hidden: Annotated[Whole, Field(ge=1, le=LARGEST_WIDTH)] = 64
    """Width of the bottleneck."""
    scale: Annotated[Number, Field(gt=0)] = 0.1
    """Factor on its output."""


class MmLoraAdapter(_AnyAdapter):
    """Low-rank updates for each modality, mixed in the MLP of each block."""

    name: Literal["mm_lora"]
    rank: Annotated[Whole, Field(ge=1, le=LARGEST_WIDTH)] = 4
    alpha: Annotated[Number | None, Field(gt=0)] = None
    """The update is scaled by alpha / rank; left out: by 1."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Targets = ("q", "v", "mlp")
    """Which layers of each block: query, key, value, output of the attention, mlp."""
    mix: Annotated[bool, Field(strict=True)] = True
    """Modalities learn of each other in the mlp; false: each has its own updates alone."""

    def _problems(self) -> Iterator[Problem]:
        if len(set(self.targets)) < len(self.targets):
            yield Problem("targets", f"= {show(self.targets)} must name each target once")


class MmAdapter(_AnyAdapter):
    """Small trainable MLPs for each modality after the attention and beside the MLP of each block, there mixed."""

    name: Literal["mm_adapter"]
    ratio: Annotated[Number, Field(gt=0, le=4)] = 0.25
    """Width of the bottlenecks as a share of the encoder's."""


class LinearDecoder(Section):
    """One linear layer on the features."""

    name: Literal["linear"]


class FpnDecoder(Section):
    """A simple feature pyramid."""

    name: Literal["fpn"]
    channels: Annotated[Whole, Field(ge=1, le=LARGEST_WIDTH)] = 128


class UpernetDecoder(Section):
    """Pyramid pooling and feature pyramid."""

    name: Literal["upernet"]
    channels: Annotated[Whole, Field(ge=1, le=LARGEST_WIDTH)] = 128


if TYPE_CHECKING:
    EncoderSection = PublishedEncoder | BuiltinEncoder
    OwnEncoderSection = EncoderSection | SideEncoderSection
    PretrainedEncoder = EncoderSection | NewEncoder
else:
    _sections = {section.__name__: section for section in map(_section_of, PUBLISHED_FAMILIES)}
    globals().update(_sections)  # pickle looks a class up by its name in the module
    _with_weights = (*_sections.values(), BuiltinEncoder)
    EncoderSection = Annotated[reduce(or_, _with_weights), Field(discriminator="name")]
    OwnEncoderSection = Annotated[reduce(or_, (*_with_weights, SideEncoderSection)), Field(discriminator="name")]
    PretrainedEncoder = Annotated[reduce(or_, (*_with_weights, NewEncoder)), Field(discriminator="name")]
AdapterSection = Annotated[
    NoAdapter | FullAdapter | LoraAdapter | BottleneckAdapter | MmLoraAdapter | MmAdapter, Field(discriminator="name")
]
OwnAdapterSection = Annotated[NoAdapter | LoraAdapter | BottleneckAdapter, Field(discriminator="name")]
DecoderSection = Annotated[LinearDecoder | FpnDecoder | UpernetDecoder, Field(discriminator="name")]


class StreamSection(Section):
    """What a modality has of its own."""

    encoder: Annotated[OwnEncoderSection, Field(examples=[{"name": "conv"}])]
    """Instead of model.encoder: a small one that learns, or a published one that stays frozen."""
    adapter: Annotated[OwnAdapterSection | None, Field(examples=[{"name": "lora"}])] = None
    """What of a published one learns; left out: as model.adapter if that is none, lora or adapter, else none."""

    def _problems(self) -> Iterator[Problem]:
        if self.adapter is not None and isinstance(self.encoder, SideEncoderSection):
            yield Problem(
                "adapter",
                f"= '{self.adapter.name}' is not used: the {self.encoder.name} encoder learns as a whole; drop it",
            )


class ModelSection(Section):
    """Encoder, adapter, fusion and decoder."""

    encoder: Annotated[EncoderSection, Field(examples=[{"name": "dinov2", "checkpoint": "facebook/dinov2-small"}])]
    adapter: Annotated[AdapterSection, Field(examples=[{"name": "lora"}])] = NoAdapter()
    """What of the encoder learns."""
    modalities: dict[str, StreamSection] = Field(
        default_factory=dict, examples=[{"dem": {"encoder": {"name": "conv"}}}]
    )
    """What a modality has of its own; what is not said is as for all."""
    fusion: Annotated[FusionSection | None, Field(examples=[{"name": "gated"}])] = None
    """How several modalities meet; "stack" if left out."""
    decoder: Annotated[DecoderSection, Field(examples=[{"name": "fpn"}])]

    @property
    def joins(self) -> FusedSection | None:
        """The fusion, if several streams meet in it behind the encoder; None where there is one stream."""
        return None if isinstance(self.fusion, StackFusion) else self.fusion

    @property
    def own_encoders(self) -> dict[str, EncoderSection]:
        """{modality: its section}, of those with a pretrained encoder of their own."""
        found = {name: own.encoder for name, own in self.modalities.items()}
        return {name: one for name, one in found.items() if not isinstance(one, SideEncoderSection)}

    def adapter_of(self, modality: str) -> NoAdapter | LoraAdapter | BottleneckAdapter:
        """What of a published encoder of its own learns; the adapters of the shared encoder alone pass to none."""
        said = self.modalities[modality].adapter or self.adapter
        if said is self.adapter and isinstance(said, LoraAdapter):
            said = said.model_copy(update={"start": None})  # which was trained in the shared encoder
        return said if isinstance(said, NoAdapter | LoraAdapter | BottleneckAdapter) else NoAdapter()
