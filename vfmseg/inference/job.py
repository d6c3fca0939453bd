"""One scene labelled from end to end: into arrays, or into map files that can be resumed and shared by processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vfmseg.errors import MachineError, VfmsegError
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.writer import BLOCK
from vfmseg.heap import give_back
from vfmseg.inference.contracts import Area, Model, Product, Report, Sink, Tick
from vfmseg.inference.engine import label_run
from vfmseg.inference.output import ALONE, SILENT, Output, Team, Watch, targets_of
from vfmseg.inference.plan import WIDEST_STRIP, Plan, Run, many_meet, share_of
from vfmseg.inference.products import ROWS
from vfmseg.inference.ranks import meet
from vfmseg.inference.reading import SceneSource, Stored, chunk_rows
from vfmseg.inference.shards import Parts, RunSink
from vfmseg.recipe.predict import PredictSection

MEBI = 2**20


@dataclass(frozen=True)
class Job:
    """A scene, its plan and the model that labels it. `scenes`: the same scene once for each reader thread."""

    scenes: Sequence[SceneSource]
    stored: Stored
    model: Model
    product: Product
    settings: PredictSection  # with its tile, no larger than the scene
    plan: Plan
    memory: int  # bytes of the buffers, as estimated
    area: Area | None = None

    @property
    def grid(self) -> Grid:
        """The grid of the labels."""
        return self.scenes[0].grid


def prepare(
    scenes: Sequence[SceneSource],
    stored: Stored,
    bands: Mapping[str, int],
    model: Model,
    product: Product,
    product_bytes: int,
    settings: PredictSection,
    area: Area | None = None,
) -> Job:
    """Plan a job. Strips are as wide as `settings.memory_limit` allows; MachineError if one tile is too much.

    `bands` {modality: number}; `product_bytes`: of all products at one pixel.
    """
    grid = scenes[0].grid
    # a tile larger than the scene would be mostly padding
    tile = min(tile_of(settings), max(grid.height, grid.width))
    settings = settings.model_copy(update={"tile": tile})
    if tile > WIDEST_STRIP:
        raise MachineError(
            f"tiles of {tile} px are wider than a strip may be ({WIDEST_STRIP} px): choose a smaller tile"
        )
    fixed, column = _memory(stored, bands, model.classes, product_bytes, settings)
    room = (settings.memory_limit * MEBI - fixed) // column
    # a strip's tiles reach beyond it on both sides
    widest = min(WIDEST_STRIP, room if grid.width <= room else room - 2 * tile)
    if widest < tile:
        least = (fixed + column * min(grid.width, 3 * tile)) // MEBI + 1
        raise MachineError(
            f"predict.memory_limit = {settings.memory_limit} MiB is too little for tiles of {tile} px in "
            f"batches of {settings.batch_size} with {model.classes} classes; it takes at least {least} MiB: raise it, "
            "or choose a smaller tile or batch"
        )
    blended = settings.blend != "none"  # unblended tiles answer for their cores alone
    plan = Plan(grid.height, grid.width, tile, settings.overlap, blended, settings.batch_size, widest)
    used = max(plan.width_read(strip) for strip in range(len(plan.strips)))
    return Job(scenes, stored, model, product, settings, plan, fixed + column * used, area)


def _memory(
    stored: Stored, bands: Mapping[str, int], classes: int, product_bytes: int, settings: PredictSection
) -> tuple[int, int]:
    """Bytes of the buffers: what does not depend on the width of a strip, and what each pixel column adds.

    The terms are those of engine.py.
    """
    tile, batch = tile_of(settings), settings.batch_size
    channels = sum(bands.values())
    size = max((np.dtype(stored.types.get(name, np.float32)).itemsize for name in bands), default=4)
    chunk = chunk_rows(stored.block[0], tile)
    fixed = 4 * batch * tile**2 * (5 * channels + 3 * classes)
    chunks = (tile + 4 * chunk) * (channels * size + len(bands))
    rows = 3 * tile * (product_bytes + 1) + 4 * tile
    products = 9 * ROWS * (classes + 3)
    written = 2 * BLOCK * product_bytes
    deep = settings.blend != "none" and many_meet(tile, settings.overlap)
    band = (8 if deep else 4) * (classes + 1) * tile
    return fixed, band + chunks + rows + products + written


def tile_of(settings: PredictSection) -> int:
    """Side of a tile in pixels; whoever asks for a job has settled it (ValueError if not)."""
    if settings.tile is None:
        raise ValueError("the side of a tile is not settled: fill predict.tile before a job is prepared")
    return settings.tile


@dataclass
class Arrays:
    """A sink that keeps everything: {product: (bands, H, W)}."""

    height: int
    width: int
    kept: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, window: Window, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep rows."""
        for name, rows in arrays.items():
            if name not in self.kept:
                self.kept[name] = np.empty((len(rows), self.height, self.width), dtype=rows.dtype)
            self.kept[name][:, window.rows, window.cols] = rows


def into(job: Job, sink: Sink, progress: Callable[[Tick], None] | None = None) -> Report:
    """Label the whole scene in this process."""
    report = Report()
    for run in job.plan.runs(job.plan.shards):
        report.add(_label(job, run, sink, progress))
    return report


def into_files(
    job: Job,
    output: Output,
    layers: Mapping[str, Layer],
    work: Mapping[str, Any],
    team: Team = ALONE,
    watch: Watch = SILENT,
) -> Report:
    """Label the scene into the maps of `output`, one for each layer; each process of the team does its share.

    Finished pieces of this `work` are kept beside the target until all are there. The caller sees to it that no other
    run writes there meanwhile (`ranks.alone`). Returns what this process did.
    """
    target, (rank, ranks) = output.path, team
    parts = Parts(target, job.plan, job.grid, layers, work)

    def together() -> None:
        if ranks > 1:  # processes that label scenes of their own have nothing to wait for
            meet()

    together()  # first of all: processes that are not connected must not touch the pieces
    if rank == 0:
        parts.prepare(output.resume, output.overwrite)
    together()
    if not parts.folder.is_dir():
        raise MachineError(
            f"{parts.folder}: the first process has made this folder, but process {rank} does not find it; processes "
            "on several machines need an output on a disk that they share"
        )
    report = Report()
    mine = share_of(tuple(parts.missing(job.plan.shards)), rank, ranks)
    if watch.planned is not None:
        watch.planned(job, sum(shard.window.height * shard.window.width for shard in mine))
    together()  # nobody may finish a shard before everybody has looked
    try:
        for run in job.plan.runs(mine):
            with RunSink(parts, run, parts.show if rank == 0 else _nothing) as sink:
                report.add(_label(job, run, sink, watch.progress))
        together()
        if rank == 0:
            parts.assemble(targets_of(target, layers), output.cog, output.compress)
    except BaseException as error:
        done, pieces = len(parts.finished()), len(job.plan.shards)
        if not done and ranks == 1:
            parts.forget()
        if done and isinstance(error, VfmsegError):
            error.args = (f"{error}\n{done} of {pieces} pieces are done and kept: go on with --resume",)
        raise
    together()
    return report


def _nothing() -> None:
    """What ranks other than the first do after a shard."""


def _label(job: Job, run: Run, sink: Sink, progress: Callable[[Tick], None] | None) -> Report:
    try:
        return label_run(
            job.scenes, job.stored, job.plan, run, job.model, job.settings.blend, job.product, sink,
            area=job.area, progress=progress,
        )  # fmt: skip
    finally:
        give_back()  # the next strip has another width, and does not fit into the holes
