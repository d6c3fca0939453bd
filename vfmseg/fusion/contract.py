"""What a fusion of features is, and the two sums that most of them are made of.

Streams that share one frozen backbone answer in one language: the sum of its answers to two images could not tell which
of them said what. So each stream has a scale and a shift of its own for every channel (`Voices`) before it is joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vfmseg.data.image import Known
from vfmseg.encoders.tokens import Features


class Fusion(nn.Module):
    """Joins the features of streams that lie on one grid. A mechanism is a subclass with a `forward`."""

    known: Known = "any"
    """Which pixels get a label: where any modality is valid, or only where all are."""

    auxiliary: nn.Module | None
    """Parts that only training uses: they are not saved, and cost nothing in prediction."""

    def __init__(self, streams: Sequence[str], channels: Sequence[int], levels: Sequence[int] | None = None) -> None:
        """`channels` of each map of a stream, shallow to deep; `levels`: numbers (from 0) of those that are handed on.

        All are, if `levels` is left out.
        """
        super().__init__()
        self.streams = tuple(streams)
        self.levels = tuple(range(len(channels))) if levels is None else tuple(levels)
        self.channels = tuple(channels[level] for level in self.levels)
        self.auxiliary = None

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: its features} of any of the streams, at least one -> maps of `levels`, each as large as theirs.

        What a stream has not seen (`seen` is 0 there) changes nothing, and a stream that has seen nothing is as good
        as one that is missing.
        """
        raise NotImplementedError

    def terms(self, found: Mapping[str, Features], fused: Features) -> dict[str, Tensor]:
        """{name: (B,) losses, one an image} that training adds to those of the labels; none for most fusions."""
        return {}


class Voices(nn.Module):
    """A scale and a shift for each channel of each stream and level; at the start they change nothing."""

    def __init__(self, streams: Sequence[str], channels: Sequence[int]) -> None:
        super().__init__()
        self.scale = nn.ParameterDict({key(s, i): torch.ones(c) for s in streams for i, c in enumerate(channels)})
        self.shift = nn.ParameterDict({key(s, i): torch.zeros(c) for s in streams for i, c in enumerate(channels)})

    def forward(self, stream: str, level: int, values: Tensor) -> Tensor:
        """(B, D, h, w) -> the same shape; `level` counts the channels that it was made with."""
        name = key(stream, level)
        return values * self.scale[name][:, None, None] + self.shift[name][:, None, None]


def key(stream: str, level: int) -> str:
    """A name for tensors of a stream and level. A modality may be called like something that every module has."""
    return f"of_{stream}_{level}"


def joined_seen(found: Mapping[str, Features], level: int) -> Tensor:
    """(B, h, w): the share of each cell that the stream with the largest share has seen."""
    return torch.stack([features.seen[level] for features in found.values()]).amax(dim=0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """(S, B, D, h, w) and weights of at least 0, broadcast to it -> (B, D, h, w), 0 where all weights are 0."""
    total = weights.sum(dim=0)
    return (values * weights).sum(dim=0) / torch.where(total > 0, total, 1.0)


def fused_features(maps: Sequence[Tensor], found: Mapping[str, Features], levels: Sequence[int]) -> Features:
    """Features of fused maps, one for each of `levels`."""
    first = next(iter(found.values()))
    seen = tuple(joined_seen(found, level) for level in levels)
    return Features(tuple(maps), seen, tuple(first.strides[level] for level in levels))
