"""Fusion with alignment: a loss brings the features of the streams together before they are averaged.

`contrastive`: cells of one place are a pair, cells of other places of the image are not (InfoNCE, van den Oord 2018).
`mmd`: maximum mean discrepancy with Gaussian kernels (Gretton et al. 2012). `coral`: equal covariances (Sun and Saenko
2016). `projection`: cells of one place shall be alike after one projection that all streams share (mean cosine).

mmd and coral compare samples, whatever is where: their projection is one of random numbers that does not learn, as one
that did would look away from what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.encoders.tokens import Features
from vfmseg.fusion.contract import Fusion, Voices, fused_features, weighted_mean

MOST_CELLS = 256
"""Of an image that are compared, spread evenly over those seen by both: the loss takes their square in memory."""


class Alignment(Fusion):
    """The mean of the streams after a scale and shift of each; in training they are drawn together as `by` says."""

    def __init__(
        self,
        streams: Sequence[str],
        channels: Sequence[int],
        by: Literal["contrastive", "mmd", "coral", "projection"],
        width: int,
        temperature: float,
    ) -> None:
        """`width`: channels in which streams are compared; `temperature` of the contrastive loss."""
        super().__init__(streams, channels)
        self.by = by
        self.temperature = temperature
        self.voices = Voices(streams, self.channels)
        shared = by in ("projection", "mmd", "coral")
        names = ["shared"] if shared else [f"of_{name}" for name in streams]
        self.auxiliary = nn.ModuleDict({name: nn.Conv2d(self.channels[-1], width, 1) for name in names})
        self.auxiliary.requires_grad_(by not in ("mmd", "coral"))

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: features} -> features of the same shapes."""
        maps = []
        for level in self.levels:
            values = torch.stack([self.voices(name, level, f.maps[level]) for name, f in found.items()])
            maps.append(weighted_mean(values, torch.stack([f.seen[level] for f in found.values()])[:, :, None]))
        return fused_features(maps, found, self.levels)

    def terms(self, found: Mapping[str, Features], fused: Features) -> dict[str, Tensor]:
        """`alignment`: (B,) mean over the pairs of streams of the loss between them, at the deepest level.

        Pairs with a missing stream count as 0, as those with one that has seen nothing.
        """
        level = self.levels[-1]
        projected = self.projected(found)
        losses = []
        for one, two in combinations(found, 2):
            both = (found[one].seen[level] >= 1) & (found[two].seen[level] >= 1)
            # distances of rows that are nearly alike are lost in half precision
            with torch.autocast(both.device.type, enabled=False):
                cells = _cells(projected[one].float(), projected[two].float(), both)
                losses.append(torch.stack([self._pair(a, b) for a, b in cells]))
        if not losses:
            return {"alignment": next(iter(found.values())).maps[level].flatten(1).sum(dim=1) * 0.0}
        return {"alignment": torch.stack(losses).sum(dim=0) / comb(len(self.streams), 2)}

    def projected(self, found: Mapping[str, Features]) -> dict[str, Tensor]:
        """{stream: (B, width, h, w)}: the deepest features where streams are compared, of length 1."""
        assert isinstance(self.auxiliary, nn.ModuleDict)
        level, modules = self.levels[-1], self.auxiliary
        layers = {name: modules["shared"] if "shared" in modules else modules[f"of_{name}"] for name in found}
        spoken = {name: self.voices(name, len(self.levels) - 1, f.maps[level]) for name, f in found.items()}
        return {name: F.normalize(layer(spoken[name]), dim=1) for name, layer in layers.items()}

    def _pair(self, one: Tensor, two: Tensor) -> Tensor:
        """Scalar loss of cells (N, width) of two streams, row i of both at one place; 0 with fewer than two cells."""
        if len(one) < 2:
            return (one.sum() + two.sum()) * 0.0
        if self.by == "contrastive":
            return info_nce(one, two, self.temperature)
        if self.by == "mmd":
            return mmd(one, two)
        if self.by == "coral":
            return coral(one, two)
        return (1 - (one * two).sum(dim=1)).mean()


def _cells(one: Tensor, two: Tensor, both: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each image (N, width) of both maps at the places that both have seen, at most MOST_CELLS of them."""
    found = []
    for a, b, mask in zip(one, two, both, strict=True):
        places = mask.flatten().nonzero()[:, 0]
        step = -(-len(places) // MOST_CELLS) or 1
        places = places[::step]
        found.append((a.flatten(1)[:, places].T, b.flatten(1)[:, places].T))
    return found


def info_nce(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding row i of the other among all its rows, both ways; (N, D) of length 1 each."""
    scores = one @ two.T / temperature
    right = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def mmd(one: Tensor, two: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples (N, D) and (M, D), mean of five Gaussian kernels.

    Their widths are 1/4 to 4 times the mean squared distance of all rows. Between equal samples it is 0.
    """
    rows = torch.cat([one, two])
    # not torch.cdist: the gradient of a root is infinite at 0, and each row is at distance 0 of itself
    squares = rows.square().sum(dim=1)
    distance = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=0.0)
    scale = distance.detach().mean().clamp(min=1e-6)
    kernel = torch.stack([torch.exp(-distance / (scale * width)) for width in (0.25, 0.5, 1.0, 2.0, 4.0)]).mean(dim=0)
    n = len(one)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def coral(one: Tensor, two: Tensor) -> Tensor:
    """Mean squared difference of the covariances of two samples (N, D) and (M, D), and of their means."""
    means = one.mean(dim=0), two.mean(dim=0)
    covariances = [(rows - mean).T @ (rows - mean) / len(rows) for rows, mean in zip((one, two), means, strict=True)]
    width = one.shape[1]
    return (covariances[0] - covariances[1]).square().sum() * width / 4 + (means[0] - means[1]).square().mean() * width
