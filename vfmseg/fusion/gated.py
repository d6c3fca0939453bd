"""Gated fusion: at each cell a number from 0 to 1 says how much of a stream passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vfmseg.encoders.tokens import Features
from vfmseg.fusion.contract import Fusion, Voices, fused_features, key, weighted_mean


class Gated(Fusion):
    """The sum of the streams, each times its gate.

    `independent`: g = sigmoid(own features). `cross`: g = sigmoid(mean of the others' features), 1 where no other has
    seen anything. `complementary`: g = softmax over the streams of numbers from own and merged features; they sum to 1
    at each cell (with two streams g and 1 - g), as in CMGFNet (Hosseinpour et al. 2022) and its kin. A gate is 0 where
    its stream has seen nothing, and in proportion to the share that it has seen.
    """

    def __init__(
        self,
        streams: Sequence[str],
        channels: Sequence[int],
        mode: Literal["independent", "complementary", "cross"],
    ) -> None:
        super().__init__(streams, channels)
        self.mode = mode
        self.voices = Voices(streams, self.channels)
        names = [(key(name, i), c) for name in streams for i, c in enumerate(self.channels)]
        self.own = _gates(names) if mode != "cross" else None
        self.others = _gates(names) if mode != "independent" else None

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: features} -> features of the same shapes."""
        maps = []
        for level, gates in enumerate(self.gates(found)):
            values = torch.stack([self.voices(name, level, f.maps[level]) for name, f in found.items()])
            maps.append((values * gates[:, :, None]).sum(dim=0))
        return fused_features(maps, found, self.levels)

    def gates(self, found: Mapping[str, Features]) -> list[Tensor]:
        """For each level (S, B, h, w): the gate of each of the streams that are there, 0 to 1."""
        return [self._gates(found, level) for level in self.levels]

    def _gates(self, found: Mapping[str, Features], level: int) -> Tensor:
        values = torch.stack([f.maps[level] for f in found.values()])  # (S, B, D, h, w)
        seen = torch.stack([f.seen[level] for f in found.values()])  # (S, B, h, w)
        if self.mode == "independent":
            return torch.sigmoid(self._asked(self.own, found, level, values)) * seen
        if self.mode == "complementary":
            merged = weighted_mean(values, seen[:, :, None]).expand_as(values)
            wanted = self._asked(self.own, found, level, values) + self._asked(self.others, found, level, merged)
            some = (seen > 0).any(dim=0)
            # in proportion to what was seen; where that is nothing, all are asked, and get nothing
            shares = (wanted + torch.where(some, seen, 1.0).log()).softmax(dim=0)
            return torch.where(some, shares, 0.0)
        # of stream i: the mean of what the streams but i have seen
        others = torch.ones(len(values), len(values), device=values.device).fill_diagonal_(0.0)
        weights = torch.einsum("ij,jbhw->ijbhw", others, seen)
        total = weights.sum(dim=1)
        about = torch.einsum("ijbhw,jbdhw->ibdhw", weights, values) / torch.where(total > 0, total, 1.0)[:, :, None]
        return torch.where(total > 0, torch.sigmoid(self._asked(self.others, found, level, about)), 1.0) * seen

    def _asked(self, gates: nn.ModuleDict | None, found: Mapping[str, Features], level: int, values: Tensor) -> Tensor:
        """(S, B, D, h, w) -> (S, B, h, w): what the gate of each stream says of its part of the values."""
        assert gates is not None
        return torch.stack([gates[key(name, level)](of)[:, 0] for name, of in zip(found, values, strict=True)])


def _gates(names: Sequence[tuple[str, int]]) -> nn.ModuleDict:
    """A 1 x 1 convolution to one number for each name; half open at the start."""
    gates = nn.ModuleDict({name: nn.Conv2d(channels, 1, 1) for name, channels in names})
    for gate in gates.values():
        nn.init.zeros_(gate.weight)  # type: ignore[arg-type]
        nn.init.zeros_(gate.bias)  # type: ignore[arg-type]
    return gates
