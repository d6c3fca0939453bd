"""The tables of docs/fusion.md: every fusion trained on scenes whose ceilings are known, and on real scenes.

    python benchmarks/fusion.py run constructed
    python benchmarks/fusion.py run ombria --data DATA_FOLDER --encoder VIT_FOLDER [--rows gated s1] [--seeds 0]
    python benchmarks/fusion.py cost
    python benchmarks/fusion.py write

`run` trains each row with three seeds, chooses on validation, and measures once on test: with all modalities, and with
each one missing. Each result is a JSON file in `benchmarks/results/`; what is there is not run again, so an interrupted
table goes on. `cost` counts parameters, operations and time of each fusion beside the encoder's. `write` puts the
tables into docs/fusion.md, below the line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__" and __package__ is None:  # started as a script, from anywhere
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import fusion_scenes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "fusion.md"
BELOW = "<!-- tables: python benchmarks/fusion.py write -->"
SEEDS = (0, 1, 2)

Change = dict[str, Any]

FUSED: dict[str, Change] = {
    "stack": {"fusion": {"name": "stack"}},
    "linear, concat": {"fusion": {"name": "linear", "op": "concat"}},
    "linear, concat, last": {"fusion": {"name": "linear", "op": "concat", "at": "last"}},
    "linear, sum": {"fusion": {"name": "linear", "op": "sum"}},
    "linear, weighted": {"fusion": {"name": "linear", "op": "weighted"}},
    "decision, mean": {"fusion": {"name": "decision", "op": "mean"}},
    "decision, weighted": {"fusion": {"name": "decision", "op": "weighted"}},
    "decision, product": {"fusion": {"name": "decision", "op": "product"}},
    "attention, single": {"fusion": {"name": "attention", "mode": "single"}},
    "attention, mutual": {"fusion": {"name": "attention", "mode": "mutual"}},
    "se": {"fusion": {"name": "se"}},
    "gated, independent": {"fusion": {"name": "gated", "mode": "independent"}},
    "gated, complementary": {"fusion": {"name": "gated", "mode": "complementary"}},
    "gated, cross": {"fusion": {"name": "gated", "mode": "cross"}},
    "reconstruction, self": {"fusion": {"name": "reconstruction", "mode": "self"}},
    "reconstruction, cross": {"fusion": {"name": "reconstruction", "mode": "cross"}},
    "alignment, contrastive": {"fusion": {"name": "alignment", "by": "contrastive"}},
    "alignment, mmd": {"fusion": {"name": "alignment", "by": "mmd"}},
    "alignment, coral": {"fusion": {"name": "alignment", "by": "coral"}},
    "alignment, projection": {"fusion": {"name": "alignment", "by": "projection"}},
}
"""Changes of a recipe's `model`, by the name of the row."""

ADAPTED: dict[str, Change] = {
    "lora, linear sum": {"adapter": {"name": "lora", "rank": 4}, "fusion": {"name": "linear", "op": "sum"}},
    "mm_lora, linear sum": {"adapter": {"name": "mm_lora"}, "fusion": {"name": "linear", "op": "sum"}},
    "mm_adapter, linear sum": {"adapter": {"name": "mm_adapter"}, "fusion": {"name": "linear", "op": "sum"}},
    "mm_lora, se": {"adapter": {"name": "mm_lora"}, "fusion": {"name": "se"}},
}


def rows_of(first: str, second: str) -> dict[str, tuple[tuple[str, ...], Change]]:
    """{row: (modalities it is trained on, changes of `model`)}; of a single modality there is nothing to fuse."""
    both = (first, second)
    single: dict[str, tuple[tuple[str, ...], Change]] = {name: ((name,), {}) for name in both}
    return single | {name: (both, change) for name, change in (FUSED | ADAPTED).items()}


def constructed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of the constructed scenes, which are made here."""
    if not (folder / "encoder").exists():
        fusion_scenes.write_scenes(folder, {"train": 24, "val": 6, "test": 12})
        fusion_scenes.save_encoder(folder / "encoder")
    return fusion_scenes.recipe(folder, options.encoder or folder / "encoder", folder / "run")


def ombria(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Floods in Sentinel-2 under clouds and in Sentinel-1, split by event."""
    data = Path(options.data).resolve() / "ombria_s1s2"
    names = {"s2": "s2_after", "s1": "s1_after", "labels": "label"}
    files = {role: f"{{split}}/{name}/{{name}}.png" for role, name in names.items()}
    return {
        "name": "ombria",
        "data": {
            "classes": {0: "land", 1: "flood"},
            "modalities": {"s2": {"nodata": 0, "normalize": "dataset"}, "s1": {"nodata": 255}},
            **{
                split: {"table": str(data / "split.csv"), "split": split, **files} for split in ("train", "val", "test")
            },
            "tile": 224,
            "samples_per_epoch": 52,
        },
        "model": {
            "encoder": {"name": "dinov2", "checkpoint": str(Path(options.encoder).resolve()), "layers": [3, 6, 9]},
            "adapter": {"name": "none"},
            "decoder": {"name": "fpn", "channels": 64},
        },
        "train": {
            "loss": {"cross_entropy": 1.0, "dice": 1.0},
            "epochs": 8,
            "batch_size": 4,
            "optimizer": {"lr": 1.0e-3, "warmup": 0.1},
        },
        "output_dir": str(folder / "run"),
    }


