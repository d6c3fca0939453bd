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

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import NamedTuple

from vfmseg.geo.grid import Span, Tile, Window, spans, tile_of

WIDEST_STRIP = 10240
"""Pixels; wider strips would save less than one tile in fifty of 224 px and cost memory."""

SHARD_ROWS = 1024
"""Pixel rows of a shard, about: what an interruption may cost at most, for each process."""

FEWEST_SHARDS = 16
"""A low scene is cut into about as many shards, so that several processes find work in it."""


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis. starts: first pixel of each. edges: cell i holds the pixels edges[i] to edges[i + 1]."""

    size: int
    tile: int
    spans: tuple[Span, ...]
    starts: tuple[int, ...]
    edges: tuple[int, ...]
    blended: bool

    def __len__(self) -> int:
        return len(self.starts)

    def tiles_of(self, first: int, end: int) -> range:
        """The tiles that have a vote on the pixels of cells first to end - 1."""
        if not self.blended:
            return range(first, end)
        # starts ascend: the first tile that reaches beyond the cell's first pixel
        reach = bisect_right(self.starts, self.edges[first] - self.tile)
        return range(reach, end)


def axis(size: int, tile: int, overlap_px: int, blended: bool) -> Axis:
    """Tiles and cells along an axis of `size` pixels.

    Blended: a tile finishes the pixels up to the start of the next one, which no later tile sees. Else each tile
    finishes its core, which ends in the middle of the overlap.
    """
    parts = tuple(spans(size, tile, overlap_px))
    starts, cores, _ = zip(*parts, strict=True)
    return Axis(size, tile, parts, starts, (*(starts if blended else cores), size), blended)


@dataclass(frozen=True)
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
        self.rows = axis(height, tile, int(tile * overlap), blended)
        self.cols = axis(width, tile, int(tile * overlap), blended)
        # a scene of one tile needs no batch of four; a function of the scene, so the same on every process
        self.batch_size = min(batch_size, len(self.rows) * len(self.cols))
        self._turn = (_even_step(self.batch_size) - len(self.cols)) % self.batch_size
        self.strips = _strips(self.cols, widest)
        rows = shard_rows or min(SHARD_ROWS, -(-height // FEWEST_SHARDS))
        self.shards = tuple(
            Shard(strip, number, (first, end), self._pixels(strip, first, end))
            for strip in range(len(self.strips))
            for number, (first, end) in enumerate(_groups(self.rows, rows))
        )

    def _pixels(self, strip: int, first: int, end: int) -> Window:
        top, bottom = self.rows.edges[first], self.rows.edges[end]
        left, right = self.strip_columns(strip)
        return Window(top, left, bottom - top, right - left)

    def strip_columns(self, strip: int) -> tuple[int, int]:
        """First pixel column of a strip, and the one after its last."""
        first, end = self.strips[strip]
        return self.cols.edges[first], self.cols.edges[end]

    def tile_columns(self, strip: int) -> range:
        """Columns of tiles that have a vote in a strip."""
        return self.cols.tiles_of(*self.strips[strip])

    def width_read(self, strip: int) -> int:
        """Pixel columns that the tiles of a strip see."""
        tiles = self.tile_columns(strip)
        return min(self.cols.size, self.cols.starts[tiles[-1]] + self.tile) - self.cols.starts[tiles[0]]

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


def _strips(cols: Axis, widest: int) -> tuple[tuple[int, int], ...]:
    """Ranges of cell columns of about equal width, each at most `widest` pixels or one cell."""
    wanted = max(1, -(-cols.size // widest))
    while True:
        bounds = [round(i * len(cols) / wanted) for i in range(wanted + 1)]
        ranges = tuple((a, b) for a, b in pairwise(bounds) if b > a)
        if wanted >= len(cols) or all(cols.edges[b] - cols.edges[a] <= widest for a, b in ranges):
            return ranges
        wanted += 1


def _even_step(size: int) -> int:
    """The step that visits the numbers below `size` most evenly: near the golden section, without a common divisor."""
    return min((step for step in range(1, size + 1) if gcd(step, size) == 1), key=lambda step: abs(step - 0.618 * size))


def _groups(rows: Axis, pixel_rows: int) -> list[tuple[int, int]]:
    """Ranges of cell rows of at least `pixel_rows` pixels each (the last one of what is left)."""
    groups: list[tuple[int, int]] = []
    first = 0
    for end in range(1, len(rows) + 1):
        if rows.edges[end] - rows.edges[first] >= pixel_rows or end == len(rows):
            groups.append((first, end))
            first = end
    return groups


def share_of(shards: tuple[Shard, ...], rank: int, ranks: int) -> tuple[Shard, ...]:
    """The shards of one of several processes: as even as whole shards allow, each share in one piece."""
    return shards[len(shards) * rank // ranks : len(shards) * (rank + 1) // ranks]
