"""The tables of docs/pretrain.md, section What it is worth: pretrained weights beside random ones, with few labels.

    python benchmarks/few_labels.py run oam_buildings --data DATA_FOLDER --encoder VIT_FOLDER --work SCRATCH
    python benchmarks/few_labels.py run aerial_multiclass --data DATA_FOLDER --encoder VIT_FOLDER --work SCRATCH
    python benchmarks/few_labels.py write

`run` goes through seeds, rows and shares of the training tiles that are labelled (`data.fraction`, drawn by the seed).
Each run is one `vfmseg finetune` and one `vfmseg evaluate`, as in table.py: its epoch is chosen on validation, and test
is measured once. All rows of a set see as many windows, and as many with few labels as with all. Small encoders are of
the layout of `builtin`, with random weights that each seed draws anew, with the published ones, or with those and a
LoRA that has learned by `vfmseg pretrain` from all training imagery of the set, without its labels; that is done once a
set and seed and stays in SCRATCH. VIT_FOLDER is a Dinov2 folder of transformers (ViT-S/14).

Results are kept in benchmarks/results/, one file a set and row, after each run. What is there is not run again, unless
it was made with other settings or encoders than those of now. Two `run` at a time share no row of a set. Minutes are
CPU time of the training. `write` puts the tables below the line that says so.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and __package__ is None:  # started as a script, from anywhere
    sys.path.insert(0, str(ROOT))

from benchmarks import table  # noqa: E402
from benchmarks.pages import with_tables  # noqa: E402
from vfmseg.encoders.builtin import FOLDER as BUILTIN  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "pretrain.md"
BELOW = "<!-- tables: python benchmarks/few_labels.py write -->"

SETS = ("oam_buildings", "aerial_multiclass")
FRACTIONS = (0.05, 0.25, 1.0)
SEEDS = (0, 1, 2)
EPOCHS = {"oam_buildings": 2, "aerial_multiclass": 3}
WINDOWS = 160
"""Of an epoch, whatever the share of the tiles that they are drawn from."""
TILE, BATCH, PRECISION, UPSCALE = 256, 4, "bf16", 1.0
VIT_LAYERS = [5, 9, 12]
"""As in the recipes; of the small encoders the quarter points."""
LORA = {"name": "lora", "rank": 8, "targets": ["q", "v"]}
LINEAR = ({"name": "linear"}, 2e-3)
FPN = ({"name": "fpn", "channels": 64}, 1e-3)
CONTINUAL = {"tile": 224, "scale": [0.5, 1.0], "samples_per_epoch": 400, "epochs": 10, "batch": 16, "lr": 1e-3}
"""How MAE goes on from `builtin`."""


@dataclass(frozen=True)
class Row:
    """encoder: its weights, random, builtin, continual or vit; adapter: what of it learns; head: decoder and lr."""

    title: str
    encoder: str
    adapter: Mapping[str, Any]
    head: tuple[Mapping[str, Any], float]


FOREST = "forest"
ROWS = {
    "random-linear": Row("random weights, frozen, `linear`", "random", {"name": "none"}, LINEAR),
    "random-lora": Row("random weights, LoRA, `fpn`", "random", LORA, FPN),
    "random-full": Row("random weights, all trained, `fpn`", "random", {"name": "full"}, FPN),
    "builtin-linear": Row("`builtin`, frozen, `linear`", "builtin", {"name": "none"}, LINEAR),
    "builtin-lora": Row("`builtin`, LoRA, `fpn`", "builtin", LORA, FPN),
    "continual-lora": Row("`builtin`, MAE on the training imagery, LoRA, `fpn`", "continual", LORA, FPN),
    "vit-linear": Row("ViT-S/14, frozen, `linear`", "vit", {"name": "none"}, LINEAR),
    "vit-lora": Row("ViT-S/14, LoRA, `fpn`", "vit", LORA, FPN),
}
TITLES = {FOREST: table.TITLES["forest"], **{name: row.title for name, row in ROWS.items()}}
SHOWN = {"random": "RANDOM", "continual": "CONTINUAL", "vit": "VIT"}
"""What folders are called in the results; each machine has them elsewhere."""


# -------------------------------------------------------------------------------------------------------------- recipes


def changes_of(name: str, row: str, fraction: float, seed: int, folders: Mapping[str, str] = SHOWN) -> list[str]:
    """Overrides that make a run of the recipe of a set. folders: where the encoders, or the trained LoRA, lie."""
    drawn = [f"data.fraction={fraction:g}", f"seed={seed}"]
    if row == FOREST:
        return drawn
    (decoder, lr), weights = ROWS[row].head, ROWS[row].encoder
    sections = {
        "model.encoder": encoder_of(weights, folders) | {"upscale": UPSCALE},
        "model.adapter": {**ROWS[row].adapter} | ({"start": folders["continual"]} if weights == "continual" else {}),
        "model.decoder": decoder,
    }
    return [
        *(f"{key}={json.dumps(section)}" for key, section in sections.items()),
        f"data.tile={TILE}", f"data.samples_per_epoch={WINDOWS}", f"train.epochs={EPOCHS[name]}",
        f"train.batch_size={BATCH}", f"train.precision={PRECISION}", f"train.optimizer.lr={lr}", *drawn,
    ]  # fmt: skip


def encoder_of(weights: str, folders: Mapping[str, str]) -> dict[str, Any]:
    """Family and weights of a row's encoder, as recipes say it."""
    if weights in ("builtin", "continual"):  # a LoRA starts on the weights that it was trained on
        return {"name": "builtin"}
    layers = {"layers": VIT_LAYERS} if weights == "vit" else {}
    return {"name": "dinov2", "checkpoint": folders[weights], **layers}


