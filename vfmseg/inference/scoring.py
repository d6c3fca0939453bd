"""Scoring a scene against its labels as rows are finished, so that no map is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vfmseg.data.scene import Scene
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.validity import Chip
from vfmseg.inference.contracts import Finished
from vfmseg.metrics import Confusion


class Labelled(Protocol):
    """A scene with true labels."""

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w), 0 to K - 1; IGNORE (-1) where there is no label."""
        ...


class Only:
    """A labelled scene as if it had some of its modalities alone. Its grid, on which the labels lie, stays."""

    def __init__(self, scene: Scene, names: Sequence[str]) -> None:
        self._scene = scene
        self._names = [name for name in scene.bands() if name in names]

    @property
    def grid(self) -> Grid:
        """The grid of the labels."""
        return self._scene.grid

    def bands(self) -> dict[str, int]:
        """{modality: number of bands that are read}; empty if the scene has none of them."""
        found = self._scene.bands()
        return {name: found[name] for name in self._names}

    def read(self, window: Window) -> dict[str, Chip]:
        """{modality: pixels (C, h, w) and valid (h, w)}; beyond the edge everything is invalid."""
        found = self._scene.read(window)
        return {name: found[name] for name in self._names}

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w); beyond the edge IGNORE."""
        return self._scene.read_labels(window)


def class_indexes(finished: Finished) -> dict[str, np.ndarray]:
    """{"index": int64 (1, h, w)}: the class of the largest vote, IGNORE where the scene is invalid."""
    index = finished.sums.max(dim=0).indices.cpu().numpy()
    return {"index": np.where(finished.valid, index, IGNORE)[None]}


@dataclass(frozen=True)
class Scores:
    """A sink that counts finished rows against the scene's labels into a confusion matrix."""

    scene: Labelled
    confusion: Confusion

    def write(self, window: Window, arrays: Mapping[str, np.ndarray]) -> None:
        """Count the pixels of a window that have a label and are valid in the scene."""
        index = arrays["index"][0]
        truth = np.where(index == IGNORE, IGNORE, self.scene.read_labels(window))
        self.confusion.update(index, truth)  # leaves out where the truth is IGNORE
