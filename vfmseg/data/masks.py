"""Which patches an encoder does not see in masked pretraining, drawn from a generator of the sample's own.

A mask follows from that generator alone, so a run that goes on draws the masks it would have drawn, and two processes
draw as one. Every mask hides `hidden_count` patches, so that the visible ones of a batch stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from vfmseg.data.image import Image
from vfmseg.data.sample import Sample
from vfmseg.errors import RecipeError

MaskKind = Literal["random", "block", "incomplete", "spectral"]
"""random: each patch alone (MAE). block: rectangles of patches (BEiT). incomplete: as random, but of a hidden patch
some pixels stay visible (RingMo), so that an object smaller than a patch does not vanish. spectral: whole bands, of
each modality, and no patches."""

SMALLEST_BLOCK = 16 / 196
"""Patches of a block are at least this share of the grid: BEiT's 16 of 14 x 14."""
STRETCH = 0.3
"""Rows of a block over its columns: from this to its inverse, uniform in the logarithm."""
_TRIES = 10
"""Rectangles drawn until one fits on the grid and hides neither nothing nor too much."""


@dataclass(frozen=True)
class Masking:
    """How masks are drawn: put into samples, one after another, each with a generator of its own.

    ratio: share of the patches, or of the bands, that is hidden, 0 to 1. patch: pixels of their sides. inside: share of
    a hidden patch's pixels that is hidden, for `incomplete`. groups: number of groups of bands that have masks of their
    own, for `random` and `block`; None: one mask for all bands.
    """

    kind: MaskKind
    ratio: float
    patch: int
    inside: float = 0.6
    groups: int | None = None

    def __call__(self, sample: Sample, draws: np.random.Generator) -> Sample:
        """The sample with `mask` filled, for `incomplete` with `pixel_mask` too, for `spectral` with `band_mask` alone.

        RecipeError if that would leave nothing visible, or hide nothing.

        Patches reach beyond the right and bottom edge where the size is no multiple of them, as in a `Stem`.
        """
        if self.kind == "spectral":
            return replace(
                sample, band_mask={name: self._bands(name, image, draws) for name, image in sample.images.items()}
            )
        height, width = next(iter(sample.images.values())).valid.shape
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        count = hidden_count(self.ratio, rows * columns, "patches of a window")
        draw = block_mask if self.kind == "block" else random_mask
        if self.groups is not None:
            each = [draw(rows, columns, count, draws) for _ in range(self.groups)]
            return replace(sample, mask=torch.from_numpy(np.stack(each)))
        mask = draw(rows, columns, count, draws)
        if self.kind != "incomplete":
            return replace(sample, mask=torch.from_numpy(mask))
        pixels = incomplete_mask(mask, self.patch, self.inside, draws)[:height, :width]
        return replace(sample, mask=torch.from_numpy(mask), pixel_mask=torch.from_numpy(np.ascontiguousarray(pixels)))

    def require(self, tile: int, bands: Mapping[str, int], place: str) -> None:
        """RecipeError if windows of tile x tile pixels of {modality: bands} would be left without anything visible.

        The same as the first sample would meet; `place`: the key of the ratio in the recipe.
        """
        if self.kind == "spectral":
            for name, count in bands.items():
                hidden_count(self.ratio, count, f"bands of {name}", place)
        else:
            total = (-(-tile // self.patch)) ** 2
            hidden_count(self.ratio, total, "patches of a window", place, f"set data.tile to {2 * self.patch} or more")

    def _bands(self, name: str, image: Image, draws: np.random.Generator) -> torch.Tensor:
        """Bool (C,), of a modality."""
        bands = len(image.pixels)
        count = hidden_count(self.ratio, bands, f"bands of {name}")
        return torch.from_numpy(random_mask(1, bands, count, draws)[0])


def hidden_count(
    ratio: float, total: int, what: str, place: str = "mask ratio", alone: str = "hide something else"
) -> int:
    """round(ratio * total), half to even, as Python does; RecipeError where that hides nothing or leaves nothing.

    `what` there is a total of, `place` where the ratio was given, and what to do where there is but one, as messages
    say it.
    """
    count = round(ratio * total) if math.isfinite(ratio) else -1
    if not 0 < count < total:
        remedy = f"try {0.5 if total == 2 else 0.75}" if total > 1 else f"which takes two or more: {alone}"
        raise RecipeError(
            f"{place} = {ratio} hides {min(max(count, 0), total)} of the {total} {what}; expected at least one hidden "
            f"and one visible, {remedy}"
        )
    return count


def random_mask(rows: int, columns: int, count: int, draws: np.random.Generator) -> np.ndarray:
    """Bool (rows, columns), True at `count` patches; every such mask is equally likely."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[draws.permutation(rows * columns)[:count]] = True
    return mask.reshape(rows, columns)


def block_mask(rows: int, columns: int, count: int, draws: np.random.Generator) -> np.ndarray:
    """Bool (rows, columns), True at `count` patches that lie in rectangles, which may overlap.

    Where the rest is too small for one more rectangle, neighbours of what is hidden make up the number. In the end all
    is moved round the grid by a random step, so that every patch is hidden as often: BEiT's rectangles hide a patch in
    the middle of 8 x 8 in 81 % of the masks of ratio 0.5, and one in a corner in 15 %.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    while (rest := count - int(mask.sum())) > 0:
        block = _block(mask, rest, draws)
        if block is None:
            break
        mask[block] = True
    while (rest := count - int(mask.sum())) > 0:
        edge = np.flatnonzero(_neighbours(mask) if mask.any() else ~mask)
        mask.flat[draws.permutation(edge)[: min(rest, len(edge)) if mask.any() else 1]] = True
    return np.roll(mask, (int(draws.integers(rows)), int(draws.integers(columns))), axis=(0, 1))


def incomplete_mask(mask: np.ndarray, patch: int, inside: float, draws: np.random.Generator) -> np.ndarray:
    """Bool (rows * patch, columns * patch), True at ceil(inside * patch^2) pixels of each hidden patch, others alone.

    Any of its pixels are equally likely, and none depends on those of another patch.
    """
    count = math.ceil(round(inside * patch * patch, 6))
    if not 0 < count <= patch * patch:
        raise RecipeError(f"a share inside = {inside} of a hidden patch; expected more than 0 and at most 1, try 0.6")
    rows, columns = mask.shape
    pixels = np.zeros((rows, columns, patch * patch), dtype=bool)
    order = draws.random((int(mask.sum()), patch * patch)).argsort(axis=1)
    pixels[mask] = order < count
    return pixels.reshape(rows, columns, patch, patch).swapaxes(1, 2).reshape(rows * patch, columns * patch)


def _block(mask: np.ndarray, rest: int, draws: np.random.Generator) -> tuple[slice, slice] | None:
    """A rectangle that hides at least one and at most `rest` patches more; None if none was found."""
    rows, columns = mask.shape
    smallest = max(1.0, SMALLEST_BLOCK * rows * columns)
    for _ in range(_TRIES):
        area = draws.uniform(smallest, max(smallest, rest))
        stretch = math.exp(draws.uniform(math.log(STRETCH), -math.log(STRETCH)))
        height, width = max(1, round(math.sqrt(area * stretch))), max(1, round(math.sqrt(area / stretch)))
        if height > rows or width > columns:
            continue
        top, left = int(draws.integers(rows - height + 1)), int(draws.integers(columns - width + 1))
        block = slice(top, top + height), slice(left, left + width)
        if 0 < height * width - int(mask[block].sum()) <= rest:
            return block
    return None


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """Bool like the mask: visible patches with a hidden one above, below, left or right."""
    wide = np.pad(mask, 1)
    return (wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]) & ~mask
