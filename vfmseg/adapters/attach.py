"""Attaching adapters: freeze the encoder, add what is to learn, and know afterwards what that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vfmseg.adapters import bottleneck, lora
from vfmseg.encoders.base import Encoder


@dataclass(frozen=True)
class Attached:
    """What was attached to an encoder. sites: names of the adapted layers inside the backbone."""

    name: str
    sites: tuple[str, ...] = ()
    low_rank: lora.Injected | None = None
    bottlenecks: dict[str, bottleneck.ParallelMlp] | None = None


def attach_none(encoder: Encoder) -> Attached:
    """The backbone stays frozen; only a stem for extra bands learns."""
    encoder.backbone.requires_grad_(False)
    return Attached("none")


def attach_full(encoder: Encoder) -> Attached:
    """All of the backbone learns."""
    encoder.backbone.requires_grad_(True)
    encoder.moving = (encoder.backbone,)
    return Attached("full")


def attach_lora(encoder: Encoder, rank: int, alpha: float, dropout: float, targets: tuple[str, ...]) -> Attached:
    """Low-rank updates of the named linear layers (q, k, v, o, mlp) of every block."""
    injected = lora.inject(encoder, rank, alpha, dropout, targets)
    encoder.moving = injected.modes
    return Attached("lora", sites=tuple(injected.sites), low_rank=injected)


def attach_bottleneck(encoder: Encoder, hidden: int, scale: float) -> Attached:
    """A small MLP beside the MLP of every block."""
    encoder.backbone.requires_grad_(False)
    placed = bottleneck.inject(encoder, hidden, scale)
    return Attached("adapter", sites=tuple(placed), bottlenecks=placed)


ADAPTERS: dict[str, Callable[..., Attached]] = {
    "none": attach_none,
    "full": attach_full,
    "lora": attach_lora,
    "adapter": attach_bottleneck,
}


def save_adapter(attached: Attached, folder: Path) -> None:
    """Write an adapter: LoRA in peft's own format, bottlenecks as safetensors; nothing for the others."""
    if attached.low_rank is not None:
        folder.mkdir(parents=True)
        lora.save(attached.low_rank.wrapper, folder)
    elif attached.bottlenecks is not None:
        folder.mkdir(parents=True)
        bottleneck.save(attached.bottlenecks, folder)


def load_adapter(encoder: Encoder, attached: Attached, folder: Path) -> None:
    """Fill an attached adapter from its folder, strictly.

    CheckpointError for a missing, extra or misshapen tensor, and for another rank, alpha or scale or other targets.
    """
    if attached.low_rank is not None:
        lora.load(encoder, folder, attached.low_rank)
    elif attached.bottlenecks is not None:
        bottleneck.load(attached.bottlenecks, folder)


def merge_lora(encoder: Encoder, folder: Path, rank: int, alpha: float, targets: tuple[str, ...]) -> Attached:
    """A saved LoRA added into the frozen weights; faster than beside them, and peft is not imported."""
    lora.merge(encoder, folder, rank, alpha, targets)
    return attach_none(encoder)


def parameter_table(encoder: Encoder, attached: Attached, decoder: nn.Module) -> list[tuple[str, int, int]]:
    """(part, trainable, total) for each part that has parameters, and their sum.

    `adapter` is what was added to the backbone and learns; `encoder` is the backbone as published.
    """
    backbone = list(encoder.backbone.parameters())
    added = [p for p in backbone if p.requires_grad] if attached.sites else []
    ours = {id(p) for p in added}
    parts = {
        "encoder": [p for p in backbone if id(p) not in ours],
        "adapter": added,
        "stem": list(encoder.stem.parameters()),
        "decoder": list(decoder.parameters()),
    }
    rows = [
        (name, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
        for name, parameters in parts.items()
        if parameters
    ]
    return [*rows, ("all", sum(r[1] for r in rows), sum(r[2] for r in rows))]
