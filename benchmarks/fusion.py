"""The tables of docs/fusion.md: every fusion trained on scenes whose ceilings are known, and on real scenes.

    python benchmarks/fusion.py run constructed
    python benchmarks/fusion.py run ombria --data DATA_FOLDER --encoder VIT_FOLDER [--parts forms] [--seeds 1]
    python benchmarks/fusion.py run india --data DATA_FOLDER --encoder VIT_FOLDER --parts main
    python benchmarks/fusion.py cost
    python benchmarks/fusion.py write

`run` is `vfmseg compare` of a recipe: each modality alone and each form of fusion, at equal trained parameters, three
seeds, chosen on validation and measured once on test, with all modalities and with each one missing. An interrupted
table goes on. Frozen encoders answer from files when they see a window again (remembered.py). What was found is kept in
`benchmarks/results/`. `cost` counts parameters, operations and time of each fusion beside the encoder's. `write` puts
the tables into docs/fusion.md, below the line that says so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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

Change = dict[str, Any]

FUSED: dict[str, Change] = {
    "stack": {"name": "stack"},
    "linear, concat": {"name": "linear", "op": "concat"},
    "linear, concat, last": {"name": "linear", "op": "concat", "at": "last"},
    "linear, sum": {"name": "linear", "op": "sum"},
    "linear, weighted": {"name": "linear", "op": "weighted"},
    "decision, mean": {"name": "decision", "op": "mean"},
    "decision, weighted": {"name": "decision", "op": "weighted"},
    "decision, product": {"name": "decision", "op": "product"},
    "attention, single": {"name": "attention", "mode": "single"},
    "attention, mutual": {"name": "attention", "mode": "mutual"},
    "se": {"name": "se"},
    "gated, independent": {"name": "gated", "mode": "independent"},
    "gated, complementary": {"name": "gated", "mode": "complementary"},
    "gated, cross": {"name": "gated", "mode": "cross"},
    "reconstruction, self": {"name": "reconstruction", "mode": "self"},
    "reconstruction, cross": {"name": "reconstruction", "mode": "cross"},
    "alignment, contrastive": {"name": "alignment", "by": "contrastive"},
    "alignment, mmd": {"name": "alignment", "by": "mmd"},
    "alignment, coral": {"name": "alignment", "by": "coral"},
    "alignment, projection": {"name": "alignment", "by": "projection"},
}
"""Sections `model.fusion`, by the name of the row."""

LINEAR_SUM = {"name": "linear", "op": "sum"}
ADAPTERS: list[Change] = [
    {"name": "lora", "rank": 8},
    {"name": "mm_lora", "rank": 4},
    {"name": "mm_adapter", "ratio": 0.0625},
]

Grid = dict[str, list[Any]]
"""{key of the recipe: its alternatives}."""

MAIN = (
    "stack",
    "linear, concat",
    "linear, sum",
    "decision, product",
    "attention, mutual",
    "se",
    "gated, complementary",
)

PARTS: dict[str, tuple[str, bool, Grid]] = {
    "forms": ("each form", True, {"model.fusion": list(FUSED.values())}),
    "main": ("the main forms", True, {"model.fusion": [FUSED[row] for row in MAIN]}),
    "dropout": (
        "with train.modality_dropout: 0.3",
        False,
        {"model.fusion": [one for one in FUSED.values() if one["name"] != "stack"], "train.modality_dropout": [0.3]},
    ),
    "adapters": ("with an adapter in the encoder", False, {"model.adapter": ADAPTERS, "model.fusion": [LINEAR_SUM]}),
}
"""{part: (its title, whether each modality alone is trained too, what is compared)}."""


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
            "tile": 256,  # whole scenes, each once an epoch, turned and flipped
        },
        "model": {
            "encoder": {"name": "dinov2", "checkpoint": str(Path(options.encoder).resolve()), "layers": [3, 6, 9]},
            "adapter": {"name": "none"},
            "decoder": {"name": "fpn", "channels": 64},
        },
        "train": {
            "loss": {"cross_entropy": 1.0, "dice": 1.0},
            "epochs": 6,
            "batch_size": 2,
            "optimizer": {"lr": 1.0e-3, "warmup": 0.1},
        },
        "output_dir": str(folder / "run"),
    }


def india(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Land cover in Sentinel-2: visible bands and infrared as two modalities, split by place."""
    data = Path(options.data).resolve() / "s2_india_rgb_ir"
    folders = {"rgb": "rgb", "infrared": "ir", "labels": "label"}
    files = {role: f"{{split}}/{name}/{{name}}.png" for role, name in folders.items()}
    found = ombria(folder, options)
    found["name"] = "india"
    found["data"] |= {
        "classes": {1: "built-up", 2: "vegetation", 3: "water"},
        "ignore_index": 0,
        "modalities": {"rgb": {"normalize": "dataset"}, "infrared": {}},
        "samples_per_epoch": 28,
        **{split: {"table": str(data / "split.csv"), "split": split, **files} for split in ("train", "val", "test")},
    }
    return found


