"""Prediction as a command: one scene or a list of them, on one or several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vfmseg.data.inputs import Inputs
from vfmseg.disk.files import never_an_input, require_new
from vfmseg.errors import DataError, OutsideError, RecipeError
from vfmseg.geo.grid import Window
from vfmseg.geo.rasterfile import files_of
from vfmseg.geo.validity import Hidden
from vfmseg.inference.contracts import WAITING, Report, Tick
from vfmseg.inference.job import Job
from vfmseg.inference.output import ALONE, Output, Team, Watch
from vfmseg.inference.ranks import gather, joined
from vfmseg.inference.shards import pieces_folder
from vfmseg.inference.worklist import targets_for
from vfmseg.labeller import BandsChosen, How, Labelled, Labeller
from vfmseg.progress import LabelProgress, stage_shares
from vfmseg.terminal import complain, say

K = TypeVar("K")
V = TypeVar("V")


def predict(
    labeller: Labeller,
    scene: str | Sequence[str],
    output: Output,
    how: How | None = None,
    others: Mapping[str, str] | None = None,
    bands: BandsChosen | None = None,
    modality: str | None = None,
) -> list[dict[str, Any]]:
    """Label a scene, or every scene of a list (worklist.py makes it) into the folder `output.target`.

    `modality`: what `scene` is, left out: the first one; `others` {modality: path} of a single scene; `how` and `bands`
    as in `Labeller.label`. Processes share the scenes of a list that has at least as many as there are processes, and
    the pieces of each scene otherwise. Returns a record for each scene to the first process, and none to the others.
    Where a process has scenes of its own, a DataError of one does not stop the list: it is told, and its record is
    {"scene": path, "error": message}.
    """
    jobs = _jobs(scene, output, others or {}, modality or labeller.inputs[0].name)
    unfit = {number: why for number, job in enumerate(jobs) if (why := job.output.unfit()) is not None}
    fit = [job for number, job in enumerate(jobs) if number not in unfit]
    _spare_inputs(fit)
    for job in fit:
        job.output.check_vector()

    def one(number: int, team: Team) -> dict[str, Any]:
        if number in unfit:
            raise DataError(unfit[number])
        return _one(labeller, jobs[number], how, bands, team)

    with joined() as (rank, ranks):
        return _shared(one, [job.path for job in jobs], Team(rank, ranks))


@dataclass(frozen=True)
class _SceneJob:
    """One scene: the path of its first modality, {modality: path} of all, and what is written of it."""

    path: str
    inputs: Mapping[str, str]
    output: Output


def modality_named(scene: str, inputs: Inputs) -> tuple[str, str]:
    """The modality that a scene given as `sar=scene.tif` is, and its path; without a name it is the first one.

    What is there as a file, or names no modality, is a path as it stands.
    """
    name, sign, path = scene.partition("=")
    if sign and path and name in [one.name for one in inputs] and not os.path.exists(scene):
        return name, path
    return inputs[0].name, scene


def _jobs(scene: str | Sequence[str], output: Output, others: Mapping[str, str], first: str) -> list[_SceneJob]:
    """What is to be done; RecipeError or DataError for what does not fit together."""
    output.check_words()
    target = output.path
    if first in others:
        raise RecipeError(
            f"--modality {first}=...: '{first}' is SCENE itself, the first modality or the one it is named as; leave "
            "this out"
        )
    if isinstance(scene, str):
        path = os.path.expanduser(scene)
        paths = {first: path, **{name: os.path.expanduser(other) for name, other in others.items()}}
        return [_SceneJob(path, paths, output.to(target))]
    if others:
        raise RecipeError("--modality goes with one scene; a list of scenes has one modality")
    targets = targets_for(scene, target, output.extras)
    return [_SceneJob(path, {first: path}, output.to(file)) for path, file in zip(scene, targets, strict=True)]


def _spare_inputs(jobs: Sequence[_SceneJob]) -> None:
    """DataError if what is written for one scene would replace a file that any of them is read from.

    Asked before the first of many scenes is labelled, as is what exists already; nothing is opened where nothing is
    there to be replaced.
    """
    maps = [file for job in jobs for file in job.output.maps.values()]
    written = [*maps, *(job.output.vector for job in jobs if job.output.vector is not None)]
    inputs = sorted({path for job in jobs for path in job.inputs.values()})
    if any(file.exists() or pieces_folder(file).exists() for file in written):
        inputs = [file for path in inputs for file in files_of(path)]
    areas = sorted({area for job in jobs for area in job.output.named_area})
    never_an_input(written, [*inputs, *areas])
    if len(jobs) > 1 and not any(job.output.resume or job.output.overwrite for job in jobs):
        for file in maps:
            require_new(file)


def _shared(one: Callable[[int, Team], dict[str, Any]], paths: Sequence[str], team: Team) -> list[dict[str, Any]]:
    """Do `one` (number of the scene, who labels it) for all scenes; the records, on the first process."""
    rank, ranks = team
    alone = len(paths) >= ranks  # a process labels scenes of its own
    records: dict[int, dict[str, Any]] = {}
    outside: dict[int, str] = {}
    for number in range(rank, len(paths), ranks) if alone else range(len(paths)):
        try:
            records[number] = one(number, ALONE if alone else team)
        except OutsideError as error:
            if len(paths) == 1:
                raise
            outside[number] = f"{paths[number]}: left out: {error}"
        except DataError as error:
            if len(paths) == 1 or not alone:
                raise
            complain(f"{paths[number]}: not labelled: {error}")
            records[number] = {"scene": paths[number], "error": str(error)}
    if alone:  # else every process has the same
        records, outside = _united(gather(records)), _united(gather(outside))
    for number in sorted(outside):
        say(outside[number])
    if not records:
        raise OutsideError(f"the area holds nothing of any of the {len(paths)} scenes; check its place")
    return [records[number] for number in sorted(records)] if rank == 0 else []


def _united(parts: Sequence[Mapping[K, V]]) -> dict[K, V]:
    """What several processes have, in one."""
    return {key: value for part in parts for key, value in part.items()}


class _Display:
    """Tells of one scene: a line before it begins, and a bar while it lasts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.bar: LabelProgress | None = None

    def planned(self, job: Job, pixels: int) -> None:
        """Before the first tile."""
        tiles = sum(job.plan.tiles_in(run) for run in job.plan.runs(job.plan.shards))
        grid, count = job.grid, len(job.plan.strips)
        most = "" if job.area is None else "at most "
        say(
            f"{self.path}: {grid.height} x {grid.width} px, {most}{tiles} tiles of {job.settings.tile} px in "
            f"{count} strip{'s' * (count > 1)}, about {job.memory / 2**20:.0f} MiB beside the model"
        )
        self.bar = LabelProgress(Path(self.path).name, pixels, WAITING)

    def tick(self, done: Tick) -> None:
        """Rows are finished."""
        if self.bar is not None:
            self.bar.add(done.pixels, done.busy, done.queued)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()

    @property
    def fills(self) -> list[float | None]:
        """How full the queue before the model was, where anything was done."""
        return [] if self.bar is None else [self.bar.queue_fill]


