"""Scoring a scene against its labels as rows are finished, so that no map is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Window
from vfmseg.inference.contracts import Finished
from vfmseg.metrics import Confusion


class Labelled(Protocol):
    """A scene with true labels."""

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w), 0 to K - 1; IGNORE (-1) where there is no label."""
        ...


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
