"""How overlapping tiles are joined: strictly positive tile weights, divided by their exact sum at every pixel.

A weight that reaches zero at the tile's edge leaves pixels without any vote at the border of the scene, and an
epsilon in the division pulls values there towards zero; both show as frames in the map. So windows are sampled
at pixel centres (never at the zero of the curve) and each pixel is divided by the sum of what it received.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vfmseg.geo.grid import Tile, Window

BLENDS = ("hann", "gaussian", "average", "none")


def profile(blend: str, tile: int) -> np.ndarray:
    """Weights of one tile along one axis, float32 (tile,), every value > 0.

    hann: sin^2(pi (i + 1/2) / tile); gaussian: standard deviation tile / 8 about the centre; average and none: 1.
    """
    centres = np.arange(tile, dtype=np.float64) + 0.5
    if blend == "hann":
        weights = np.sin(np.pi * centres / tile) ** 2
    elif blend == "gaussian":
        weights = np.exp(-0.5 * ((centres - tile / 2) / (tile / 8)) ** 2)
    elif blend in ("average", "none"):
        weights = np.ones(tile)
    else:
        raise ValueError(f"blend = {blend!r}; expected one of {', '.join(BLENDS)}")
    return weights.astype(np.float32)


class Band:
    """The rows in flight of one strip: weighted sums (K, tile, W) and weights (tile, W) of one type, on one device.

    Tiles are added in the order of the grid, row by row, so every pixel sums its votes in the same order whatever the
    strip is. `left`, `width`: the strip in pixels; what a tile holds beyond it belongs to another strip.
    """

    def __init__(
        self,
        classes: int,
        tile: int,
        left: int,
        width: int,
        top: int,
        blend: str,
        device: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sums = torch.zeros((classes, tile, width), dtype=dtype, device=device)
        self.weights = torch.zeros((tile, width), dtype=dtype, device=device)
        self.top = top  # row of the scene that the first row of the band holds
        self.left = left
        self.width = width
        self.blended = blend != "none"
        line = torch.from_numpy(profile(blend, tile)).to(device, dtype)
        self.tile_weights = torch.outer(line, line)  # (tile, tile)

    def add(self, tile: Tile, votes: Tensor) -> None:
        """Add the votes (K, tile, tile) of one tile; unblended tiles count in their core alone."""
        window, weights = tile.window, self.tile_weights
        if not self.blended:
            window = tile.core
            core = np.s_[window.row - tile.window.row :, window.col - tile.window.col :]
            votes, weights = votes[(slice(None), *core)], weights[core]
        shared = Window(self.top, self.left, *self.weights.shape).shared(window)
        if shared is None:
            return
        here, there = shared
        weights = weights[there]
        self.sums[(slice(None), *here)].addcmul_(votes[(slice(None), *there)].to(weights.dtype), weights)
        self.weights[here] += weights

    def finished(self, rows: int) -> tuple[Tensor, Tensor]:
        """Views of the first `rows` rows: sums (K, rows, W) and weights (rows, W); weight 0 where no tile was run."""
        return self.sums[:, :rows], self.weights[:rows]

    def drop(self, rows: int) -> None:
        """Move the band down by `rows` rows."""
        if rows == 0:
            return
        keep = self.sums.shape[1] - rows
        for first in range(0, keep, rows):  # pieces that do not overlap with where they go
            here, there = slice(first, min(first + rows, keep)), slice(first + rows, min(first + rows, keep) + rows)
            self.sums[:, here] = self.sums[:, there]
            self.weights[here] = self.weights[there]
        self.sums[:, max(keep, 0) :] = 0
        self.weights[max(keep, 0) :] = 0
        self.top += rows
