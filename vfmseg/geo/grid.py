"""Where pixels are: grids, windows, and the one function that cuts a scene into tiles.

Integers and affine arithmetic only: nothing here opens a file. Training, validation and prediction all cut
scenes with `cut`, so they cannot disagree about where a tile lies or which tile answers for a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vfmseg.errors import DataError
from vfmseg.geo.crs import same_ground

Affine6 = tuple[float, float, float, float, float, float]

IDENTITY: Affine6 = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""The transform that GDAL reports for a file without one: pixel numbers are coordinates."""

Slices = tuple[slice, slice]
"""Rows and columns of an array (..., h, w): `array[(..., *slices)]`."""

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

    def shared(self, other: Window) -> tuple[Slices, Slices] | None:
        """Where the pixels that two windows share lie in this one, and where in the other; None if they share none.

        Each is (rows, columns), to index arrays of the windows' sizes. Window(0, 0, 4, 4) and Window(2, 3, 4, 4) share
        rows 2 and 3 and column 3 of the scene: (2:4, 3:4) in the first, (0:2, 0:1) in the second.
        """
        top, left = max(self.row, other.row), max(self.col, other.col)
        bottom = min(self.row + self.height, other.row + other.height)
        right = min(self.col + self.width, other.col + other.width)
        if bottom <= top or right <= left:
            return None
        here, there = (
            (slice(top - one.row, bottom - one.row), slice(left - one.col, right - one.col)) for one in (self, other)
        )
        return here, there

    def __str__(self) -> str:
        """Rows and columns as a reader of messages counts them: from 0, the last one included."""
        last = (self.row + self.height - 1, self.col + self.width - 1)
        return f"rows {self.row} to {last[0]}, columns {self.col} to {last[1]}"


def _clip(start: int, length: int, size: int) -> tuple[int, int]:
    """First index and the one after the last of a span, as far as it lies in 0..size."""
    first = min(max(start, 0), size)
    return first, max(min(start + length, size), first)


@dataclass(frozen=True)
class Grid:
    """The pixel grid of a scene.

    crs: "EPSG:32633" or WKT, None if the file has none. transform: (a, b, c, d, e, f) with
    x = a col + b row + c and y = d col + e row + f in units of the crs; row 0, col 0 is the outer corner of
    the first pixel. height, width: pixels. A map with north at the top has b = d = 0 and e < 0; with a = 10, c = 500000
    the centre of column 2 lies at x = 500025.
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
        determinant = a * e - b * d  # area of a pixel, negative where rows run southwards; Cramer's rule below
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
        # four corners are enough: between them both grids are affine, so that they cannot differ by more there
        corners = [(0, 0), (0, self.width), (self.height, 0), (self.height, self.width)]
        pairs = [(self.point(*corner), other.point(*corner)) for corner in corners]
        return all(max(abs(x - u), abs(y - v)) <= _TOLERANCE * pixel for (x, y), (u, v) in pairs)


@dataclass(frozen=True)
class Tile:
    """One piece of a scene: the window that is read, and the core that this tile answers for."""

    window: Window
    core: Window


Span = tuple[int, int, int]
"""A tile along one axis: its first pixel, the first of its core, and the one after the core."""


class Spans:
    """The tiles along one axis of `size` pixels, in order; each is computed when it is asked for, so none is kept.

    Tiles step by tile - overlap_px; the last one is pulled back so that it ends with the scene. An axis that is not
    longer than a tile has a single one, at 0. Neighbours' cores meet in the middle of their overlap: 10 pixels in
    tiles of 4 that overlap by 2 are the spans (0, 0, 3), (2, 3, 5), (4, 5, 7), (6, 7, 10).
    """

    def __init__(self, size: int, tile: int, overlap_px: int = 0) -> None:
        if tile < 1 or size < 1:
            raise DataError(f"cannot cut {size} pixels into tiles of {tile}: both must be at least 1")
        if not 0 <= overlap_px < tile:
            raise DataError(
                f"tiles of {tile} pixels cannot overlap by {overlap_px}: expected 0 to {tile - 1}; try {tile // 4}"
            )
        self.size = size
        self.tile = tile
        self.step = tile - overlap_px
        self.last = max(size - tile, 0)  # first pixel of the last tile
        self._count = -(-self.last // self.step) + 1  # rounded up: the last step may be a short one

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Span:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self.start(index), self.core(index), self.core(index + 1)

    def start(self, index: int) -> int:
        """First pixel of a tile."""
        return min(index * self.step, self.last)

    def core(self, index: int) -> int:
        """First pixel of a tile's core; for the tile after the last, the size of the axis."""
        if index == 0:
            return 0
        if index == self._count:
            return self.size
        return (self.start(index - 1) + self.tile + self.start(index)) // 2  # middle of the overlap with the one before

    def up_to(self, pixel: int) -> int:
        """How many tiles start at or before a pixel."""
        if pixel >= self.last:
            return self._count
        return max(0, pixel // self.step + 1)


class Tiles:
    """The tiles that cover a scene, row by row; each is computed when it is asked for."""

    def __init__(self, height: int, width: int, tile: int, overlap_px: int = 0) -> None:
        self.rows = Spans(height, tile, overlap_px)
        self.cols = Spans(width, tile, overlap_px)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    def __getitem__(self, index: int) -> Tile:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, col = divmod(index, len(self.cols))
        return tile_of(self.rows[row], self.cols[col], self.rows.tile)

    def __iter__(self) -> Iterator[Tile]:
        return (self[index] for index in range(len(self)))


def cut(height: int, width: int, tile: int, overlap_px: int = 0) -> Tiles:
    """Tiles that cover a scene of height x width pixels, row by row.

    Each window is exactly tile x tile; it reaches beyond the scene only where the scene is smaller than a
    tile. The cores partition the scene: neighbours meet in the middle of their overlap, so each pixel belongs
    to a tile that sees it far from an edge.
    """
    return Tiles(height, width, tile, overlap_px)


def tile_of(rows: Span, cols: Span, tile: int) -> Tile:
    """The tile of a span of rows and one of columns."""
    (row, top, bottom), (col, left, right) = rows, cols
    return Tile(Window(row, col, tile, tile), Window(top, left, bottom - top, right - left))
