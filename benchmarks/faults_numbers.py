"""Trials: absurd numbers, an odd environment, and nobody who listens.

Held: what cannot be done is refused with exit code 2 or 3 and one message, within 10 s and 2 GiB; what can be done ends
with exit code 0 in the same bounds. Where the reader of the output or of the messages has left (`2>&1 | head`), the
work is done and the exit code is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from faults_bits import OUT, answer, label
from faults_lab import QUICK, Trial, contents, difference, recipe, run
from faults_rasters import bounded

NUMBERS = ("0", "-1", "1", "1000000000", "1e300", "-1e300", "1e-300", "nan", "inf", "-inf", "9" * 400, "0.5", "x", "")

OPTIONS = [
    "--tile",
    "--overlap",
    "--batch-size",
    "--readers",
    "--memory-limit",
    "--min-area",
    "--simplify",
    "--scales",
    "--bounds",
]

RECIPE = [
    "seed", "data.tile", "data.samples_per_epoch", "data.workers", "data.ignore_index", "train.epochs",
    "train.batch_size", "train.accumulate", "train.clip", "train.optimizer.lr", "train.optimizer.encoder_lr",
    "train.optimizer.weight_decay", "train.optimizer.warmup", "train.augment.scale", "train.augment.rotate",
    "train.focal_gamma", "train.loss.cross_entropy", "train.loss.dice", "predict.tile", "predict.overlap",
    "predict.batch_size", "predict.memory_limit", "model.adapter.rank", "model.adapter.alpha",
    "model.encoder.upscale", "model.decoder.channels",
]  # fmt: skip

MORE = [
    ["--scales", ",".join(["8"] * 1000)], ["--scales", ",".join(["1"] * 1000)], ["--scales", "1e-9,1e9"],
    ["--bounds", "nan,nan,nan,nan"], ["--bounds", "-1e308,-1e308,1e308,1e308"], ["--bounds", "0,0,0,0"],
    ["--bounds", "1,2,3"], ["--tile", "1", "--overlap", "0"], ["--overlap", "0.999999"],
    ["--tile", "32", "--overlap", "0.99", "--batch-size", "1000000"], ["--polygons", ".gpkg", "--min-area", "1e308"],
    ["--polygons", ".gpkg", "--simplify", "1e308"],
]  # fmt: skip

ENVIRONMENTS = [
    {"RANK": "abc"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "abc"}, {"RANK": "3"}, {"RANK": "-1", "WORLD_SIZE": "1"},
    {"LOCAL_RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "0"}, {"RANK": "5", "WORLD_SIZE": "2"},
    {"OMP_NUM_THREADS": "x"}, {"GDAL_CACHEMAX": "x"}, {"GDAL_DATA": "nowhere"}, {"TMPDIR": "nowhere"},
]  # fmt: skip


def numbers(lab: Path) -> Iterator[Trial]:
    """Of all kinds."""
    best = lab / "lora" / "run" / "best"
    for option in OPTIONS:
        for number in NUMBERS:
            yield Trial(f"predict {option} {number[:12]}", _predict(label(best, lab, f"{option}={number}")))
    for more in MORE:
        yield Trial(f"predict {' '.join(more)[:60]}", _predict(label(best, lab, *more)))
    for key in RECIPE:
        for number in NUMBERS:
            yield Trial(f"finetune {key}={number[:12]}", _finetune(lab, f"{key}={number}"))
    for around in ENVIRONMENTS:
        shown = " ".join(f"{key}={value}" for key, value in around.items())
        for name in ("predict", "finetune"):
            yield Trial(f"{name} with {shown}", _around(lab, name, around))
    for closed, stream in ((1, "output"), (2, "messages")):
        for name in ("predict", "finetune"):
            yield Trial(f"{name} whose {stream} nobody reads", _unheard(lab, name, closed))


def _predict(command: list[str]) -> Callable[[Path], str]:
    return lambda here: bounded(run(command, here, patience=QUICK + 5))


def _write_recipe(lab: Path, here: Path) -> None:
    content = recipe(lab, "lora") | {"output_dir": OUT}
    content["train"] |= {"epochs": 1}
    (here / "r.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _finetune(lab: Path, change: str) -> Callable[[Path], str]:
    def act(here: Path) -> str:
        _write_recipe(lab, here)
        return bounded(run(["finetune", "r.yaml", change], here, patience=QUICK + 5))

    return act


def _around(lab: Path, name: str, around: dict[str, str]) -> Callable[[Path], str]:
    """A wrong environment is refused in words; if not, what was said is not silenced either."""

    def act(here: Path) -> str:
        _write_recipe(lab, here)
        command = label(lab / "lora" / "run" / "best", lab) if name == "predict" else ["finetune", "r.yaml"]
        ended = run(command, here, patience=QUICK + 5, around=around)
        wrong = bounded(ended)
        return wrong or ("" if ended.said.strip() else f"ended with {ended.code} without a word")

    return act


def _unheard(lab: Path, name: str, closed: int) -> Callable[[Path], str]:
    sound = contents(answer(lab, "lora").parent)

    def act(here: Path) -> str:
        _write_recipe(lab, here)
        command = label(lab / "lora" / "run" / "best", lab, "--json") if name == "predict" else ["finetune", "r.yaml"]
        ended = run(command, here, closed=closed)
        if ended.code:
            return f"ended with {ended.code}: {ended.tail}"
        found = contents(here / OUT)
        return difference(found, sound) if name == "predict" else "" if "best" in found else "no best/"

    return act
