"""Prediction as a command: one scene or a list of them, on one or several processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmseg.errors import RecipeError
from vfmseg.geo.polygons import write_polygons
from vfmseg.how import How
from vfmseg.inference.engine import Tick
from vfmseg.inference.job import Job
from vfmseg.inference.ranks import join, meet
from vfmseg.inference.shards import forget_pieces
from vfmseg.inference.worklist import scenes_of, targets_for
from vfmseg.progress import LabelProgress, stage_shares
from vfmseg.segmenter import Labelled, Segmenter
from vfmseg.terminal import say


@dataclass(frozen=True)
class Wanted:
    """What is to be written, and how an existing target is treated. polygons: also a vector file of this suffix."""

    extras: tuple[str, ...] = ()
    area: str | tuple[float, ...] | None = None
    cog: bool = False
    polygons: str | None = None
    min_area: float = 0.0
    simplify: float = 0.0
    resume: bool = False
    overwrite: bool = False
    skip_unreadable: bool = False


def predict(
    segmenter: Segmenter, scene: str, others: Mapping[str, str], output: Path, how: How, wanted: Wanted
) -> list[dict[str, Any]]:
    """Label a scene, or every scene of a folder, pattern, list or STAC file, into `output` (then a folder).

    `others` {modality: path} of a single scene. Processes share the scenes of a list that has at least as many as there
    are processes, and the pieces of each scene otherwise. Returns a record for each scene that this process has
    finished (the first process for shared ones).
    """
    first = next(iter(segmenter.facts.bands))
    if first in others:
        raise RecipeError(f"--modality {first}=...: '{first}' is SCENE itself, the first modality; leave this out")
    rank, ranks = join()
    scenes = scenes_of(scene)
    if scenes is None:
        jobs = [(scene, output)]
    else:
        if others:
            raise RecipeError("--modality goes with one scene; a list of scenes has one modality")
        jobs = list(zip(scenes, targets_for(scenes, output, wanted.extras), strict=True))
    alone = len(jobs) >= ranks > 1
    records = []
    for number, (path, target) in enumerate(jobs):
        if alone and number % ranks != rank:
            continue
        if wanted.resume and target.is_file() and not wanted.overwrite:
            say(f"{target} is there already")
            if alone or rank == 0:
                forget_pieces(target)  # of a run that was killed after its very last step but one
            continue
        share = (0, 1) if alone else (rank, ranks)
        record = _one(segmenter, {first: path, **others}, path, target, how, wanted, *share)
        if alone or rank == 0:
            records.append(record)
    meet()
    return records


def _one(
    segmenter: Segmenter,
    inputs: Mapping[str, str],
    path: str,
    target: Path,
    how: How,
    wanted: Wanted,
    rank: int,
    ranks: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    shown: list[LabelProgress] = []

    def planned(job: Job) -> None:
        tiles = sum(job.plan.tiles_in(run) for run in job.plan.runs(job.plan.shards))
        grid, count = job.grid, len(job.plan.strips)
        say(
            f"{path}: {grid.height} x {grid.width} px, {tiles} tiles of {job.settings.tile} px in "
            f"{count} strip{'s' * (count > 1)}, about {job.memory / 2**20:.0f} MiB beside the model"
        )
        shown.append(LabelProgress(Path(path).name, grid.height * grid.width))

    def tick(done: Tick) -> None:
        shown[0].add(done.pixels, done.busy, done.queued)

    try:
        labelled = segmenter.label(
            inputs, target, how, extras=wanted.extras, area=wanted.area, cog=wanted.cog, resume=wanted.resume,
            overwrite=wanted.overwrite, skip_unreadable=wanted.skip_unreadable, rank=rank, ranks=ranks,
            planned=planned, progress=tick,
        )  # fmt: skip
    finally:
        for bar in shown:
            bar.close()
    files = {name: str(file) for name, file in labelled.files.items()}
    if wanted.polygons is not None and rank == 0:
        vector = target.with_suffix(wanted.polygons)
        write_polygons(target, vector, min_area=wanted.min_area, simplify=wanted.simplify)
        files["polygons"] = str(vector)
    _tell_unreadable(labelled)
    return _record(path, files, labelled, shown[0].pixels, time.perf_counter() - started)


def _tell_unreadable(labelled: Labelled) -> None:
    for message in labelled.unreadable.messages[:5]:
        say(f"left out as nodata: {message}")
    more = len(labelled.unreadable.messages) - 5
    if more > 0:
        say(f"... and {more} more blocks that cannot be read")


def _record(path: str, files: dict[str, str], labelled: Labelled, pixels: int, seconds: float) -> dict[str, Any]:
    """What is told of a scene; tiles and stages are those of this process."""
    report = labelled.report
    return {
        "scene": path,
        "output": files["labels"],
        "files": files,
        "seconds": round(seconds, 2),
        "pixels": pixels,
        "mpx_per_second": round(pixels / 1e6 / seconds, 3),
        "tiles_run": report.tiles,
        "tiles_left_out": report.skipped,
        "unreadable_pixels": labelled.unreadable.pixels,
        "stage_shares": {name: round(share, 3) for name, share in stage_shares(report.stages).items()},
    }


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for people."""
    if len(records) == 1:
        (one,) = records
        return f"labels written to {one['output']} in {one['seconds']} s ({one['mpx_per_second']} Mpx/s)"
    pixels, seconds = sum(r["pixels"] for r in records), sum(r["seconds"] for r in records)
    return f"{len(records)} scenes labelled in {seconds:.1f} s ({pixels / 1e6 / max(seconds, 1e-9):.2f} Mpx/s)"
