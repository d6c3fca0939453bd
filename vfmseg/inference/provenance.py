"""What a map says of how it was made, and what must be the same when an interrupted labelling goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfmseg.data.raster_scene import RasterScene
from vfmseg.disk.paths import files_behind
from vfmseg.errors import DamagedError
from vfmseg.geo.fileinfo import FileInfo
from vfmseg.geo.grid import Window
from vfmseg.geo.mosaic import map_tags
from vfmseg.geo.reader import Raster
from vfmseg.geo.trust import is_remote
from vfmseg.inference.job import Job
from vfmseg.inference.output import Output

WORK_TAG = "vfmseg_work"
"""Tag of a finished map that tells by which work it was made."""

MODALITIES_TAG = "vfmseg_modalities"
"""Tag of a map that tells which modalities the scene had, of a model that takes several: `rgb+sar`."""


def work_of(scene: RasterScene, job: Job, output: Output, bands: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What is labelled, and how: with another of these, finished pieces are of no use.

    `bands` {modality: numbers}: which bands of the scene were named to be those of the model.
    """
    return {
        "scene": {
            name: [_file(path, info) for path, info in raster.infos.items()] + _glance(raster)
            for name, raster in scene.rasters.items()
        },
        "tile": job.settings.tile,
        "overlap": job.settings.overlap,
        "blend": job.settings.blend,
        "batch_size": job.settings.batch_size,
        "average": job.settings.average,
        "tta": job.settings.tta,
        "scales": list(job.settings.scales),
        "products": ["labels", *output.extras],
        "area": _area(output.area),
        "strips": len(job.plan.strips),
        "skip_unreadable": output.skip_unreadable,
    } | ({"bands": {name: list(numbers) for name, numbers in bands.items()}} if bands else {})


def mark_of(work: Mapping[str, Any], form: dict[str, Any]) -> dict[str, str]:
    """The tag that names a work and the `form` of its files, which pieces do not have: they may end in any.

    Strips are left out: how it was cut changes no byte.
    """
    named = {key: value for key, value in work.items() if key != "strips"} | form
    return {WORK_TAG: hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]}


def finished_before(files: Iterable[Path], mark: Mapping[str, str]) -> set[Path]:
    """The maps that are there with this tag."""
    return {file for file in files if file.is_file() and mark.items() <= map_tags(file).items()}


def _area(area: str | Path | Sequence[float] | None) -> str | list[float] | None:
    if area is None:
        return None
    return _stamp(str(area)) if isinstance(area, str | Path) else [float(side) for side in area]


def _file(path: str, info: FileInfo) -> str:
    """A path with what tells another file under the same name, also where only its CRS or nodata is another."""
    said = repr(replace(info, others=()))
    parts = [_stamp(path), f"says {_short(said)}"]
    if info.others:
        parts.append(f"with {len(info.others)} files {_short(*map(_stamp, info.others))}")
    return ", ".join(parts)


def _glance(raster: Raster) -> list[str]:
    """A digest of a few pixels where a file lies behind a server, whose time and size nobody tells; else nothing."""
    if not any(is_remote(file) for path, info in raster.infos.items() for file in (path, *info.others)):
        return []
    grid = raster.grid
    sixths = [(1, 1), (1, 5), (3, 3), (5, 1), (5, 5)]
    places = [Window(grid.height * i // 6, grid.width * j // 6, 1, 16) for i, j in sixths]
    try:
        return [f"pixels {_short(*(raster.read(place).pixels.tobytes().hex() for place in places))}"]
    except DamagedError:  # whoever reads it again will say so, or leave it out
        return ["pixels that cannot be read"]


def _short(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _stamp(path: str) -> str:
    """A path with size and time, by which another file under the same name is told.

    Of a name that GDAL alone knows, those of the file that it leads into (`/vsizip/FILE/...`), if there is one here.
    """
    file = next(iter(files_behind(path)), None)
    if file is None:
        return path
    facts = os.stat(file)
    name = os.path.realpath(path) if file == path else path
    return f"{name} ({facts.st_size} bytes, {facts.st_mtime_ns})"
