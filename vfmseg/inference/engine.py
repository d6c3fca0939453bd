"""The streaming engine: readers -> batcher -> model -> blend -> sink, side by side, with a bounded queue between.

    readers   threads that read chunks of rows ahead (reading.py)
    batcher   a thread that cuts tiles, leaves out those without a valid pixel, and fills batches of constant shapes
    model     the calling thread: runs batches, adds the votes to the band of rows in flight, finishes rows
    sink      a thread that writes finished rows

Memory beyond the model's own, in bytes, for a strip of W pixels (as read), tiles of t, K classes, C bands of s bytes,
chunks of c rows, batches of B (`prepare` in job.py adds them up):

    band      4 (K + 1) t W          weighted sums and weights, on the model's device; twice that where more than three
                                     tiles meet along an axis, which are summed in float64
    chunks    (t + 4 c) W (C s + 1)  read and not yet used, and being read
    rows      3 t W (p + 1)          finished and not yet written, p bytes of products a pixel, and 4 t W of masks
    products  9 r W (K + 3)          r rows of shares while they become products (products.py), on the model's device
    written   2 b W p                b rows that wait until a row of the file's blocks is full, and are read back
    batches   4 B t^2 (5 C + 3 K)    filled, waiting and in the model

Nothing depends on the height of the scene. Files are joined when all this is free again, in 3 x 16 MiB (shards.py).
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
from vfmseg.inference.blend import Band
from vfmseg.inference.contracts import WAITING, Area, Finished, Model, Predictor, Product, Report, Sink, Tick
from vfmseg.inference.plan import Plan, Run
from vfmseg.inference.reading import Chunk, Readers, Rows, SceneSource, Stored, chunk_rows
from vfmseg.inference.stages import Pipe, Stages

PATIENT_ROWS = 4
"""Rows of tiles for which a batch waits to be filled."""


@dataclass(frozen=True)
class _Step:
    """One thing that happens in its turn: a tile's votes are added, a tile was left out, or a row of tiles ends."""

    tile: Tile | None = None
    number: int | None = None  # of the tile in the run; None: left out
    finished: Window | None = None  # rows of the strip that end here
    valid: np.ndarray | None = None  # of the finished rows
    top: int = 0  # first row that is still open


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
    """Label the shards of a run. The first error of any stage ends all of them and is raised as it was.

    `scenes`: the same scene once for each reader thread. `area`: tiles that hold none of it are not run, and pixels
    outside of it are not labelled. `progress` is told when rows are finished.
    """
    report = Report()
    with Stages() as stages:
        work = _Work(scenes, stored, plan, run, stages, model.rule, area)
        stages.start("reader", work.read)
        stages.start("batcher", work.cut)
        stages.start("sink", lambda: work.write(sink))
        # float64 is not known to every accelerator
        dtype = torch.float64 if plan.float64 and not model.device.startswith("mps") else torch.float32
        band = Band(model.classes, plan.tile, work.left, work.width, work.tile_top, blend, model.device, dtype)
        _consume(work, model.vote, product, band, report, progress)
        work.finish()
    report.stages = dict(stages.busy)
    return report


