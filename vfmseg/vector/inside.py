"""Which pixels of a scene lie in an area: bool masks of windows, cut from squares of the scene that are burnt once.

Squares lie at multiples of 256 pixels, whatever window is asked for: window rows 200 to 299 take their mask from the
squares that start at rows 0 and 256. So a pixel has one answer, in every window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from rasterio.features import geometry_mask
from rasterio.transform import Affine

from vfmseg.errors import OutsideError
from vfmseg.geo.dateline import Rings
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.quiet import in_pixels

_BLOCK = 256
"""Height and width in pixels of the fixed squares that polygons are burnt in."""

_KEPT = 512
"""Squares that are kept, of 64 KiB each: some rows of tiles of a strip."""

_BANDS = 8
"""Rows of squares for which the parts of the polygons are kept."""

_MARGIN = 2
"""Pixels around a square in which its polygons are left as they are."""

_NUDGE = 2.0**-20
"""Pixels (a millionth) by which a point at the height of a row's centres is moved up."""

_FEW = 64
"""Rings of so few points are burnt as they are: looking for the part that matters would take longer."""


class Polygons:
    """Which pixels of a grid lie in any of some polygons: those whose centre does.

    A centre on an edge belongs to the side below it or left of it: areas that share an edge share no pixel.
    polygons: in the CRS of the grid; name: where they are from. DataError if they hold the centre of no pixel.
    """

    def __init__(self, polygons: Sequence[Rings], grid: Grid, name: str) -> None:
        self._grid = grid
        self._burnt = lru_cache(_KEPT)(self._burn)  # readers and tiles ask for a square many times
        self._band = lru_cache(_BANDS)(self._cut)
        self._placed: list[Rings] = []  # in pixels: row, column
        self._boxes = np.empty((len(polygons), 4))  # top, left, bottom, right of each outline, in pixels
        for i, rings in enumerate(polygons):
            placed = [_off_centres(np.stack(grid.pixel(*ring.T), axis=1)) for ring in rings]
            self._boxes[i] = [*placed[0].min(axis=0), *placed[0].max(axis=0)]
            self._placed.append(placed)
        if not any(burnt.any() for _, burnt in self._squares(Window(0, 0, grid.height, grid.width))):
            raise OutsideError(
                f"{name}: none of its polygons holds the centre of a pixel of the scene; check the area's place, size "
                "and coordinate reference system"
            )

    def mask(self, window: Window) -> np.ndarray:
        """Bool (h, w): True inside. A pixel's answer is the same in every window; beyond the scene it is False."""
        inside = np.zeros(window.shape, dtype=bool)
        for square, burnt in self._squares(window):
            shared = window.shared(square)
            if shared is not None:
                here, there = shared
                inside[here] = burnt[there]
        return inside

    def touches(self, window: Window) -> bool:
        """Whether any pixel of a window lies inside."""
        for square, burnt in self._squares(window):
            shared = window.shared(square)
            if shared is not None and burnt[shared[1]].any():
                return True
        return False

    def _squares(self, window: Window) -> Iterator[tuple[Window, np.ndarray]]:
        """(place, mask) of the squares that meet a window and the box of a polygon, cropped to the scene.

        Squares without a polygon are left out: there the mask is False. Why not burn each window: GDAL's answer for a
        centre that lies on an edge hangs on rounding, and so on where the raster begins. Burnt window by window, the
        area would have flaws along the windows' seams.
        """
        top, left, bottom, right = self._boxes.T
        window = window.clip(self._grid.height, self._grid.width)
        for row in range(window.row // _BLOCK * _BLOCK, window.row + window.height, _BLOCK):
            level = (top < row + _BLOCK) & (bottom > row)
            for col in range(window.col // _BLOCK * _BLOCK, window.col + window.width, _BLOCK) if level.any() else ():
                near = np.flatnonzero(level & (left < col + _BLOCK) & (right > col))
                if near.size:
                    burnt = self._burnt(row, col, tuple(near.tolist()))
                    burnt = burnt[: self._grid.height - row, : self._grid.width - col]
                    yield Window(row, col, *burnt.shape), burnt

    def _burn(self, row: int, col: int, near: tuple[int, ...]) -> np.ndarray:
        """Bool (256, 256): the mask of one square, of the polygons `near` it.

        GDAL looks at every point it is given, so it gets those that matter here: of an outline of a million
        points each square would else go through them all.
        """
        box = _around(row, col, col + _BLOCK)
        band = self._band(row)
        shapes = [_geometry(rings) for i in near if (rings := _thinned(band[i], box))]
        if not shapes:
            return np.zeros((_BLOCK, _BLOCK), dtype=bool)
        with in_pixels():
            # in pixels of the scene: the square's first corner is (col, row), and rows run downwards as they are
            return geometry_mask(shapes, (_BLOCK, _BLOCK), Affine(1, 0, col, 0, 1, row), invert=True)

    def _cut(self, row: int) -> dict[int, Rings]:
        """{number of a polygon: what matters of it} in a row of squares, of which each square takes its part."""
        top, _, bottom, _ = self._boxes.T
        level = np.flatnonzero((top < row + _BLOCK) & (bottom > row))
        box = _around(row, 0, self._grid.width)
        return {i: _thinned(self._placed[i], box) for i in level.tolist()}


def _off_centres(ring: np.ndarray) -> np.ndarray:
    """A ring in pixels with no point at the height of a row's centres.

    GDAL fills an edge that runs along them or not by the turn of the ring at its lowest point, wherever that is; in a
    ring that crosses itself it says nothing of the edge.
    """
    rows, cols = ring.T
    return np.stack([np.where(rows % 1 == 0.5, rows - _NUDGE, rows), cols], axis=1)


def _around(row: int, left: int, right: int) -> np.ndarray:
    """Upper left and lower right corner (2, 2) of part of a row of squares, with a margin."""
    return np.array([(row - _MARGIN, left - _MARGIN), (row + _BLOCK + _MARGIN, right + _MARGIN)], dtype=np.float64)


def _thinned(rings: Rings, box: np.ndarray) -> Rings:
    """Rings with fewer points that hold the same points of a box (2, 2), to the last bit.

    Of points that follow each other beyond one side of the box, the first and last stay: what those between them
    enclose lies beyond that side as well. No edge that meets the box is changed, so nothing is rounded anew, as it
    would be by clipping.
    """
    thinned = []
    for ring in rings:
        for side, sign in ((0, 1.0), (1, -1.0)) if len(ring) > _FEW else ():
            for axis in (0, 1):
                beyond = sign * (ring[:, axis] - box[side, axis]) < 0
                ring = ring[~(beyond & np.roll(beyond, 1) & np.roll(beyond, -1))]
        if len(ring):
            thinned.append(ring)
    return thinned


def _geometry(rings: Rings) -> dict[str, Any]:
    """GeoJSON, x the column and y the row, of rings in pixels."""
    return {"type": "Polygon", "coordinates": [np.concatenate([r, r[:1]])[:, ::-1].tolist() for r in rings]}
