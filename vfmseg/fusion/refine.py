"""Smoothing of class scores along the edges of a guide image, so that a map follows a roof's edge in the elevation.

Each step replaces the scores of a pixel by a mean over neighbours, weighted by how alike they are in the guide
(pixel-adaptive mean-field refinement, Araslanov and Roth 2020, with one learned number: how alike is alike).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DILATIONS = (1, 2, 4)
"""Neighbours are those of a 3 x 3 square, pulled apart by these steps: 25 with the pixel itself."""


class Refine(nn.Module):
    """Scores (B, K, H, W), smoothed where the guide is smooth."""

    def __init__(self, guide: str, iterations: int) -> None:
        """`guide`: the stream whose normalised pixels guide; `iterations`: how often; each reaches 4 pixels further."""
        super().__init__()
        self.guide = guide
        self.iterations = iterations
        self.log_width = nn.Parameter(torch.tensor(-1.0))  # width e^-1 = 0.37 standard deviations of the guide

    def forward(self, scores: Tensor, guide: Tensor, valid: Tensor) -> Tensor:
        """`guide` (B, C, H, W) normalised, `valid` bool (B, H, W): an invalid pixel gives and takes nothing."""
        weights = self._weights(guide.float(), valid)
        for _ in range(self.iterations):
            scores = (neighbours(scores) * weights[:, :, None]).sum(dim=1)
        return scores

    def _weights(self, guide: Tensor, valid: Tensor) -> Tensor:
        """(B, N, H, W): the share of each neighbour; they sum to 1, and an invalid pixel keeps what it has."""
        around, mask = neighbours(guide), neighbours(valid[:, None].to(guide.dtype))[:, :, 0] > 0
        distance = (around - guide[:, None]).square().mean(dim=2)
        likeness = -distance / (2 * (2 * self.log_width).exp())
        open_ = mask & valid[:, None]
        open_ = torch.cat([torch.ones_like(open_[:, :1]), open_[:, 1:]], dim=1)  # the pixel itself comes first
        return likeness.masked_fill(~open_, -torch.inf).softmax(dim=1)


def neighbours(values: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C, H, W): the pixel itself, then its neighbours; 0 beyond the image."""
    height, width = values.shape[-2:]
    found = [values]
    for step in DILATIONS:
        padded = F.pad(values, (step, step, step, step))
        for row in (-step, 0, step):
            for col in (-step, 0, step):
                if row or col:
                    found.append(padded[..., step + row : step + row + height, step + col : step + col + width])
    return torch.stack(found, dim=1)
