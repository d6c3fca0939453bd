"""Where pixels are: grids, windows, and the one function that cuts a scene into tiles.

Integers and affine arithmetic only: nothing here opens a file. Training, validation and prediction all cut
scenes with `cut`, so they cannot disagree about where a tile lies or which tile answers for a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from vfmseg.errors import DataError
from vfmseg.geo.crs import same_ground

Affine6 = tuple[float, float, float, float, float, float]

IDENTITY: Affine6 = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""The transform that GDAL reports for a file without one: pixel numbers are coordinates."""

_TOLERANCE = 0.05
"""Pixels by which corners may differ in grids of the same place (headers round their numbers)."""


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of pixels: first row and column (may be negative), height and width, all in pixels."""

    row: int
    col: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Rows of the window, to index an array with (only for windows that start inside the array)."""
        return slice(self.row, self.row + self.height)

    @property
    def cols(self) -> slice:
        """Columns of the window, to index an array with (only for windows that start inside the array)."""
        return slice(self.col, self.col + self.width)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.height, self.width)

    def clip(self, height: int, width: int) -> Window:
        """The part inside a scene of height x width pixels; no rows or no columns if wholly beyond it."""
        top, bottom = _clip(self.row, self.height, height)
        left, right = _clip(self.col, self.width, width)
        return Window(top, left, bottom - top, right - left)

    def __str__(self) -> str:
        """Rows and columns as a reader of messages counts them: from 0, the last one included."""
        last = (self.row + self.height - 1, self.col + self.width - 1)
        return f"rows {self.row} to {last[0]}, columns {self.col} to {last[1]}"


def _clip(start: int, length: int, size: int) -> tuple[int, int]:
    first = min(max(start, 0), size)
    return first, max(min(start + length, size), first)


@dataclass(frozen=True)
class Grid:
    """The pixel grid of a scene.

    crs: "EPSG:32633" or WKT, None if the file has none. transform: (a, b, c, d, e, f) with
    x = a col + b row + c and y = d col + e row + f in units of the crs; row 0, col 0 is the outer corner of
    the first pixel. height, width: pixels.
    """

    crs: str | None
    transform: Affine6
    height: int
    width: int

    @property
    def georeferenced(self) -> bool:
        """Whether the file says where on Earth it lies: it has a CRS and a transform."""
        return self.crs is not None and self.transform != IDENTITY

    def point(self, row: float, col: float) -> tuple[float, float]:
        """(x, y) in units of the crs of a place in pixels; (0.5, 0.5) is the centre of the first pixel."""
        a, b, c, d, e, f = self.transform
        return (a * col + b * row + c, d * col + e * row + f)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """(row, col) in pixels of a place in units of the crs: the inverse of `point`."""
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        return ((a * (y - f) - d * (x - c)) / determinant, (e * (x - c) - b * (y - f)) / determinant)

    def crop(self, window: Window) -> Grid:
        """The grid of a window, which may reach beyond the scene."""
        a, b, _, d, e, _ = self.transform
        x, y = self.point(window.row, window.col)
        return Grid(self.crs, (a, b, x, d, e, y), window.height, window.width)

    def same_place(self, other: Grid) -> bool:
        """Whether the two grids can be laid on each other pixel by pixel.

        Sizes must be equal, and what both files say of CRS and transform must agree (corners within 0.05
        pixel; not heights). A file that says nothing, such as a PNG label of a GeoTIFF, contradicts nothing.
        """
        if (self.height, self.width) != (other.height, other.width):
            return False
        if self.crs is not None and other.crs is not None and not same_ground(self.crs, other.crs):
            return False
        if IDENTITY in (self.transform, other.transform):
            return True
        a, b, _, d, e, _ = self.transform
        pixel = max(abs(a) + abs(b), abs(d) + abs(e))
        corners = [(0, 0), (0, self.width), (self.height, 0), (self.height, self.width)]
        pairs = [(self.point(*corner), other.point(*corner)) for corner in corners]
        return all(max(abs(x - u), abs(y - v)) <= _TOLERANCE * pixel for (x, y), (u, v) in pairs)


@dataclass(frozen=True)
class Tile:
    """One piece of a scene: the window that is read, and the core that this tile answers for."""

    window: Window
    core: Window


def starts(size: int, tile: int, overlap_px: int) -> list[int]:
    """First pixels of the tiles along one axis of `size` pixels, ascending, without repeats.

    Tiles step by tile - overlap_px; the last one is pulled back so that it ends with the scene. An axis that
    is not longer than a tile has the single start 0.
    """
    if tile < 1 or size < 1:
        raise DataError(f"cannot cut {size} pixels into tiles of {tile}: both must be at least 1")
    if not 0 <= overlap_px < tile:
        raise DataError(
            f"tiles of {tile} pixels cannot overlap by {overlap_px}: expected 0 to {tile - 1}; try {tile // 4}"
        )
    if size <= tile:
        return [0]
    last = size - tile
    return [*range(0, last, tile - overlap_px), last]


def cut(height: int, width: int, tile: int, overlap_px: int = 0) -> list[Tile]:
    """Tiles that cover a scene of height x width pixels, row by row.

    Each window is exactly tile x tile; it reaches beyond the scene only where the scene is smaller than a
    tile. The cores partition the scene: neighbours meet in the middle of their overlap, so each pixel belongs
    to a tile that sees it far from an edge.
    """
    rows = spans(height, tile, overlap_px)
    cols = spans(width, tile, overlap_px)
    return [tile_of(row, col, tile) for row in rows for col in cols]


Span = tuple[int, int, int]
"""A tile along one axis: its first pixel, the first of its core, and the one after the core."""


def tile_of(rows: Span, cols: Span, tile: int) -> Tile:
    """The tile of a span of rows and one of columns."""
    (row, top, bottom), (col, left, right) = rows, cols
    return Tile(Window(row, col, tile, tile), Window(top, left, bottom - top, right - left))


def spans(size: int, tile: int, overlap_px: int) -> list[Span]:
    """Each tile along one axis, in order."""
    firsts = starts(size, tile, overlap_px)
    seams = [(one + tile + two) // 2 for one, two in pairwise(firsts)]
    return list(zip(firsts, [0, *seams], [*seams, size], strict=True))
