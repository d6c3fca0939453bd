"""A raster seen on another grid, window by window: never as a whole, and no pixel depends on the window asked for.

A pixel is a function of its own place: the place is carried into the raster, and valid pixels around it are
interpolated. What the raster hides (nodata, masks, NaN) and ground that it does not cover is invalid. GDAL's warper
knows one nodata value for all bands: it mixes a second one, and that of a single band, into the neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from rasterio.transform import Affine
from rasterio.warp import transform, transform_bounds

from vfmseg.errors import DataError
from vfmseg.geo.crs import same_ground, short_name
from vfmseg.geo.dateline import period, turned, within, x_range
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.opening import GDAL_ERRORS

# values (bands, h, w) and validity (h, w) of a window of the raster's own grid
Read = Callable[[Window], tuple[np.ndarray, np.ndarray]]

PIXELS = 2**17
"""Places that are worked on at a time, and a quarter of the raster's pixels that are read at a time."""

FINER = 1.5
"""Pixels of the raster along one of the grid's beyond which they are averaged instead of interpolated."""

MOST = 256
"""Places along one pixel that are averaged at most."""

CLOSE = 0.01
"""Pixels of the raster by which a place may be wrong where the two reference systems differ."""

_STEPS = (64, 16, 4, 1)  # pixels between places that are transformed exactly: the largest that is close enough
_CELLS = 64  # such places are made in blocks of 64 x 64: PROJ may choose another method for another batch


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
        self._places = _Places(source, target)
        down, across = (min(MOST, math.ceil(n - 1e-6)) if n > FINER else 1 for n in self._places.pixels)
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
        rows, cols = self._places.at(_parts(window.row, window.height, down), _parts(window.col, window.width, across))
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


