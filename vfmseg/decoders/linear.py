"""The smallest decoder: one linear map of the features of each cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfmseg.decoders.pyramid import on_one_grid
from vfmseg.encoders.tokens import Features


class Linear(nn.Module):
    """All maps on the grid of the first, each cell normalised over its channels, then one 1x1 convolution.

    A cell's logits depend on that cell's features alone.
    """

    def __init__(self, in_channels: tuple[int, ...], strides: tuple[float, ...], classes: int) -> None:
        super().__init__()
        self.stride = strides[0]  # pixels of the input image per cell of the logits
        self.norm = nn.LayerNorm(sum(in_channels))
        self.classify = nn.Linear(sum(in_channels), classes)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, K, h, w) on the grid of the first map."""
        x = torch.cat(on_one_grid(features.maps), dim=1)  # (B, sum of D_i, h, w)
        return self.classify(self.norm(x.movedim(1, -1))).movedim(-1, 1)
