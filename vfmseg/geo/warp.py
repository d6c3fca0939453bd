"""A raster read on another grid, window by window: values float32 and validity of any window of the target grid.

A pixel is a function of its own position: the position is carried into the raster (`gridtransform`), and the raster's
pixels around it are interpolated, or averaged where the raster is finer. So a pixel has the same bits in every window,
and no more of the raster is read than lies below the window.

    target, 10 m                    raster, 20 m
    row 4, column 6                 its centre (4.5, 6.5) lies at (2.25, 3.25) of the raster: in row 2, column 3,
                                    between the centres of rows 1 and 2, and of columns 2 and 3

Why not GDAL's warper, which interpolates as exactly? It would have to be fed by windows, with NaN where the reader
(masks, alpha, nodata of file and recipe) says that nothing is. Then up to 11 % of its pixels have other last bits for
another window, so that the labels of a scene would depend on how the scene was cut; and its averages lie 0.04 of the
raster's pixels beside their place and also fill ground of which more than half is hidden. `python benchmarks/warp.py`
prints these figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.crs import short_name
from vfmseg.geo.footprints import apart, bounds
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.gridtransform import GridTransform

Read = Callable[[Window], tuple[np.ndarray, np.ndarray]]
"""Values (bands, h, w) and validity bool (h, w) of a window of the raster's own grid."""

PIXELS = 2**17
"""Positions that are worked on at a time, and a quarter of the raster's pixels that are read at a time (memory)."""

FINER = 1.5
"""Pixels of the raster along one of the target beyond which they are averaged: interpolation would skip some."""

MOST = 256
"""Positions along one pixel that are averaged at most."""


class Warp:
    """Reads a raster of grid `source` on grid `target`. DataError if they share no ground, or have no place on Earth.

    A pixel is interpolated bilinearly between the raster's pixel centres, and valid where the raster's pixel below its
    centre is. Where the raster is finer than `FINER` it is the mean of as many such positions as it holds pixels of the
    raster, and valid if half of them are: of a raster that is finer by 4.3, the mean of 5 x 5.
    """

    def __init__(self, name: str, source: Grid, target: Grid) -> None:
        for grid, whose in ((source, "it has"), (target, "the scene's first modality has")):
            if not grid.georeferenced:
                raise DataError(
                    f"{name}: is {source.height} x {source.width} px, the scene's first modality {target.height} x "
                    f"{target.width} px, and {whose} no CRS and transform; expected one size, or files that say where "
                    "they lie: give both a georeference"
                )
        _check_overlap(name, source, target)
        self._source = source
        self._positions = GridTransform(source, target)
        # 1e-6: a raster that is finer by 5.0000001 is finer by 5
        down, across = (min(MOST, math.ceil(n - 1e-6)) if n > FINER else 1 for n in self._positions.pixels)
        self._parts = (down, across)  # positions along a pixel

    def read(self, window: Window, count: int, read: Read) -> tuple[np.ndarray, np.ndarray]:
        """Values float32 (count, h, w), 0 where invalid, and validity (h, w) of a window inside the target."""
        values = np.zeros((count, *window.shape), dtype=np.float32)
        valid = np.zeros(window.shape, dtype=bool)
        self._fill(window, read, values, valid)
        return values, valid

    def _fill(self, window: Window, read: Read, values: np.ndarray, valid: np.ndarray) -> None:
        """Write a window into arrays of its size; a large one, or one over much of the raster, in halves."""
        down, across = self._parts
        if window.height * down * window.width * across > PIXELS:
            return self._fill_halves(window, read, values, valid)  # halves give the same bits: see `GridTransform`
        rows, cols = _parts(window.row, window.height, down), _parts(window.col, window.width, across)
        rows, cols = self._positions.at(rows, cols)
        samples = _Samples(rows, cols, self._source)
        needed = samples.needed
        if needed is None:  # all of it lies beside the raster: the arrays stay empty
            return None
        if needed.height * needed.width > 4 * PIXELS and window.height * window.width > 1:
            return self._fill_halves(window, read, values, valid)
        found, good = samples.take(*read(needed))
        if self._parts == (1, 1):
            values[:], valid[:] = found, good
            return None
        counts = _summed(good.astype(np.float32), self._parts)
        valid[:] = counts * 2 >= down * across
        for band, one in zip(values, found, strict=True):
            np.divide(_summed(one, self._parts), counts, out=band, where=valid)
        return None

    def _fill_halves(self, window: Window, read: Read, values: np.ndarray, valid: np.ndarray) -> None:
        row, col, height, width = window.row, window.col, window.height, window.width
        if height > width:
            half = height // 2
            self._fill(Window(row, col, half, width), read, values[:, :half], valid[:half])
            self._fill(Window(row + half, col, height - half, width), read, values[:, half:], valid[half:])
        else:
            half = width // 2
            self._fill(Window(row, col, height, half), read, values[:, :, :half], valid[:, :half])
            self._fill(Window(row, col + half, height, width - half), read, values[:, :, half:], valid[:, half:])