SETS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "constructed": constructed,
    "ombria": ombria,
    "india": india,
}
TITLES = {
    "constructed": "Constructed scenes",
    "ombria": "ombria_s1s2: floods in Sentinel-2 and Sentinel-1",
    "india": "s2_india_rgb_ir: visible bands and infrared",
}


def run(options: argparse.Namespace) -> None:
    """Train and measure what is not there yet, and keep the tables."""
    from benchmarks.remembered import remembering
    from vfmseg.compare.comparison import compare

    folder = Path(options.work or Path(tempfile.gettempdir()) / f"vfmseg-fusion-{options.set}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(SETS[options.set](folder, options), sort_keys=False))
    for part in options.parts:
        _, singles, grid = PARTS[part]
        changes = [f"{key}={','.join(map(_flow, values))}" for key, values in grid.items()]
        with remembering(folder / "remembered"):
            found = compare(
                file, changes, options.seeds, equal=True, missing=True, singles=singles, output=folder / part
            )
        kept = [
            {key: cell[key] for key in KEPT} | {"recall": recall_of(Path(cell["folder"]), found["seeds"])}
            for cell in found["cells"]
        ]
        content = {key: found[key] for key in ("seeds", "equal", "machine", "torch", "verdict")} | {"cells": kept}
        result = RESULTS / f"fusion.{options.set}.{part}.json"
        result.write_text(json.dumps(content, indent=1) + "\n")


KEPT = ("name", "trainable_parameters", "equal", "validation", "test", "missing")
"""Of a cell; its time is that of an encoder that remembers, and its folder one of this machine."""


def recall_of(cell: Path, seeds: list[int]) -> dict[str, dict[str, float]]:
    """{split: {class: recall}} of a cell, the mean over its seeds: which of two sensors sees the flood at all?"""
    found: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        each = []
        for seed in seeds:
            run = cell / f"seed-{seed}"
            result = json.loads((run / ("metrics.json" if split == "validation" else "measured.json")).read_text())
            scores = result["validation"] if split == "validation" else result["test"]["scores"]
            each.append({name: one["recall"] or 0.0 for name, one in scores["classes"].items()})
        found[split] = {name: round(sum(one[name] for one in each) / len(each), 4) for name in each[0]}
    return found


def _flow(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).replace("...", "").strip()


def lines_of_scores(name: str, part: str) -> Iterator[str]:
    """A table of what is there of a set: mean and spread of the seeds."""
    file = RESULTS / f"fusion.{name}.{part}.json"
    if not file.exists():
        return
    found = json.loads(file.read_text())
    gone = list(dict.fromkeys(name for cell in found["cells"] for name in cell["missing"] or ()))
    yield f"| {PARTS[part][0]} | validation | test | {' | '.join(f'test without {one}' for one in gone)} | trained |"
    yield "|---|" + "--:|" * (3 + len(gone))
    for cell in found["cells"]:
        missing = cell["missing"] or {}
        cells = [cell["validation"], cell["test"], *(missing.get(one) for one in gone)]
        yield (
            f"| {cell['name']} | {' | '.join(map(_spread, cells))} | {cell['trainable_parameters']:,}"
            f"{' (not equal)' if cell['equal'] is False else ''} |"
        )
    yield ""
    for cell in found["cells"]:
        if cell["name"].startswith("only-"):
            told = "; ".join(
                f"{split} {', '.join(f'{name} {value:.2f}' for name, value in one.items())}"
                for split, one in cell["recall"].items()
            )
            yield f"- Share of the pixels of each class that {cell['name'].split('_')[0]} finds: {told}."
    if PARTS[part][1]:
        yield ""
    words = found["verdict"]["words"]
    yield (
        f"Seeds {', '.join(map(str, found['seeds']))}; {found['machine']}, torch {found['torch']}; all train as many "
        f"parameters as {found['equal']} where they can. {words[:1].upper()}{words[1:]}."
    )


def _spread(scores: dict[str, Any] | None) -> str:
    if scores is None or scores["mean"] is None:
        return "-"
    return f"{scores['mean']:.3f}" + ("" if scores["spread"] is None else f" ± {scores['spread']:.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("set", choices=SETS)
    running.add_argument("--data", help="folder of the data sets")
    running.add_argument("--encoder", help="folder of a published encoder")
    running.add_argument("--parts", nargs="+", choices=PARTS, default=["forms", "dropout", "adapters"])
    running.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
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
    from benchmarks.unmatched import lines_of_tables

    top = PAGE.read_text(encoding="utf-8").partition(BELOW)[0]
    tables = {
        title: [line for part in PARTS for line in (*lines_of_scores(name, part), "")] for name, title in TITLES.items()
    }
    tables["Scenes of one sensor, and models that miss one"] = list(lines_of_tables())
    tables["Cost"] = list(lines_of_cost(RESULTS / "fusion.cost.json"))
    parts = [f"### {title}\n\n" + "\n".join(lines).strip() for title, lines in tables.items() if any(lines)]
    PAGE.write_text(top + BELOW + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
