"""Areas of equal number in an array that comes in bands of rows, as polygons of shapely, each in one piece.

Everything is in pixels (x the column, y the row): corners are whole numbers, so nothing is rounded. For example, of two
bands of one row each,

    1 1 2        band 0, rows 0 to 0
    2 1 2        band 1, rows 1 to 1

the three pixels of class 1 are one polygon with the corners (0, 0), (2, 0), (2, 2), (1, 2), (1, 1), (0, 1), the two
of class 2 at the right another, and the pixel of class 2 at the left, which touches nothing of its class, a third.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
from rasterio.features import shapes
from rasterio.transform import Affine

from vfmseg.geo.opening import gdal

_BATCH = 20_000
"""Polygons handled at a time."""

Pieces = tuple[np.ndarray, np.ndarray]
"""Polygons (n) and their class ids int64 (n)."""


def trace(bands: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> Iterator[Pieces]:
    """Polygons (n) and their numbers (n) of the 4-connected areas of equal number, each when it is complete.

    bands: from the top down, numbers (h, width) of a type that rasterio can trace, and bool (h, width), False where
    there is no polygon. An area is complete when it does not reach the last row seen. Memory is that of one band and
    of the polygons that are not complete, so that a scene may have any height.
    """
    seam = Seam(width)
    top = 0
    for numbers, shown in bands:
        bottom = top + len(numbers)
        yield from seam.add(_traced(numbers, shown, top), top, bottom)
        top = bottom
    yield from seam.close(set())


def _traced(numbers: np.ndarray, shown: np.ndarray, top: int) -> Iterator[Pieces]:
    """Polygons of one band as if there were no others, some at a time."""
    with gdal():
        found = shapes(numbers, mask=shown, connectivity=4, transform=Affine.translation(0, top))
        while some := list(islice(found, _BATCH)):
            yield _assembled([shape["coordinates"] for shape, _ in some]), np.array([i for _, i in some], np.int64)


def _assembled(polygons: list[Any]) -> np.ndarray:
    """Polygons of shapely from lists of rings of points."""
    import shapely

    rings = list(chain.from_iterable(polygons))
    points = np.array(list(chain.from_iterable(rings)), dtype=np.float64)
    ends = np.cumsum([0, *map(len, rings)]), np.cumsum([0, *map(len, polygons)])
    made: np.ndarray = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, ends)
    return made


class Seam:
    """Joins the polygons of one band to those of the next, along the line between them.

    Held are the polygons that reach the last row seen, each as a list of the parts that the bands cut it into. Parts
    are united only when the polygon is complete: one through all bands would else be united as often as there are
    bands, each time the whole of it. Which parts belong together is kept as a union-find: `_parent` leads from a
    number to the one it was joined to, until a number leads to itself.
    """

    def __init__(self, width: int) -> None:
        self._parts: dict[int, list[Any]] = {}  # of each open polygon; its number is that of one of its parts
        self._ids: dict[int, int] = {}
        self._parent: dict[int, int] = {}  # union-find: the number a joined polygon goes by now
        self._owner: np.ndarray = np.full(width, -1)  # the open polygon of each pixel of the last row; -1 without
        self._next = 0

    def add(self, band: Iterable[Pieces], top: int, bottom: int) -> Iterator[Pieces]:
        """Take the polygons of rows top to bottom - 1, and give what is complete after them."""
        first, last = np.full((2, len(self._owner)), -1)  # number of the polygon of each pixel of these rows
        for polygons, ids in band:
            edges = [_edge_pixels(polygons, y) for y in (top, bottom)]
            open_ = np.unique(np.concatenate([which for which, _ in edges]))  # touch the row above or below the band
            numbers = np.full(len(polygons), -1)
            numbers[open_] = np.arange(self._next, self._next + len(open_))
            self._next += len(open_)
            for i, number in zip(open_.tolist(), numbers[open_].tolist(), strict=True):
                self._parts[number], self._ids[number], self._parent[number] = [polygons[i]], int(ids[i]), number
            for owner, (which, cols) in zip((first, last), edges, strict=True):
                owner[cols] = numbers[which]
            yield polygons[numbers < 0], ids[numbers < 0]
        both = (self._owner >= 0) & (first >= 0)  # columns in which two polygons meet at the seam
        for one, other in np.unique(np.stack([self._owner[both], first[both]], axis=1), axis=0).tolist():
            self._join(one, other)
        seen, inverse = np.unique(last, return_inverse=True)
        self._owner = np.array([self._root(n) if n >= 0 else -1 for n in seen.tolist()])[inverse]
        yield from self.close(set(self._owner.tolist()))

    def close(self, still_open: set[int]) -> Iterator[Pieces]:
        """Give the polygons of all other numbers."""
        import shapely

        done = [number for number in self._parts if number not in still_open]
        ids = np.array([self._ids.pop(number) for number in done], dtype=np.int64)
        groups = [self._parts.pop(number) for number in done]
        self._parent = {number: number for number in self._parts}
        united = [group[0] if len(group) == 1 else shapely.union_all(group) for group in groups]
        if united:
            yield _without_flat_corners(np.array(united, dtype=object)), ids

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = number = self._parent[self._parent[number]]
        return number

    def _join(self, one: int, other: int) -> None:
        """Two polygons share an edge: they are one if they are of one class."""
        one, other = self._root(one), self._root(other)
        if one == other or self._ids[one] != self._ids[other]:
            return
        small, large = sorted((one, other), key=lambda number: len(self._parts[number]))
        self._parent[small] = large
        self._parts[large] += self._parts.pop(small)
        del self._ids[small]


def _edge_pixels(polygons: np.ndarray, y: int) -> Pieces:
    """Which polygon (n) and column (n) of all unit edges of outlines that lie on the line y.

    An outline with the edge (3, y) to (6, y) gives its polygon three times, with columns 3, 4 and 5.
    """
    import shapely

    points, which = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    on = np.flatnonzero((points[:-1, 1] == y) & (points[1:, 1] == y) & (which[:-1] == which[1:]))
    left = np.minimum(points[on, 0], points[on + 1, 0]).astype(np.int64)
    length = np.abs(points[on, 0] - points[on + 1, 0]).astype(np.int64)
    step = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.repeat(which[on], length), np.repeat(left, length) + step


def _without_flat_corners(polygons: np.ndarray) -> np.ndarray:
    """The same polygons without corners in the middle of a straight edge, which seams leave behind.

    A corner goes where the points before and after it have its x, or its y. So the polygons do not tell where the bands
    were cut. All rings of all polygons are handled at once: `rings` and `ends` say where each ring and polygon starts.
    """
    import shapely

    kind, points, (rings, ends) = shapely.to_ragged_array(polygons)
    first, closing = rings[:-1], rings[1:] - 1
    ring = np.repeat(np.arange(len(first)), np.diff(rings))
    before, after = np.roll(np.arange(len(points)), 1), np.roll(np.arange(len(points)), -1)
    before[first] = closing - 1  # the closing point repeats the first
    flat = ((points == points[before]) & (points == points[after])).any(axis=1)
    flat[closing] = True
    kept = np.flatnonzero(~flat)
    starts = np.concatenate([[0], np.cumsum(np.bincount(ring[kept], minlength=len(first)) + 1)])
    corners = np.empty((starts[-1], 2))
    corners[np.arange(len(kept)) + ring[kept]] = points[kept]  # each ring before has a closing point
    corners[starts[1:] - 1] = corners[starts[:-1]]
    made: np.ndarray = shapely.from_ragged_array(kind, corners, (starts, ends))
    return made