SETS: dict[str, tuple[tuple[str, str], Callable[[Path, argparse.Namespace], dict[str, Any]]]] = {
    "constructed": (("image", "dem"), constructed),
    "ombria": (("s2", "s1"), ombria),
}


def result_file(name: str, row: str, seed: int) -> Path:
    """Where a result is kept."""
    words = row.replace(", ", "-").replace(" ", "_")
    return RESULTS / f"fusion.{name}.{words}.{seed}.json"


def run(options: argparse.Namespace) -> None:
    """Train and measure what is not there yet."""
    (first, second), make = SETS[options.set]
    folder = Path(options.work or Path(tempfile.gettempdir()) / f"vfmseg-fusion-{options.set}")
    rows = rows_of(first, second)
    chosen = options.rows or list(rows)
    for dropout in (False, True):
        for row in chosen:
            names, change = rows[row]
            if dropout and (len(names) == 1 or row == "stack"):
                continue
            for seed in options.seeds:
                target = result_file(options.set, row + (", dropout" if dropout else ""), seed)
                if not target.exists() and dropout == options.dropout:
                    found = one(make(folder, options), names, change, seed, dropout)
                    target.write_text(json.dumps(found, indent=1) + "\n")
                    print(target.name, found["test"], flush=True)


def one(recipe: dict[str, Any], names: tuple[str, ...], change: Change, seed: int, dropout: bool) -> dict[str, Any]:
    """Scores, parameters and time of one training."""
    from vfmseg import Segmenter
    from vfmseg.finetune import finetune
    from vfmseg.recipe import load_recipe

    data = recipe["data"]
    for name in [name for name in data["modalities"] if name not in names]:
        del data["modalities"][name]
        for split in ("train", "val", "test"):
            del data[split][name]
    recipe["model"] |= change
    recipe["seed"] = seed
    if dropout:
        recipe["train"]["modality_dropout"] = 0.3
    place = Path(recipe["output_dir"])
    place.mkdir(parents=True, exist_ok=True)
    file = place.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    started = time.process_time()
    result = finetune(load_recipe(file), overwrite=True)
    minutes = (time.process_time() - started) / 60
    segmenter = Segmenter.from_pretrained(place / "best", device="cpu")
    test = {"+".join(names): segmenter.evaluate(segmenter.recipe, "test")["miou"]}
    if len(names) > 1 and change["fusion"]["name"] != "stack":
        test |= {name: segmenter.evaluate(segmenter.recipe, "test", only=(name,))["miou"] for name in names}
    return {
        "validation": result["validation"]["miou"],
        "test": {key: round(value, 4) for key, value in test.items()},
        "trainable": result["trainable_parameters"],
        "minutes": round(minutes, 2),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the figures were made with."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def lines_of_scores(name: str) -> Iterator[str]:
    """A table of what is there of a set: mean and spread of the seeds."""
    (first, second), _ = SETS[name]
    yield f"| fusion | seeds | validation | test, both | {first} alone | {second} alone | trainable |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in rows_of(first, second):
        for words in (row, f"{row}, dropout"):
            found = [json.loads(f.read_text()) for s in SEEDS if (f := result_file(name, words, s)).exists()]
            if not found:
                continue
            single = row in (first, second)
            keys = [row if single else f"{first}+{second}", first, second]
            cells = [
                "" if single and i == 0 else _spread([f["test"].get(key) for f in found]) for i, key in enumerate(keys)
            ]
            validation = _spread([f["validation"] for f in found])
            yield (
                f"| {words + ' alone' if single else words} | {len(found)} | {validation} | {' | '.join(cells)} | "
                f"{found[0]['trainable']:,} |"
            )


def _spread(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    spread = f" +- {statistics.stdev(there):.3f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.3f}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("set", choices=SETS)
    running.add_argument("--data", help="folder of the data sets")
    running.add_argument("--encoder", help="folder of a published encoder")
    running.add_argument("--rows", nargs="+")
    running.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    running.add_argument("--dropout", action="store_true", help="with train.modality_dropout 0.3")
    running.add_argument("--work", help="folder for scenes and runs")
    commands.add_parser("cost")
    commands.add_parser("write")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if options.command == "run":
        run(options)
    elif options.command == "cost":
        from benchmarks.fusion_cost import measure

        measure(FUSED, RESULTS / "fusion.cost.json")
    else:
        write()


def write() -> None:
    """Put the tables into the page."""
    from benchmarks.fusion_cost import lines_of_cost

    top = PAGE.read_text(encoding="utf-8").partition(BELOW)[0]
    tables = {
        "Constructed scenes": list(lines_of_scores("constructed")),
        "ombria_s1s2": list(lines_of_scores("ombria")),
        "Cost": list(lines_of_cost(RESULTS / "fusion.cost.json")),
    }
    parts = [f"### {title}\n\n" + "\n".join(lines) for title, lines in tables.items() if len(lines) > 2]
    PAGE.write_text(top + BELOW + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
