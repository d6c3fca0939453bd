"""Tiles of scenes as tensors: random windows to learn from, and a full cover to be scored on.

Both open files where they are read (in the worker), and what they return is a function of their arguments and of
what is asked for: no global random state is read or changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from torch.utils.data import Dataset

from vfmseg.data.augment import Augment
from vfmseg.data.image import Image, Known, known
from vfmseg.data.sample import Sample
from vfmseg.data.scene import Scene
from vfmseg.data.windows import Draw, Purpose, rng
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Grid, Tile, Window, cut
from vfmseg.geo.validity import Chip

_TRIES = 10
"""Windows that are tried until one has something to learn from; a scene may have hardly any labels."""

SMALL_TILE = 1024
"""Pixels; tiles up to here may be far larger than all scenes, as what is empty in them takes little memory."""

MOST_WINDOWS = 10**7
"""Of an epoch: the order of that many fits in memory."""


class TrainingWindows(Dataset[Sample]):
    """Random tile x tile windows, asked for by Draw(epoch, index).

    A scene of h x w pixels is visited ceil(h / tile) * ceil(w / tile) times an epoch, each time anywhere in it; with
    `samples_per_epoch` scenes keep these shares on average. Window and augmentation follow from
    (seed, epoch, index). Scenes smaller than a tile are filled up with invalid, unlabelled pixels. `rule`: where
    several modalities have an answer; a window without any labelled pixel there is drawn again.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        tile: int,
        seed: int,
        augment: Augment | None,
        rule: Known,
        samples_per_epoch: int | None = None,
    ) -> None:
        if not scenes:
            raise DataError("there are no training scenes; expected at least one")
        self.scenes = list(scenes)
        self.tile = tile
        self.seed = seed
        self.augment = augment
        self.rule = rule
        grids = [scene.grid for scene in self.scenes]
        widest = max(side for grid in grids for side in (grid.height, grid.width))
        if tile > SMALL_TILE and tile >= 2 * widest:
            raise DataError(
                f"data.tile = {tile}, but the longest side of a training scene is {widest} px: three quarters or more "
                f"of every window would be empty, at the full price in memory and time; try data.tile = {widest}"
            )
        self._ends = list(accumulate(ceil(g.height / tile) * ceil(g.width / tile) for g in grids))
        self._length = samples_per_epoch or self._ends[-1]
        if self._length > MOST_WINDOWS:
            raise DataError(
                f"data.train: an epoch would be {self._length:,} windows of {tile} px, more than {MOST_WINDOWS:,}; set "
                "data.samples_per_epoch to fewer"
            )
        self._shuffled: tuple[int, np.ndarray] | None = None  # (epoch, permutation of the slots)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, draw: Draw) -> Sample:
        """Read, augment and return one window; the labels of a filler are all IGNORE."""
        scene = self.scenes[bisect_right(self._ends, self._slot(draw))]
        draws = rng(Purpose.WINDOW, self.seed, draw.epoch, draw.index)
        chips, labels = self._learnable(scene, draws)
        sample = to_sample(chips, labels)
        if draw.filler:
            return Sample(sample.images, torch.full((self.tile, self.tile), IGNORE))
        if self.augment is None:
            return sample
        stream = rng(Purpose.AUGMENT, self.seed, draw.epoch, draw.index)
        return self.augment(sample, int(stream.integers(2**63)))

    def _slot(self, draw: Draw) -> int:
        """The place in the list of visits that this draw stands for."""
        slots = self._ends[-1]
        if draw.index < self._length // slots * slots:
            return draw.index % slots
        if slots > MOST_WINDOWS:  # too many to be put into an order
            return int(rng(Purpose.SCENE, self.seed, draw.epoch, draw.index).integers(slots))
        # A part of the list is left for the rest of the draws; another part each epoch, so that every scene is seen.
        if self._shuffled is None or self._shuffled[0] != draw.epoch:
            self._shuffled = (draw.epoch, rng(Purpose.SCENE, self.seed, draw.epoch).permutation(slots))
        return int(self._shuffled[1][draw.index % slots])

    def _learnable(self, scene: Scene, draws: np.random.Generator) -> tuple[dict[str, Chip], np.ndarray]:
        """Pixels and labels of a random window; one without any usable label is drawn again, ten times in all."""
        several = scene.grid.height > self.tile or scene.grid.width > self.tile
        for left in reversed(range(_TRIES if several else 1)):
            window = random_window(scene.grid, self.tile, draws)
            labels = scene.read_labels(window)
            if left and not (labels != IGNORE).any():
                continue  # the images need not be read to know
            chips = scene.read(window)
            if not left or (known(chips, self.rule) & (labels != IGNORE)).any():
                break
        return chips, labels


class CoverWindows(Dataset[Sample]):
    """Every pixel of every scene exactly once, for scores: tiles in a fixed order, never augmented.

    Tiles are whole, so the last ones of a row or column overlap the one before; labels are kept in the tile's core
    only and are IGNORE elsewhere, so that no pixel counts twice.
    """

    def __init__(self, scenes: Sequence[Scene], tile: int) -> None:
        self.scenes = list(scenes)
        self._tiles = [cut(scene.grid.height, scene.grid.width, tile) for scene in self.scenes]
        self._ends = list(accumulate(map(len, self._tiles)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> tuple[int, Tile]:
        """Number of the scene of the index-th tile, and the tile; IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return number, self._tiles[number][index - self._ends[number] + len(self._tiles[number])]

    def __getitem__(self, index: int) -> Sample:
        """The index-th tile, images (C, tile, tile)."""
        number, part = self.place(index)
        scene, window, core = self.scenes[number], part.window, part.core
        labels = np.full(window.shape, IGNORE, dtype=np.int64)
        both = window.shared(core)
        if both is not None:
            labels[both[0]] = scene.read_labels(core)
        return to_sample(scene.read(window), labels)


def random_window(grid: Grid, tile: int, draws: np.random.Generator) -> Window:
    """A tile x tile window, each offset that fits equally likely; along a shorter axis it starts at 0."""
    row = int(draws.integers(max(grid.height - tile, 0) + 1))
    col = int(draws.integers(max(grid.width - tile, 0) + 1))
    return Window(row, col, tile, tile)


def to_sample(chips: dict[str, Chip], labels: np.ndarray) -> Sample:
    """Chips of one window as a sample of tensors, with labels int64 (h, w)."""
    images = {name: Image.of(chip) for name, chip in chips.items()}
    return Sample(images, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)))
