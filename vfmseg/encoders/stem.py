"""From C bands to the three that published encoders were trained with.

Input is normalised and padded to whole patches; output is (B, 3, H, W) for the published patch kernel and, where
bands are left over, (B, N, D) to add to the patch tokens. At the start nothing is added, so training begins from what
the encoder makes of the first three bands.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Published(nn.Module):
    """Three bands, as published: nothing to do."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> the same, None."""
        return pixels, None


class Widen(nn.Module):
    """Bands beyond the third get a patch kernel of their own, zero at the start; one or two bands are repeated."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.extra: nn.Conv2d | None = None
        if in_channels > 3:
            self.extra = nn.Conv2d(in_channels - 3, width, patch, stride=patch, bias=False)
            nn.init.zeros_(self.extra.weight)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> (B, 3, H, W) and (B, N, D) of the other bands, or None."""
        bands = pixels.shape[1]
        if bands == 1:
            return pixels.expand(-1, 3, -1, -1), None
        if bands == 2:
            return torch.cat([pixels, pixels.mean(dim=1, keepdim=True)], dim=1), None
        if self.extra is None:
            return pixels, None
        return pixels[:, :3], self.extra(pixels[:, 3:]).flatten(2).transpose(1, 2)


class Project(nn.Module):
    """A trainable 1x1 convolution from C bands to three; at the start it passes the first three (or repeats)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        # no bias: invalid pixels are zero and must stay zero
        self.mix = nn.Conv2d(in_channels, 3, 1, bias=False)
        start = torch.zeros(3, in_channels)
        for row in range(3):
            if row < in_channels:
                start[row, row] = 1.0
            else:
                start[row] = 1.0 / in_channels  # a missing band is the mean of those there
        with torch.no_grad():
            self.mix.weight.copy_(start[:, :, None, None])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> (B, 3, H, W), None."""
        return self.mix(pixels), None
