"""Scoring finished rows against a scene's labels, as they come: no map is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Window
from vfmseg.inference.contracts import Finished
from vfmseg.metrics import Confusion


class Labelled(Protocol):
    """A scene that knows its true labels."""

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w); IGNORE where there is none."""
        ...


def class_indexes(finished: Finished) -> dict[str, np.ndarray]:
    """Class indexes int64 (1, h, w), IGNORE where the scene is invalid: what is scored."""
    index = finished.sums.max(dim=0).indices.cpu().numpy()
    return {"index": np.where(finished.valid, index, IGNORE)[None]}


@dataclass(frozen=True)
class Scores:
    """A sink that counts finished rows against the scene's labels; nodata never reaches a metric."""

    scene: Labelled
    confusion: Confusion

    def write(self, window: Window, arrays: Mapping[str, np.ndarray]) -> None:
        """Count rows."""
        index = arrays["index"][0]
        truth = np.where(index == IGNORE, IGNORE, self.scene.read_labels(window))
        self.confusion.update(torch.from_numpy(np.maximum(index, 0)), torch.from_numpy(truth))
