"""Small encoders that learn from nothing, for modalities that a published one was not made for.

Their maps lie on the cells of the published encoder's and have its channels, so that any fusion takes both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.image import Images
from vfmseg.encoders.stem import NormalisedBands
from vfmseg.encoders.tokens import Features

CELL = 16
"""Pixels a side of a cell after resampling: four convolutions of stride 2 make it one."""


class SideEncoder(NormalisedBands):
    """Images of one stream -> features (B, D, h, w) on a given grid of cells; everything in it learns."""

    def __init__(
        self,
        modalities: Mapping[str, int],
        mean: Sequence[float],
        std: Sequence[float],
        body: Callable[[int, int], nn.Module],
        width: int,
        channels: Sequence[int],
    ) -> None:
        """`modalities` {name: bands}; `body(bands, width)`: (B, bands, 16 h, 16 w) -> (B, 4 width, h, w).

        `channels` of each map, as the published encoder's.
        """
        super().__init__(modalities, mean, std)
        # one band more: where the others are valid, as a filled-in mean is something else than a measured one
        self.body = body(sum(modalities.values()) + 1, width)
        self.heads = nn.ModuleList(nn.Conv2d(4 * width, count, 1) for count in channels)

    def forward(self, images: Images, cells: tuple[int, int], strides: Sequence[float]) -> Features:
        """`cells`: rows and columns; `strides`: pixels per cell of each map."""
        bands = torch.cat([self.normalised(images), self.valid(images)], dim=1)
        height, width = bands.shape[-2:]
        ground = [max(side, round(count * strides[0])) for side, count in zip((height, width), cells, strict=True)]
        bands = F.pad(bands, (0, ground[1] - width, 0, ground[0] - height))
        size = [count * CELL for count in cells]
        smaller = size[0] < ground[0]
        bands = F.interpolate(bands, size, mode="bilinear", align_corners=False, antialias=smaller)
        seen = F.adaptive_avg_pool2d(bands[:, -1:], cells)[:, 0]
        deep = self.body(bands)
        return Features(tuple(head(deep) for head in self.heads), (seen,) * len(self.heads), tuple(strides))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel: what is in one corner of a tile moves nothing in another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        moved: Tensor = self.norm(values.movedim(1, -1)).movedim(-1, 1)
        return moved


def conv(bands: int, width: int) -> nn.Module:
    """Convolutions alone: (B, bands, 16 h, 16 w) -> (B, 4 width, h, w), each cell with the ground around it."""
    layers: list[nn.Module] = []
    for inner, outer in ((bands, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)):
        layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), ChannelNorm(outer), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 4 * width, 3, padding=1))


class Spectral(nn.Module):
    """Spatial features, each channel made stronger by what the spectrum of the cell says.

    (1 + sigmoid(spectral)) x spatial, as in HyperSIGMA (Wang et al. 2025). The spectral part is two convolutions along
    the bands, whose answer depends on their order.
    """

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        few = max(4, width // 2)
        self.reduce = nn.Conv2d(bands, width, 1)
        self.spatial = conv(width, width)
        first = min(7, bands)
        self.along = nn.Sequential(
            nn.Conv3d(1, few, (first, 1, 1), stride=(min(3, first), 1, 1)), ChannelNorm(few), nn.GELU()
        )
        left = (bands - first) // min(3, first) + 1
        self.code = nn.Sequential(nn.Linear(few * left, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width))

    def forward(self, bands: Tensor) -> Tensor:
        """(B, bands, 16 h, 16 w) -> (B, 4 width, h, w)."""
        spatial = self.spatial(self.reduce(bands))
        spectra = self.along(F.avg_pool2d(bands, CELL // 4)[:, None])  # (B, few, left, 4 h, 4 w)
        means = F.avg_pool2d(spectra.flatten(1, 2), 4)
        code = self.code(means.movedim(1, -1)).movedim(-1, 1)
        weighed: Tensor = spatial * (1 + torch.sigmoid(code))
        return weighed


SIDES: dict[str, Callable[[int, int], nn.Module]] = {"conv": conv, "spectral": Spectral}
"""Bodies by the name in the recipe."""
