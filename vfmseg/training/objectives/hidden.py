"""What of a batch the encoder of masked pretraining does not see: patches, pixels of patches, or bands."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vfmseg.data.image import Image, Images
from vfmseg.data.sample import Batch
from vfmseg.encoders.stem import Stem
from vfmseg.errors import DataError
from vfmseg.training.objectives.patches import chosen, split, to_patches

Hides = Literal["patches", "pixels", "bands"]
"""patches: all of each patch of `Batch.mask`. pixels: of these patches the pixels of `Batch.pixel_mask`. bands: of all
patches the bands of `Batch.band_mask`."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """Which patches the encoder may leave out, which are asked for, and what of them is hidden."""

    kept: Tensor  # int64 (B, N - H), numbers of the patches that are wholly visible
    asked: Tensor  # int64 (B, H), numbers of the patches of which something is hidden
    pixels: Tensor | None  # bool (B, 1, h, w), hidden in all bands, or (B, G, h, w), hidden in those of each group
    whole: bool  # of a patch that is asked for all is hidden
    bands: dict[str, Tensor]  # {modality: bool (B, C)}, hidden everywhere

    def covered(self, images: Images, stem: Stem) -> dict[str, Image]:
        """The images that a stem takes, such that it makes zeros of what is hidden, whatever is there.

        Pixels because they count as invalid, bands because they are of the value that a stem normalises to zero.
        """
        means = dict(zip(stem.modalities, stem.mean.split(list(stem.modalities.values())), strict=True))
        found = {name: images[name] for name in stem.modalities}
        if self.pixels is not None and self.pixels.shape[1] == 1:
            found = {name: Image(image.pixels, image.valid & ~self.pixels[:, 0]) for name, image in found.items()}
        elif self.pixels is not None:  # the other bands of such a pixel stay valid
            (name,), hidden = found, self.in_bands(stem)
            mean = means[name].to(found[name].pixels.dtype)[:, None, None]
            found = {name: Image(torch.where(hidden, mean, found[name].pixels), found[name].valid)}
        for name in set(found) & set(self.bands):
            hidden, mean = self.bands[name][..., None, None], means[name].to(found[name].pixels.dtype)[:, None, None]
            found[name] = Image(torch.where(hidden, mean, found[name].pixels), found[name].valid)
        return found

    def covered_in(self, stem: Stem, normalised: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What a stem makes of `covered` images, from what it has made of them whole.

        `normalised` (B, C, h, w) and `valid` (B, 1, h, w) are `Stem.normalised` and `Stem.valid` of the images.
        """
        if self.pixels is not None and self.pixels.shape[1] == 1:
            valid = torch.where(self.pixels, 0.0, valid)
        return torch.where(self.in_bands(stem), 0.0, normalised), valid

    def in_bands(self, stem: Stem) -> Tensor:
        """Bool (B, 1 or C, h or 1, w or 1): what of a stem's bands is hidden."""
        if self.pixels is None:
            return torch.cat([self.bands[name] for name in stem.modalities], dim=1)[..., None, None]
        if self.pixels.shape[1] == 1:
            return self.pixels
        group_of = {band: number for number, group in enumerate(stem.groups) for band in group}
        return self.pixels[:, [group_of[band] for band in range(len(group_of))]]

    def inside(self, modalities: Collection[str], patch: int) -> Tensor | None:
        """Bool (B, H or 1, patch * patch or 1, C or 1): what is hidden of the patches asked for; None: all of them."""
        if self.whole:
            return None
        if self.pixels is not None:
            return chosen(to_patches(self.pixels, patch), self.asked)
        return torch.cat([self.bands[name] for name in modalities], dim=1)[:, None, None]


def hidden_in(batch: Batch, hides: Hides, patch: int, groups: int = 1) -> Hidden:
    """What is hidden in a batch; DataError if its masks are not such, ValueError if samples hide different numbers.

    `groups` of bands, each of which has a token of each patch.
    """
    kept, asked = split(hidden_patches(batch, hides, patch, groups))
    if hides == "bands":
        return Hidden(kept, asked, None, False, batch.band_mask)
    if hides == "pixels":
        if batch.pixel_mask is None:
            raise DataError("this batch has no masks of hidden pixels; expected a source of incomplete masks")
        return Hidden(kept, asked, batch.pixel_mask[:, None], False, {})
    assert batch.mask is not None
    height, width = _size(batch)
    mask = batch.mask if batch.mask.ndim == 4 else batch.mask[:, None]
    pixels = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width]
    return Hidden(kept, asked, pixels, True, {})


def hidden_patches(batch: Batch, hides: Hides, patch: int, groups: int = 1) -> Tensor:
    """Bool (B, G * N): patches of which something is hidden, those of the first of G `groups` of bands first.

    DataError if the batch has no masks, or of other patches or groups.
    """
    height, width = _size(batch)
    grid = (-(-height // patch), -(-width // patch))
    if hides == "bands":
        if set(batch.band_mask) != set(batch.images):
            raise DataError("this batch has no masks of hidden bands; expected a source of spectral masks")
        return torch.ones(
            len(batch), grid[0] * grid[1], dtype=torch.bool, device=next(iter(batch.band_mask.values())).device
        )
    if batch.mask is None:
        raise DataError("this batch has no masks of hidden patches; expected a source that draws them (data/masks.py)")
    rows, columns = batch.mask.shape[-2:]
    if (rows, columns) != grid:
        raise DataError(
            f"masks of {rows} x {columns} patches for images of {height} x {width} pixels; "
            f"expected {grid[0]} x {grid[1]}, as patches of this encoder have {patch} pixels a side"
        )
    if batch.mask.ndim == 3:
        return batch.mask.flatten(1).repeat(1, groups)
    if batch.mask.shape[1] != groups:
        raise DataError(
            f"masks of {batch.mask.shape[1]} groups of bands for {groups}; expected one for each, or one for all"
        )
    counts = sorted(set(batch.mask.sum(dim=(2, 3)).flatten().tolist()))
    if len(counts) > 1:
        raise ValueError(f"the masks of groups hide {counts} patches; expected the same number in each")
    return batch.mask.flatten(1)


def _size(batch: Batch) -> tuple[int, int]:
    height, width = next(iter(batch.images.values())).valid.shape[-2:]
    return height, width
