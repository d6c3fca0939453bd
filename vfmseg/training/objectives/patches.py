"""Images cut into patches and put together again, which of them are hidden, and what is expected of a prediction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vfmseg.encoders.stem import padded

Normalise = Literal["patch", "band"]
"""What of a target gets zero mean and unit variance: a patch, as MAE does, or each band of a patch by itself."""
VARIANCE_EPS = 1e-6
"""Added to the variance, so that a patch of one value becomes zeros."""


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch, C): patches row by row, and the pixels of each row by row.

    What reaches beyond the right and bottom edge is zero, or False, as in a `Stem`.
    """
    pixels = padded(pixels, patch)
    shape = (*pixels.shape[:2], pixels.shape[2] // patch, patch, pixels.shape[3] // patch, patch)
    return pixels.reshape(shape).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """(B, N, patch * patch, C) -> (B, C, height, width): what `to_patches` has cut."""
    patch = round(patches.shape[2] ** 0.5)
    cut = patches.unflatten(2, (patch, patch)).unflatten(1, (-(-height // patch), -(-width // patch)))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def split(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (B, N) -> int64 (B, N - H) and (B, H): the numbers of the visible and of the hidden patches, increasing.

    ValueError where the samples hide different numbers of patches.
    """
    counts = hidden.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"the masks of a batch hide {counts} patches; expected the same number in each sample")
    order = hidden.int().argsort(dim=1, stable=True)
    visible = hidden.shape[1] - counts[0]
    return order[:, :visible], order[:, visible:]


def chosen(patches: Tensor, numbers: Tensor) -> Tensor:
    """(B, N, ...) and int64 (B, H) -> (B, H, ...): these patches of each sample."""
    return patches[torch.arange(len(numbers), device=numbers.device)[:, None], numbers]


def moments(patches: Tensor, normalise: Normalise | None) -> tuple[Tensor, Tensor]:
    """What (B, H, patch * patch, C) is less and divided by as a target: mean, and sqrt(variance + eps), unbiased."""
    if normalise is None:
        return torch.zeros((), device=patches.device), torch.ones((), device=patches.device)
    over = (2, 3) if normalise == "patch" else (2,)
    variance, mean = torch.var_mean(patches, dim=over, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()
