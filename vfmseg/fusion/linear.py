"""Linear fusion: features are put side by side, added, or averaged with learned weights, at one level or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vfmseg.encoders.tokens import Features
from vfmseg.errors import RecipeError, show
from vfmseg.fusion.contract import Fusion, Voices, fused_features, weighted_mean


class Linear(Fusion):
    """`concat`: a 1 x 1 convolution of all streams side by side; `sum`; `weighted`: a mean with learned weights.

    At the start `concat` and `weighted` are the mean of the streams.
    """

    def __init__(
        self,
        streams: Sequence[str],
        channels: Sequence[int],
        op: Literal["concat", "sum", "weighted"],
        at: Literal["all", "last"] | Sequence[int],
    ) -> None:
        """`at`: which maps are fused and handed on, numbers from 1 (shallow): [4] of four maps is the same as `last`.

        RecipeError for a number beyond the maps.
        """
        super().__init__(streams, channels, levels_of(at, len(channels)))
        self.op = op
        self.voices = None if op == "concat" else Voices(streams, self.channels)
        self.mixing = nn.ModuleList(SideBySide(streams, c) for c in self.channels) if op == "concat" else None
        # a weight for each stream, level and channel: the softmax over the streams of these numbers
        self.weights = (
            nn.ParameterList(torch.zeros(len(streams), c) for c in self.channels) if op == "weighted" else None
        )

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: features} -> features of the fused levels."""
        maps = [self._level(found, number, level) for number, level in enumerate(self.levels)]
        return fused_features(maps, found, self.levels)

    def _level(self, found: Mapping[str, Features], number: int, level: int) -> Tensor:
        if self.mixing is not None:
            joined: Tensor = self.mixing[number](found, level)
            return joined
        assert self.voices is not None
        values = torch.stack([self.voices(name, number, f.maps[level]) for name, f in found.items()])
        seen = torch.stack([f.seen[level] for f in found.values()])[:, :, None]  # (S, B, 1, h, w)
        if self.weights is None:
            return (values * seen).sum(dim=0)
        rows = [self.streams.index(name) for name in found]
        shares = self.weights[number][rows].softmax(dim=0)[:, None, :, None, None]
        return weighted_mean(values, shares * seen)


class SideBySide(nn.Module):
    """A 1 x 1 convolution of the maps of all streams and of what they have seen; starts as their mean."""

    def __init__(self, streams: Sequence[str], width: int) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.mix = nn.Conv2d(len(streams) * (width + 1), width, 1)
        start = torch.cat([torch.eye(width) / len(streams)] * len(streams) + [torch.zeros(width, len(streams))], dim=1)
        with torch.no_grad():
            self.mix.weight.copy_(start[:, :, None, None])
            nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, found: Mapping[str, Features], level: int) -> Tensor:
        """(B, D, h, w); what is missing or unseen enters as zeros, and the convolution is told so."""
        some = next(iter(found.values()))
        nothing = torch.zeros_like(some.maps[level]), torch.zeros_like(some.seen[level])
        pairs = [
            (found[name].maps[level], found[name].seen[level]) if name in found else nothing for name in self.streams
        ]
        values = [values * seen[:, None] for values, seen in pairs]
        mixed: Tensor = self.mix(torch.cat([*values, torch.stack([seen for _, seen in pairs], dim=1)], dim=1))
        return mixed


def levels_of(at: Literal["all", "last"] | Sequence[int], count: int) -> tuple[int, ...]:
    """Numbers from 0 of the maps that `at` names among `count`.

    RecipeError if there are not as many, or the deepest is not among them.
    """
    if at == "all":
        return tuple(range(count))
    if at == "last":
        return (count - 1,)
    assert not isinstance(at, str)
    if max(at) < count:
        raise RecipeError(
            f"model.fusion.at = {show(list(at))} leaves out map {count}, the deepest: the encoder would run its last "
            "blocks for nothing; let model.encoder.layers end at the last map that is wanted"
        )
    if max(at) > count:
        raise RecipeError(
            f"model.fusion.at = {show(list(at))} names map {max(at)}, but model.encoder.layers gives {count}; "
            "expected numbers from 1 (shallow) up to that"
        )
    return tuple(number - 1 for number in at)