def continual_recipe(name: str, seed: int, data: Path, output: Path) -> dict[str, Any]:
    """The recipe by which `builtin` goes on with the training images of a set, by MAE and LoRA."""
    folder = data.resolve() / name
    with (folder / "split.csv").open(encoding="utf-8", newline="") as lines:
        images = [str(folder / line["image"]) for line in csv.DictReader(lines) if line["split"] == "train"]
    taken = {key: CONTINUAL[key] for key in ("tile", "scale", "samples_per_epoch")}
    return {
        "name": f"continual-{name}", "seed": seed,
        "data": {"modalities": {"rgb": {"bands": [1, 2, 3]}}, "scenes": {"rgb": images}, **taken},
        "model": {"encoder": {"name": "builtin"}, "adapter": LORA},
        "objectives": {"mae": {"ratio": 0.75}},
        "train": {"epochs": CONTINUAL["epochs"], "batch_size": CONTINUAL["batch"], "precision": PRECISION,
                  "optimizer": {"lr": CONTINUAL["lr"]}},
        "output_dir": str(output),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- encoders


def random_vit(folder: Path, seed: int) -> Path:
    """Write an encoder of the layout of `builtin`, its weights drawn by the seed, and return its folder."""
    from vfmseg.encoders.dinov2 import DINOV2
    from vfmseg.encoders.formats.settings import MOST_PARAMETERS
    from vfmseg.encoders.formats.transformers import TRANSFORMERS

    said = BUILTIN / "config.json"
    config = json.loads(said.read_text(encoding="utf-8"))
    network: Any = TRANSFORMERS.random(DINOV2, config, seed, str(said), MOST_PARAMETERS, None)
    network.float().save_pretrained(folder)
    return folder


def continual(name: str, seed: int, data: Path, work: Path) -> tuple[Path, float]:
    """The folder whose LoRA has gone on from `builtin`, and the CPU minutes it took; what is there is not done again.

    One that was stopped starts anew: minutes are those of all of it.
    """
    place = work / f"continual.{name}.{seed}"
    recipe, minutes = place / "recipe.yaml", place / "minutes.json"  # JSON is YAML
    said = json.dumps(continual_recipe(name, seed, data, place / "run"), indent=1)
    made_of = {"recipe": said, "weights": weights_of("continual", "")}
    if minutes.is_file() and (known := json.loads(minutes.read_text(encoding="utf-8")))["of"] == made_of:
        return place / "run" / "best", known["minutes"]
    place.mkdir(parents=True, exist_ok=True)
    minutes.unlink(missing_ok=True)  # of a run that is replaced
    recipe.write_text(said, encoding="utf-8")
    started = table.children_minutes()
    table.vfmseg("pretrain", str(recipe), "--overwrite")
    took = round(table.children_minutes() - started, 2)
    table.keep(minutes, {"minutes": took, "of": made_of})
    return place / "run" / "best", took


def weights_of(weights: str, vit: str) -> str:
    """A hash of what an encoder's weights come from: of its file, of random ones that of the layout."""
    file = {"random": BUILTIN / "config.json", "vit": Path(vit) / "model.safetensors"}
    return hashlib.sha256(file.get(weights, BUILTIN / "model.safetensors").read_bytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- measured


def run(options: argparse.Namespace) -> None:
    """Fill `benchmarks/results/` for a set, and print its table."""
    from vfmseg.terminal import quiet_libraries

    quiet_libraries()
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for row in options.rows:
            for fraction in options.fractions:
                made_of = settings_of(options.set, row, fraction, seed, options.encoder)
                if read(options.set, row).get(f"{fraction:g}", {}).get(str(seed), {}).get("of") == made_of:
                    continue
                print(f"{options.set} {row} {fraction:.0%} seed {seed}", file=sys.stderr, flush=True)
                result = {**measure(row, fraction, seed, options), "machine": table.machine(), "of": made_of}
                kept = read(options.set, row)
                kept.setdefault(f"{fraction:g}", {})[str(seed)] = result
                table.keep(path_of(options.set, row), kept)
    print("\n".join(lines_of(options.set)))


def settings_of(name: str, row: str, fraction: float, seed: int, vit: str) -> dict[str, Any]:
    """What a result is of; one of other settings is measured again."""
    found: dict[str, Any] = {"changes": changes_of(name, row, fraction, seed)}
    if row != FOREST:
        found["weights"] = weights_of(ROWS[row].encoder, vit)
        if ROWS[row].encoder == "continual":
            found["continual"] = CONTINUAL
    return found


def measure(row: str, fraction: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one row once."""
    name, data, pretraining = options.set, options.data, {}
    if row == FOREST:
        return table.run_baseline(name, row, seed, data, changes_of(name, row, fraction, seed))
    folders = {"vit": str(Path(options.encoder).resolve())}
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        if ROWS[row].encoder == "random":
            folders["random"] = str(random_vit(Path(scratch).resolve() / "random", seed))
        elif ROWS[row].encoder == "continual":
            start, minutes = continual(name, seed, data, options.work.resolve())
            folders["continual"], pretraining = str(start), {"pretraining_minutes": minutes}
        found = table.train_and_measure(name, changes_of(name, row, fraction, seed, folders), data)
    return {**found, **pretraining}


def path_of(name: str, row: str) -> Path:
    """Where the results of a row of a set are kept."""
    return RESULTS / f"few_labels.{name}.{row}.json"


def read(name: str, row: str) -> dict[str, dict[str, Any]]:
    """{fraction: {seed: result}} of what is kept of a row."""
    path = path_of(name, row)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def current(name: str, row: str) -> dict[str, dict[str, Any]]:
    """The same without what was made with other settings than those of now."""
    kept = {
        fraction: {seed: one for seed, one in seeds.items()
                   if one["of"]["changes"] == changes_of(name, row, float(fraction), int(seed))}
        for fraction, seeds in read(name, row).items()
    }  # fmt: skip
    return {fraction: seeds for fraction, seeds in kept.items() if seeds}


# --------------------------------------------------------------------------------------------------------------- tables


def lines_of(name: str) -> Iterator[str]:
    """The table of a set; nothing if nothing was measured."""
    rows = {row: found for row in TITLES if (found := current(name, row))}
    if not rows:
        return
    yield from (f"### {table.SETS[name]}", "", about(name, rows), "")
    yield f"| | {' | '.join(f'{fraction:.0%}' for fraction in FRACTIONS)} | trained | CPU min at 100% |"
    yield f"|---|{'--:|' * (len(FRACTIONS) + 2)}"
    for row, found in rows.items():
        cells = [scores([one["test"]["miou"] for one in found.get(f"{f:g}", {}).values()]) for f in FRACTIONS]
        trained = next(iter(next(iter(found.values())).values()))["trainable"]
        minutes = [one["minutes"] for one in found.get("1", {}).values()]
        took = f"{statistics.mean(minutes):.1f}" if minutes else "-"
        yield f"| {TITLES[row]} | {' | '.join(cells)} | {f'{trained:,}' if trained else '-'} | {took} |"


def scores(found: Sequence[float]) -> str:
    """Mean ± standard deviation, with the number of seeds where it is not the usual one."""
    if not found:
        return "-"
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    seeds = f" ({len(found)} seed{'s' * (len(found) > 1)})" if len(found) != len(SEEDS) else ""
    return f"{statistics.mean(found):.3f}{spread}{seeds}"


def about(name: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What is the same in all rows, the machine and the versions; each that there is where rows differ."""
    runs = [one for found in rows.values() for of in found.values() for one in of.values()]
    known = [one["versions"] for one in runs if "versions" in one]
    versions = [", ".join(f"{part} {one[part]}" for part in ("torch", "transformers", "peft")) for one in known]
    made = [" or ".join(dict.fromkeys(each)) for each in ([one["machine"] for one in runs], versions) if each]
    spent = [one["pretraining_minutes"] for one in runs if "pretraining_minutes" in one]
    windows = int(CONTINUAL["epochs"]) * int(CONTINUAL["samples_per_epoch"])
    before = (
        f" MAE on the training imagery saw {windows:,} windows in {statistics.mean(spent):.1f} minutes, once a seed, "
        "which are not counted below."
        if spent
        else ""
    )
    return (
        f"Test mIoU after {EPOCHS[name]} epochs of {WINDOWS} windows of {TILE} px in batches of {BATCH}, {PRECISION}, "
        f"with each share of the tiles; seeds {', '.join(map(str, SEEDS))} (mean ± their standard deviation)."
        f"{before} {'; '.join(made)}:"
    )


def page() -> str:
    """The page of the documentation with the tables as they are now."""
    return with_tables(PAGE, BELOW, "\n\n".join("\n".join(part) for name in SETS if (part := list(lines_of(name)))))


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("set", choices=SETS)
    runner.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    runner.add_argument("--encoder", required=True, help="folder of the ViT-S/14")
    runner.add_argument("--work", required=True, type=Path, help="folder of what is trained beside")
    runner.add_argument("--rows", nargs="+", default=list(TITLES), choices=list(TITLES))
    runner.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), choices=SEEDS)
    runner.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS), choices=FRACTIONS)
    verbs.add_parser("write")
    options = parser.parse_args(arguments)
    if options.verb == "run":
        run(options)
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
