"""Prediction as a command: one scene or a list of them, on one or several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vfmseg.disk.files import local_path, never_an_input, require_new, unfit_name
from vfmseg.errors import DataError, OutsideError, RecipeError
from vfmseg.geo.rasterfile import RasterFile, files_of
from vfmseg.geo.validity import Hidden
from vfmseg.inference.contracts import WAITING, Report, Tick
from vfmseg.inference.how import How
from vfmseg.inference.job import Job, targets_of
from vfmseg.inference.ranks import gather, joined
from vfmseg.inference.shards import pieces_folder
from vfmseg.inference.worklist import targets_for
from vfmseg.progress import LabelProgress, stage_shares
from vfmseg.segmenter import Segmenter
from vfmseg.terminal import complain, say
from vfmseg.vector.polygons import check_place, check_polygons, unfit_vector_name, write_polygons
from vfmseg.vector.vectorfile import is_ours

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Wanted:
    """What is to be written, and how an existing target is treated. polygons: also a vector file of this suffix."""

    extras: tuple[str, ...] = ()
    area: str | tuple[float, ...] | None = None
    cog: bool = False
    compress: str = "deflate"
    polygons: str | None = None  # such as ".gpkg"
    min_area: float = 0.0
    simplify: float = 0.0
    resume: bool = False
    overwrite: bool = False
    skip_unreadable: bool = False


def predict(
    segmenter: Segmenter,
    scene: str | Sequence[str],
    others: Mapping[str, str],
    output: str | Path,
    how: How,
    wanted: Wanted,
) -> list[dict[str, Any]]:
    """Label a scene, or every scene of a list (worklist.py makes it) into `output` (then a folder).

    `others` {modality: path} of a single scene. Processes share the scenes of a list that has at least as many as there
    are processes, and the pieces of each scene otherwise. Returns a record for each scene to the first process, and
    none to the others. Where a process has scenes of its own, a DataError of one does not stop the list: it is told,
    and its record is {"scene": path, "error": message}.
    """
    output = local_path(output)
    if not output.name:
        raise DataError(
            f"{output}: is a folder; expected the name of a GeoTIFF to write, or of a new folder for a list"
        )
    first = segmenter.inputs[0].name
    if first in others:
        raise RecipeError(f"--modality {first}=...: '{first}' is SCENE itself, the first modality; leave this out")
    if isinstance(scene, str):
        jobs = [(os.path.expanduser(scene), output)]
        others = {name: os.path.expanduser(path) for name, path in others.items()}
    else:
        if others:
            raise RecipeError("--modality goes with one scene; a list of scenes has one modality")
        jobs = list(zip(scene, targets_for(scene, output, wanted.extras), strict=True))
    if wanted.polygons is not None and not wanted.polygons.startswith("."):
        raise RecipeError(f"--polygons {wanted.polygons}: expected a suffix with its dot, such as .gpkg")
    unfit = {number: why for number, (_, target) in enumerate(jobs) if (why := _unfit(target, wanted)) is not None}
    _spare_inputs([job for number, job in enumerate(jobs) if number not in unfit], others, wanted)
    vectors = [None if number in unfit else _vector_of(target, wanted) for number, (_, target) in enumerate(jobs)]

    def one(number: int, rank: int, ranks: int) -> dict[str, Any]:
        path, target = jobs[number]
        if number in unfit:
            raise DataError(unfit[number])
        return _one(segmenter, {first: path, **others}, path, target, vectors[number], how, wanted, rank, ranks)

    with joined() as (rank, ranks):
        return _shared(one, [path for path, _ in jobs], rank, ranks)


def _spare_inputs(jobs: Sequence[tuple[str, Path]], others: Mapping[str, str], wanted: Wanted) -> None:
    """DataError if what is written for one scene would replace a file that any of them is read from.

    Asked before the first of many scenes is labelled, as is what exists already; nothing is opened where nothing is
    there to be replaced.
    """
    maps = [file for _, target in jobs for file in targets_of(target, ("labels", *wanted.extras)).values()]
    vectors = [target.with_suffix(wanted.polygons) for _, target in jobs] if wanted.polygons else []
    inputs = [*(path for path, _ in jobs), *others.values()]
    if any(file.exists() or pieces_folder(file).exists() for file in [*maps, *vectors]):
        inputs = [file for path in inputs for file in files_of(path)]
    if isinstance(wanted.area, str):
        inputs.append(wanted.area)
    never_an_input([*maps, *vectors], inputs)
    if len(jobs) > 1 and not wanted.resume and not wanted.overwrite:
        for file in maps:
            require_new(file)


def _unfit(target: Path, wanted: Wanted) -> str | None:
    """Why a scene's files cannot be written under their names; None if they can."""
    for file in targets_of(target, ("labels", *wanted.extras)).values():
        if (why := unfit_name(file)) is not None:
            return why
    if wanted.polygons is None or not wanted.polygons.startswith("."):  # `_vector_of` refuses these
        return None
    vector = target.with_suffix(wanted.polygons)
    return unfit_name(vector) or unfit_vector_name(vector)


