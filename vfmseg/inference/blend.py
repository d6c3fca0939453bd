"""How overlapping tiles are joined: at each pixel the mean of their votes, weighted by where the pixel lies in a tile.

    mean(pixel) = sum over tiles of w * vote / sum over tiles of w

All weights are above 0, and the division is by the exact sum. A weight of 0 at the tile's edge would leave pixels
without any vote at the border of the scene, where no other tile helps, and a small number added to the divisor against
that would pull their probabilities towards zero: both show as frames in the map. So the curves are taken at the
centres of pixels, i + 1/2, which never fall on their zeros.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vfmseg.geo.grid import Tile, Window

BLENDS = ("hann", "gaussian", "average", "none")


def profile(blend: str, tile: int) -> np.ndarray:
    """Weights of one tile along one axis, float32 (tile,), all above 0; a pixel weighs w(row) * w(column).

        hann        w(i) = sin^2(pi (i + 1/2) / tile)                        tile = 4: 0.146 0.854 0.854 0.146
        gaussian    w(i) = exp(-((i + 1/2 - tile/2) / (tile/8))^2 / 2)       tile = 4: 0.011 0.607 0.607 0.011
        average     w(i) = 1
        none        w(i) = 1, and tiles count in their core alone, so that nothing is averaged

    At the edge of a tile of 512 px hann is 9.4e-6 and gaussian 3.5e-4. Tiles of 4 that start at pixels 0 and 2 meet in
    pixels 2 and 3; blended by hann, votes of 0.9 and 0.5 make 0.854 * 0.9 + 0.146 * 0.5 = 0.84 at pixel 2.
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


class OpenRows:
    """Rows of one strip that more tiles may vote on: sums (K, tile, W), weights (tile, W) of one type, on one device.

    `sums` holds w * vote and `weights` holds w, added up over the tiles so far; W is the width of the strip. One row of
    tiles reaches over `tile` rows of pixels, so that is all that is ever open. What is finished leaves at the top, and
    the rest moves up: with tiles of 16 that step by 12, rows 0-15 are open, then rows 12-27, of which 12-15 hold the
    votes of the row of tiles before.

    Tiles must be added in the order of the grid, row by row, left to right. Sums of floating-point numbers depend on
    their order in the last bit, (a + b) + c is not always a + (b + c), and where two classes are equally likely that
    bit is the label. One order for all strips, runs and processes makes the map's bytes the same.
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
        """`left`, `width`: the strip, in pixel columns of the scene. `top`: the first row of the scene that is open."""
        self.sums = torch.zeros((classes, tile, width), dtype=dtype, device=device)
        self.weights = torch.zeros((tile, width), dtype=dtype, device=device)
        self.top = top
        self.left = left
        self.width = width
        self.blended = blend != "none"
        line = torch.from_numpy(profile(blend, tile)).to(device, dtype)
        self.tile_weights = torch.outer(line, line)  # (tile, tile)

    def add(self, tile: Tile, votes: Tensor) -> None:
        """Add the votes (K, tile, tile) of one tile, as far as they are on open rows and on columns of the strip."""
        window, weights = tile.window, self.tile_weights
        if not self.blended:
            window = tile.core
            # votes from the core's first row and column on; what they hold after the core is cut off by `shared`
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
        """The first `rows` rows: sums (K, rows, W) and weights (rows, W), 0 where no tile was run.

        They share memory with the open rows: they hold until the next `drop`.
        """
        return self.sums[:, :rows], self.weights[:rows]

    def drop(self, rows: int) -> None:
        """Forget the first `rows` rows, and open as many empty ones at the bottom."""
        if rows == 0:
            return
        keep = self.sums.shape[1] - rows
        # moved in place, as a second copy would double the memory; and in pieces of `rows` rows, as copying between
        # views that overlap is undefined in torch. Rows 4-15 go up by 4 as 4-7 to 0-3, 8-11 to 4-7, 12-15 to 8-11
        for first in range(0, keep, rows):
            here, there = slice(first, min(first + rows, keep)), slice(first + rows, min(first + rows, keep) + rows)
            self.sums[:, here] = self.sums[:, there]
            self.weights[here] = self.weights[there]
        self.sums[:, max(keep, 0) :] = 0
        self.weights[max(keep, 0) :] = 0
        self.top += rows