def _one(labeller: Labeller, job: _SceneJob, how: How | None, bands: BandsChosen | None, team: Team) -> dict[str, Any]:
    started = time.perf_counter()
    display = _Display(job.path)
    try:
        watch = Watch(display.planned, display.tick, display.close)
        labelled = labeller.label(job.inputs, job.output, how, bands, team, watch)
    finally:
        display.close()
    if labelled.before and team.rank == 0:
        say(f"{job.output.path} is there already")
    files = {name: str(file) for name, file in labelled.files.items()}
    if job.output.vector is not None:
        files["polygons"] = str(job.output.vector)
    report, lost, hidden, fills = _of_the_team(labelled, display.fills, team)
    if team.rank == 0:  # of a scene, that is: where each process has its own, each is the first one of its scene
        _tell_unreadable(list(lost.values()))
        for name, counts in hidden.items():
            if counts.causes:
                say(f"{job.path}: of the pixels read of {name}, hidden were {counts.text()}")
    lost_pixels = sum(block.height * block.width for block in lost)
    shares = {name: {cause: round(share, 4) for cause, share in h.shares().items()} for name, h in hidden.items()}
    return _record(job.path, files, report, fills, lost_pixels, time.perf_counter() - started) | {"hidden": shares}


def _of_the_team(
    labelled: Labelled, fills: list[float | None], team: Team
) -> tuple[Report, dict[Window, str], dict[str, Hidden], list[float | None]]:
    """What all processes of a scene did: tiles and pixels, unreadable blocks, hidden pixels, how full queues were."""
    if team.ranks == 1:
        return labelled.report, labelled.unreadable.blocks, dict(labelled.hidden), fills
    report, hidden = Report(), dict[str, Hidden]()
    for one in gather(labelled.report):
        report.add(one)
    for part in gather(labelled.hidden):
        for name, counts in part.items():
            hidden.setdefault(name, Hidden()).add(counts)
    lost = _united(gather(labelled.unreadable.blocks))
    return report, lost, hidden, [fill for part in gather(fills) for fill in part]


def _tell_unreadable(messages: Sequence[str]) -> None:
    for message in messages[:5]:
        complain(f"left out as nodata: {message}")
    if len(messages) > 5:
        complain(f"... and {len(messages) - 5} more blocks that cannot be read")


def _record(
    path: str, files: dict[str, str], report: Report, fills: Sequence[float | None], lost: int, seconds: float
) -> dict[str, Any]:
    """What is told of a scene; pixels and tiles are those of this run, without what an earlier one had finished.

    `fills`: of the queue before the model, of each process that had something to do.
    """
    known = [fill for fill in fills if fill is not None]
    return {
        "scene": path,
        "output": files["labels"],
        "files": files,
        "seconds": round(seconds, 2),
        "pixels": report.pixels,
        "mpx_per_second": round(report.pixels / 1e6 / seconds, 3),
        "tiles_run": report.tiles,
        "tiles_left_out": report.skipped,
        "unreadable_pixels": lost,
        "stage_shares": {name: round(share, 3) for name, share in stage_shares(report.stages).items()},
        "queue_fill": round(sum(known) / len(known), 3) if known else None,
    }


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for people."""
    done = [record for record in records if "error" not in record]
    if len(done) == 1:
        (one,) = done
        return f"labels written to {one['output']} in {one['seconds']} s ({one['mpx_per_second']} Mpx/s)"
    pixels, seconds = sum(r["pixels"] for r in done), sum(r["seconds"] for r in done)
    return f"{len(done)} scenes labelled in {seconds:.1f} s ({pixels / 1e6 / max(seconds, 1e-9):.2f} Mpx/s)"


def require_all(records: Sequence[Mapping[str, Any]], scenes: int) -> None:
    """DataError if some of so many scenes could not be labelled."""
    failed = sum("error" in record for record in records)
    if failed:
        raise DataError(
            f"{failed} of {scenes} scenes could not be labelled, see above; mend them and go on with --resume"
        )
