"""Maps of one grid of cells on another: the grids begin in the same corner, and their cells have other sizes.

The patches of two encoders cover the same image with cells of, say, 14 and 16 pixels, and reach beyond its right and
bottom edge by different lengths. So lengths are counted in pixels from the corner, never as shares of a grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[tuple[int, int], float]
"""Rows and columns of cells, and the pixels of a cell a side."""


def regrid(maps: Tensor, seen: Tensor, have: Grid, want: Grid) -> Tensor:
    """(B, D, h, w) on the cells of `have` -> (B, D, rows, columns) on those of `want`, bilinear.

    `seen` (B, h, w): cells that have seen nothing take no part, and where there are no others, maps are zero. Larger
    cells are means of what they cover, as antialiasing makes them. Beyond the last cell its value goes on.
    """
    with torch.autocast(maps.device.type, enabled=False):  # weights of half precision would move maps
        used = (seen > 0).float()[:, None]
        axes = [_bilinear(n, have[1], m, want[1]) for n, m in zip(have[0], want[0], strict=True)]
        moved = _separable(torch.cat([maps.float() * used, used], dim=1), *axes)
        return (moved[:, :-1] / moved[:, -1:].clamp(min=1e-12)).to(maps.dtype)


def shares(valid: Tensor, want: Grid) -> Tensor:
    """The share of each cell of `want` that is valid, (B, rows, columns), of a mask of pixels (B, H, W).

    What lies beyond the image is not valid.
    """
    with torch.autocast(valid.device.type, enabled=False):
        overlaps = (_overlap(n, m, want[1]) for n, m in zip(valid.shape[-2:], want[0], strict=True))
        return _separable(valid.float()[:, None], *overlaps)[:, 0].clamp(0, 1)


def _separable(maps: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """(B, D, h, w), (rows, h), (columns, w) -> (B, D, rows, columns)."""
    return vertical.to(maps.device) @ maps @ horizontal.to(maps.device).T


def _bilinear(have: int, size: float, want: int, wanted: float) -> Tensor:
    """(want, have): the share that each cell of `size` pixels has in each cell of `wanted` pixels, along one axis.

    Linear interpolation between the two nearest centres, at one point of a wanted cell that is no larger, at several
    of a larger one, of which the mean is taken: each point has a cell's width or less for itself. Rows sum to 1.
    """
    points = max(1, math.ceil(wanted / size - 1e-9))
    places = (torch.arange(want * points, dtype=torch.float64) + 0.5) * wanted / points
    centres = (places / size - 0.5).clamp(0, have - 1)
    weights = (1 - (centres[:, None] - torch.arange(have, dtype=torch.float64)).abs()).clamp(min=0)
    return weights.unflatten(0, (want, points)).mean(dim=1).float()


def _overlap(pixels: int, cells: int, size: float) -> Tensor:
    """(cells, pixels): the share of each cell of `size` pixels that each pixel covers, along one axis."""
    first = torch.arange(cells, dtype=torch.float64)[:, None] * size
    edges = torch.arange(pixels, dtype=torch.float64)
    covered = torch.minimum(edges + 1, first + size) - torch.maximum(edges, first)
    return (covered.clamp(min=0) / size).float()
