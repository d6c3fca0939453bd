"""Bands that are computed from an elevation band as it is read: `height`, `slope`, `height_above_local`.

Absolute metres tell a model which valley it is in, not what stands there. These bands tell the form of the ground, and
but for `height` they do not change if all of a scene lies 1000 m higher.

Every value is a function of a fixed neighbourhood of its pixel in the raster, never of the window that is read: a
window is read with a margin, and sums are added in one order. So overlapping windows agree to the last bit. There is no
aspect: a direction would have to be turned when a training tile is mirrored or turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vfmseg.geo.grid import Grid, Slices, Window
from vfmseg.geo.ground import Ground

LOCAL_RADIUS = 100.0
"""Metres to each side of a pixel that its `height_above_local` is measured from, unless the recipe says others."""

MOST = 256
"""Pixels to each side at most, so that the margin that is read with a window stays bounded."""

SIDE = 512
"""Pixels a side of what is worked on at a time: with the largest margin some 40 MiB."""

Read = Callable[[Window, Slices], tuple[np.ndarray, np.ndarray]]
"""Values (1, h, w) and validity (h, w) of a window inside the raster; the slices say which of it was asked for."""


@dataclass(frozen=True)
class _Around:
    """A window with a margin: heights float64 (h + 2 down, w + 2 across), 0 where invalid, and validity of that size.

    window: without the margin. sides: pixels to each side that are averaged, (down, across).
    """

    heights: np.ndarray
    valid: np.ndarray
    window: Window
    margin: tuple[int, int]
    sides: tuple[int, int]
    grid: Grid

    def within(self, down: int, across: int) -> tuple[np.ndarray, np.ndarray]:
        """Heights and validity with a smaller margin."""
        top, left = self.margin[0] - down, self.margin[1] - across
        place = (slice(top, self.heights.shape[0] - top), slice(left, self.heights.shape[1] - left))
        return self.heights[place], self.valid[place]


Band = tuple[np.ndarray, np.ndarray]
"""Values float64 (h, w), and where they are known, bool (h, w)."""


def _height(around: _Around) -> Band:
    """The elevation itself."""
    return around.within(0, 0)


def _slope(around: _Around) -> Band:
    """Degrees from 0 (level) to 90, by Horn's differences over 3 x 3 pixels ("Hill shading and the reflectance map",
    1981) in metres of ground.

    Each of the three rows (columns) gives a difference between its two outer pixels, or to the middle one where an
    outer one is invalid or beyond the raster; their mean, weighted 1 : 2 : 1, is the rise. Unknown where no two pixels
    beside each other are valid, in x or in y.
    """
    heights, valid = around.within(1, 1)
    across, known_across = _rise(heights, valid)
    down, known_down = (part.T for part in _rise(heights.T, valid.T))
    a, b, _, d, e, _ = around.grid.transform
    x, y = Ground(around.grid).rows(around.window.row, around.window.height)
    # rise per pixel = (a, d; b, e) times rise per unit of x and y, solved by Cramer's rule
    area = a * e - b * d
    rise_x, rise_y = (e * across - d * down) / area / x, (a * down - b * across) / area / y
    steep = np.ascontiguousarray(np.sqrt(rise_x * rise_x + rise_y * rise_y))
    return np.degrees(np.arctan(steep)), known_across & known_down


def _rise(heights: np.ndarray, valid: np.ndarray) -> Band:
    """Rise per pixel to the right (h, w), of heights (h + 2, w + 2)."""
    left, middle, right = heights[:, :-2], heights[:, 1:-1], heights[:, 2:]
    has_left, has_middle, has_right = valid[:, :-2], valid[:, 1:-1], valid[:, 2:]
    one_sided = np.where(has_right, right - middle, middle - left)
    rises = np.where(has_left & has_right, (right - left) / 2, one_sided)
    weights = ((has_left & has_right) | (has_middle & (has_left | has_right))).astype(np.float64)
    rises *= weights
    total = rises[:-2] + 2 * rises[1:-1] + rises[2:]
    weight = weights[:-2] + 2 * weights[1:-1] + weights[2:]
    return total / np.maximum(weight, 1), weight > 0


def _height_above_local(around: _Around) -> Band:
    """Metres above the mean of all valid pixels in the square of 2 radius + 1 pixels a side round each pixel.

    Of a surface model that is near the height above ground, where the square holds more ground than roofs.
    """
    heights, valid = around.within(*around.sides)
    down, across = (2 * side + 1 for side in around.sides)
    total = _box(heights, down, across)
    count = _box(valid.astype(np.float64), down, across)
    here, known = around.within(0, 0)
    return here - total / np.maximum(count, 1), known


def _box(values: np.ndarray, down: int, across: int) -> np.ndarray:
    """Sums over each `down` x `across` pixels, smaller by as many less one."""
    return _running(_running(values, down).T, across).T


def _running(values: np.ndarray, length: int) -> np.ndarray:
    """Sums of `length` rows from each row on; always added in one order, by sums of 1, 2, 4, ... rows.

    A cumulative sum would start at the window's first row, and its last bits would depend on where that is.
    """
    rows = len(values) - length + 1
    total: np.ndarray | None = None
    done, size, power = 0, 1, values  # power[i]: sum of rows i to i + size - 1
    while True:
        if length & size:
            part = power[done : done + rows]
            total = part if total is None else total + part
            done += size
        if done == length:
            assert total is not None
            return total
        power = power[:-size] + power[size:]
        size *= 2


@dataclass(frozen=True)
class Derived:
    """One kind of band: what computes it, and the pixels it needs to each side, given those that are averaged."""

    compute: Callable[[_Around], Band]
    margin: Callable[[tuple[int, int]], tuple[int, int]]


DERIVED: Mapping[str, Derived] = {
    "height": Derived(_height, lambda sides: (0, 0)),
    "slope": Derived(_slope, lambda sides: (1, 1)),
    "height_above_local": Derived(_height_above_local, lambda sides: sides),
}


class Derivation:
    """Computes the bands `names` of an elevation raster on its own grid.

    radius: metres to each side that `height_above_local` takes the mean of; at least one pixel, `MOST` at most. grid:
    of the raster; if it has no place, a grid of the same pixels that has one may stand for it.
    """

    def __init__(self, names: Sequence[str], radius: float, grid: Grid) -> None:
        self.names = tuple(names)
        self._grid = grid
        self.pixel = Ground(grid).pixel  # metres (down, across)
        self.wanted = [radius / metres for metres in self.pixel]  # pixels to each side, before the bounds
        down, across = (round(min(max(pixels, 1), MOST)) for pixels in self.wanted)
        self.sides = (down, across)
        margins = [DERIVED[name].margin(self.sides) for name in self.names]
        self._margin = (max(m[0] for m in margins), max(m[1] for m in margins))

    def read(self, window: Window, read: Read) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values float32 (bands, h, w), 0 where invalid, and validity (h, w) of a window inside the raster.

        And where (h, w) the elevation is valid, but too few pixels beside it are for all bands.
        """
        values = np.zeros((len(self.names), *window.shape), dtype=np.float32)
        valid, lost = (np.zeros(window.shape, dtype=bool) for _ in range(2))
        for top in range(0, window.height, SIDE):
            for left in range(0, window.width, SIDE):
                rows, cols = min(SIDE, window.height - top), min(SIDE, window.width - left)
                here = (slice(top, top + rows), slice(left, left + cols))
                part = Window(window.row + top, window.col + left, rows, cols)
                values[(slice(None), *here)], valid[here], lost[here] = self._read(part, read)
        return values, valid, lost

    def _read(self, window: Window, read: Read) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        around = self._around(window, read)
        measured = around.within(0, 0)[1]
        bands = [DERIVED[name].compute(around) for name in self.names]
        valid = np.logical_and.reduce([measured, *(known for _, known in bands)])
        values = np.stack([np.where(valid, band, 0).astype(np.float32) for band, _ in bands])
        return values, valid, measured & ~valid

    def _around(self, window: Window, read: Read) -> _Around:
        """A window with its margin; beyond the raster nothing is valid."""
        down, across = self._margin
        outer = Window(window.row - down, window.col - across, window.height + 2 * down, window.width + 2 * across)
        inside = outer.clip(self._grid.height, self._grid.width)
        heights, valid = np.zeros(outer.shape), np.zeros(outer.shape, dtype=bool)
        asked, shared = inside.shared(window), outer.shared(inside)
        if asked is not None and shared is not None:
            found, good = read(inside, asked[0])
            heights[shared[0]] = np.where(good, found[0], 0)
            valid[shared[0]] = good
        return _Around(heights, valid, window, self._margin, self.sides, self._grid)
