"""Learned co-registration: further modalities are moved onto the first by a shift that training finds.

An elevation model that lies 3 m beside the image it is fused with puts its edges on the wrong cells. The shift is one
for all scenes, so overlapping tiles agree on it. Pixels are moved, not maps of features: a shift is smaller than a cell
of those (14 or 16 px), and no map could be moved by a part of a cell without losing what lies inside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.image import Image, Images

STEP = 0.1
"""Pixels that a change of 0.001 of a parameter moves near 0: the usual learning rates then move that much a step."""


class Coregister(nn.Module):
    """Images, of which the modalities named are moved by shift = limit * tanh(parameter * 100 / limit), in pixels."""

    limit: Tensor  # scalar: the largest shift in pixels of the reference grid

    def __init__(self, modalities: Sequence[str], limit: float) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.register_buffer("limit", torch.tensor(limit, dtype=torch.float32))
        self.wanted = nn.ParameterDict({f"of_{name}": torch.zeros(2) for name in modalities})

    def shift(self, modality: str) -> Tensor:
        """(rows, columns) in pixels: what is at (r, c) after the move was at (r + rows, c + columns) before."""
        return self.limit * torch.tanh(self.wanted[f"of_{modality}"] * (1000 * STEP) / self.limit)

    def forward(self, images: Images) -> dict[str, Image]:
        """The images, the modalities named moved; what comes from beyond the image, or beside nodata, is invalid."""
        return {name: self._moved(name, image) if name in self.modalities else image for name, image in images.items()}

    def _moved(self, name: str, image: Image) -> Image:
        shift = self.shift(name)
        whole = shift.detach().floor()
        part = shift - whole  # 0 to below 1, with the gradient
        rows, cols = (int(value) for value in whole.tolist())
        reach = int(torch.ceil(self.limit).item()) + 1
        padded = F.pad(torch.where(image.valid[..., None, :, :], image.pixels, 0.0), (reach,) * 4)
        mask = F.pad(image.valid, (reach,) * 4)
        height, width = image.valid.shape[-2:]
        pixels, valid = torch.zeros_like(image.pixels), torch.ones_like(image.valid)
        for down in (0, 1):
            for right in (0, 1):
                top, left = reach + rows + down, reach + cols + right
                area = (..., slice(top, top + height), slice(left, left + width))
                weight = (part[0] if down else 1 - part[0]) * (part[1] if right else 1 - part[1])
                pixels = pixels + padded[area] * weight
                valid = valid & (mask[area] | (weight <= 0))
        return Image(pixels * valid[..., None, :, :], valid)
