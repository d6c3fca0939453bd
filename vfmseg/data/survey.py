"""A look at some of a split's pixels before training: which are hidden and by what, and numbers far from all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vfmseg.data.image import Known, known
from vfmseg.data.scene import Scene
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Window
from vfmseg.geo.validity import Hidden

PIXELS = 2**23
"""Pixels that are looked at in a split, about: a second of reading, or a few."""

SIDE = 256
"""Side of a window that is looked at, in pixels."""

KEPT = 512
"""Values of each band that are kept of a window."""

LEAST = 0.005
"""Share of the pixels from which one number far from all others is told."""


@dataclass(frozen=True)
class Fill:
    """A number that many pixels of a band hold and that lies far from all others, which go from `low` to `high`."""

    modality: str
    band: int  # 1-based, among those that are read
    value: float
    share: float
    low: float
    high: float


@dataclass
class Survey:
    """What was found. labelled, visible: labelled pixels of each class, and those of them that are not hidden."""

    labelled: np.ndarray
    visible: np.ndarray
    hidden: dict[str, Hidden] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)


def survey(scenes: Sequence[Scene], classes: int, rule: Known) -> Survey:
    """Look at windows spread evenly over all scenes; `rule`: where several modalities have an answer.

    No classes: scenes without labels.
    """
    found = Survey(np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64))
    values: dict[str, list[np.ndarray]] = {}
    before = [{name: Hidden(h.pixels, dict(h.causes)) for name, h in scene.hidden().items()} for scene in scenes]
    for scene in scenes:
        for window in spread(scene.grid.height, scene.grid.width, max(1, PIXELS // (SIDE * SIDE * len(scenes)))):
            chips = scene.read(window)
            if classes:
                labels = scene.read_labels(window)
                labelled = labels != IGNORE
                visible = labelled & known(chips, rule)
                found.labelled += np.bincount(labels[labelled], minlength=classes)
                found.visible += np.bincount(labels[visible], minlength=classes)
            for name, chip in chips.items():
                some = chip.pixels[:, chip.valid]
                values.setdefault(name, []).append(some[:, :: max(1, some.shape[1] // KEPT)])
    for scene, old in zip(scenes, before, strict=True):
        for name, hidden in scene.hidden().items():
            found.hidden.setdefault(name, Hidden()).add(hidden.since(old[name]))
    for name, parts in values.items():
        for number, band in enumerate(np.concatenate(parts, axis=1), 1):
            found.fills += _fills(name, number, band)
    return found


def spread(height: int, width: int, count: int) -> Iterator[Window]:
    """At most `count` windows, in equal steps over the tiles of a scene."""
    across = -(-width // SIDE)
    tiles = across * -(-height // SIDE)
    for number in sorted({(2 * i + 1) * tiles // (2 * count) for i in range(count)} if count < tiles else range(tiles)):
        row, col = number // across * SIDE, number % across * SIDE
        yield Window(row, col, min(SIDE, height - row), min(SIDE, width - col))


def _fills(modality: str, number: int, band: np.ndarray) -> Iterator[Fill]:
    """The smallest and the largest number of a band, where they look like a filling."""
    distinct, counts = np.unique(band, return_counts=True)
    if len(distinct) < 10:  # classes, flags or a constant: any of them may be meant
        return
    for at, low, high in ((0, distinct[1], distinct[-1]), (-1, distinct[0], distinct[-2])):
        gap = min(abs(float(distinct[at]) - float(low)), abs(float(distinct[at]) - float(high)))
        share = counts[at] / counts.sum()
        if share >= LEAST and gap > 2 * (float(high) - float(low)):
            yield Fill(modality, number, float(distinct[at]), float(share), float(low), float(high))
