"""What a map says of how it was made, and what must be the same when an interrupted labelling goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vfmseg.checkpoint import fingerprint_of, versions
from vfmseg.geo.mosaic import map_tags
from vfmseg.how import Settled
from vfmseg.inference.job import Job
from vfmseg.inference.sources import OpenScene
from vfmseg.recipe import Recipe

WORK_TAG = "vfmseg_work"
"""Tag of a finished map that tells by which work it was made."""


def tags_of(recipe: Recipe, record: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Tags of every map that a segmenter makes."""
    return {
        "vfmseg_recipe": recipe.name,
        "vfmseg_encoder": str(record["encoder"]["id"]),
        "vfmseg_checkpoint": fingerprint_of(folder),
        "vfmseg_version": versions()["vfmseg"],
    }


def work_of(
    scene: OpenScene,
    job: Job,
    settled: Settled,
    extras: Sequence[str],
    area: str | Path | Sequence[float] | None,
    skip_unreadable: bool,
) -> dict[str, Any]:
    """What is labelled, and how: with another of these, finished pieces are of no use."""
    return {
        "scene": {
            name: [_stamp(path, others) for path, others in raster.files.items()]
            for name, raster in scene.rasters.items()
        },
        "tile": job.settings.tile,
        "overlap": job.settings.overlap,
        "blend": job.settings.blend,
        "batch_size": job.settings.batch_size,
        "average": "logits" if settled.logits else "probabilities",
        "tta": settled.tta,
        "scales": list(settled.scales),
        "products": ["labels", *extras],
        "area": _stamp(str(area)) if isinstance(area, str | Path) else (list(area) if area else None),
        "strips": len(job.plan.strips),
        "skip_unreadable": skip_unreadable,
    }


def mark_of(work: Mapping[str, Any], form: dict[str, Any]) -> dict[str, str]:
    """The tag that names a work and the `form` of its files, which pieces do not have: they may end in any.

    Strips are left out: how it was cut changes no byte.
    """
    named = {key: value for key, value in work.items() if key != "strips"} | form
    return {WORK_TAG: hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]}


def finished_before(files: Iterable[Path], mark: Mapping[str, str]) -> set[Path]:
    """The maps that are there with this tag."""
    return {file for file in files if file.is_file() and mark.items() <= map_tags(file).items()}


def _stamp(path: str, others: Sequence[str] = ()) -> str:
    """A path with size and time, by which another file under the same name is told; of `others` a digest.

    Of a path that GDAL alone knows, those of the file that it leads into (`/vsizip/FILE/...`), if there is one here.
    """
    inside = Path(re.sub(r"^(/vsi\w+/)+", "", path))
    file = next((place for place in (inside, *inside.parents) if place.is_file()), None)
    text = path
    if file is not None:
        facts = file.stat()
        name = os.path.realpath(path) if file == Path(path) else path
        text = f"{name} ({facts.st_size} bytes, {facts.st_mtime_ns})"
    if others:
        digest = hashlib.sha256("\n".join(_stamp(other) for other in others).encode()).hexdigest()[:16]
        text += f" with {len(others)} files ({digest})"
    return text