def _shared(
    one: Callable[[int, int, int], dict[str, Any]], paths: Sequence[str], rank: int, ranks: int
) -> list[dict[str, Any]]:
    """Do `one` (number of the scene, rank, ranks) for all scenes; the records, on the first process."""
    alone = len(paths) >= ranks  # a process labels scenes of its own
    records: dict[int, dict[str, Any]] = {}
    outside: dict[int, str] = {}
    for number in range(rank, len(paths), ranks) if alone else range(len(paths)):
        try:
            records[number] = one(number, *((0, 1) if alone else (rank, ranks)))
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


def _vector_of(target: Path, wanted: Wanted) -> Path | None:
    """Where the polygons go. What would stop them is found before hours of labelling, not after."""
    if wanted.polygons is None:
        return None
    vector = target.with_suffix(wanted.polygons)
    check_polygons(vector, wanted.min_area, wanted.simplify)
    if not wanted.overwrite and not (wanted.resume and target.exists() and vector.is_file() and is_ours(vector)):
        require_new(vector)
    return vector


def _one(
    segmenter: Segmenter,
    inputs: Mapping[str, str],
    path: str,
    target: Path,
    vector: Path | None,
    how: How,
    wanted: Wanted,
    rank: int,
    ranks: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    if vector is not None:
        check_place(vector, RasterFile(path).info.grid, path)
    shown: list[LabelProgress] = []

    def planned(job: Job, pixels: int) -> None:
        tiles = sum(job.plan.tiles_in(run) for run in job.plan.runs(job.plan.shards))
        grid, count = job.grid, len(job.plan.strips)
        most = "" if job.area is None else "at most "
        say(
            f"{path}: {grid.height} x {grid.width} px, {most}{tiles} tiles of {job.settings.tile} px in "
            f"{count} strip{'s' * (count > 1)}, about {job.memory / 2**20:.0f} MiB beside the model"
        )
        shown.append(LabelProgress(Path(path).name, pixels, WAITING))

    def tick(done: Tick) -> None:
        shown[0].add(done.pixels, done.busy, done.queued)

    def polygons(labels: Path) -> None:
        for bar in shown:
            bar.close()
        # also of a map that was there: older polygons may be of another scene or other options
        if vector is not None:
            write_polygons(labels, vector, min_area=wanted.min_area, simplify=wanted.simplify)

    try:
        labelled = segmenter.label(
            inputs, target, how, extras=wanted.extras, area=wanted.area, cog=wanted.cog, compress=wanted.compress,
            resume=wanted.resume, overwrite=wanted.overwrite, skip_unreadable=wanted.skip_unreadable,
            rank=rank, ranks=ranks, beside={} if vector is None else {vector: polygons}, planned=planned, progress=tick,
        )  # fmt: skip
    finally:
        for bar in shown:
            bar.close()
    if labelled.before and rank == 0:
        say(f"{target} is there already")
    files = {name: str(file) for name, file in labelled.files.items()}
    if vector is not None:
        files["polygons"] = str(vector)
    report, lost, fills = labelled.report, labelled.unreadable.blocks, [bar.queue_fill for bar in shown]
    hidden = dict(labelled.hidden)
    if ranks > 1:
        report = Report()
        for one in gather(labelled.report):
            report.add(one)
        lost = _united(gather(lost))
        hidden = {}
        for part in gather(labelled.hidden):
            for name, counts in part.items():
                hidden.setdefault(name, Hidden()).add(counts)
        fills = [fill for part in gather(fills) for fill in part]
    if rank == 0:  # of a scene, that is: where each process has its own, each is the first one of its scene
        _tell_unreadable(list(lost.values()))
        for name, counts in hidden.items():
            if counts.causes:
                say(f"{path}: of the pixels read of {name}, hidden were {counts.text()}")
    lost_pixels = sum(block.height * block.width for block in lost)
    shares = {name: {cause: round(share, 4) for cause, share in h.shares().items()} for name, h in hidden.items()}
    return _record(path, files, report, fills, lost_pixels, time.perf_counter() - started) | {"hidden": shares}


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