def _parts(first: int, count: int, parts: int) -> np.ndarray:
    """Middles of the parts of `count` pixels, in pixels: 4.25, 4.75, 5.25, 5.75 of pixels 4 and 5 in 2 parts each."""
    return first + (np.arange(count * parts) + 0.5) / parts


def _summed(values: np.ndarray, parts: tuple[int, int]) -> np.ndarray:
    """Sums (h, w) over the parts (h * down, w * across) of each pixel.

    Always in one order: numpy's own sum adds pairwise, in an order that hangs on the shape, and with it the last bit.
    """
    down, across = parts
    total = values[::down].copy()
    for i in range(1, down):
        total += values[i::down]
    summed = total[:, ::across].copy()
    for j in range(1, across):
        summed += total[:, j::across]
    return summed


class _Samples:
    """Positions in a raster, and the pixels around each that it is interpolated from.

    rows, cols: in pixels, of shapes that broadcast to (h, w): (h, 1) and (1, w), or both (h, w). needed: the window of
    the raster that holds those pixels; None if no position lies inside.
    """

    def __init__(self, rows: np.ndarray, cols: np.ndarray, grid: Grid) -> None:
        in_rows = (rows >= 0) & (rows < grid.height)  # False for NaN
        in_cols = (cols >= 0) & (cols < grid.width)
        self._inside = in_rows & in_cols
        if rows.shape == cols.shape:
            in_rows = in_cols = self._inside
        # what lies outside is moved to 0, so that every index is one; `_inside` takes it out again
        self._rows, self._cols = np.where(in_rows, rows, 0.0), np.where(in_cols, cols, 0.0)
        self._grid = grid
        self.needed: Window | None = None
        if self._inside.any():
            top, bottom = _reach(rows[in_rows], grid.height)
            left, right = _reach(cols[in_cols], grid.width)
            self.needed = Window(top, left, bottom - top, right - left)

    def take(self, values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interpolated values (bands, h, w), 0 where invalid, from those of the window `needed`."""
        assert self.needed is not None
        above, below, row, down = _between(self._rows, self._grid.height, self.needed.row, self.needed.height)
        left, right, col, across = _between(self._cols, self._grid.width, self.needed.col, self.needed.width)
        width = self.needed.width  # indexes of the flattened window: one number a pixel is faster to look up
        centre = row * width + col
        corners = [above * width + left, above * width + right, below * width + left, below * width + right]
        flat = valid.ravel()
        good = self._inside & flat[centre]
        whole = bool(valid.all())
        found = np.zeros((len(values), *good.shape), dtype=np.float32)
        for band, into in zip(values, found, strict=True):
            stored = band.ravel()
            around = [stored[corner] for corner in corners]
            if not whole:  # an invalid corner gives way to the pixel below the position, which is valid
                middle = stored[centre]
                around = [np.where(flat[at], one, middle) for at, one in zip(corners, around, strict=True)]
            # a + (b - a) t instead of a (1 - t) + b t: equal pixels give exactly their value
            upper = around[0] + (around[1] - around[0]) * across
            lower = around[2] + (around[3] - around[2]) * across
            np.copyto(into, upper + (lower - upper) * down, where=good)
        return found, good


def _reach(positions: np.ndarray, size: int) -> tuple[int, int]:
    """First pixel, and the one after the last, that positions inside 0..size are interpolated from.

    Pixel i has its centre at i + 0.5, so 2.25 lies between the centres of pixels 1 and 2: it needs (1, 3).
    """
    return max(0, math.floor(positions.min() - 0.5)), min(size, math.floor(positions.max() - 0.5) + 2)


def _between(positions: np.ndarray, size: int, first: int, count: int) -> tuple[np.ndarray, ...]:
    """Four arrays: the pixels with centres before and after each position, the pixel below it, and a share.

    Pixels are counted from `first` on, of which there are `count`; the share says how far the position is from the
    first centre to the second. Position 2.25 gives 1, 2, 2 and 0.75. Up to half a pixel from the raster's edge the
    nearest centre stands for both.
    """
    centred = np.clip(positions - 0.5, 0, size - 1)
    before = np.floor(centred)
    share = (centred - before).astype(np.float32)
    last = first + count - 1  # positions outside of the raster were moved to its first pixel, which need not be here
    indexes = [np.clip(p, first, last).astype(np.int64) - first for p in (before, before + 1, np.floor(positions))]
    return indexes[0], indexes[1], indexes[2], share


def _check_overlap(name: str, source: Grid, target: Grid) -> None:
    if apart(source, target) or apart(target, source):
        west, south, east, north = bounds(target)
        raise DataError(
            f"{name}: covers nothing of the scene's first modality ({short_name(target.crs)}, x {west:.6g} to "
            f"{east:.6g}, y {south:.6g} to {north:.6g}); expected files of one place; check the pair"
        )
