"""How a scene is cut for prediction: a function of its size and of the settings alone, in whole numbers.

    tile    what the model sees, t x t pixels; tiles overlap
    cell    the pixels that are finished when a tile is done (axes.py); rows and columns of cells partition the scene
    strip   a range of cell columns, as wide as memory allows
    shard   a range of cell rows of one strip: what is written, kept and resumed as a whole
    run     shards of one strip that follow each other and are labelled in one go

A scene of 50 x 70 px in tiles of 16 with overlap 0.25, blended, strips of at most 30 px, shards of at least 20 rows:

    tile rows start at      0 12 24 34            which are the first rows of the cells, too
    tile columns start at   0 12 24 36 48 54
    strips                  columns 0-23, 24-47, 48-69: cell columns 0-1, 2-3, 4-5
    shards of each strip    rows 0-23 and 24-49: cell rows 0-1, 2-3; strip 1 has 001_00000 and 001_00001
    tiles run for strip 1   tile columns 1, 2, 3: tile 1 sees columns 12-27 and has a vote in 24-27; 40 columns are read
    runs                    where nothing is labelled yet, one for each strip; where 001_00000 is there already, that
                            of strip 1 is shard 001_00001 alone: tile rows 1, 2, 3, of which row 1 only lends votes

After tile row 0 the rows 0-11 are finished, after row 1 the rows 12-23 (and the first shard), after row 2 24-33.

The tile grid is one for the whole scene. Strips, shards and runs only choose which of its tiles are run; a tile that
has votes on both sides of an edge between them is run on both sides. So none of them changes what a tile sees, and a
pixel gets the same votes in the same order (that of the grid) however the work was cut: the bytes of the map are the
same on one process or eight, in 1 GiB or in 4.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from vfmseg.errors import MachineError
from vfmseg.geo.grid import Spans, Tile, Window, tile_of
from vfmseg.inference.axes import Axis, ShardRows, Strips

WIDEST_STRIP = 10240
"""Pixels. Tiles beside the edge between two strips are run in both: about one column of tiles more for each strip.

With overlap 0.25 that is one column in 61 for tiles of 224 px, in 27 for 512 px and in 13 for 1024 px. Twice the width
would save half of it, and take twice the memory: buffers grow with the width of a strip (engine.py).
"""

SHARD_ROWS = 1024
"""Pixel rows of a shard, about: an interruption costs each process at most the one that it works on."""

FEWEST_SHARDS = 16
"""Shards of a strip, about, in scenes of fewer than 16 x 1024 rows, so that several processes find work in them."""

MOST_IN_STRIP = 2**16
"""Shards of a strip; in a scene of more than 2^16 x 1024 = 67 million rows they are higher than 1024 rows."""

MOST_SHARDS = 2**20
"""Shards of one scene, each a file for each product, in one folder; 2^20 of 1024 x 10240 px are some 10^13 pixels."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of the map: the cell rows rows[0] to rows[1] - 1 of one strip; `window` is the same in pixels."""

    strip: int
    number: int  # from the top of its strip
    rows: tuple[int, int]
    window: Window

    @property
    def name(self) -> str:
        """Name for files: strip and number, such as 001_00012."""
        return f"{self.strip:03}_{self.number:05}"


@dataclass(frozen=True)
class Run:
    """Shards of one strip that follow each other, top to bottom."""

    strip: int
    shards: tuple[Shard, ...]


class Place(NamedTuple):
    """Where a tile stands in the batch that it is run in. size: tiles in a full one; slot: 0 <= slot < size."""

    size: int
    slot: int


