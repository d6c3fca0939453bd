"""Tiles of scenes as tensors: random windows to learn from, and a full cover to be scored on.

Both open files where they are read (in the worker), and what they return is a function of their arguments and of
what is asked for: no global random state is read or changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from torch.utils.data import Dataset

from vfmseg.data.augment import Augment
from vfmseg.data.dropout import hide
from vfmseg.data.image import Image, Known, known
from vfmseg.data.sample import Sample
from vfmseg.data.scene import Scene
from vfmseg.data.visits import MOST_WINDOWS, Portion, Visits
from vfmseg.data.windows import Draw, Purpose, rng
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Grid, Tile, Window, cut
from vfmseg.geo.validity import Chip

_TRIES = 10
"""Windows that are tried until one has something to learn from; a scene may have hardly any labels."""

SMALL_TILE = 1024
"""Pixels; tiles up to here may be far larger than all scenes, as what is empty in them takes little memory."""


class RandomWindows(Dataset[Sample]):
    """What sources of random windows share: which scene a draw is of, and of which kind that is.

    A scene of h x w pixels is visited ceil(h / tile) * ceil(w / tile) times an epoch; with `samples_per_epoch` scenes
    keep these shares on average. `portions`: the sources that the scenes are of, which may have weights, see `Visits`.
    `bands` {modality: number}: what every sample has; of one that its scene lacks nothing is valid. `place`: the key of
    the scenes in the recipe, for messages.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        tile: int,
        seed: int,
        samples_per_epoch: int | None,
        bands: Mapping[str, int] | None,
        portions: Sequence[Portion],
        place: str,
    ) -> None:
        if not scenes:
            raise DataError(f"{place}: there are no scenes; expected at least one")
        self.scenes = list(scenes)
        self.tile = tile
        self.seed = seed
        self.bands = bands
        grids = [scene.grid for scene in self.scenes]
        self.widest = max(side for grid in grids for side in (grid.height, grid.width))
        counts = [ceil(g.height / tile) * ceil(g.width / tile) for g in grids]
        self.visits = Visits(counts, seed, samples_per_epoch, portions)
        if (length := samples_per_epoch or sum(counts)) > MOST_WINDOWS:
            raise DataError(
                f"{place}: an epoch would be {length:,} windows of {tile} px, more than {MOST_WINDOWS:,}; set "
                "data.samples_per_epoch to fewer"
            )

    def __len__(self) -> int:
        return len(self.visits)

    def kind(self, draw: Draw) -> Hashable:
        """The modalities that the scene of a draw has."""
        sets = self._sets
        return sets[0] if len(sets) == 1 else sets[self.visits.scene(draw)]

    @cached_property
    def _sets(self) -> list[tuple[str, ...]]:
        """The modalities of each scene; a single entry if all have the same."""
        found = [tuple(sorted(scene.bands())) for scene in self.scenes]
        return found[:1] if len(set(found)) == 1 else found

    def _rng(self, purpose: Purpose, draw: Draw) -> np.random.Generator:
        """The random numbers of one draw for one purpose."""
        return rng(purpose, self.seed, draw.epoch, draw.index)


class TrainingWindows(RandomWindows):
    """Random tile x tile windows, asked for by Draw(epoch, index).

    Each visit of a scene is anywhere in it. Window and augmentation follow from (seed, epoch, index). Scenes smaller
    than a tile are filled up with invalid, unlabelled pixels. `rule`: where several modalities have an answer; a window
    without any labelled pixel there is drawn again. `dropout` {modality: how often it is hidden}, see `hide`.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        tile: int,
        seed: int,
        augment: Augment | None,
        rule: Known,
        samples_per_epoch: int | None = None,
        bands: Mapping[str, int] | None = None,
        dropout: Mapping[str, float] | None = None,
        portions: Sequence[Portion] = (),
    ) -> None:
        super().__init__(scenes, tile, seed, samples_per_epoch, bands, portions, "data.train")
        self.augment = augment
        self.rule = rule
        self.dropout = dropout
        if tile > SMALL_TILE and tile >= 2 * self.widest:
            raise DataError(
                f"data.tile = {tile}, but the longest side of a training scene is {self.widest} px: three quarters or "
                f"more of every window would be empty, at the full price in memory and time; try data.tile = "
                f"{self.widest}"
            )

    def __getitem__(self, draw: Draw) -> Sample:
        """Read, augment and return one window, maybe without some modality; the labels of a filler are all IGNORE."""
        scene = self.scenes[self.visits.scene(draw)]
        chips, labels = self._learnable(scene, self._rng(Purpose.WINDOW, draw))
        sample = to_sample(chips, labels, self.bands)
        if draw.filler:
            return Sample(sample.images, torch.full((self.tile, self.tile), IGNORE))
        if self.augment is not None:
            sample = self.augment(sample, int(self._rng(Purpose.AUGMENT, draw).integers(2**63)))
        if self.dropout:
            sample = hide(sample, self.dropout, self._rng(Purpose.MODALITY, draw))
        return sample

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
    only and are IGNORE elsewhere, so that no pixel counts twice. `bands` as in `TrainingWindows`.
    """

    def __init__(self, scenes: Sequence[Scene], tile: int, bands: Mapping[str, int] | None = None) -> None:
        self.scenes = list(scenes)
        self.bands = bands
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
        return to_sample(scene.read(window), labels, self.bands)


def random_window(grid: Grid, tile: int, draws: np.random.Generator) -> Window:
    """A tile x tile window, each offset that fits equally likely; along a shorter axis it starts at 0."""
    row = int(draws.integers(max(grid.height - tile, 0) + 1))
    col = int(draws.integers(max(grid.width - tile, 0) + 1))
    return Window(row, col, tile, tile)


def to_sample(chips: Mapping[str, Chip], labels: np.ndarray, bands: Mapping[str, int] | None = None) -> Sample:
    """Chips of one window as a sample of tensors, with labels int64 (h, w).

    `bands` {modality: number}: those that a sample has, in this order; left out: those of the chips. One without a chip
    becomes zeros of which nothing is valid, because all samples of a batch need one layout.
    """
    images = {
        name: Image.of(chips[name]) if name in chips else Image.nothing(count, labels.shape)
        for name, count in (bands or {name: len(chip.pixels) for name, chip in chips.items()}).items()
    }
    return Sample(images, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)))
