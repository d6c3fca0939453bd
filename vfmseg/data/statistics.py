"""Mean and standard deviation of every band over a whole split, in one pass and in constant memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from vfmseg.data.scene import Scene
from vfmseg.errors import DataError
from vfmseg.geo.grid import Window, cut

BandStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean of each band, and standard deviation of each band, in image units."""

LEAST_TILES = 256
"""Tiles of scenes with one set of modalities that are read even where they hold more pixels than asked for."""


class _Moments:
    """Count, mean and sum of squared deviations of some bands, merged tile by tile in float64.

    Merging follows Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979): no difference of large sums, so that bands with a large mean keep their variance.
    """

    def __init__(self, bands: int) -> None:
        self.count = 0
        self.mean = np.zeros(bands)
        self.squares = np.zeros(bands)

    def add(self, values: np.ndarray) -> None:
        """Add pixels, (bands, n)."""
        n = values.shape[1]
        if n == 0:
            return
        wide = values.astype(np.float64)
        mean = wide.mean(axis=1)
        wide -= mean[:, None]
        squares = np.einsum("bn,bn->b", wide, wide)
        delta = mean - self.mean
        total = self.count + n
        self.squares += squares + delta**2 * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def std(self) -> np.ndarray:
        """Standard deviation (of the population) per band; of a constant band max(|mean|, 1)."""
        std = np.sqrt(self.squares / self.count)
        # A band that never varies says nothing. Dividing by its rounding noise would blow up the first deviating
        # pixel of another scene; divided by its own size it stays small.
        size = np.maximum(np.abs(self.mean), 1.0)
        return np.where(std > 1e-6 * np.abs(self.mean), std, size)


def stream_statistics(scenes: Sequence[Scene], tile: int = 512, most: int | None = None) -> dict[str, BandStatistics]:
    """{modality: (mean per band, std per band)} over the valid pixels of all scenes, each pixel once.

    In the units of the images (stored * scale + offset). Reads tile by tile; call it with the training split only.
    `most`: about how many pixels are read at most, see `_tiles`. Raises DataError for a modality without any valid
    pixel.
    """
    moments: dict[str, _Moments] = {}
    for scene, window in _tiles(scenes, tile, most):
        for name, chip in scene.read(window).items():
            here = moments.setdefault(name, _Moments(chip.pixels.shape[0]))
            if len(here.mean) != chip.pixels.shape[0]:
                raise DataError(
                    f"{scene.name}: {name} has {chip.pixels.shape[0]} bands, the scenes before it "
                    f"{len(here.mean)}; name the bands in the recipe (data.modalities.{name}.bands)"
                )
            whole = chip.valid.all()  # the usual case, without picking pixels one by one
            here.add(chip.pixels.reshape(len(chip.pixels), -1) if whole else chip.pixels[:, chip.valid])
    if not moments:
        raise DataError("no scenes to compute band statistics from; expected at least one training scene")
    for name, here in moments.items():
        if here.count == 0:
            raise DataError(
                f"{name}: none of the {len(scenes)} scenes has a valid pixel (all are nodata, NaN or masked); "
                f"check data.modalities.{name}.nodata and the files"
            )
    return {name: (_floats(here.mean), _floats(here.std())) for name, here in moments.items()}


def _tiles(scenes: Sequence[Scene], tile: int, most: int | None) -> Iterator[tuple[Scene, Window]]:
    """Each scene in tiles; of scenes of more than `most` pixels in all a random part of them, always the same.

    Of scenes with one set of modalities at least LEAST_TILES are read if there are as many, so that none is left out.
    """
    pixels = sum(scene.grid.height * scene.grid.width for scene in scenes)
    share = 1.0 if most is None or pixels <= most else most / pixels
    alike: dict[tuple[str, ...], list[Scene]] = {}
    for scene in scenes:
        alike.setdefault(tuple(scene.bands()) if share < 1.0 else (), []).append(scene)
    for group in alike.values():
        cuts = [cut(scene.grid.height, scene.grid.width, tile) for scene in group]
        ends = list(accumulate(map(len, cuts)))
        count = max(round(share * ends[-1]), LEAST_TILES)
        chosen: Iterable[int] = range(ends[-1])
        if share < 1.0 and count < ends[-1]:
            chosen = map(int, np.sort(np.random.default_rng(0).choice(ends[-1], count, replace=False)))
        for number in chosen:
            at = bisect_right(ends, number)
            yield group[at], cuts[at][number - ends[at] + len(cuts[at])].core


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
