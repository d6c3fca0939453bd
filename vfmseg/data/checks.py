"""Whether the scenes of all splits can be learned from and measured on: no file twice, labels that are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from vfmseg.data.image import Known, known
from vfmseg.data.scene import Scene
from vfmseg.data.survey import spread
from vfmseg.data.traces import Traces
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Window

WINDOWS = 128
"""Windows of a scene that are looked at before all of it counts as invalid."""


def disjoint(splits: Mapping[str, Sequence[Scene]], below: str = "data.") -> None:
    """Raise DataError if one file is used in two splits: scores on pixels that were learned mean nothing.

    `below`: where the splits are in the recipe, for messages.
    """
    owner: dict[str, str] = {}
    for split, scenes in splits.items():
        for scene in scenes:
            for file in scene.files:
                other = owner.setdefault(file, split)
                if other != split:
                    raise DataError(
                        f"{file} is in {below}{other} and in {below}{split}; expected every file in one split only: "
                        "remove it from one of them"
                    )


def require_valid(scenes: Sequence[Scene], place: str) -> None:
    """DataError for a modality of which no scene shows a valid pixel in windows spread evenly over it.

    Nearly always the first window tells. `place`: the key of the scenes in the recipe.
    """
    left = {name for scene in scenes for name in scene.bands()}
    for scene in scenes:
        for window in spread(scene.grid.height, scene.grid.width, WINDOWS) if left & set(scene.bands()) else ():
            left -= {name for name, chip in scene.read(window).items() if chip.valid.any()}
            if not left & set(scene.bands()):
                break
    for name in sorted(left):
        count = sum(name in scene.bands() for scene in scenes)
        raise DataError(
            f"{place}: {name} is invalid (nodata, NaN, alpha or mask) wherever it was looked at in its {count} scenes; "
            f"expected some valid pixels: check data.modalities.{name}.nodata and the files"
        )


def require_labels(
    scenes: Sequence[Scene], split: str, classes: int, rule: Known, traces: Traces | None = None
) -> list[int]:
    """Read every label once, and count the pixels of each of `classes` classes; `traces` sees them as well.

    DataError for an id that is no class, if not a single pixel of the split is labelled, and if the images say nothing
    at any that is. Labels are small beside images; a wrong id found here costs seconds, found in the third epoch it
    costs the run.
    """
    counts = np.zeros(classes, dtype=np.int64)
    seen = False
    for number, scene in enumerate(scenes):
        height, width = scene.grid.height, scene.grid.width
        for row, col in product(range(0, height, 256), range(0, width, 2**16)):  # rows as files store them
            window = Window(row, col, min(256, height - row), min(2**16, width - col))
            labels = scene.read_labels(window)
            if traces is not None:
                traces.labels(number, labels)
            labelled = labels != IGNORE
            counts += np.bincount(labels[labelled], minlength=classes)
            if not seen and labelled.any():
                seen = bool((labelled & known(scene.read(window), rule)).any())
    if not counts.any():
        raise DataError(
            f"data.{split}: every pixel of its {len(scenes)} scenes is ignored (ignore_index or nodata); expected some "
            "pixels of the classes: check data.ignore_index and data.classes against the label files"
        )
    if not seen:
        raise DataError(
            f"data.{split}: the images are invalid (nodata, NaN, alpha or mask) at every labelled pixel of its "
            f"{len(scenes)} scenes; expected some valid ones: check data.modalities.NAME.nodata and the files"
        )
    return counts.tolist()
