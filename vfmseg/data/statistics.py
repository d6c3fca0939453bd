"""Mean and standard deviation of every band over a whole split, in one pass and in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vfmseg.data.scene import Scene
from vfmseg.errors import DataError
from vfmseg.geo.grid import cut

BandStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean of each band, and standard deviation of each band, in image units."""


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


def stream_statistics(scenes: Sequence[Scene], tile: int = 512) -> dict[str, BandStatistics]:
    """{modality: (mean per band, std per band)} over the valid pixels of all scenes, each pixel once.

    In the units of the images (stored * scale + offset). Reads tile by tile; call it with the training split only.
    Raises DataError for a modality without any valid pixel.
    """
    moments: dict[str, _Moments] = {}
    for scene in scenes:
        for part in cut(scene.grid.height, scene.grid.width, tile):
            for name, chip in scene.read(part.core).items():
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


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
