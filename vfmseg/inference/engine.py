"""The streaming engine: labels one run of a scene in four stages that work side by side.

    readers   threads that read chunks of rows ahead (reading.py)
    batcher   a thread that cuts tiles, leaves out those without a valid pixel, and fills batches (batches.py)
    model     the calling thread: runs batches, adds their votes to the open rows (blend.py), finishes rows
    sink      a thread that writes finished rows

Between two stages is a queue of few places: whoever is too fast waits, and memory has a bound. The batcher puts events
("the votes of tile 7 come here", "the row of tiles ends") and batches into one queue; the model takes the events in
their order, each as soon as the votes it needs are there. So votes are added in the order of the grid, although a batch
may bring those of tiles 8 and 12 before those of tile 7.

Memory beside that of the model itself, in bytes, for a strip of W pixel columns (as read), tiles of t x t px, K
classes, C bands of s bytes in m modalities, chunks of c rows, batches of B tiles, p bytes of products a pixel, and
b = 256 rows of blocks of the files that are written (`prepare` in job.py adds it up):

    open rows  4 (K + 1) t W          weighted sums and weights in float32, on the model's device; twice that in
                                      float64, where more than three tiles meet along an axis
    chunks     (t + 4 c) W (C s + m)  values as stored and masks, read and not yet used, and being read
    finished   3 t W (p + 1)          rows of products and masks that are not yet written, and 4 t W of masks queued
    products   9 r W (K + 3)          r rows of probabilities that become products (products.py), on the model's device
    written    2 b W p                rows that wait until a row of the file's blocks is full, and are read back
    batches    4 B t^2 (5 C + 3 K)    float32 pixels being filled, waiting and in the model, and the model's answers

With W = 10240, t = 512, K = 6, 4 bands of 16 bits in one modality, c = 256, B = 4 and labels alone that is 140 + 135 +
50 + 6 + 5 + 152 = 488 MiB. Nothing depends on the height of the scene. Files are joined when all this is free again, in
3 x 16 MiB (shards.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vfmseg.data.image import Known
from vfmseg.errors import DataError
from vfmseg.geo.grid import Tile, Window
from vfmseg.inference.batches import OPEN_BATCHES, Batcher, TileBatch
from vfmseg.inference.blend import OpenRows
from vfmseg.inference.contracts import WAITING, Area, Finished, Model, Predictor, Product, Report, Sink, Tick
from vfmseg.inference.plan import Plan, Run
from vfmseg.inference.reading import Chunk, Chunks, Readers, SceneSource, Stored, chunk_rows
from vfmseg.inference.stages import Pipe, Stages

PATIENT_ROWS = 4
"""Rows of tiles that a batch waits for more tiles, before it is run with free slots.

Where most of a scene is left out, it would else fill late or never, and hold back all rows that need its votes.
"""


@dataclass(frozen=True)
class _Event:
    """What the model stage does next: add a tile's votes, count one that was left out, or end a row (no tile)."""

    tile: Tile | None = None
    number: int | None = None  # of the tile in the run, from 0 on in the order of the grid; None: left out
    finished: Window | None = None  # pixels of the strip that no later tile has a vote on
    valid: np.ndarray | None = None  # bool (h, w) of these
    top: int = 0  # first row of the scene that is open afterwards


def label_run(
    scenes: Sequence[SceneSource],
    stored: Stored,
    plan: Plan,
    run: Run,
    model: Model,
    blend: str,
    product: Product,
    sink: Sink,
    *,
    area: Area | None = None,
    progress: Callable[[Tick], None] | None = None,
) -> Report:
    """Label the shards of a run into `sink`; returns what was done: tiles, pixels, seconds.

    `scenes`: the same scene once for each reader thread, as none may share a file handle. `blend`: one of
    blend.BLENDS. `area`: tiles that hold none of it are not run, and pixels outside of it are not labelled.
    `progress` is told when rows are finished. The first error of any stage ends all of them and is raised as it was.
    """
    report = Report()
    with Stages() as stages:
        work = _Work(scenes, stored, plan, run, stages, model.rule, area)
        stages.start("reader", work.read)
        stages.start("batcher", work.cut)
        stages.start("sink", lambda: work.write(sink))
        # mps has no float64
        dtype = torch.float64 if plan.float64 and not model.device.startswith("mps") else torch.float32
        rows = OpenRows(model.classes, plan.tile, work.left, work.width, work.tile_top, blend, model.device, dtype)
        _consume(work, model.vote, product, rows, report, progress)
        work.finish()
    report.stages = dict(stages.busy)
    return report


