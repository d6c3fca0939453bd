"""The table of scores in docs/benchmarks.md: every row trained, chosen on validation, measured once on test.

    python benchmarks/table.py run DATA_FOLDER --encoder VIT_FOLDER [--sets oam_buildings] [--rows lora-fpn]
    python benchmarks/table.py write

`run` goes through data sets, rows and seeds, and keeps each result as a JSON file in `benchmarks/results/`; what is
there already is not run again, so an interrupted table goes on. Each training is one `vfmseg finetune` and one
`vfmseg evaluate`, the commands a user has. A row whose first run takes over ten minutes keeps to one seed. Minutes are
CPU time of the training: beside other work the clock would measure that work too. `write` puts the tables into
docs/benchmarks.md, below the line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and __package__ is None:  # started as a script, from anywhere
    sys.path.insert(0, str(ROOT))

from benchmarks.pages import with_tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BELOW = "<!-- tables: python benchmarks/table.py write -->"
SEEDS = (0, 1, 2)
LONG_RUN = 10.0  # minutes

BASELINES = ("majority", "forest", "unet")
FROZEN = ["model.adapter={name: none}"]
BOTTLENECK = "model.adapter={name: adapter, hidden: 64}"
# changes to the recipe that make each row; VIT is replaced by the folder of the encoder
ROWS: dict[str, list[str]] = {
    "builtin": ["model.encoder=BUILTIN"],
    "frozen-linear": ["model.encoder.checkpoint=VIT", *FROZEN, "model.decoder={name: linear}",
                      "train.optimizer.lr=2.0e-3"],
    "frozen-fpn": ["model.encoder.checkpoint=VIT", *FROZEN],
    "lora-fpn": ["model.encoder.checkpoint=VIT"],
    "adapter-fpn": ["model.encoder.checkpoint=VIT", BOTTLENECK],
}  # fmt: skip
# the encoder in the package as each recipe has its own: as fine tokens, bands by the same way in
BUILTIN = {
    "oam_buildings": "{name: builtin, upscale: 1.75}",
    "aerial_multiclass": "{name: builtin, upscale: 1.3125}",
    "s2_india_rgb_ir": "{name: builtin, input: widen}",
    "demo": "{name: builtin}",
}
# the demo's recipe has the encoder in the package; this is what `vfmseg demo --encoder` makes of it
DEMO = ["model.encoder={name: dinov2, checkpoint: VIT, upscale: 1.3125}", "train.epochs=2",
        "model.decoder={name: fpn, channels: 64}", "train.optimizer.lr=1.0e-3"]  # fmt: skip
# epochs where a row differs from its recipe: a frozen encoder costs less than half a step with LoRA
EPOCHS = {
    "oam_buildings": {"frozen-linear": 4, "frozen-fpn": 4},
    "aerial_multiclass": {"frozen-linear": 4, "frozen-fpn": 4},
    "s2_india_rgb_ir": {},
    "demo": {},
}
# CPU seconds of the U-Net: about what the row with LoRA takes on the same data
UNET_SECONDS = {"oam_buildings": 1200.0, "aerial_multiclass": 1200.0, "s2_india_rgb_ir": 300.0, "demo": 360.0}
TITLES = {
    "majority": "majority class",
    "forest": "random forest, 5x5 neighbourhoods",
    "unet": "small U-Net from scratch",
    "builtin": "recipe, `builtin` encoder, LoRA r 8 on q and v",
    "frozen-linear": "recipe, ViT-S/14 frozen, `linear`",
    "frozen-fpn": "recipe, ViT-S/14 frozen, `fpn`",
    "lora-fpn": "recipe, ViT-S/14 LoRA r 8 on q and v, `fpn`",
    "adapter-fpn": "recipe, ViT-S/14 `adapter` 64, `fpn`",
}
SETS = {
    "oam_buildings": "oam_buildings (RGB, 2 classes; test place: Banepa)",
    "aerial_multiclass": "aerial_multiclass (RGB, 5 classes; test scenes 1-3)",
    "s2_india_rgb_ir": "s2_india_rgb_ir (RGB + infrared, 3 classes)",
    "demo": "`vfmseg demo` (mosaics of oam_buildings; test place: Banepa)",
}


def train_and_measure(name: str, changes: Sequence[str], data: Path) -> dict[str, Any]:
    """One run of a recipe with overrides: its test scores, trainable parameters, minutes and chosen epoch."""
    with tempfile.TemporaryDirectory() as scratch:
        changes = [*changes, *places(name, data)]
        started = children_minutes()
        vfmseg("finetune", str(recipe_of(name)), *changes, f"output_dir={scratch}/run")
        minutes = round(children_minutes() - started, 2)
        training = json.loads((Path(scratch) / "run" / "metrics.json").read_text())
        test = json.loads(vfmseg("evaluate", f"{scratch}/run/best", str(recipe_of(name)), *changes, "--json"))
    return {
        "test": test,
        "validation": training["validation"]["miou"],
        "best_epoch": training["best_epoch"],
        "trainable": training["trainable_parameters"],
        "minutes": minutes,
        "versions": training["versions"],
    }


def recipe_of(name: str) -> Path:
    """The recipe of a data set."""
    if name == "demo":
        return ROOT / "vfmseg" / "assets" / "demo" / "recipe.yaml"
    return ROOT / "recipes" / f"{name}.yaml"


def row_changes(name: str, row: str, vit: str) -> list[str]:
    """Overrides that make a row of a recipe."""
    if (name, row) == ("demo", "builtin"):
        return []  # the recipe as it is
    changes = [*(DEMO if name == "demo" else ()), *ROWS[row]]
    if row in EPOCHS[name]:
        changes.append(f"train.epochs={EPOCHS[name][row]}")
    return [change.replace("VIT", json.dumps(vit)).replace("BUILTIN", BUILTIN[name]) for change in changes]


def places(name: str, data: Path) -> list[str]:
    """Overrides that say where the data lies on this machine; the demo's lies in the package."""
    if name == "demo":
        return []
    return [f"data.{split}.table={data.resolve() / name / 'split.csv'}" for split in ("train", "val", "test")]


