"""Random changes of a training tile: geometry for everything at once, radiometry for one modality at a time.

torchvision's random transforms draw from the global random state, so a tile would depend on the worker that
happened to make it. Here all numbers are drawn first, from a generator of the sample's own, and torchvision's
functions then apply them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from vfmseg.data.image import Image
from vfmseg.data.sample import Sample
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE


@dataclass(frozen=True)
class Radiometry:
    """Largest random change of one modality; 0 leaves that property alone.

    brightness, contrast, saturation: factors from max(0, 1 - x) to 1 + x; hue: turns of the colour circle from -x to
    x, at most 0.5. Saturation and hue need exactly three bands in the order red, green, blue.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


@dataclass(frozen=True)
class _Motion:
    """One drawn geometry: mirror left-right, then quarter turns, then zoom (above 1 enlarges) and turn (degrees)."""

    mirror: bool
    quarters: int
    zoom: float
    degrees: float

    @property
    def resamples(self) -> bool:
        return self.zoom != 1.0 or self.degrees != 0.0

    def frame(self) -> Tensor:
        """(2, 2): a way of (rows, columns) pixels before is frame @ way after."""
        mirror = torch.tensor([[1.0, 0.0], [0.0, -1.0 if self.mirror else 1.0]])
        quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        angle = math.radians(self.degrees)
        turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        return self.zoom * turn @ torch.linalg.matrix_power(quarter, self.quarters) @ mirror


@dataclass(frozen=True)
class Augment:
    """Augments one sample; the same seed gives the same result, whatever ran before.

    flip: mirror half of the tiles (with rotate90 this reaches all eight orientations; without it top-bottom is
    mirrored at random too). rotate90: turn by a random multiple of 90 degrees (tiles that are not square: of 180).
    scale: (smallest, largest) zoom, above 1 enlarges. rotate: largest turn in degrees, either way.
    radiometry: {modality: changes}. value_range: {modality: largest possible value}, 255.0 for 8-bit images, 0 or
    missing if unknown; changed values are clipped to 0..that value.
    Zoom and turn resample inside the tile: labels by nearest neighbour; pixels from outside the tile become
    IGNORE and invalid; an invalid pixel never mixes into a valid one.
    """

    flip: bool = True
    rotate90: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    rotate: float = 0.0
    radiometry: Mapping[str, Radiometry] = field(default_factory=dict)
    value_range: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, sample: Sample, generator_seed: int) -> Sample:
        """A changed copy of `sample`, of the same shape."""
        draws = np.random.default_rng(generator_seed)
        height, width = next(iter(sample.images.values())).valid.shape
        motion = self._motion(draws, square=height == width)
        images = {name: _move_image(image, motion) for name, image in sample.images.items()}
        for name, changes in self.radiometry.items():
            if name in images:
                images[name] = _recolour(name, images[name], changes, self.value_range.get(name, 0.0), draws)
        labels = None if sample.labels is None else _move_labels(sample.labels, motion)
        return replace(sample, images=images, labels=labels, frame=motion.frame() @ sample.frame)

    def _motion(self, draws: np.random.Generator, square: bool) -> _Motion:
        # every number is drawn whether it is used or not: switching one change on leaves the others as they were
        mirror, quarters, turned, zoom, degrees = draws.random(5)
        turns = 0
        if self.rotate90:
            turns = int(quarters * 4) if square else 2 * int(quarters * 2)
        elif self.flip:
            turns = 2 * int(turned * 2)  # left-right mirror and half turn together mirror top-bottom
        low, high = (math.log(limit) for limit in self.scale)
        return _Motion(
            mirror=self.flip and bool(mirror < 0.5),
            quarters=turns,
            # uniform in the logarithm, so that halving and doubling are equally likely
            zoom=1.0 if self.scale == (1.0, 1.0) else math.exp(low + (high - low) * zoom),
            degrees=self.rotate * (2.0 * degrees - 1.0),
        )


def _orient(tensor: Tensor, motion: _Motion) -> Tensor:
    """Mirror and quarter turns of (..., H, W): every pixel only changes place."""
    if motion.mirror:
        tensor = tv.horizontal_flip(tensor)
    return torch.rot90(tensor, motion.quarters, dims=(-2, -1)) if motion.quarters else tensor


def _move_image(image: Image, motion: _Motion) -> Image:
    """Move an image of (C, H, W) pixels."""
    image = image.each(lambda tensor: _orient(tensor, motion))
    if not motion.resamples:
        return image
    pixels, valid = image.pixels, image.valid
    # Invalid pixels hold 0. The weights of the valid ones are resampled beside them, and dividing by these keeps
    # a valid pixel next to nodata (or to the tile's edge) at the mean of its valid neighbours instead of darkening it.
    both = tv_tensors.Image(torch.cat([torch.where(valid, pixels, 0.0), valid[None].to(pixels.dtype)]))
    moved = tv.affine(
        both,
        angle=motion.degrees,
        translate=[0.0, 0.0],
        scale=motion.zoom,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    ).as_subclass(Tensor)
    weight = moved[-1]
    kept = weight >= 0.5
    return Image(torch.where(kept, moved[:-1] / weight.clamp(min=0.5), 0.0), kept)


def _move_labels(labels: Tensor, motion: _Motion) -> Tensor:
    """Move int64 (H, W) by nearest neighbour; what comes from outside is IGNORE."""
    labels = _orient(labels, motion)
    if not motion.resamples:
        return labels
    moved: Tensor = tv.affine(
        tv_tensors.Mask(labels),
        angle=motion.degrees,
        translate=[0.0, 0.0],
        scale=motion.zoom,
        shear=[0.0, 0.0],
        fill=IGNORE,
    )
    return moved.as_subclass(Tensor)


def _recolour(name: str, image: Image, changes: Radiometry, top: float, draws: np.random.Generator) -> Image:
    """Change the colours of an image of (C, H, W) pixels where it is valid; `top` > 0 clips to 0..top."""
    pixels, valid = image.pixels, image.valid
    signs = 2.0 * draws.random(4) - 1.0
    brightness, contrast, saturation = (
        max(0.0, 1.0 + sign * limit)
        for sign, limit in zip(signs, (changes.brightness, changes.contrast, changes.saturation), strict=False)
    )
    if (changes.saturation or changes.hue) and pixels.shape[0] != 3:
        raise DataError(
            f"{name}: saturation and hue need 3 bands (red, green, blue), but {pixels.shape[0]} are read; "
            f"remove them from train.augment.radiometry.{name}, brightness and contrast work with any bands"
        )
    out = pixels * brightness
    if changes.contrast:
        # about the mean of the valid pixels of each band: torchvision's own would count nodata as black
        centre = out.sum(dim=(1, 2), keepdim=True) / valid.sum().clamp(min=1)
        out = torch.lerp(centre, out, contrast)
    if changes.saturation:
        out = torch.lerp(tv.rgb_to_grayscale(out).expand_as(out), out, saturation)
    if changes.hue:
        # torchvision expects 0..1; a change of hue does not depend on the unit that brings the values there
        unit = max(top, float(out.max()), 1e-12)
        out = tv.adjust_hue(out.clamp(min=0.0) / unit, float(signs[3]) * changes.hue) * unit
    if top > 0:
        out = out.clamp(0.0, top)
    return Image(torch.where(valid, out, 0.0), valid)
