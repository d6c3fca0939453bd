"""What scenes of one sensor add to few of both, and what helps a model that misses a sensor: two tables.

    python benchmarks/unmatched.py [--seeds 0 1 2]     # then: python benchmarks/fusion.py write

Constructed scenes: discs that an image and a radar backscatter both show, under noise, and with a brightness that
differs from scene to scene, so that two scenes teach little of it. All rows draw the same number of windows; the test
scenes have both sensors and are also labelled with each alone. The encoder starts from random numbers and learns as a
whole, so that it knows neither sensor before. Tables are kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

SIDE = 72
COUNTS = {
    "paired": (2, "rgb sar"),
    "optical": (10, "rgb"),
    "radar": (10, "sar"),
    "test": (8, "rgb sar"),
    "pairs": (10, "rgb sar"),
}
RESULT = Path(__file__).parent / "results" / "fusion.unmatched.json"
GATED: dict[str, Any] = {"model": {"fusion": {"name": "gated"}}}
REBUILT: dict[str, Any] = {"model": {"fusion": {"name": "reconstruction"}}}
RECOVERED: dict[str, Any] = {"model": {"fusion": {"name": "reconstruction", "recover": True}}}
DROPOUT: dict[str, Any] = {"train": {"modality_dropout": 0.3}}
DISTILLED: dict[str, Any] = {"train": {"modality_dropout": 0.3, "distill": 0.5}}

TABLES: dict[str, dict[str, tuple[dict[str, int], dict[str, Any]]]] = {
    "learned from": {
        "2 paired scenes": ({"paired": 1}, GATED),
        "10 optical, 10 radar": ({"optical": 1, "radar": 1}, GATED),
        "2 paired, 10 optical, 10 radar": ({"paired": 2, "optical": 1, "radar": 1}, GATED),
    },
    "10 paired scenes": {
        "gated": ({"pairs": 1}, GATED),
        "gated, modality_dropout 0.3": ({"pairs": 1}, GATED | DROPOUT),
        "gated, modality_dropout 0.3, distill 0.5": ({"pairs": 1}, GATED | DISTILLED),
        "reconstruction, modality_dropout 0.3": ({"pairs": 1}, REBUILT | DROPOUT),
        "reconstruction with recover, modality_dropout 0.3": ({"pairs": 1}, RECOVERED | DROPOUT),
    },
}
"""{title: {row: ({folder: weight}, changes of the recipe's sections)}}."""


def scene(seed: int) -> dict[str, np.ndarray]:
    """`rgb` uint8 (3, SIDE, SIDE), `sar` float32 (1, SIDE, SIDE) in decibels, and `labels` uint8 (SIDE, SIDE)."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    discs = np.zeros((SIDE, SIDE), bool)
    for _ in range(4):
        row, col, radius = draws.uniform(0, SIDE), draws.uniform(0, SIDE), draws.uniform(8, 18)
        discs |= (y - row) ** 2 + (x - col) ** 2 < radius**2
    light = draws.uniform(-25, 25, (3, 1, 1))
    rgb = 100 + 40 * draws.uniform(0.6, 1.4) * discs + light + draws.normal(0, 35, (3, SIDE, SIDE))
    sar = -18 + 5 * draws.uniform(0.6, 1.4) * discs + draws.uniform(-3, 3) + draws.normal(0, 5, (1, SIDE, SIDE))
    return {"rgb": rgb.clip(0, 255).astype(np.uint8), "sar": sar.astype(np.float32), "labels": discs.astype(np.uint8)}


def write(folder: Path) -> None:
    """All scenes as `folder`/COUNTS key/rgb, sar or labels/NUMBER.tif."""
    for number, (part, (count, sensors)) in enumerate(COUNTS.items()):
        for i in range(count):
            arrays = scene(1000 * number + i)
            for name in (*sensors.split(), "labels"):
                bands = arrays[name].reshape(-1, SIDE, SIDE)
                path = folder / part / name / f"{i}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = {"count": len(bands), "dtype": bands.dtype, "height": SIDE, "width": SIDE, "driver": "GTiff"}
                # beside each other, as no two scenes show the same ground
                place = from_origin(5e5 + 1e4 * number, 5e6 - 1e3 * i, 10, 10)
                with rasterio.open(path, "w", crs="EPSG:32633", transform=place, **kind) as target:
                    target.write(bands)


def save_encoder(folder: Path, seed: int) -> None:
    """A ViT of DINOv2's layout whose weights are random from the seed."""
    import torch
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    size = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "mlp_ratio": 4}
    Dinov2Model(Dinov2Config(image_size=256, patch_size=16, **size)).save_pretrained(folder)


def recipe_of(folder: Path, weights: dict[str, int], changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """The recipe of a row."""

    def source(part: str) -> dict[str, Any]:
        return {name: f"{folder}/{part}/{name}/*.tif" for name in (*COUNTS[part][1].split(), "labels")}

    train = [source(part) | ({"weight": weight} if len(weights) > 1 else {}) for part, weight in weights.items()]
    sensors = {"rgb": {"optional": True}, "sar": {"optional": True}}
    data = {"classes": {0: "ground", 1: "disc"}, "modalities": sensors, "train": train, "test": source("test")}
    return {
        "name": "unmatched",
        "seed": seed,
        "data": data | {"tile": 48, "samples_per_epoch": 32},
        "model": {
            "encoder": {"name": "dinov2", "checkpoint": f"{folder}/encoder-{seed}"},
            "adapter": {"name": "full"},
            "decoder": {"name": "linear"},
            **changes["model"],
        },
        "train": {"epochs": 20, "batch_size": 8, **changes.get("train", {})},
        "output_dir": f"{folder}/run",
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    from vfmseg.finetune import finetune
    from vfmseg.recipe import parse_recipe
    from vfmseg.segmenter import Segmenter

    kept: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        for seed in seeds:
            save_encoder(Path(place) / f"encoder-{seed}", seed)
        for title, rows in TABLES.items():
            kept[title] = {}
            for row, (weights, changes) in rows.items():
                found = []
                for seed in seeds:
                    recipe = parse_recipe(recipe_of(Path(place), weights, changes, seed), Path(place), row)
                    finetune(recipe, overwrite=True)
                    segmenter = Segmenter.from_pretrained(f"{place}/run/last", device="cpu")
                    subsets = segmenter.evaluate_subsets(recipe)
                    found.append({key: round(one["miou"], 4) for key, one in subsets.items()})
                kept[title][row] = found
                print(row, found, flush=True)
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def lines_of_tables() -> Iterator[str]:
    """The tables, of what is kept."""
    for title, rows in json.loads(RESULT.read_text()).items() if RESULT.exists() else ():
        yield f"| {title} | test mIoU, both | rgb alone | sar alone |"
        yield "|---|--:|--:|--:|"
        for row, found in rows.items():
            cells = []
            for key in ("rgb+sar", "rgb", "sar"):
                values = [one[key] for one in found]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            yield f"| {row} | {' | '.join(cells)} |"
        yield ""


if __name__ == "__main__":
    main()
