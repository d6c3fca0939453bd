"""Squeeze-and-excitation fusion: each modality weighs its own channels by what is in the tile, then all are added.

The head of MFNet (Ma et al. 2024) does so at each level of its pyramid; here it is at each map that the decoder's
pyramid is made from. Channel attention: Hu et al. 2018, s = sigmoid(W2 relu(W1 z)), z the mean of each channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vfmseg.encoders.tokens import Features
from vfmseg.fusion.contract import Fusion, fused_features, key


class Se(Fusion):
    """The sum over streams of (channel weights x features), where seen."""

    def __init__(self, streams: Sequence[str], channels: Sequence[int], reduction: int) -> None:
        """`reduction`: the inner layer of a gate has channels / reduction numbers, at least 4."""
        super().__init__(streams, channels)
        self.squeeze = nn.ModuleDict(
            {
                key(name, i): nn.Sequential(
                    nn.Linear(c, max(4, c // reduction)), nn.ReLU(), nn.Linear(max(4, c // reduction), c)
                )
                for name in streams
                for i, c in enumerate(self.channels)
            }
        )

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: features} -> features of the same shapes."""
        maps = []
        for level, weights in enumerate(self.weights(found)):
            parts = [
                f.maps[level] * weights[i][:, :, None, None] * f.seen[level][:, None]
                for i, f in enumerate(found.values())
            ]
            maps.append(torch.stack(parts).sum(dim=0))
        return fused_features(maps, found, self.levels)

    def weights(self, found: Mapping[str, Features]) -> list[Tensor]:
        """For each level (S, B, D): the weight of each channel of the streams that are there, above 0 and below 1."""
        return [
            torch.stack([torch.sigmoid(self.squeeze[key(name, i)](seen_mean(f, i))) for name, f in found.items()])
            for i in self.levels
        ]


def seen_mean(features: Features, level: int) -> Tensor:
    """(B, D): the mean of each channel over what was seen, 0 where that is nothing."""
    weights = features.seen[level][:, None]
    total = weights.sum(dim=(2, 3))
    return (features.maps[level] * weights).sum(dim=(2, 3)) / torch.where(total > 0, total, 1.0)
