"""Small networks of several streams with an adapter, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from encoder_models import MODELS, SETTINGS, family
from torch import Tensor, nn

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.data.image import Image
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.build import build_backbone, build_stem
from vfmseg.fusion.linear import Linear
from vfmseg.model import Network

NAMES = ("mm_lora", "mm_adapter")
KINDS = (*MODELS, "builtin")
STREAMS = {"optical": 3, "dem": 1, "sar": 2}  # bands


def network(
    folders: dict[str, Path],
    kind: str,
    name: str,
    streams: Sequence[str] = ("optical", "dem"),
    seed: int | None = 1,
    checkpointing: bool = False,
    **changes: Any,
) -> Network:
    """Streams of one backbone with an adapter, whose tensors are random from the seed; None: as attached."""
    source = None if kind == "builtin" else str(folders[kind])
    backbone = build_backbone(family(kind), source, gradient_checkpointing=checkpointing)
    stems = {stream: build_stem(backbone, {stream: n}, [100.0] * n, [50.0] * n) for stream, n in STREAMS.items()}
    stems = {stream: stems[stream] for stream in streams}
    torch.manual_seed(0)
    attached = ADAPTERS[name].attach(backbone, tuple(stems), **{**SETTINGS[name], **changes})
    fuse = Linear(tuple(stems), backbone.channels, "sum", "all") if len(stems) > 1 else None
    strides = (float(backbone.patch),) * len(backbone.layers)
    model = Network(backbone, stems, attached, fuse, build_decoder("linear", backbone.channels, strides, 2), 2)
    if seed is not None:
        fill(model, seed)
    return model


def fill(model: Network, seed: int) -> None:
    """Give every tensor of the adapter a value that has to do with its name, whatever else is there; w is 0.5."""
    with torch.no_grad():
        for name, tensor in model.backbone.network.named_parameters():
            if tensor.requires_grad and tensor.ndim > 0:
                generator = torch.Generator().manual_seed(sum(name.encode()) * 31 + seed)
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))


def shares(model: Network) -> dict[str, nn.Parameter]:
    """The w of each layer and stream."""
    return {n: p for n, p in model.backbone.network.named_parameters() if p.requires_grad and p.ndim == 0}


def set_shares(model: Network, value: float) -> None:
    with torch.no_grad():
        for share in shares(model).values():
            share.fill_(value)


def images(batch: int = 2, seed: int = 1) -> dict[str, Image]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Image(
            255 * torch.rand(batch, bands, 50, 70, generator=generator), torch.ones(batch, 50, 70, dtype=torch.bool)
        )
        for name, bands in STREAMS.items()
    }


def of(given: dict[str, Image], *names: str) -> dict[str, Image]:
    return {name: given[name] for name in names}


def unseen(image: Image) -> Image:
    return Image(torch.full_like(image.pixels, torch.nan), torch.zeros_like(image.valid))


def maps(model: Network, given: dict[str, Image], stream: str) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model.encode(given)[stream].maps


def far(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """The largest difference."""
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))
