"""How a scene is cut for prediction: a pure function of its size and of the settings, with integers alone.

    tile    what the model sees; tiles overlap
    cell    what is finished when a tile is done: rows of cells and columns of cells partition the scene
    strip   a range of cell columns, as wide as memory allows
    shard   a range of cell rows of one strip: what is written, kept and resumed as a whole
    run     shards of one strip that follow each other and are labelled in one go

The tile grid is one for the whole scene: strips, shards and runs only choose which of its tiles are run, and run those
beside their edges once more. So neither of them changes what a tile sees, and a pixel gets the same votes in the same
order however the work was cut.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from vfmseg.errors import MachineError
from vfmseg.geo.grid import Spans, Tile, Window, tile_of

WIDEST_STRIP = 10240
"""Pixels; wider strips would save less than one tile in fifty of 224 px and cost memory."""

SHARD_ROWS = 1024
"""Pixel rows of a shard, about: what an interruption may cost at most, for each process."""

FEWEST_SHARDS = 16
"""A low scene is cut into about as many shards, so that several processes find work in it."""

HIGHEST_PILE = 2**16
"""Shards of a strip; of a scene of more than 67 million rows they are higher."""

MOST_SHARDS = 2**20
"""Of one scene: some 10^13 pixels."""


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis, and the cells that they finish; none is kept, as a scene may have billions.

    Blended: a tile finishes the pixels up to the start of the next one, which no later tile sees. Else each tile
    finishes its core, which ends in the middle of the overlap.
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
        """First pixel of a cell; for the cell after the last, the size of the axis."""
        if self.blended and cell < len(self.spans):
            return self.spans.start(cell)
        return self.spans.core(cell)

    def tiles_of(self, first: int, end: int) -> range:
        """The tiles that have a vote on the pixels of cells first to end - 1."""
        if not self.blended:
            return range(first, end)
        # the first tile that reaches beyond the cell's first pixel
        return range(self.spans.up_to(self.edge(first) - self.spans.tile), end)


@dataclass(frozen=True, slots=True)
class Shard:
    """Cells rows[0] to rows[1] - 1 of strip `strip`; `window` is the same in pixels."""

    strip: int
    number: int  # from the top of its strip
    rows: tuple[int, int]
    window: Window

    @property
    def name(self) -> str:
        """Name for files: strip and number."""
        return f"{self.strip:03}_{self.number:05}"


@dataclass(frozen=True)
class Run:
    """Shards of one strip that follow each other, top to bottom."""

    strip: int
    shards: tuple[Shard, ...]


class Place(NamedTuple):
    """Where a tile lies in the batch that it is run in. size: places of that batch; slot: 0 <= slot < size."""

    size: int
    slot: int


class Plan:
    """The cut of one scene. Strips are at most `widest` pixels wide where the tile grid allows it."""

    def __init__(
        self,
        height: int,
        width: int,
        tile: int,
        overlap: float,
        blended: bool,
        batch_size: int,
        widest: int = WIDEST_STRIP,
        shard_rows: int | None = None,
    ) -> None:
        """`overlap`: share of a tile, 0 <= overlap < 1. `shard_rows`: pixel rows of a shard, None = by the height."""
        self.tile = tile
        self.deep = blended and many_meet(tile, overlap)
        self.rows = Axis(Spans(height, tile, int(tile * overlap)), blended)
        self.cols = Axis(Spans(width, tile, int(tile * overlap)), blended)
        # a scene of one tile needs no batch of four; a function of the scene, so the same on every process
        self.batch_size = min(batch_size, len(self.rows) * len(self.cols))
        self._turn = (_even_step(self.batch_size) - len(self.cols)) % self.batch_size
        self.strips = Strips(self.cols, widest)
        rows = shard_rows or max(min(SHARD_ROWS, -(-height // FEWEST_SHARDS)), -(-height // HIGHEST_PILE))
        self.groups = Groups(self.rows, rows)
        if len(self.strips) * len(self.groups) > MOST_SHARDS:
            raise MachineError(
                f"a scene of {height} x {width} px would be written in {len(self.strips) * len(self.groups):,} pieces, "
                f"more than {MOST_SHARDS:,}: cut it into several scenes (gdal_translate -srcwin), and list these"
            )
        self.shards = Shards(self)

    def shard(self, strip: int, number: int) -> Shard:
        """A shard by its strip and its number from the top."""
        first, end = self.groups[number]
        return Shard(strip, number, (first, end), self._pixels(strip, first, end))

    def across(self, window: Window) -> list[Shard]:
        """The shards that hold the first row of a window and share columns with it, left to right."""
        groups = range(len(self.groups))
        number = bisect_right(groups, window.row, key=lambda n: self.rows.edge(self.groups[n][0])) - 1
        strips = range(len(self.strips))
        first = bisect_right(strips, window.col, key=lambda n: self.strip_columns(n)[0]) - 1
        end = bisect_left(strips, window.col + window.width, key=lambda n: self.strip_columns(n)[0])
        return [self.shard(strip, number) for strip in range(first, end)]

    def _pixels(self, strip: int, first: int, end: int) -> Window:
        top, bottom = self.rows.edge(first), self.rows.edge(end)
        left, right = self.strip_columns(strip)
        return Window(top, left, bottom - top, right - left)

    def strip_columns(self, strip: int) -> tuple[int, int]:
        """First pixel column of a strip, and the one after its last."""
        first, end = self.strips[strip]
        return self.cols.edge(first), self.cols.edge(end)

    def tile_columns(self, strip: int) -> range:
        """Columns of tiles that have a vote in a strip."""
        return self.cols.tiles_of(*self.strips[strip])

    def width_read(self, strip: int) -> int:
        """Pixel columns that the tiles of a strip see."""
        tiles = self.tile_columns(strip)
        return min(self.cols.size, self.cols.start(tiles[-1]) + self.tile) - self.cols.start(tiles[0])

    def tile_at(self, row: int, col: int) -> Tile:
        """The tile of a row and column of the grid."""
        return tile_of(self.rows.spans[row], self.cols.spans[col], self.tile)

    def place(self, row: int, col: int) -> Place:
        """Place of a tile in its batch. Libraries may round by it, so it must not depend on how work was cut.

        The tiles of the scene, counted row by row, fill batches of `batch_size`, and the last batch has as many places
        as tiles are left. Within a batch the places are turned by the number of the row, so that the part of a row
        that a strip holds does not begin at the same place in every row: all places would not be filled evenly then.
        """
        size, width = self.batch_size, len(self.cols)
        tiles, number = len(self.rows) * width, row * width + col
        first = number - number % size  # tile of the same batch
        if first + size > tiles:
            return Place(tiles - first, number - first)
        return Place(size, (number + self._turn * (first // width)) % size)

    def runs(self, shards: Iterable[Shard]) -> list[Run]:
        """Shards joined where they follow each other, so that no tile between them is run twice."""
        runs: list[list[Shard]] = []
        for shard in sorted(shards, key=lambda s: (s.strip, s.number)):
            last = runs[-1][-1] if runs else None
            if last is not None and (last.strip, last.number + 1) == (shard.strip, shard.number):
                runs[-1].append(shard)
            else:
                runs.append([shard])
        return [Run(run[0].strip, tuple(run)) for run in runs]

    def tiles_in(self, run: Run) -> int:
        """Number of tiles of a run, those beside its edges counted in."""
        first, end = run.shards[0].rows[0], run.shards[-1].rows[1]
        return len(self.rows.tiles_of(first, end)) * len(self.tile_columns(run.strip))


def many_meet(tile: int, overlap: float) -> bool:
    """Whether more than three tiles meet along each axis: too many for float32 to sum their votes to 1e-6."""
    return tile > 3 * (tile - int(tile * overlap))


class Strips:
    """Ranges of cell columns of about equal width, each at most `widest` pixels or one cell."""

    def __init__(self, cols: Axis, widest: int) -> None:
        self._cells = len(cols)
        self._count = min(max(1, -(-cols.size // widest)), self._cells)
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


def _even_step(size: int) -> int:
    """The step that visits the numbers below `size` most evenly: near the golden section, without a common divisor."""
    return min((step for step in range(1, size + 1) if gcd(step, size) == 1), key=lambda step: abs(step - 0.618 * size))


class Groups:
    """Ranges of cell rows of at least `pixel_rows` pixels each (the last one of what is left).

    Cells are equally high but for the first and the last two, so all groups but those at the ends have as many.
    """

    def __init__(self, rows: Axis, pixel_rows: int) -> None:
        cells, self._each = len(rows), -(-pixel_rows // rows.spans.step)
        first = next(_greedy(rows, pixel_rows, 0))
        self._head = first[1]  # cells of the first group
        self._regular = max(0, (cells - 2 - self._head) // self._each)
        self._tail = list(_greedy(rows, pixel_rows, self._head + self._regular * self._each))

    def __len__(self) -> int:
        return 1 + self._regular + len(self._tail)

    def __getitem__(self, number: int) -> tuple[int, int]:
        if number > self._regular:
            return self._tail[number - 1 - self._regular]
        first = self._head + (number - 1) * self._each
        return (0, self._head) if number == 0 else (first, first + self._each)


def _greedy(rows: Axis, pixel_rows: int, first: int) -> Iterator[tuple[int, int]]:
    """The groups from cell `first` on, each ended as soon as it is high enough."""
    for end in range(first + 1, len(rows) + 1):
        if rows.edge(end) - rows.edge(first) >= pixel_rows or end == len(rows):
            yield first, end
            first = end


class Shards:
    """All shards of a plan, strip by strip and from the top; each is computed when it is asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan.strips) * len(self._plan.groups)

    def __getitem__(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._plan.shard(*divmod(index, len(self._plan.groups)))

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))


def share_of(shards: Sequence[Shard] | Shards, rank: int, ranks: int) -> tuple[Shard, ...]:
    """The shards of one of several processes: as even as whole shards allow, each share in one piece."""
    return tuple(shards[i] for i in range(len(shards) * rank // ranks, len(shards) * (rank + 1) // ranks))
