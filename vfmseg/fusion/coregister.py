"""Learned co-registration: further modalities are moved onto the first by a shift that training finds.

An elevation model that lies 3 m beside the image it is fused with puts its edges on the wrong cells. The shift is one
for all scenes, so overlapping tiles agree on it. Pixels are moved, not maps of features: a shift is smaller than a cell
of those (14 or 16 px), and no map could be moved by a part of a cell without losing what lies inside it. How it is
found: training/objectives/coregistration.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.image import Image, Images

SPEED = 10.0
"""A change of 0.001 of a parameter moves 1 % of the limit: usual learning rates then cross it in some hundred steps."""


class Coregister(nn.Module):
    """Images, of which the modalities named are moved by shift = limit * tanh(10 * parameter), in pixels."""

    limit: Tensor  # scalar: the largest shift in pixels of the reference grid

    def __init__(self, modalities: Sequence[str], limit: float) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.register_buffer("limit", torch.tensor(limit, dtype=torch.float32))
        self.wanted = nn.ParameterDict({f"of_{name}": torch.zeros(2) for name in modalities})

    def shift(self, modality: str) -> Tensor:
        """(rows, columns) in pixels: what is at (r, c) after the move was at (r + rows, c + columns) before."""
        return self.limit * torch.tanh(SPEED * self.wanted[f"of_{modality}"])

    def forward(self, images: Images, frames: Tensor | None = None) -> dict[str, Image]:
        """The images, the modalities named moved; what comes from beyond the image, or beside nodata, is invalid.

        `frames` (B, 2, 2): how each image was turned before (`Sample.frame`), which turns the shift too. No gradient
        reaches the shift from here: from one pixel to the next there is mostly noise, and the loss of one tile says
        little about which way an edge should move.
        """
        return {
            name: self._moved(name, image, frames) if name in self.modalities else image
            for name, image in images.items()
        }

    @torch.no_grad()
    def _moved(self, name: str, image: Image, frames: Tensor | None) -> Image:
        shift = self.shift(name)
        if frames is None:
            return moved_by(image, shift)
        # no matrix product: autocast would round it to half precision, at 200 px by half a pixel
        turned = (frames.to(shift) * shift).sum(dim=2)
        parts = [moved_by(Image(image.pixels[b], image.valid[b]), way) for b, way in enumerate(turned)]
        return Image(torch.stack([part.pixels for part in parts]), torch.stack([part.valid for part in parts]))


def moved_by(image: Image, shift: Tensor) -> Image:
    """An image of (..., C, H, W) pixels, read `shift` (rows, columns) pixels further down and to the right.

    Bilinear between pixels; a pixel is valid if all are that it is read from. A shift of (0, 5) on a row
    0 1 2 3 4 5 6 7 gives 5 6 7 and five invalid pixels.
    """
    rows, cols = (int(value) for value in shift.floor().tolist())
    down, right = (shift - shift.floor()).tolist()
    reach = max(abs(rows), abs(cols)) + 1
    padded = F.pad(torch.where(image.valid[..., None, :, :], image.pixels, 0.0), (reach,) * 4)
    mask = F.pad(image.valid, (reach,) * 4)
    height, width = image.valid.shape[-2:]
    pixels, valid = torch.zeros_like(image.pixels), torch.ones_like(image.valid)
    for row, share in ((0, 1 - down), (1, down)):
        for col, part in ((0, 1 - right), (1, right)):
            if share * part > 0:
                top, left = reach + rows + row, reach + cols + col
                area = (..., slice(top, top + height), slice(left, left + width))
                pixels = pixels + padded[area] * (share * part)
                valid = valid & mask[area]
    return Image(torch.where(valid[..., None, :, :], pixels, 0.0), valid)
