"""UPerNet: a feature pyramid whose top also sees the whole tile."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.decoders.pyramid import LEVELS, Pyramid, add_downwards, convolution
from vfmseg.encoders.tokens import Features

POOLS = (1, 2, 3, 6)  # cells a side of the pooled grids


class PooledContext(nn.Module):
    """Pyramid pooling: the map joined with its own averages over grids of 1, 2, 3 and 6 cells a side (PSPNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // len(POOLS))
        # one group: the coarsest grid is a single cell, where smaller groups would leave little to normalise
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, narrow, 1, bias=False), nn.GroupNorm(1, narrow), nn.GELU()) for _ in POOLS
        )
        self.join = convolution(channels + len(POOLS) * narrow, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        pooled = [
            F.interpolate(reduce(F.adaptive_avg_pool2d(x, cells)), size=x.shape[-2:], mode="bilinear")
            for cells, reduce in zip(POOLS, self.reduce, strict=True)
        ]
        return self.join(torch.cat([x, *pooled], dim=1))


class UperNet(nn.Module):
    """Pyramid pooling on the coarsest level, a top-down path, and all levels fused on the finest grid.

    After Xiao et al., Unified Perceptual Parsing, 2018, with GroupNorm. The fusion is a 1x1 convolution of the joined
    levels and one 3x3 convolution: a quarter of the work of a 3x3 convolution of all of them.
    """

    def __init__(
        self, in_channels: tuple[int, ...], strides: tuple[float, ...], classes: int, channels: int = 128
    ) -> None:
        super().__init__()
        self.stride = strides[0] / 4  # pixels of the input image per cell of the logits
        self.pyramid = Pyramid(in_channels, channels)
        self.context = PooledContext(channels)
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in range(LEVELS - 2))
        self.join = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(LEVELS))
        self.fuse = convolution(channels, channels, 3)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, K, 4h, 4w) for a first map of h x w cells."""
        levels = self.pyramid(features.maps)
        levels = add_downwards([*levels[:-1], self.context(levels[-1])])
        # the finest level is left to the fusion, the coarsest is smooth already
        smooth = [smooth(level) for smooth, level in zip(self.smooth, levels[1:-1], strict=True)]
        # A 1x1 convolution of joined, enlarged levels is the sum of one of each level before it is enlarged: cheaper.
        joined = [join(level) for join, level in zip(self.join, [levels[0], *smooth, levels[-1]], strict=True)]
        return self.classify(self.fuse(add_downwards(joined)[0]))