class Plan:
    """The cut of one scene of height x width pixels, as described above; it opens no file and keeps no list of tiles.

    Strips are at most `widest` pixels wide where the tile grid allows it.
    """

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
        """`tile`: pixels. `overlap`: share of a tile, 0 <= overlap < 1. `blended`: tiles are weighted and added.

        `batch_size`: tiles of one call of the model. `shard_rows`: least pixel rows of a shard, None = by the height.
        """
        self.tile = tile
        self.float64 = blended and many_meet(tile, overlap)  # what votes are summed in
        self.rows = Axis(Spans(height, tile, int(tile * overlap)), blended)
        self.cols = Axis(Spans(width, tile, int(tile * overlap)), blended)
        # a scene of one tile needs no batch of four; a function of the scene, so the same on every process
        self.batch_size = min(batch_size, len(self.rows) * len(self.cols))
        self._turn = (_even_step(self.batch_size) - len(self.cols)) % self.batch_size  # see `place`
        self.strips = Strips(self.cols, widest)
        rows = shard_rows or max(min(SHARD_ROWS, -(-height // FEWEST_SHARDS)), -(-height // MOST_IN_STRIP))
        self.shard_rows = ShardRows(self.rows, rows)
        self.shards = Shards(self)
        if len(self.shards) > MOST_SHARDS:
            raise MachineError(
                f"a scene of {height} x {width} px would be written in {len(self.shards):,} pieces, "
                f"more than {MOST_SHARDS:,}: cut it into several scenes (gdal_translate -srcwin), and list these"
            )

    def shard(self, strip: int, number: int) -> Shard:
        """A shard by its strip and its number from the top."""
        first, end = self.shard_rows[number]
        return Shard(strip, number, (first, end), self._pixels(strip, first, end))

    def across(self, window: Window) -> list[Shard]:
        """The shards that hold the first row of a window and share columns with it, left to right.

        In the example above, a window of rows 24 to 29 and columns 20 to 49 gets 000_00001, 001_00001 and 002_00001.
        """
        numbers = range(len(self.shard_rows))  # bisect computes only the ranges that it looks at
        number = bisect_right(numbers, window.row, key=lambda n: self.rows.edge(self.shard_rows[n][0])) - 1
        strips = range(len(self.strips))
        first = bisect_right(strips, window.col, key=lambda n: self.strip_columns(n)[0]) - 1
        end = bisect_left(strips, window.col + window.width, key=lambda n: self.strip_columns(n)[0])
        return [self.shard(strip, number) for strip in range(first, end)]

    def _pixels(self, strip: int, first: int, end: int) -> Window:
        """The pixels of cell rows first to end - 1 of a strip."""
        top, bottom = self.rows.edge(first), self.rows.edge(end)
        left, right = self.strip_columns(strip)
        return Window(top, left, bottom - top, right - left)

    def strip_columns(self, strip: int) -> tuple[int, int]:
        """First pixel column of a strip, and the one after its last."""
        first, end = self.strips[strip]
        return self.cols.edge(first), self.cols.edge(end)

    def tile_columns(self, strip: int) -> range:
        """Tile columns that have a vote in a strip; blended, one or more of them start in the strip before."""
        return self.cols.tiles_of(*self.strips[strip])

    def width_read(self, strip: int) -> int:
        """How many pixel columns the tiles of a strip see: more than the strip is wide, as tiles reach beyond it."""
        tiles = self.tile_columns(strip)
        return min(self.cols.size, self.cols.start(tiles[-1]) + self.tile) - self.cols.start(tiles[0])

    def tile_at(self, row: int, col: int) -> Tile:
        """The tile in a row and a column of the tile grid, counted from 0."""
        return tile_of(self.rows.spans[row], self.cols.spans[col], self.tile)

    def place(self, row: int, col: int) -> Place:
        """The batch's size and the tile's slot in it: the same in every strip, run and process.

        Libraries may compute the last bits of an answer in another way in a batch of another size or in another slot of
        it, so both must follow from the tile's number in the scene, row * width + col, alone; `width` is the number of
        tiles in a row. Numbers 0 to B - 1 (B: `batch_size`) are the scene's first batch, B to 2 B - 1 the second; the
        last one is as large as tiles are left. In the batch whose first tile lies in grid row r,

            slot = (number + r * turn) mod B        with turn = (step - width) mod B

        All tiles of a batch are turned alike, so no two of them get one slot. Which tiles are run together may depend
        on the cut: those of a strip fill whichever slots are free (batches.py), and a batch with free slots costs as
        much as a full one. That is what the turn is for. Without it, where B divides `width`, each column would have
        one slot in all rows: of 16 tiles in a row and B = 16, a strip of columns 0 to 7 would fill the slots 0 to 7
        alone, and all its batches would be half empty. The turn moves a column by `step` slots from row to row. For
        B = 16 the step is 9 (`_even_step`): rows 0, 1, 2 of the strip fill the slots 0-7, then 9-15 and 0, then 2-9.

        Counted for 144 cuts (tiles of 256, 512, 1024 px, overlap 0.25, B of 4, 8, 16, scenes 10000 and 20000 px high
        and 10980 to 50000 px wide): 1.5 % fewer batches in all, within 0.2 % of the least that could hold the tiles.
        Most is saved where it fits worst without: 20000 x 12000 px in tiles of 1024 take 111 batches of 4 instead of
        130, or 29 of 16 instead of 52. Where nothing is to be gained it may cost some: up to 53 instead of 48.
        """
        size, width = self.batch_size, len(self.cols)
        tiles, number = len(self.rows) * width, row * width + col
        first = number - number % size  # number of the first tile of the same batch
        if first + size > tiles:  # the last batch; a turn evens out over many only
            return Place(tiles - first, number - first)
        return Place(size, (number + self._turn * (first // width)) % size)

    def runs(self, shards: Iterable[Shard]) -> list[Run]:
        """Shards joined where they follow each other in a strip: tiles across the edge between two are run once."""
        runs: list[list[Shard]] = []
        for shard in sorted(shards, key=lambda s: (s.strip, s.number)):
            last = runs[-1][-1] if runs else None
            if last is not None and (last.strip, last.number + 1) == (shard.strip, shard.number):
                runs[-1].append(shard)
            else:
                runs.append([shard])
        return [Run(run[0].strip, tuple(run)) for run in runs]

    def tiles_in(self, run: Run) -> int:
        """Number of tiles of a run, with those that start outside of it and only lend it votes."""
        first, end = run.shards[0].rows[0], run.shards[-1].rows[1]
        return len(self.rows.tiles_of(first, end)) * len(self.tile_columns(run.strip))


def many_meet(tile: int, overlap: float) -> bool:
    """Whether more than three tiles may meet along an axis (overlap above 2/3): their votes are summed in float64.

    A float32 sum of n numbers above 0 is off by up to n * 2^-24 (6e-8) of itself: 5e-7 for 3 x 3 tiles, but 6e-6 for
    the 10 x 10 that meet with an overlap of 0.9. Class probabilities shall be right to 1e-6.
    """
    return tile > 3 * (tile - int(tile * overlap))


def _even_step(size: int) -> int:
    """The step by which 0, step, 2 step, ... modulo `size` visits all slots, and any few in a row far from each other.

    That takes a number without a common divisor with `size`; the golden section 0.618 of `size` spreads best. 3 of 4,
    5 of 8, 9 of 16, 19 of 32.
    """
    return min((step for step in range(1, size + 1) if gcd(step, size) == 1), key=lambda step: abs(step - 0.618 * size))


class Shards:
    """All shards of a plan as a sequence, strip by strip and from the top; each is computed when it is asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan.strips) * len(self._plan.shard_rows)

    def __getitem__(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._plan.shard(*divmod(index, len(self._plan.shard_rows)))

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))


def share_of(shards: Sequence[Shard] | Shards, rank: int, ranks: int) -> tuple[Shard, ...]:
    """The shards that process `rank` of `ranks` labels: neighbours in the sequence, so that they make few runs.

    Shares differ by one shard at most, and each shard is in one of them: 10 on 4 processes are 2, 3, 2 and 3.
    """
    return tuple(shards[i] for i in range(len(shards) * rank // ranks, len(shards) * (rank + 1) // ranks))
