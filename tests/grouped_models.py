"""Small models whose bands enter in groups, and batches with masks of the groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from encoder_models import DEPTH, Encoder, family, upstream
from torch import Tensor, nn

from vfmseg.adapters.attach import attach_full
from vfmseg.data.image import Image
from vfmseg.data.masks import Masking, MaskKind
from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.encoders.backbone import Backbone, BaseRecord
from vfmseg.encoders.build import ENCODERS, build_stem

GROUPS = ((5, 1), (2, 6, 3), (4,))
"""Of six bands: not side by side, not of one size, and not in order."""


def grouped(kind: str, groups: Sequence[Sequence[int]] = GROUPS, **changes: Any) -> Encoder:
    backbone = Backbone(ENCODERS[family(kind)], upstream(kind, **changes), [DEPTH], False, BaseRecord(kind, None, ""))
    bands = sum(map(len, groups))
    stem = build_stem(backbone, {"cube": bands}, [100.0] * bands, [50.0] * bands, groups=groups)
    for kernel in stem.mix.kernels:  # type: ignore[union-attr]
        nn.init.normal_(kernel.weight, std=0.05)  # type: ignore[arg-type, union-attr]
    nn.init.normal_(stem.mix.codes, std=0.3)  # type: ignore[arg-type]
    return Encoder(backbone, {"image": stem}, attach_full(backbone, ("image",)), None, nn.Identity(), 2).train()


def masked(
    images: Tensor, patch: int, draws: np.random.Generator, groups: int | None, kind: MaskKind = "random"
) -> Batch:
    """Images (B, C, h, w), half of the patches hidden: of each group by itself, or (None) the same of all."""
    valid, masking = torch.ones(images.shape[2:], dtype=torch.bool), Masking(kind, 0.5, patch, groups=groups)
    return collate([masking(Sample({"cube": Image(image, valid)}, None), draws) for image in images])


def pictures(count: int = 2, bands: int = 6, height: int = 50, width: int = 70) -> Tensor:
    return 255 * torch.rand(count, bands, height, width)


def group_of(groups: Sequence[Sequence[int]]) -> list[int]:
    """The group of each band."""
    found = {band: number for number, group in enumerate(groups) for band in group}
    return [found[band + 1] for band in range(len(found))]


def hidden_values(batch: Batch, patch: int, groups: Sequence[Sequence[int]] = GROUPS) -> Tensor:
    """Bool (B, C, h, w): pixels of the bands that are hidden."""
    assert batch.mask is not None
    mask = batch.mask if batch.mask.ndim == 4 else batch.mask[:, None].expand(-1, len(groups), -1, -1)
    height, width = batch.images["cube"].valid.shape[-2:]
    pixels = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width]
    return pixels[:, group_of(groups)]
