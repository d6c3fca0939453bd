"""What each fusion costs beside the encoder: parameters, operations and time of one tile."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TILE = 448
ROUNDS = 7


def network(model: dict[str, Any], streams: int) -> nn.Module:
    """A ViT-S/14 with random weights and that many streams of three bands, joined as `model` says."""
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    from vfmseg.adapters.attach import attach_none
    from vfmseg.build.model import around
    from vfmseg.encoders.backbone import Backbone, BaseRecord
    from vfmseg.encoders.build import build_stem
    from vfmseg.encoders.dinov2 import DINOV2
    from vfmseg.recipe import Recipe

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    backbone = Backbone(DINOV2, Dinov2Model(config), (3, 6, 9, 12), False, BaseRecord("random", None, ""))
    names = ("one", "two")[:streams]
    source = {**{name: f"{name}.tif" for name in names}, "labels": "labels.tif"}
    recipe = Recipe.model_validate(
        {
            "name": "cost",
            "data": {"classes": {0: "a", 1: "b"}, "modalities": {name: {} for name in names}, "train": source},
            "model": {
                "encoder": {"name": "dinov2", "checkpoint": "facebook/dinov2-small"},
                "decoder": {"name": "fpn"},
                **(model if streams > 1 else {}),
            },
            "output_dir": "run",
        }
    )
    stems = {name: build_stem(backbone, {name: 3}, [100.0] * 3, [50.0] * 3) for name in names}
    return around(recipe, backbone, stems, attach_none(backbone, names)).without_auxiliary().eval()


def tiles(streams: int) -> dict[str, Any]:
    """One tile of each stream."""
    from vfmseg.data.image import Image

    valid = torch.ones(1, TILE, TILE, dtype=torch.bool)
    return {name: Image(torch.rand(1, 3, TILE, TILE) * 255, valid) for name in ("one", "two")[:streams]}


@torch.no_grad()
def counted(model: dict[str, Any], streams: int) -> dict[str, Any]:
    """Parameters of each part, and GFLOP of a tile; nothing is computed for it."""
    with torch.device("meta"):
        built = network(model, streams)
        with FlopCounterMode(display=False) as counter:
            built(tiles(streams))
    parts = {name: sum(p.numel() for p in found.values()) for name, found in built.parts().items()}  # type: ignore[operator]
    return parts | {"gflop": round(counter.get_total_flops() / 1e9, 2)}


@torch.no_grad()
def timed(one: nn.Module, two: nn.Module) -> dict[str, float]:
    """Milliseconds of a tile of one and of two modalities, in turn, and their ratio: medians of some rounds."""
    times: list[list[float]] = []
    for _ in range(ROUNDS + 1):
        times.append([])
        for model, streams in ((one, 1), (two, 2)):
            images = tiles(streams)
            started = time.perf_counter()
            model(images)
            times[-1].append(1000 * (time.perf_counter() - started))
    single, both = zip(*times[1:], strict=True)
    ratio = statistics.median(b / a for a, b in zip(single, both, strict=True))
    return {"ms_of_one": round(statistics.median(single), 1), "ms": round(statistics.median(both), 1), "times": ratio}


def measure(fusions: dict[str, dict[str, Any]], target: Path) -> None:
    """Measure all fusions, in turn with a single modality, and keep them as JSON."""
    from vfmseg.heap import keep_freed

    keep_freed()  # as the commands of vfmseg do
    found: dict[str, Any] = {"tile": TILE, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": {}}
    found["one"] = counted({}, 1)
    single = network({}, 1)
    for row, fusion in fusions.items():
        if fusion["name"] != "stack":
            model = {"fusion": fusion}
            found["rows"][row] = counted(model, 2) | timed(single, network(model, 2))
            print(row, found["rows"][row], flush=True)
    target.write_text(json.dumps(found, indent=1) + "\n")


def lines_of_cost(source: Path) -> Iterator[str]:
    """The table."""
    if not source.exists():
        return
    found = json.loads(source.read_text())
    one = found["one"]
    yield (
        f"ViT-S/14 with an fpn decoder, one tile of {found['tile']} px, {found['threads']} thread, torch "
        f"{found['torch']}. One modality: {one['encoder'] / 1e6:.1f} M parameters of the encoder, "
        f"{one['gflop']} GFLOP. "
        "`x one`: two modalities by one; times are measured in turn."
    )
    yield ""
    yield "| fusion | parameters of the fusion | GFLOP | GFLOP x one | ms | ms x one |"
    yield "|---|--:|--:|--:|--:|--:|"
    for row, cells in found["rows"].items():
        yield (
            f"| {row} | {cells['fusion']:,} | {cells['gflop']} | {cells['gflop'] / one['gflop']:.2f} | {cells['ms']} | "
            f"{cells['times']:.2f} |"
        )