def run_baseline(name: str, row: str, seed: int, data: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Majority, forest or U-Net on the tiles, bands and split of a recipe with overrides."""
    from benchmarks.baselines import measure

    started = time.process_time()
    scores, trainable = measure(row, recipe_of(name), [*changes, *places(name, data)], seed, UNET_SECONDS[name])
    return {"test": scores, "trainable": trainable, "minutes": round((time.process_time() - started) / 60, 2)}


def children_minutes() -> float:
    """CPU minutes of the processes that this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def vfmseg(*arguments: str) -> str:
    """Run the command line of the installed package; its output, or its complaint and an end."""
    done = subprocess.run(
        [sys.executable, "-m", "vfmseg.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"vfmseg {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def run(options: argparse.Namespace) -> None:
    """Fill `benchmarks/results/`."""
    for name in options.sets:
        for row in options.rows:
            for seed in options.seeds:
                target = RESULTS / f"{name}.{row}.{seed}.json"
                first = RESULTS / f"{name}.{row}.0.json"
                long = seed and first.is_file() and json.loads(first.read_text())["minutes"] > LONG_RUN
                if target.is_file() or long or (row == "majority" and seed):
                    continue
                print(f"{name} {row} seed {seed}", file=sys.stderr, flush=True)
                if row in BASELINES:
                    result = run_baseline(name, row, seed, options.data)
                else:
                    changes = [*row_changes(name, row, options.encoder), f"seed={seed}"]
                    result = train_and_measure(name, changes, options.data)
                    result["changes"] = [*row_changes(name, row, "VIT"), f"seed={seed}"]
                keep(target, {**result, "machine": machine()})


def machine() -> str:
    """What a run has had."""
    return f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"


def keep(target: Path, content: Mapping[str, Any]) -> None:
    """Write a result aside and give it its name, so that no stopped run leaves half of one."""
    target.parent.mkdir(exist_ok=True)
    aside = target.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    shutil.move(aside, target)


def show() -> str:
    """The table as Markdown."""
    lines = []
    for name, title in SETS.items():
        rows = [row for row in TITLES if list(RESULTS.glob(f"{name}.{row}.*.json"))]
        if not rows:
            continue
        lines += ["", f"### {title}", "", "| model | test mIoU | seeds | val mIoU | IoU by class | trained | CPU min |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [_row(name, row) for row in rows]
    return "\n".join(lines)


def page() -> str:
    """The page of the documentation with the tables as they are now."""
    return with_tables(PAGE, BELOW, show().strip())


def _row(name: str, row: str) -> str:
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}.{row}.*.json"))]
    scores = [r["test"]["miou"] for r in found]
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    validation = [r["validation"] for r in found if r.get("validation") is not None]
    classes = found[0]["test"]["classes"]
    by_class = ", ".join(
        f"{c} {statistics.mean(r['test']['classes'][c]['iou'] or 0 for r in found):.2f}" for c in classes
    )
    minutes = statistics.mean(r["minutes"] for r in found)
    long = " (over 10 min: one seed)" if len(found) == 1 and minutes > LONG_RUN else ""
    chosen = f"{statistics.mean(validation):.3f}" if validation else "-"
    trainable = f"{found[0]['trainable']:,}" if found[0]["trainable"] else "-"
    return (
        f"| {TITLES[row]} | {statistics.mean(scores):.3f}{spread} | {len(found)}{long} | {chosen} | {by_class} | "
        f"{trainable} | {minutes:.1f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("data", type=Path)
    runner.add_argument("--encoder", required=True, help="folder of the ViT-S/14")
    runner.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    runner.add_argument("--rows", nargs="+", default=list(TITLES), choices=list(TITLES))
    runner.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    verbs.add_parser("write")
    options = parser.parse_args(arguments)
    if options.verb == "run":
        run(options)
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
