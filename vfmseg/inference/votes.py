"""From a model to the votes that the engine blends: device, precision, and probabilities or logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.inference.contracts import Predictor


def voter(
    model: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
    modalities: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    logits: bool,
) -> Predictor:
    """A predictor that runs `model` (images, valid -> logits) on `device` in `dtype` and answers in float32.

    `logits`: it answers with them; else with probabilities.
    """

    def vote(images: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        images = {name: images[name].to(device, non_blocking=True) for name in modalities}
        valid = {name: valid[name].to(device, non_blocking=True) for name in modalities}
        enabled = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
            answer = model(images, valid).float()  # (B, K, t, t)
            return answer if logits else answer.softmax(dim=1)

    return vote


def filled_up(vote: Predictor, size: int) -> Predictor:
    """A predictor that shows `vote` batches of `size` alone: short ones get places that hold nothing valid.

    For compiled models: every further shape would be compiled anew, and answered by another code.
    """

    def predict(images: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        batch = len(next(iter(images.values())))
        if batch >= size:
            return vote(images, valid)
        images = {name: F.pad(image, (0, 0, 0, 0, 0, 0, 0, size - batch)) for name, image in images.items()}
        valid = {name: F.pad(mask, (0, 0, 0, 0, 0, size - batch)) for name, mask in valid.items()}
        return vote(images, valid)[:batch]

    return predict
