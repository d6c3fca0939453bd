"""A raster seen on another grid, window by window: never as a whole, and no pixel depends on the window asked for.

A pixel is a function of its own place: the place is carried into the raster, and valid pixels around it are
interpolated. What the raster hides (nodata, masks, NaN) and ground that it does not cover is invalid. GDAL's warper
knows one nodata value for all bands: it mixes a second one, and that of a single band, into the neighbours.
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

# values (bands, h, w) and validity (h, w) of a window of the raster's own grid
Read = Callable[[Window], tuple[np.ndarray, np.ndarray]]

PIXELS = 2**17
"""Places that are worked on at a time, and a quarter of the raster's pixels that are read at a time."""

FINER = 1.5
"""Pixels of the raster along one of the grid's beyond which they are averaged instead of interpolated."""

MOST = 256
"""Places along one pixel that are averaged at most."""


class Warp:
    """Reads a raster of grid `source` on grid `target`. DataError if they share no ground, or have no place on Earth.

    A pixel is interpolated between the raster's pixel centres, and valid where the raster's pixel below its centre is.
    Where the raster is finer than `FINER` it is the mean of as many such places as it holds pixels of the raster, and
    valid if half of them are.
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
        down, across = (min(MOST, math.ceil(n - 1e-6)) if n > FINER else 1 for n in self._positions.pixels)
        self._parts = (down, across)

    def read(self, window: Window, count: int, read: Read) -> tuple[np.ndarray, np.ndarray]:
        """Values float32 (count, h, w), 0 where invalid, and validity (h, w) of a window inside the target."""
        values = np.zeros((count, *window.shape), dtype=np.float32)
        valid = np.zeros(window.shape, dtype=bool)
        self._fill(window, read, values, valid)
        return values, valid

    def _fill(self, window: Window, read: Read, values: np.ndarray, valid: np.ndarray) -> None:
        down, across = self._parts
        if window.height * down * window.width * across > PIXELS:
            return self._fill_halves(window, read, values, valid)
        rows, cols = _parts(window.row, window.height, down), _parts(window.col, window.width, across)
        rows, cols = self._positions.at(rows, cols)
        samples = _Samples(rows, cols, self._source)
        needed = samples.needed
        if needed is None:
            return None
        if needed.height * needed.width > 4 * PIXELS and window.height * window.width > 1:
            return self._fill_halves(window, read, values, valid)
        found, good = samples.take(*read(needed))
        if self._parts == (1, 1):
            values[:], valid[:] = found, good
            return None
        share = _summed(good.astype(np.float32), self._parts)
        valid[:] = share * 2 >= down * across
        for band, one in zip(values, found, strict=True):
            np.divide(_summed(one, self._parts), share, out=band, where=valid)
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
    """Middles of the parts of `count` pixels, in pixels."""
    return first + (np.arange(count * parts) + 0.5) / parts


def _summed(places: np.ndarray, parts: tuple[int, int]) -> np.ndarray:
    """Sums over the places of each pixel, in an order that does not depend on the shape."""
    down, across = parts
    total = places[::down].copy()
    for i in range(1, down):
        total += places[i::down]
    summed = total[:, ::across].copy()
    for j in range(1, across):
        summed += total[:, j::across]
    return summed


class _Samples:
    """Places in a raster (rows and columns in pixels, of shapes that broadcast), and the pixels around them."""

    def __init__(self, rows: np.ndarray, cols: np.ndarray, grid: Grid) -> None:
        in_rows = (rows >= 0) & (rows < grid.height)  # False for NaN
        in_cols = (cols >= 0) & (cols < grid.width)
        self._inside = in_rows & in_cols
        if rows.shape == cols.shape:
            in_rows = in_cols = self._inside
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
        width = self.needed.width
        centre = row * width + col
        corners = [above * width + left, above * width + right, below * width + left, below * width + right]
        flat = valid.ravel()
        good = self._inside & flat[centre]
        whole = bool(valid.all())
        found = np.zeros((len(values), *good.shape), dtype=np.float32)
        for band, into in zip(values, found, strict=True):
            stored = band.ravel()
            around = [stored[corner] for corner in corners]
            if not whole:  # an invalid corner gives way to the pixel below the place
                middle = stored[centre]
                around = [np.where(flat[at], one, middle) for at, one in zip(corners, around, strict=True)]
            upper = around[0] + (around[1] - around[0]) * across
            lower = around[2] + (around[3] - around[2]) * across
            np.copyto(into, upper + (lower - upper) * down, where=good)
        return found, good


def _reach(places: np.ndarray, size: int) -> tuple[int, int]:
    """First pixel, and the one after the last, that places inside 0..size are interpolated from."""
    return max(0, math.floor(places.min() - 0.5)), min(size, math.floor(places.max() - 0.5) + 2)


def _between(places: np.ndarray, size: int, first: int, count: int) -> tuple[np.ndarray, ...]:
    """Pixels whose centres lie before and after places, the one below; how far towards the second. From `first` on."""
    centred = np.clip(places - 0.5, 0, size - 1)
    before = np.floor(centred)
    share = (centred - before).astype(np.float32)
    last = first + count - 1  # places outside of the raster were moved to its first pixel, which need not be here
    indexes = [np.clip(p, first, last).astype(np.int64) - first for p in (before, before + 1, np.floor(places))]
    return indexes[0], indexes[1], indexes[2], share


def _check_overlap(name: str, source: Grid, target: Grid) -> None:
    if apart(source, target) or apart(target, source):
        west, south, east, north = bounds(target)
        raise DataError(
            f"{name}: covers nothing of the scene's first modality ({short_name(target.crs)}, x {west:.6g} to "
            f"{east:.6g}, y {south:.6g} to {north:.6g}); expected files of one place; check the pair"
        )
