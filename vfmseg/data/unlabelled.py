"""Windows of unlabelled scenes as tensors: random resized crops of scenes of any size, to pretrain on.

Scenes need not be cut before: each window is read where it lies. What a draw gives is a function of
(seed, epoch, index), in whatever process it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vfmseg.data.augment import Augment
from vfmseg.data.dataset import RandomWindows, random_window
from vfmseg.data.draw import BandDraw
from vfmseg.data.image import Image
from vfmseg.data.sample import Sample
from vfmseg.data.scene import Scene, speakers
from vfmseg.data.visits import Portion
from vfmseg.data.windows import Draw, Purpose
from vfmseg.errors import DataError
from vfmseg.geo.grid import Grid
from vfmseg.geo.validity import Chip

Masker = Callable[[Sample, np.random.Generator], Sample]
"""The same sample with a mask, see `vfmseg.data.masks`."""

TRIES = 10
"""Windows that are read until one is not mostly nodata; of a scene that has hardly anything else the best is taken."""

LEAST_VALID = 0.5
"""Share of a window's pixels, of all modalities that its scene has, that must be valid for it to be taken at once."""


class UnlabelledWindows(RandomWindows):
    """Windows without labels, asked for by Draw(epoch, index): images (C, tile, tile), and a mask if one is drawn.

    A window is a square of tile * s pixels a side, anywhere in its scene, resized to tile x tile; s goes from scale[0]
    to scale[1], uniformly in its logarithm, and in a scene in which the largest windows do not fit only as far as they
    do. Scenes in which none fits are filled up with invalid pixels. A window that is mostly nodata is drawn again.
    `mask` draws from a generator of its own, so that masks are the same whatever else is drawn. Of a filler nothing
    is valid. `place`: the section of scenes and scale in the recipe, for messages. `bands_drawn`: which bands of a
    sample are shown; `bands` are then those. The other arguments are those of `RandomWindows`.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        tile: int,
        seed: int,
        augment: Augment | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        samples_per_epoch: int | None = None,
        bands: Mapping[str, int] | None = None,
        portions: Sequence[Portion] = (),
        mask: Masker | None = None,
        place: str = "data",
        bands_drawn: BandDraw | None = None,
    ) -> None:
        bands = bands or {name: scene.bands()[name] for name, scene in speakers(scenes).items()}
        super().__init__(scenes, tile, seed, samples_per_epoch, bands, portions, f"{place}.scenes")
        self.augment = augment
        self.scale = scale
        self.mask = mask
        self.place = place
        self.bands_drawn = bands_drawn
        self._require_scale()

    def _require_scale(self) -> None:
        """DataError for windows that would be mostly empty in every scene."""
        low, high = self.scale
        if self.tile * high > 2 * self.widest:
            fits = math.floor(100 * self.widest / self.tile) / 100
            raise DataError(
                f"{self.place}.scale = [{low:g}, {high:g}] of data.tile = {self.tile} makes windows of up to "
                f"{self.tile * high:g} px a side, but the longest side of a scene is {self.widest} px; expected at "
                f"most twice that; try {self.place}.scale = [{min(low, fits):g}, {fits:g}], or a smaller data.tile"
            )

    def __getitem__(self, draw: Draw) -> Sample:
        """One window, read, resized and augmented."""
        images = {} if draw.filler else self._read(draw)
        if self.bands_drawn is not None:
            images = self.bands_drawn(images, self._rng(Purpose.BANDS, draw))
        nothing = (self.tile, self.tile)
        bands = self.bands or {}
        sample = Sample({name: images.get(name) or Image.nothing(bands[name], nothing) for name in bands}, None)
        if self.augment is not None and not draw.filler:
            sample = self.augment(sample, int(self._rng(Purpose.AUGMENT, draw).integers(2**63)))
        if self.mask is not None:
            sample = self.mask(sample, self._rng(Purpose.MASK, draw))
        return sample

    def bands_of(self, draw: Draw) -> dict[str, list[int]]:
        """{modality: bands, from 0, that this draw shows}, of those of which some are drawn."""
        return {} if self.bands_drawn is None else self.bands_drawn.numbers(self._rng(Purpose.BANDS, draw))

    def _read(self, draw: Draw) -> dict[str, Image]:
        """{modality that the scene has: its part of a random window}; the best of several where all are mostly nodata.

        Scale and place are both drawn again.
        """
        scene = self.scenes[self.visits.scene(draw)]
        draws = self._rng(Purpose.WINDOW, draw)
        best: dict[str, Chip] = {}
        most = -1.0
        for _ in range(self._tries(scene.grid)):
            chips = scene.read(random_window(scene.grid, self._side(scene.grid, draws), draws))
            valid = float(np.mean([chip.valid.mean() for chip in chips.values()]))
            if valid > most:
                best, most = chips, valid
            if most >= LEAST_VALID:
                break
        return {name: resized(Image.of(chip), self.tile) for name, chip in best.items()}

    def _tries(self, grid: Grid) -> int:
        """1 where every window holds the whole scene, as another would show the same."""
        return TRIES if max(grid.height, grid.width) > round(self.tile * self.scale[0]) else 1

    def _side(self, grid: Grid, draws: np.random.Generator) -> int:
        """A random side of a window in pixels of the scene."""
        low, high = self.scale
        high = max(low, min(high, min(grid.height, grid.width) / self.tile))
        return max(1, round(self.tile * low * (high / low) ** draws.random()))


def resized(image: Image, side: int) -> Image:
    """An image of (C, h, w) pixels as (C, side, side), bilinearly, and averaged over what a pixel covers where smaller.

    A pixel is valid only if all that it is made from is: an average with the 0 of invalid pixels would be too dark.
    """
    if image.valid.shape == (side, side):
        return image
    pixels = _resized(image.pixels, side)
    if bool(image.valid.all()):
        return Image(pixels, torch.ones(side, side, dtype=torch.bool))
    # weights are never negative, so that the sum is zero exactly where no invalid pixel has any
    valid = _resized((~image.valid).to(pixels.dtype)[None], side)[0] == 0
    return Image(torch.where(valid, pixels, 0.0), valid)


def _resized(values: Tensor, side: int) -> Tensor:
    """Values float (C, h, w) as (C, side, side)."""
    return interpolate(values[None], (side, side), mode="bilinear", antialias=True)[0]