class _Work:
    """What the stages of one run share: where it lies in the scene, and the queues between them."""

    def __init__(
        self,
        scenes: Sequence[SceneSource],
        stored: Stored,
        plan: Plan,
        run: Run,
        stages: Stages,
        rule: Known,
        area: Area | None,
    ) -> None:
        self.plan, self.stages, self.rule, self.area = plan, stages, rule, area
        # rows of cells that the run finishes; rows and columns of tiles with a vote there, which begin before them
        self.cells = range(run.shards[0].rows[0], run.shards[-1].rows[1])
        self.tile_rows = plan.rows.tiles_of(self.cells.start, self.cells.stop)
        self.tile_cols = plan.tile_columns(run.strip)
        self.left, right = plan.strip_columns(run.strip)
        self.width = right - self.left
        self.tile_top = plan.rows.start(self.tile_rows[0])
        read_left = plan.cols.start(self.tile_cols[0])
        read_right = min(plan.cols.size, plan.cols.start(self.tile_cols[-1]) + plan.tile)
        bottom = min(plan.rows.size, plan.rows.start(self.tile_rows[-1]) + plan.tile)
        self.seen = Window(self.tile_top, read_left, bottom - self.tile_top, read_right - read_left)  # by any tile
        self.readers = Readers(scenes, stored, stages, None if area is None else self.must_read)
        self.chunk_height = chunk_rows(stored.block[0], plan.tile)
        self.chunks: Pipe[Chunk] = Pipe(stages, 1)
        # events of about four rows of tiles: so far may the batcher be ahead of the model
        self.queue: Pipe[TileBatch | _Event | None] = Pipe(stages, 4 * len(self.tile_cols) + 4)
        self.waiting: Pipe[None] = Pipe(stages, WAITING)  # a token for each batch in the queue, as events are many
        self.rows: Pipe[tuple[Window, dict[str, np.ndarray]] | None] = Pipe(stages, 2)  # finished, not yet written
        self.written: Pipe[None] = Pipe(stages, 1)  # one token, when all is

    def read(self) -> None:
        """Thread: read what the tiles of the run see, chunk by chunk."""
        self.readers.read(self.seen, self.chunk_height, self.chunks)

    def cut(self) -> None:
        """Thread: cut tiles into batches in the order of the grid; each tile gets its event, each row its end."""
        chunks = Chunks(self.chunks, self.seen.row + self.seen.height, self.rule)
        batcher = Batcher(self.plan.tile, self.hand_on)
        number = 0
        for row in self.tile_rows:
            chunks.until(self.plan.rows.start(row) + self.plan.tile)
            started, blocked = time.perf_counter(), self.blocked
            for col in self.tile_cols:
                tile = self.plan.tile_at(row, col)
                if self.must_run(chunks, tile.window):
                    self.queue.put(_Event(tile, number))
                    batcher.add(chunks, tile.window, self.plan.place(row, col), number)
                else:
                    self.queue.put(_Event(tile))
                number += 1
            self.queue.put(self.row_end(chunks, row))
            # batches that were begun long ago go as they are; full ones have gone already
            batcher.finish(number - PATIENT_ROWS * len(self.tile_cols) - OPEN_BATCHES * self.plan.batch_size)
            self.stages.worked("cut", time.perf_counter() - started - (self.blocked - blocked))
            if row + 1 < len(self.plan.rows):
                chunks.forget(self.plan.rows.start(row + 1))
        batcher.finish()
        self.queue.put(None)

    @property
    def blocked(self) -> float:
        """Seconds for which the batcher has waited for the model so far: they are no work of its own."""
        return self.queue.blocked + self.waiting.blocked

    def must_run(self, chunks: Chunks, window: Window) -> bool:
        """Whether the model has to see a tile: it holds a valid pixel, and a pixel of the area."""
        return (self.area is None or self.area.touches(window)) and bool(chunks.valid(window).any())

    def must_read(self, window: Window) -> bool:
        """Whether a tile that is run may see any of a window; False only where none does.

        A tile that shares a pixel with the window lies within tile - 1 px round it, and so does its part of the area.
        """
        assert self.area is not None
        reach = self.plan.tile - 1
        height, width = window.height + 2 * reach, window.width + 2 * reach
        return self.area.touches(Window(window.row - reach, window.col - reach, height, width))

    def row_end(self, chunks: Chunks, row: int) -> _Event:
        """The end of a row of tiles: its row of cells is finished, unless the row only lends votes to the run.

        In the example of plan.py a run of the second shard starts with tile row 1 (rows 12 to 27), which finishes
        nothing of it; the end of tile row 2 finishes rows 24 to 33, and leaves those from 34 on open.
        """
        rows_of = self.plan.rows
        if row not in self.cells:  # a row above: its cells belong to the shard before
            return _Event(top=rows_of.start(row + 1))
        window = Window(rows_of.edge(row), self.left, rows_of.edge(row + 1) - rows_of.edge(row), self.width)
        valid = chunks.valid(window)
        if self.area is not None:
            valid &= self.area.mask(window)
        return _Event(finished=window, valid=valid, top=rows_of.edge(row + 1))

    def hand_on(self, batch: TileBatch) -> None:
        """Queue a batch for the model; waits while as many as may wait are queued."""
        self.waiting.put(None)
        self.queue.put(batch)

    def write(self, sink: Sink) -> None:
        """Thread: hand finished rows to the sink until there are no more."""
        while (item := self.rows.get()) is not None:
            started = time.perf_counter()
            sink.write(*item)
            self.stages.worked("write", time.perf_counter() - started)
        self.written.put(None)

    def finish(self) -> None:
        """Wait until everything is written."""
        self.rows.put(None)
        self.written.get()