class _Work:
    """What the stages of one run share: where it lies, and the queues between them."""

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
        self.cells = range(run.shards[0].rows[0], run.shards[-1].rows[1])
        self.tile_rows = plan.rows.tiles_of(self.cells.start, self.cells.stop)
        self.tile_cols = plan.tile_columns(run.strip)
        self.left, right = plan.strip_columns(run.strip)
        self.width = right - self.left
        self.tile_top = plan.rows.start(self.tile_rows[0])
        read_left = plan.cols.start(self.tile_cols[0])
        read_right = min(plan.cols.size, plan.cols.start(self.tile_cols[-1]) + plan.tile)
        bottom = min(plan.rows.size, plan.rows.start(self.tile_rows[-1]) + plan.tile)
        self.place = Window(self.tile_top, read_left, bottom - self.tile_top, read_right - read_left)
        self.readers = Readers(scenes, stored, stages, None if area is None else self.needs)
        self.chunk_height = chunk_rows(stored.block[0], plan.tile)
        self.chunks: Pipe[Chunk] = Pipe(stages, 1)
        self.queue: Pipe[TileBatch | _Step | None] = Pipe(stages, 4 * len(self.tile_cols) + 4)
        self.waiting: Pipe[None] = Pipe(stages, WAITING)  # a token for each whole batch in the queue
        self.rows: Pipe[tuple[Window, dict[str, np.ndarray]] | None] = Pipe(stages, 2)
        self.written: Pipe[None] = Pipe(stages, 1)

    def read(self) -> None:
        """Thread: read the place of the run chunk by chunk."""
        self.readers.read(self.place, self.chunk_height, self.chunks)

    def cut(self) -> None:
        """Thread: cut tiles into batches, in the order of the grid; after each row of tiles say what is finished."""
        rows = Rows(self.chunks, self.place.row + self.place.height, self.rule)
        batcher = Batcher(self.plan.tile, self.hand_on)
        number = 0
        for row in self.tile_rows:
            rows.until(self.plan.rows.start(row) + self.plan.tile)
            started, blocked = time.perf_counter(), self.blocked
            for col in self.tile_cols:
                tile = self.plan.tile_at(row, col)
                if self.runs(rows, tile.window):
                    self.queue.put(_Step(tile, number))
                    batcher.add(rows, tile.window, self.plan.place(row, col), number)
                else:
                    self.queue.put(_Step(tile))
                number += 1
            self.queue.put(self.row_end(rows, row))
            # where tiles are left out for long, nothing that was cut before may wait for its batch to fill
            batcher.finish(number - PATIENT_ROWS * len(self.tile_cols) - OPEN_BATCHES * self.plan.batch_size)
            self.stages.worked("cut", time.perf_counter() - started - (self.blocked - blocked))
            if row + 1 < len(self.plan.rows):
                rows.forget(self.plan.rows.start(row + 1))
        batcher.finish()
        self.queue.put(None)

    @property
    def blocked(self) -> float:
        """Seconds for which the cutting thread has waited for the model."""
        return self.queue.blocked + self.waiting.blocked

    def runs(self, rows: Rows, window: Window) -> bool:
        """Whether the model has to see a tile: it is asked for and holds a valid pixel."""
        return (self.area is None or self.area.touches(window)) and bool(rows.valid(window).any())

    def needs(self, window: Window) -> bool:
        """Whether a tile that the area asks for may see any of a window."""
        assert self.area is not None
        reach = self.plan.tile - 1
        top, left = max(0, window.row - reach), max(0, window.col - reach)
        bottom, right = window.row + window.height + reach, window.col + window.width + reach
        return self.area.touches(Window(top, left, bottom - top, right - left))

    def row_end(self, rows: Rows, row: int) -> _Step:
        """What is finished after a row of tiles; nothing where the row only lends votes to the run."""
        rows_of = self.plan.rows
        if row not in self.cells:
            return _Step(top=rows_of.start(row + 1))
        window = Window(rows_of.edge(row), self.left, rows_of.edge(row + 1) - rows_of.edge(row), self.width)
        valid = rows.valid(window)
        if self.area is not None:
            valid &= self.area.mask(window)
        return _Step(finished=window, valid=valid, top=rows_of.edge(row + 1))

    def hand_on(self, batch: TileBatch) -> None:
        """Queue a batch for the model; waits while two are queued."""
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
    band: Band,
    report: Report,
    progress: Callable[[Tick], None] | None,
) -> None:
    """Run batches and take the steps in their order, each as soon as its votes are there."""
    stages = work.stages
    steps: deque[_Step] = deque()
    votes: dict[int, Tensor] = {}
    while True:
        started = time.perf_counter()
        item = work.queue.get()
        stages.worked("wait", time.perf_counter() - started)
        started = time.perf_counter()
        if isinstance(item, _Step):
            steps.append(item)
        elif item is not None:
            work.waiting.get()
            votes |= _votes(vote, item)
            stages.worked("model", time.perf_counter() - started)
            started = time.perf_counter()
        before = report.pixels
        while steps and (steps[0].number is None or steps[0].number in votes):
            step = steps.popleft()
            if step.tile is None:
                _end_row(work, band, step, product, report)
            elif step.number is None:
                report.skipped += 1
            else:
                band.add(step.tile, votes.pop(step.number))
                report.tiles += 1
        stages.worked("blend", time.perf_counter() - started)
        if progress is not None and report.pixels > before:
            progress(Tick(report.pixels - before, stages.busy, len(work.waiting)))
        if item is None:
            if steps:
                raise RuntimeError(f"{len(steps)} steps of a run were lost; please report this")
            return


def _votes(vote: Predictor, batch: TileBatch) -> dict[int, Tensor]:
    answer = vote(batch.tiles())
    return {number: answer[slot] for slot, number in batch.numbers.items()}


def _end_row(work: _Work, band: Band, step: _Step, product: Product, report: Report) -> None:
    """Turn finished rows into products, queue them for the sink, and move the band down."""
    window = step.finished
    if window is not None:
        assert step.valid is not None
        band.drop(window.row - band.top)  # votes on rows above the run: they belong to the shard before
        sums, weights = band.finished(window.height)
        if ((weights <= 0).cpu().numpy() & step.valid).any():
            raise RuntimeError(f"{window}: a tile was lost; please report this")
        _require_numbers(sums, window)
        work.rows.put((window, product(Finished(sums, weights, step.valid))))
        report.pixels += window.height * window.width
    band.drop(step.top - band.top)


def _require_numbers(sums: Tensor, window: Window) -> None:
    """DataError where the model answers no number: the largest of them would be a class that nothing speaks for."""
    if torch.isfinite(sums.sum()):  # one pass; only then look where
        return
    places = (~torch.isfinite(sums)).any(dim=0).nonzero()
    if not len(places):  # each is a number, and only their total is beyond all numbers
        return
    row, col = places[0].tolist()
    raise DataError(
        f"row {window.row + row}, column {window.col + col}: the model answers NaN or infinity near here; look for "
        "values in the scene that are no measurements and no nodata value names (such as -3.4e38), or for an overflow "
        "of half precision (use bf16 or fp32)"
    )
