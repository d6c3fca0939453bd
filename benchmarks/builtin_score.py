"""What frozen encoders are worth on the probe's labelled sets of `make_builtin.py`, and what they cost.

Scores are mean IoU over cells of validation tiles, by a linear classifier and by nearest neighbours, as
`vfmseg pretrain` takes them while it trains (docs/pretrain.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vfmseg.build.pretraining import build_encoder, statistics_of
from vfmseg.build.probe import probe_of
from vfmseg.build.unlabelled import open_unlabelled
from vfmseg.data.traces import Traces
from vfmseg.encoders.build import build_backbone
from vfmseg.recipe import load_pretrain_recipe

SPEED_BATCH, SPEED_ROUNDS = 16, 5


@dataclass(frozen=True)
class Candidate:
    """An encoder in a folder of Dinov2's layout, of which the block `layer` is asked; None: the last."""

    title: str
    folder: Path
    layer: int | None = None


def scores(recipe: Path, candidate: Candidate) -> dict[str, Any]:
    """`parameters` in the blocks asked for, `images` a second of 224 px and one thread, and what the probe says."""
    encoder: dict[str, Any] = {"name": "dinov2", "checkpoint": str(candidate.folder)}
    settings = load_pretrain_recipe(recipe, [f"model.encoder={json.dumps(encoder)}"])
    opened = open_unlabelled(settings.data, statistics_of(settings))
    model = build_encoder(settings, opened.inputs)
    if candidate.layer is not None:
        model.backbone = build_backbone("dinov2", str(candidate.folder), [candidate.layer])
    probe = probe_of(settings, model, opened.inputs, opened.scenes, Traces())
    assert probe is not None
    found = probe(Accelerator(cpu=True, mixed_precision="bf16"), 1).values
    parameters = sum(tensor.numel() for tensor in model.backbone.parameters())
    return {"parameters": parameters, "images": images_a_second(model, settings.data.tile), **found}


@torch.no_grad()
def images_a_second(model: Any, side: int) -> float:
    """Of the fastest of some batches through the encoder, in bf16."""
    backbone = model.backbone.eval()
    images, valid = torch.randn(SPEED_BATCH, 3, side, side), torch.ones(SPEED_BATCH, side, side)
    took = []
    for _ in range(SPEED_ROUNDS):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            tokens = backbone.embed(images, None, valid)
            for block in range(1, backbone.layers[-1] + 1):
                tokens = backbone.step(block, tokens)
        took.append(time.perf_counter() - started)
    return SPEED_BATCH / min(took)


def as_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown."""
    sets = list(rows[0][1]["sets"])
    heads = [f"{name}, {kind}" for name in sets for kind in ("linear", "kNN", "rank")]
    lines = [f"| frozen encoder | parameters | images/s | {' | '.join(heads)} |", "|---|" + "--:|" * (2 + len(heads))]
    for title, one in rows:
        cells = [
            text
            for name in sets
            for text in (
                *(f"{one['sets'][name][kind]:.3f}" for kind in ("linear", "knn")),
                f"{one['sets'][name]['rank']:.0f}",
            )
        ]
        lines.append(f"| {title} | {one['parameters'] / 1e6:.1f} M | {one['images']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)