def _consume(
    work: _Work,
    vote: Predictor,
    product: Product,
    rows: OpenRows,
    report: Report,
    progress: Callable[[Tick], None] | None,
) -> None:
    """The model stage: run batches, and take the events in their order, each as soon as its votes are there."""
    stages = work.stages
    events: deque[_Event] = deque()
    votes: dict[int, Tensor] = {}  # {number of a tile: (K, t, t)} that wait for their turn
    while True:
        started = time.perf_counter()
        item = work.queue.get()
        stages.worked("wait", time.perf_counter() - started)
        started = time.perf_counter()
        if isinstance(item, _Event):
            events.append(item)
        elif item is not None:
            work.waiting.get()
            votes |= _votes(vote, item)
            stages.worked("model", time.perf_counter() - started)
            started = time.perf_counter()
        before = report.pixels
        while events and (events[0].number is None or events[0].number in votes):
            event = events.popleft()
            if event.tile is None:
                _end_row(work, rows, event, product, report)
            elif event.number is None:
                report.skipped += 1
            else:
                rows.add(event.tile, votes.pop(event.number))
                report.tiles += 1
        stages.worked("blend", time.perf_counter() - started)
        if progress is not None and report.pixels > before:
            progress(Tick(report.pixels - before, stages.busy, len(work.waiting)))
        if item is None:
            if events:
                raise RuntimeError(f"{len(events)} events of a run were lost; please report this")
            return


def _votes(vote: Predictor, batch: TileBatch) -> dict[int, Tensor]:
    """{number of a tile: its votes (K, t, t)} of one batch; the answers in free slots are dropped."""
    answer = vote(batch.tiles())
    return {number: answer[slot] for slot, number in batch.numbers.items()}


def _end_row(work: _Work, rows: OpenRows, event: _Event, product: Product, report: Report) -> None:
    """Turn finished rows into products, queue them for the sink, and let go of what no longer is open."""
    window = event.finished
    if window is not None:
        assert event.valid is not None
        rows.drop(window.row - rows.top)  # rows above the run, on which its first tiles have votes, too
        sums, weights = rows.finished(window.height)
        # every valid pixel of the area lies in a tile that was run, and all weights are above 0
        if ((weights <= 0).cpu().numpy() & event.valid).any():
            raise RuntimeError(f"{window}: a tile was lost; please report this")
        _require_numbers(sums, window)
        work.rows.put((window, product(Finished(sums, weights, event.valid))))
        report.pixels += window.height * window.width
    rows.drop(event.top - rows.top)


def _require_numbers(sums: Tensor, window: Window) -> None:
    """DataError if any of the sums (K, h, w) is NaN or infinite: the class of such a pixel would be arbitrary."""
    if torch.isfinite(sums.sum()):  # one pass for all that are well: a NaN or infinity makes the total one
        return
    places = (~torch.isfinite(sums)).any(dim=0).nonzero()
    if not len(places):  # all are finite, only their total overflows
        return
    row, col = places[0].tolist()
    raise DataError(
        f"row {window.row + row}, column {window.col + col}: the model answers NaN or infinity near here; look for "
        "values in the scene that are no measurements and no nodata value names (such as -3.4e38), or for an overflow "
        "of half precision (use bf16 or fp32)"
    )
