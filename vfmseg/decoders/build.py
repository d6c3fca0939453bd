"""Decoders by name."""

from __future__ import annotations

from torch import nn

from vfmseg.decoders.fpn import Fpn
from vfmseg.decoders.linear import Linear
from vfmseg.decoders.upernet import UperNet
from vfmseg.errors import RecipeError, nearest

WITHOUT_WIDTH: dict[str, type[Linear]] = {"linear": Linear}
WITH_WIDTH: dict[str, type[Fpn] | type[UperNet]] = {"fpn": Fpn, "upernet": UperNet}
DECODERS: dict[str, type[nn.Module]] = {**WITHOUT_WIDTH, **WITH_WIDTH}
CHANNELS = 128  # the width where none is given


def build_decoder(
    name: str, in_channels: tuple[int, ...], strides: tuple[float, ...], classes: int, channels: int | None = None
) -> nn.Module:
    """A decoder for features of these channels and strides (shallow to deep), answering with `classes` logits.

    `channels` is the width of `fpn` and `upernet` (None: 128); `linear` has none. Raises RecipeError for an unknown
    name, a width below 8, or a width that the decoder cannot use.
    """
    if name not in DECODERS:
        raise RecipeError(f"model.decoder.name = {name} is not a decoder; {nearest(name, DECODERS)}")
    if not in_channels or len(in_channels) != len(strides):
        raise ValueError(
            f"{len(in_channels)} channels and {len(strides)} strides of maps; expected as many, at least 1"
        )
    if name in WITHOUT_WIDTH:
        if channels is not None:
            raise RecipeError(f"model.decoder.channels = {channels} is not used by {name}; leave it out")
        return WITHOUT_WIDTH[name](in_channels, strides, classes)
    width = CHANNELS if channels is None else channels
    if width < 8:
        raise RecipeError(f"model.decoder.channels = {width}; expected at least 8; try {CHANNELS}")
    return WITH_WIDTH[name](in_channels, strides, classes, width)