class _Places:
    """Where a place of the target, in pixels, lies in the source, in pixels. pixels: of the source along one of it.

    In one reference system that is arithmetic. Else places are transformed on a lattice that is fixed to the target,
    and interpolated between.
    """

    def __init__(self, source: Grid, target: Grid) -> None:
        self._source = source
        self._target = target
        self._same = same_ground(str(source.crs), str(target.crs))
        self._affine = tuple(~Affine(*source.transform) @ Affine(*target.transform))[:6]
        self._turn = self._columns_of_a_turn()
        self._middle: float | None = None  # column below the middle of the target, where the source is in two pieces
        if self._turn is not None:
            cols = self._exact(*self._some(1, 1))[1]
            known = cols[np.isfinite(cols)]
            if self._same or (known.size and np.ptp(known) > self._turn / 2 and np.isfinite(cols[2, 2])):
                self._middle = float(cols[2, 2])
        self._step = 1
        self.pixels = self._lengths()
        if not self._same:
            self._step = next(step for step in _STEPS if step == 1 or self._error(step) <= CLOSE)

    def at(self, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns in the source (shapes that broadcast to (h, w)) of ascending target rows and columns."""
        if self._same:
            a, b, c, d, e, f = self._affine
            down, across = rows[:, None], cols[None, :]
            if b == 0 == d:
                return e * down + f, self._landed(a * across + c)
            return d * across + e * down + f, self._landed(a * across + b * down + c)
        places = np.empty((2, len(rows), len(cols)))
        for top, part_rows in _blocks(rows, self._step):
            for left, part_cols in _blocks(cols, self._step):
                nodes = self._nodes(top, left)
                places[:, part_rows, part_cols] = self._interpolated(nodes, rows[part_rows] / self._step - top,
                                                                     cols[part_cols] / self._step - left)  # fmt: skip
        return places[0], self._landed(places[1])

    def _columns_of_a_turn(self) -> float | None:
        """Columns of the source once round the Earth; None if no place can lie a turn from where it is wanted."""
        turn = period(self._source.crs)
        a, b, *_ = self._source.transform
        if turn is None or b:
            return None
        middle = sum(x_range(self._source)) / 2
        if self._same and max(abs(x - middle) for x in x_range(self._target)) <= turn / 2:
            return None
        return abs(turn / a)

    def _landed(self, cols: np.ndarray) -> np.ndarray:
        """Columns of places where the source is: 180 and -180 degrees are one place."""
        if self._turn is None or self._middle is None:
            return cols
        return within(cols, self._source.width / 2, self._turn)

    def _nodes(self, top: int, left: int) -> np.ndarray:
        """Source places (2, n, n) of a block of the lattice; NaN where a cell beside it is torn (the date line)."""
        ticks = np.arange(_CELLS + 1) * self._step
        nodes = self._exact(*np.meshgrid(top * self._step + ticks, left * self._step + ticks, indexing="ij"))
        usual = 8 * self._step * max(self.pixels)
        with np.errstate(invalid="ignore"):
            for axis in (1, 2):
                torn = (np.abs(np.diff(nodes, axis=axis)) > usual).any(axis=0)
                before = [slice(None), slice(None)]
                before[axis - 1] = slice(0, -1)
                nodes[(slice(None), *before)][:, torn] = np.nan
        return nodes

    @staticmethod
    def _interpolated(nodes: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        i, j = rows.astype(np.int64), cols.astype(np.int64)
        across, down = cols - j, (rows - i)[:, None]
        lines = nodes[:, :, j] + (nodes[:, :, j + 1] - nodes[:, :, j]) * across
        between: np.ndarray = lines[:, i] + (lines[:, i + 1] - lines[:, i]) * down
        return between

    def _exact(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Source places (2, ...) of target places; NaN where there is no such place."""
        xs, ys = Affine(*self._target.transform) @ (cols.ravel(), rows.ravel())
        if not self._same:
            try:
                xs, ys = map(np.asarray, transform(self._target.crs, self._source.crs, xs, ys))
            except GDAL_ERRORS:
                xs = ys = np.full(rows.size, np.nan)
        with np.errstate(invalid="ignore"):
            across, down = ~Affine(*self._source.transform) @ (xs, ys)
            if self._turn is not None:
                across = within(across, self._source.width / 2 if self._middle is None else self._middle, self._turn)
        places = np.stack([down, across]).reshape(2, *rows.shape)
        places[:, ~np.isfinite(places).all(axis=0)] = np.nan
        return places

    def _some(self, height: float, width: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the first corners of 25 cells of this size, spread over the target."""
        rows = np.linspace(0, max(0, self._target.height - height), 5)
        cols = np.linspace(0, max(0, self._target.width - width), 5)
        down, across = np.meshgrid(rows, cols, indexing="ij")
        return down, across

    def _lengths(self) -> tuple[float, float]:
        """Pixels of the source along a row and a column step of the target: medians over the target."""
        rows, cols = self._some(1, 1)
        start = self._exact(rows, cols)
        steps = [np.hypot(*(self._exact(rows + i, cols + j) - start)) for i, j in ((1, 0), (0, 1))]
        down, across = (float(np.median(s[np.isfinite(s)])) if np.isfinite(s).any() else 1.0 for s in steps)
        return down, across

    def _error(self, step: int) -> float:
        """Pixels of the source by which interpolation in cells of this size is off, at most."""
        rows, cols = self._some(step, step)
        corners = [self._exact(rows + i, cols + j) for i in (0, step) for j in (0, step)]
        off = np.hypot(*(self._exact(rows + step / 2, cols + step / 2) - sum(corners) / 4))
        known = off[np.isfinite(off)]
        return float(known.max()) if known.size else math.inf


def _blocks(places: np.ndarray, step: int) -> list[tuple[int, slice]]:
    """First cell of each block of the lattice that holds some of these ascending places, and which they are."""
    blocks = (places // (step * _CELLS)).astype(np.int64)
    starts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(places)]
    return [(int(blocks[a]) * _CELLS, slice(a, b)) for a, b in pairwise(starts)]


def _check_overlap(name: str, source: Grid, target: Grid) -> None:
    if _apart(source, target) or _apart(target, source):
        west, south, east, north = _bounds(target)
        raise DataError(
            f"{name}: covers nothing of the scene's first modality ({short_name(target.crs)}, x {west:.6g} to "
            f"{east:.6g}, y {south:.6g} to {north:.6g}); expected files of one place; check the pair"
        )


def _apart(one: Grid, two: Grid) -> bool:
    """Whether `one`, seen in the reference system of `two`, clearly lies elsewhere."""
    turn = period(one.crs)
    if turn is not None and np.ptp(x_range(one)) > turn / 2:  # half a world has no box in a projection
        return False
    try:
        west, south, east, north = transform_bounds(one.crs, two.crs, *_bounds(one))
    except GDAL_ERRORS:
        return False
    if not all(map(math.isfinite, (west, south, east, north))) or west > east:  # beyond a system, over the date line
        return False
    left, bottom, right, top = _bounds(two)
    turn = period(two.crs)
    beside = west >= right or east <= left if turn is None else not turned(left, right, west, east, turn)
    return beside or south >= top or north <= bottom


def _bounds(grid: Grid) -> tuple[float, float, float, float]:
    xs, ys = zip(*(grid.point(row, col) for row in (0, grid.height) for col in (0, grid.width)), strict=True)
    return min(xs), min(ys), max(xs), max(ys)
