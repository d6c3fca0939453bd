"""Small models and masked batches for the tests of masked pretraining."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import DEPTH, Encoder, attach, encoder_of, family, upstream
from torch import Tensor, nn

from vfmseg.data.image import Image
from vfmseg.data.masks import Masking
from vfmseg.data.sample import Batch, Sample
from vfmseg.encoders.backbone import Backbone, BaseRecord
from vfmseg.encoders.build import ENCODERS
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.step import total


def batch_of(images: Tensor, mask: Tensor, valid: Tensor | None = None) -> Batch:
    """Images (B, C, h, w), each band a modality as in `Encoder`, and masks (B, rows, columns)."""
    valid = torch.ones(len(images), *images.shape[2:], dtype=torch.bool) if valid is None else valid
    return Batch({f"b{i}": Image(images[:, i : i + 1], valid) for i in range(images.shape[1])}, None, mask=mask)


def loss_of(objective: MaskedAutoencoder, model: nn.Module, batch: Batch) -> Tensor:
    return total(objective.terms(model, batch), objective.counts(batch))


def require_close_in_half(objective: MaskedAutoencoder, model: nn.Module, batch: Batch, precision: torch.dtype) -> None:
    """The loss in half precision is float32, within 1 % of what it is in float32, and has gradients."""
    exact = loss_of(objective, model, batch).item()
    with torch.autocast("cpu", precision):
        terms = objective.terms(model, batch)
    assert terms["pixels"].sum.dtype == torch.float32
    loss = total(terms, objective.counts(batch))
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.01)


def tiny(kind: str, bands: int = 3, adapter: str = "full", **changes: Any) -> Encoder:
    """A small random encoder, images of `bands` bands in, each a modality."""
    network = upstream(kind, **changes)
    backbone = Backbone(ENCODERS[family(kind)], network, [DEPTH], False, BaseRecord(kind, None, ""))
    encoder = encoder_of(backbone, bands, [100.0] * bands, [50.0] * bands)
    attach(encoder, adapter)
    return encoder


def as_fresh(model: Encoder) -> None:
    """Weights as new ones are, and not as far from zero as other tests need them."""
    with torch.no_grad():
        for name, tensor in model.backbone.network.named_parameters():
            if tensor.ndim > 1 and "position" not in name:
                torch.nn.init.trunc_normal_(tensor, std=0.05)
            elif name.endswith("bias"):
                tensor.zero_()
            elif "lambda" in name:
                tensor.fill_(1.0)


def objective_of(model: nn.Module, **settings: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(model, **{"width": 16, "depth": 2, "heads": 2, **settings})  # type: ignore[arg-type]


def random_batch(
    model: Encoder, height: int = 50, width: int = 70, samples: int = 2, incomplete: bool = False, ratio: float = 0.5
) -> Batch:
    """Images whose sides are no multiple of a patch, half of the patches hidden."""
    bands, patch = len(model.image_stem.modalities), model.backbone.patch
    images = 255 * torch.rand(samples, bands, height, width)
    masking = Masking("incomplete" if incomplete else "random", ratio, patch)
    nothing = Sample({"x": Image(images[0], torch.ones(height, width, dtype=torch.bool))}, None)
    masked = [masking(nothing, np.random.default_rng(i)) for i in range(samples)]
    batch = batch_of(images, torch.stack([sample.mask for sample in masked if sample.mask is not None]))
    if incomplete:
        batch.pixel_mask = torch.stack([sample.pixel_mask for sample in masked if sample.pixel_mask is not None])
    return batch


def seen_by_blocks(model: Encoder, call: Callable[[], Any]) -> list[Tensor]:
    """What each block is given during a call."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for _, block in model.backbone.blocks:
            hooks.enter_context(block.register_forward_pre_hook(lambda _, given: found.append(given[0])))
        call()
    return found


class Oracle(nn.Module):
    """Answers what it was told, of the patches that are asked for."""

    def __init__(self, answers: Tensor) -> None:
        """`answers` (B, N, numbers of a patch)."""
        super().__init__()
        self.answers = answers

    def forward(self, tokens: Tensor, kept: Any, asked: Tensor, grid: Any, rows: Any) -> dict[str, list[Tensor]]:
        return {"image": [torch.stack([self.answers[i, asked[i]] for i in range(len(asked))])]}
