"""One axis of a scene's cut: where tiles start, which pixels each one finishes, and the ranges that are worked on.

All of it is integer arithmetic and kept in a few numbers, as a scene may have billions of tiles. An example that
plan.py goes on with: 50 rows in tiles of 16 with overlap 0.25, that is 4 px, so that tiles step by 12. The last tile
is pulled back to end with the scene:

    tile               0     1     2     3
    starts at          0    12    24    34      sees 0-15, 12-27, 24-39, 34-49
    cell, blended      0-11 12-23 24-33 34-49   up to the start of the next tile
    cell, unblended    0-13 14-25 26-36 37-49   up to the middle of the overlap

Blended, the rows 12 to 15 get votes of tiles 0 and 1, so they are finished only with tile 1; rows 0 to 11 are finished
with tile 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vfmseg.geo.grid import Spans


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis, and the cell of each: the pixels that are finished when that tile is done.

    Cell i belongs to tile i, and the cells partition the axis. Blended: a cell ends where the next tile starts, as no
    later tile has a vote before that. Unblended: a cell is the tile's core, which ends in the middle of the overlap,
    as each pixel is answered by the one tile that sees it farthest from an edge.
    """

    spans: Spans
    blended: bool

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def size(self) -> int:
        """Pixels of the axis."""
        return self.spans.size

    def start(self, tile: int) -> int:
        """First pixel of a tile."""
        return self.spans.start(tile)

    def edge(self, cell: int) -> int:
        """First pixel of a cell; for the cell after the last, the size of the axis.

        So cell i is the pixels edge(i) to edge(i + 1) - 1. In the example: 0, 12, 24, 34, 50 blended, 0, 14, 26, 37, 50
        unblended.
        """
        if self.blended and cell < len(self.spans):
            return self.spans.start(cell)
        return self.spans.core(cell)

    def tiles_of(self, first: int, end: int) -> range:
        """The tiles that have a vote on the pixels of cells first to end - 1.

        Unblended those are the tiles of the same numbers. Blended also the tiles before that reach into cell `first`:
        in the example cells 2 and 3 start at row 24, and tile 1 sees rows 12 to 27, so the answer is 1, 2, 3.
        """
        if not self.blended:
            return range(first, end)
        # a tile that starts at s sees pixels up to s + tile - 1: those with s <= edge - tile end before the cell
        return range(self.spans.up_to(self.edge(first) - self.spans.tile), end)


class Strips:
    """(first, end) ranges of cell columns, left to right, of about equal width.

    Each is at most `widest` pixels, or one cell where a cell is wider. In tiles of 16 that step by 12, 70 columns are
    the cells 0, 12, 24, 36, 48, 54; with `widest` = 30 they make the ranges (0, 2), (2, 4), (4, 6): 24, 24 and 22 px.
    """

    def __init__(self, cols: Axis, widest: int) -> None:
        self._cells = len(cols)
        self._count = min(max(1, -(-cols.size // widest)), self._cells)
        # cells are not equally wide, so the quotient may be a few strips too low
        while self._count < self._cells and any(cols.edge(b) - cols.edge(a) > widest for a, b in self):
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, strip: int) -> tuple[int, int]:
        if not 0 <= strip < self._count:
            raise IndexError(strip)
        return round(strip * self._cells / self._count), round((strip + 1) * self._cells / self._count)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self[strip] for strip in range(self._count))


class ShardRows:
    """(first, end) ranges of cell rows, top to bottom, of at least `pixel_rows` pixels (the last: of what is left).

    They are the rows of the shards, the same in every strip. In the example, with `pixel_rows` = 20: (0, 2) and (2, 4),
    the rows 0 to 23 and 24 to 49.

    Only the first cell and the last two have another height than the step between tiles: unblended, the first core
    has no neighbour above; and the last tile is pulled back. So all ranges but those at the ends have the same number
    of cells, and the millions of ranges that a high scene may have are computed, not listed.
    """

    def __init__(self, rows: Axis, pixel_rows: int) -> None:
        cells, self._each = len(rows), -(-pixel_rows // rows.spans.step)
        first = next(_greedy(rows, pixel_rows, 0))
        self._head = first[1]  # cells of the first range
        self._regular = max(0, (cells - 2 - self._head) // self._each)  # ranges of `_each` cells that follow it
        self._tail = list(_greedy(rows, pixel_rows, self._head + self._regular * self._each))

    def __len__(self) -> int:
        return 1 + self._regular + len(self._tail)

    def __getitem__(self, number: int) -> tuple[int, int]:
        if number > self._regular:
            return self._tail[number - 1 - self._regular]
        first = self._head + (number - 1) * self._each
        return (0, self._head) if number == 0 else (first, first + self._each)


def _greedy(rows: Axis, pixel_rows: int, first: int) -> Iterator[tuple[int, int]]:
    """The ranges of cells from cell `first` on, each ended as soon as it is `pixel_rows` high."""
    for end in range(first + 1, len(rows) + 1):
        if rows.edge(end) - rows.edge(first) >= pixel_rows or end == len(rows):
            yield first, end
            first = end
