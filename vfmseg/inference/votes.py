"""A model as a predictor for the engine: its device, its precision, and logits or probabilities as votes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.data.image import Images
from vfmseg.inference.contracts import Predictor, Tiles


class Model(Protocol):
    """What answers with logits (B, K, t, t)."""

    def __call__(self, images: Images, frames: Tensor | None) -> Tensor:
        """`images` of (B, C, t, t) pixels; `frames` (B, 2, 2): how each is turned, as in `Batch`; None: none is."""
        ...


def voter(
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
) -> Predictor:
    """A predictor that answers with logits, float32 (B, K, t, t), on `device`.

    The model's matrix products run in `dtype` (autocast). Its answer becomes float32 before anything is summed: half
    precision holds three digits.
    """

    def vote(tiles: Tiles) -> Tensor:
        images = {
            name: image.each(lambda tensor: tensor.to(device, non_blocking=True))
            for name, image in tiles.images.items()
        }
        frames = None if tiles.frame is None else tiles.frame.to(device).expand(len(tiles.windows), 2, 2)
        enabled = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
            return model(images, frames).float()  # (B, K, t, t)

    return vote


def as_probabilities(vote: Predictor) -> Predictor:
    """A predictor that answers with probabilities (B, K, t, t), the softmax of the logits that `vote` answers with."""

    def predict(tiles: Tiles) -> Tensor:
        with torch.inference_mode():
            return vote(tiles).softmax(dim=1)

    return predict


def filled_up(vote: Predictor, size: int) -> Predictor:
    """A predictor like `vote` that shows it batches of `size` tiles alone: short ones get slots with nothing valid.

    For compiled models: each other shape would be compiled for itself, and that code may answer with other last bits.
    """

    def predict(tiles: Tiles) -> Tensor:
        batch = len(tiles.windows)
        if batch >= size:
            return vote(tiles)
        images = {
            # pad names axes from the last one on, two numbers each: nothing but at the end of the first
            name: image.each(lambda tensor: F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, size - batch)))
            for name, image in tiles.images.items()
        }
        return vote(Tiles(images, tiles.windows + (None,) * (size - batch), tiles.frame))[:batch]

    return predict
