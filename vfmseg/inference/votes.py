"""From a model to the votes that the engine blends: device, precision, and probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.data.image import Images
from vfmseg.inference.contracts import Predictor, Tiles


def voter(
    model: Callable[[Images], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Predictor:
    """A predictor that runs `model` (images -> logits) on `device` in `dtype` and answers with logits in float32."""

    def vote(tiles: Tiles) -> Tensor:
        images = {
            name: image.each(lambda tensor: tensor.to(device, non_blocking=True))
            for name, image in tiles.images.items()
        }
        enabled = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
            return model(images).float()  # (B, K, t, t)

    return vote


def as_probabilities(vote: Predictor) -> Predictor:
    """A predictor that answers with the probabilities of what `vote` answers with, logits."""

    def predict(tiles: Tiles) -> Tensor:
        with torch.inference_mode():
            return vote(tiles).softmax(dim=1)

    return predict


def filled_up(vote: Predictor, size: int) -> Predictor:
    """A predictor that shows `vote` batches of `size` alone: short ones get places that hold nothing valid.

    For compiled models: every further shape would be compiled anew, and answered by another code.
    """

    def predict(tiles: Tiles) -> Tensor:
        batch = len(tiles.windows)
        if batch >= size:
            return vote(tiles)
        images = {
            name: image.each(lambda tensor: F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, size - batch)))
            for name, image in tiles.images.items()
        }
        return vote(Tiles(images, tiles.windows + (None,) * (size - batch)))[:batch]

    return predict
