"""What the engine is given (a predictor, products, a sink, an area), and what it tells: reports and ticks.

Shapes: B tiles in a batch, C bands, K classes, t x t pixels of a tile; h x w pixels of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vfmseg.data.image import Images, Known
from vfmseg.data.inputs import Inputs
from vfmseg.geo.grid import Window
from vfmseg.recipe.data import ClassSpec


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles for one call of a predictor: images of (B, C, t, t) pixels on the CPU, and where each lies in the scene.

    windows: one for each of the B slots; None for a slot without a tile, in which nothing is valid. frame (2, 2): how
    tiles are turned and resized; a way of (rows, columns) pixels in the scene is frame @ way here. None: not at all.
    """

    images: Images
    windows: tuple[Window | None, ...]
    frame: Tensor | None = None


# tiles -> votes float32 (B, K, t, t) on the model's device: probabilities or logits
Predictor = Callable[[Tiles], Tensor]


@dataclass(frozen=True)
class Finished:
    """Finished rows of a strip, h x w px. On the model's device: sums (K, h, w) and weights (h, w), see blend.OpenRows.

    valid: bool (h, w), where a label is asked for and the scene has pixels. sums / weights are the mean votes there.
    """

    sums: Tensor
    weights: Tensor
    valid: np.ndarray


# finished rows -> {product: array (bands, h, w)} on the CPU
Product = Callable[[Finished], dict[str, np.ndarray]]


class Sink(Protocol):
    """Takes the products of a run as its rows are finished, top to bottom; called from one thread."""

    def write(self, window: Window, arrays: Mapping[str, np.ndarray]) -> None:
        """Take {product: array (bands, h, w)} of a window as wide as the strip."""
        ...


@dataclass
class Report:
    """What was done: tiles run, tiles left out (skipped), pixels finished, and {stage: seconds of work}."""

    tiles: int = 0
    skipped: int = 0
    pixels: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Add what was done in another run."""
        self.tiles += other.tiles
        self.skipped += other.skipped
        self.pixels += other.pixels
        for name, seconds in other.stages.items():
            self.stages[name] = self.stages.get(name, 0.0) + seconds


WAITING = 2
"""Batches that may wait for the model: while it runs one, the next is ready, and one more evens out the reading."""


@dataclass(frozen=True)
class Tick:
    """Pixels finished since the last tick, {stage: seconds of work in this run}, batches that wait, 0 to WAITING."""

    pixels: int
    busy: Mapping[str, float]
    queued: int


@dataclass(frozen=True)
class Area:
    """The part of a scene that shall be labelled.

    touches(window): whether it holds any pixel of a window, which may reach beyond the scene. mask(window): of a
    window within the scene, bool (h, w), True inside.
    """

    touches: Callable[[Window], bool]
    mask: Callable[[Window], np.ndarray]


class Votes(Protocol):
    """Who says what tiles show: a trained model, or one that follows words or prompts.

    identity: what decides its answers, as tags that every map carries; pieces and maps of another identity are never
    taken for its own. runs_on: what else the last bits hang on (type, device), which only resuming asks.
    """

    @property
    def classes(self) -> Mapping[int, ClassSpec]:
        """{id in the map: name and colour}; votes are in the order of the ids."""
        ...

    @property
    def inputs(self) -> Inputs:
        """The modalities that tiles must have, and how files are read for them."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the answers lie."""
        ...

    @property
    def known(self) -> Known:
        """Where several modalities have an answer; other pixels get no label."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """Tags, such as {"vfmseg_checkpoint": a hash}."""
        ...

    @property
    def runs_on(self) -> Mapping[str, Any]:
        """Plain values, such as {"dtype": "torch.float32"}."""
        ...

    @property
    def one_batch_size(self) -> bool:
        """Whether all batches should have one size, the places that are left over filled with nothing."""
        ...

    def __call__(self, tiles: Tiles) -> Tensor:
        """Logits float32 (B, K, t, t) on the device; the softmax over K makes probabilities of them.

        Who knows probabilities answers with their logarithms, which are logits of just these.
        """
        ...


@dataclass(frozen=True)
class Model:
    """What the engine asks of a model: `vote` on tiles, with `classes` votes a pixel, which lie on `device`.

    rule: where several modalities have an answer; elsewhere pixels get no label, and tiles without one are not run.
    """

    vote: Predictor
    classes: int
    device: str = "cpu"
    rule: Known = "all"
