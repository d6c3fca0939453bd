"""Where a position in one grid lies in another grid: from pixels to pixels, through both coordinate systems.

Positions are (row, column) in pixels from the outer corner of the first pixel: (0.5, 0.5) is its centre. For example,
with a target of 10 m and a source of 20 m pixels that start at one corner, the centre of the target's pixel in row 4,
column 6 is (4.5, 6.5), and lies at (2.25, 3.25) in the source: in its pixel of row 2, column 3.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from rasterio.transform import Affine
from rasterio.warp import transform

from vfmseg.geo.crs import same_ground
from vfmseg.geo.dateline import period, within, x_range
from vfmseg.geo.grid import Grid
from vfmseg.geo.opening import GDAL_ERRORS

CLOSE = 0.01
"""Pixels of the source by which a position may be wrong where the two reference systems differ."""

# Target pixels between nodes, the positions that PROJ transforms: the largest step that is `CLOSE` enough. PROJ takes
# about 0.4 us a point; with nodes 64 pixels apart there is one for 4096 pixels.
_STEPS = (64, 16, 4, 1)

_CELLS = 64  # nodes are made in blocks of 65 x 65: PROJ may choose another method for another batch of points


class GridTransform:
    """Positions in the target as positions in the source.

    pixels: how many of the source lie along one of the target, (down, across); (2.0, 2.0) if the source is finer by 2.
    In one reference system that is arithmetic. Else the corners of cells of the target are transformed by PROJ, and
    positions between them interpolated. The cells are fixed to the target's first pixel, not to what is asked for, so
    that a position has the same answer, to the last bit, in every window.
    """

    def __init__(self, source: Grid, target: Grid) -> None:
        self._source = source
        self._target = target
        self._same = same_ground(str(source.crs), str(target.crs))
        # pixels of the target -> ground -> pixels of the source; only of use where both are in one system
        self._affine = tuple(~Affine(*source.transform) @ Affine(*target.transform))[:6]
        self._turn = self._columns_of_a_turn()
        self._middle: float | None = None  # column below the middle of the target, where the source is in two pieces
        if self._turn is not None:
            cols = self._exact(*self._spread(1, 1))[1]
            known = cols[np.isfinite(cols)]
            if self._same or (known.size and np.ptp(known) > self._turn / 2 and np.isfinite(cols[2, 2])):
                self._middle = float(cols[2, 2])
        self._step = 1
        self.pixels = self._lengths()
        if not self._same:
            self._step = next(step for step in _STEPS if step == 1 or self._error(step) <= CLOSE)

    def at(self, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns in the source, of shapes that broadcast to (h, w), of target rows (h) and columns (w).

        Both ascend. NaN where the target's position has no place in the source's reference system.
        """
        if self._same:
            a, b, c, d, e, f = self._affine
            down, across = rows[:, None], cols[None, :]
            if b == 0 == d:  # neither is turned: rows depend on rows alone, and (h, 1) and (1, w) are enough
                return e * down + f, self._landed(a * across + c)
            return d * across + e * down + f, self._landed(a * across + b * down + c)
        found = np.empty((2, len(rows), len(cols)))
        for top, part_rows in _blocks(rows, self._step):
            for left, part_cols in _blocks(cols, self._step):
                nodes = self._nodes(top, left)
                found[:, part_rows, part_cols] = self._interpolated(nodes, rows[part_rows] / self._step - top,
                                                                    cols[part_cols] / self._step - left)  # fmt: skip
        return found[0], self._landed(found[1])

    def _columns_of_a_turn(self) -> float | None:
        """Columns of the source once round the Earth; None if no position can lie a turn from where it is wanted."""
        turn = period(self._source.crs)
        a, b, *_ = self._source.transform
        if turn is None or b:  # in a turned grid a turn is no number of columns
            return None
        middle = sum(x_range(self._source)) / 2
        if self._same and max(abs(x - middle) for x in x_range(self._target)) <= turn / 2:
            return None
        return abs(turn / a)

    def _landed(self, cols: np.ndarray) -> np.ndarray:
        """Columns moved by whole turns to where the source is: 180 and -180 degrees are one place."""
        if self._turn is None or self._middle is None:
            return cols
        return within(cols, self._source.width / 2, self._turn)

    def _nodes(self, top: int, left: int) -> np.ndarray:
        """Source positions (2, n, n) of the corners of a block of cells; NaN where a cell beside it is torn.

        A cell whose corners lie far apart in the source is torn by the end of the source's world (the date line):
        between them nothing can be interpolated.
        """
        ticks = np.arange(_CELLS + 1) * self._step
        nodes = self._exact(*np.meshgrid(top * self._step + ticks, left * self._step + ticks, indexing="ij"))
        usual = 8 * self._step * max(self.pixels)  # what is 8 times as long as the median cell is taken for torn
        with np.errstate(invalid="ignore"):
            for axis in (1, 2):
                torn = (np.abs(np.diff(nodes, axis=axis)) > usual).any(axis=0)
                before = [slice(None), slice(None)]
                before[axis - 1] = slice(0, -1)
                nodes[(slice(None), *before)][:, torn] = np.nan  # the node before the tear, and with it its cells
        return nodes

    @staticmethod
    def _interpolated(nodes: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Bilinear (2, h, w) between nodes, of rows (h) and columns (w) counted in cells of the block.

        Row 2.25, column 0.5 lies a quarter below node row 2, half-way between node columns 0 and 1.
        """
        i, j = rows.astype(np.int64), cols.astype(np.int64)
        across, down = cols - j, (rows - i)[:, None]
        lines = nodes[:, :, j] + (nodes[:, :, j + 1] - nodes[:, :, j]) * across
        between: np.ndarray = lines[:, i] + (lines[:, i + 1] - lines[:, i]) * down
        return between

    def _exact(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Source positions (2, ...) of target positions, each by PROJ; NaN where there is none."""
        xs, ys = Affine(*self._target.transform) @ (cols.ravel(), rows.ravel())
        if not self._same:
            try:  # PROJ gives infinity for a place that a system does not have; some raise instead
                xs, ys = map(np.asarray, transform(self._target.crs, self._source.crs, xs, ys))
            except GDAL_ERRORS:
                xs = ys = np.full(rows.size, np.nan)
        with np.errstate(invalid="ignore"):
            across, down = ~Affine(*self._source.transform) @ (xs, ys)
            if self._turn is not None:
                across = within(across, self._source.width / 2 if self._middle is None else self._middle, self._turn)
        found = np.stack([down, across]).reshape(2, *rows.shape)
        found[:, ~np.isfinite(found).all(axis=0)] = np.nan
        return found

    def _spread(self, height: float, width: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns (5, 5) of the first corners of 25 cells of this size, spread over the target."""
        rows = np.linspace(0, max(0, self._target.height - height), 5)
        cols = np.linspace(0, max(0, self._target.width - width), 5)
        down, across = np.meshgrid(rows, cols, indexing="ij")
        return down, across

    def _lengths(self) -> tuple[float, float]:
        """Pixels of the source along a row and a column step of the target: medians over the target."""
        rows, cols = self._spread(1, 1)
        start = self._exact(rows, cols)
        steps = [np.hypot(*(self._exact(rows + i, cols + j) - start)) for i, j in ((1, 0), (0, 1))]
        down, across = (float(np.median(s[np.isfinite(s)])) if np.isfinite(s).any() else 1.0 for s in steps)
        return down, across

    def _error(self, step: int) -> float:
        """Pixels of the source by which interpolation in cells of this size is off, at most: at their middles."""
        rows, cols = self._spread(step, step)
        # bilinear interpolation gives the mean of the corners there, where a curve is farthest from its chord
        corners = [self._exact(rows + i, cols + j) for i in (0, step) for j in (0, step)]
        off = np.hypot(*(self._exact(rows + step / 2, cols + step / 2) - sum(corners) / 4))
        known = off[np.isfinite(off)]
        return float(known.max()) if known.size else math.inf


def _blocks(positions: np.ndarray, step: int) -> list[tuple[int, slice]]:
    """First cell of each block of cells that holds some of these ascending positions, and which they are."""
    blocks = (positions // (step * _CELLS)).astype(np.int64)
    starts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(positions)]
    return [(int(blocks[a]) * _CELLS, slice(a, b)) for a, b in pairwise(starts)]
