"""Several scales out of the maps of a plain ViT, which all share one coarse grid: what `fpn` and `upernet` stand on.

GroupNorm everywhere: it knows no running statistics, so batch size, ranks and frozen parts do not matter to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 4  # strides s/4, s/2, s and 2s of a grid of stride s


def on_one_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Every map (B, D_i, h_i, w_i) resized to the height and width of the first, bilinearly."""
    size = maps[0].shape[-2:]
    return [x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear") for x in maps]


def halve(x: Tensor) -> Tensor:
    """Means of 2 x 2 cells; the last row or column of an odd map is averaged over what is there."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def enlarge(x: Tensor, size: torch.Size) -> Tensor:
    """Twice as fine, then cut to `size` (height, width).

    The factor is exactly 2 and what is too much is cut off right and below: stretching a map of ceil(h / 2) rows
    to h rows would shift an odd-sized map against the others.
    """
    x = F.interpolate(x, scale_factor=2, mode="bilinear")
    return x[..., : size[0], : size[1]]


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 16 groups of at least 8 channels, as many as divide the channels."""
    groups = max(g for g in range(1, 17) if channels % g == 0 and (g == 1 or channels // g >= 8))
    return nn.GroupNorm(groups, channels)


def convolution(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """Convolution of odd kernel that keeps the size, GroupNorm, GELU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False), group_norm(channels), nn.GELU()
    )


def twice_as_fine(channels: int) -> nn.ConvTranspose2d:
    """Each cell learned apart into 2 x 2, without looking at its neighbours: exactly twice the rows and columns."""
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


def maps_of_level(maps: int, level: int) -> list[int]:
    """Which of `maps` maps (shallow to deep) feed a level: shallow ones the fine levels, and each map at least one."""
    if maps <= LEVELS:
        return [round(level * (maps - 1) / (LEVELS - 1))]
    return list(range(level * maps // LEVELS, (level + 1) * maps // LEVELS))


class Pyramid(nn.Module):
    """Maps on one grid of stride s -> four levels of equal channels at strides s/4, s/2, s and 2s, fine to coarse.

    After ViTDet's simple feature pyramid (Li et al., 2022), with every level fed by the maps of its depth.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.sources = [maps_of_level(len(in_channels), level) for level in range(LEVELS)]
        # reduced first, on the coarse grid, where it is cheap
        self.laterals = nn.ModuleList(
            nn.Conv2d(sum(in_channels[i] for i in source), channels, 1, bias=False) for source in self.sources
        )
        self.norms = nn.ModuleList(group_norm(channels) for _ in self.sources)
        self.finer = nn.ModuleList(
            (
                nn.Sequential(twice_as_fine(channels), group_norm(channels), nn.GELU(), twice_as_fine(channels)),
                twice_as_fine(channels),
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, D_i, h_i, w_i) -> (B, channels, ...) of 4h x 4w, 2h x 2w, h x w and half of that, rounded up."""
        maps = on_one_grid(maps)
        reduced = [
            norm(lateral(torch.cat([maps[i] for i in source], dim=1)))
            for source, lateral, norm in zip(self.sources, self.laterals, self.norms, strict=True)
        ]
        quarter, half = (finer(x) for finer, x in zip(self.finer, reduced[:2], strict=True))
        return [quarter, half, reduced[2], halve(reduced[3])]


def add_downwards(levels: Sequence[Tensor]) -> list[Tensor]:
    """Each level plus all coarser ones, enlarged step by step: the top-down path of a feature pyramid network."""
    out = [levels[-1]]
    for level in reversed(levels[:-1]):
        out.insert(0, level + enlarge(out[0], level.shape[-2:]))
    return out
