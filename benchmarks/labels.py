"""How much labels depend on what they should not depend on, and what makes them cheaper: tiles, holes, precision.

    python benchmarks/labels.py run NAME CHECKPOINT SCENE [--crop 1024] [--encoder FOLDER]
    python benchmarks/labels.py write

Seams: mean |difference of probability| between neighbouring pixels across tile borders, over the same between the same
pixels where a grid shifted by half a stride has no border; 1 = no seam can be seen. Both grids are measured against
each other, so that ground which is rougher where borders happen to lie cancels. Hole: the share of pixels around a hole
cut into the scene whose label changes. Variants: share of pixels with the same label as with float32 and the settings
of the recipe, and time over that of the model alone (`floor`: its forward passes in float32 on batches in memory), the
median of ROUNDS rounds in which all take turns. `run` keeps JSON in benchmarks/results/labels/, `write` puts tables
into docs/labels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vfmseg.build.data import bands_of
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.geo.grid import Spans, Window
from vfmseg.geo.reader import Raster
from vfmseg.inference.plan import Plan
from vfmseg.segmenter import DTYPES, Segmenter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "labels"
PAGE = ROOT / "docs" / "labels.md"
BELOW = "<!-- tables: python benchmarks/labels.py write -->"
ROUNDS = 3
SEAMS = (("none", 0.0), ("none", 0.25), ("average", 0.25), ("gaussian", 0.25), ("hann", 0.125), ("hann", 0.25),
         ("hann", 0.5))  # fmt: skip


def borders(size: int, tile: int, overlap: float, blend: str) -> np.ndarray:
    """Positions i such that a tile's say ends or begins between pixels i - 1 and i."""
    parts = list(Spans(size, tile, int(tile * overlap)))
    if blend == "none":
        places = {core for _, core, _ in parts[1:]}
    else:
        places = {start for start, _, _ in parts[1:]} | {start + tile for start, _, _ in parts[:-1]}
    return np.array(sorted(places), dtype=int)


def steps(probabilities: np.ndarray, axis: int) -> np.ndarray:
    """|Difference| of neighbours along an axis, mean over the classes: row i is that of pixels i and i + 1."""
    found = np.abs(np.diff(probabilities, axis=axis)).mean(axis=0)
    return found if axis == 1 else found.T


def seam_score(segmenter: Segmenter, scene: np.ndarray, tile: int, overlap: float, blend: str) -> float | None:
    """Mean step across tile borders over the mean step at the same places without; None if the scene is one tile."""
    how = {"blend": blend, "overlap": overlap}
    shift = (tile - int(tile * overlap)) // 2
    here, there = segmenter.probabilities(scene, how), segmenter.probabilities(scene[:, shift:, shift:], how)
    with_border: list[np.ndarray] = []
    without: list[np.ndarray] = []
    for axis in (1, 2):
        size = scene.shape[axis]
        ours = set(borders(size, tile, overlap, blend).tolist())
        theirs = {shift + place for place in borders(size - shift, tile, overlap, blend).tolist()}
        one, other = steps(here[:, shift:, shift:], axis), steps(there, axis)
        for places, mine, control in ((ours - theirs, one, other), (theirs - ours, other, one)):
            rows = [place - shift - 1 for place in sorted(places) if place > shift]
            with_border.append(mine[rows].ravel())
            without.append(control[rows].ravel())
    at = np.concatenate(with_border)
    return round(float(at.mean() / np.concatenate(without).mean()), 4) if at.size else None


def hole_share(segmenter: Segmenter, scene: np.ndarray, side: int) -> float:
    """Share of the pixels within a tile of a hole in the middle whose label changes."""
    before = segmenter.predict(scene)
    holed = scene.astype(np.float32)
    top, left = ((n - side) // 2 for n in scene.shape[1:])
    holed[:, top : top + side, left : left + side] = np.nan
    after = segmenter.predict(holed)
    near = np.zeros(scene.shape[1:], dtype=bool)
    reach = segmenter.recipe.data.tile
    near[max(0, top - reach) : top + side + reach, max(0, left - reach) : left + side + reach] = True
    near[top : top + side, left : left + side] = False
    return round(float((before != after)[near].mean()), 5)


def variants(checkpoint: Path, encoder: str | None) -> dict[str, tuple[Segmenter, dict[str, Any]]]:
    """Ways to the same labels, by name; the first is what the others are compared with."""

    def load(dtype: str = "fp32", merge: bool = True, compile: bool = False, last: bool = False) -> Segmenter:
        loaded = load_segmenter(checkpoint, encoder, merge)
        if last:
            loaded.model.to(memory_format=torch.channels_last)
        return Segmenter(loaded, checkpoint, torch.device("cpu"), DTYPES[dtype], compile)

    plain = load()
    return {
        "as in the recipe, float32": (plain, {}),
        "adapter not merged": (load(merge=False), {}),
        "channels last": (load(last=True), {}),
        "torch.compile": (load(compile=True), {}),
        "bf16": (load("bf16"), {}),
        "bf16, channels last": (load("bf16", last=True), {}),
        "bf16, torch.compile": (load("bf16", compile=True), {}),
        "overlap 0.125": (plain, {"overlap": 0.125}),
        "bf16, overlap 0.125": (load("bf16"), {"overlap": 0.125}),
        "tile twice as large": (plain, {"tile": 2 * plain.how.tile}),
        "batch of 1": (plain, {"batch_size": 1}),
        "logits averaged": (plain, {"average": "logits"}),
    }


def floor(segmenter: Segmenter, scene: np.ndarray) -> Callable[[], None]:
    """The forward passes of a scene alone, in float32."""
    settings = segmenter.how
    tile, size = settings.tile, settings.batch_size
    plan = Plan(*scene.shape[1:], tile, settings.overlap, True, size)
    (name,) = (one.name for one in segmenter.inputs)
    batch = torch.from_numpy(np.nan_to_num(np.stack([scene[:, :tile, :tile]] * size)))
    valid = torch.ones(size, tile, tile, dtype=torch.bool)
    full, left = divmod(len(plan.rows) * len(plan.cols), size)

    def work() -> None:
        with torch.inference_mode():
            for count in [size] * full + ([left] if left else []):
                segmenter.model({name: batch[:count]}, {name: valid[:count]})

    return work


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cheaper(checkpoint: Path, encoder: str | None, scene: np.ndarray) -> list[dict[str, Any]]:
    """Labels a second and agreement of each variant, and of the floor."""
    tried = variants(checkpoint, encoder)
    labels = {}
    for name, (segmenter, how) in tried.items():
        print(name, file=sys.stderr, flush=True)
        labels[name] = segmenter.probabilities(scene, how).argmax(axis=0)  # also warms up and compiles
    plain = next(iter(tried))
    works: dict[str, Callable[[], Any]] = {"floor": floor(tried[plain][0], scene)}
    for name, (segmenter, how) in tried.items():
        works[name] = lambda segmenter=segmenter, how=how: segmenter.predict(
            scene, tile=how.tile, overlap=how.overlap, batch_size=how.batch_size
        )
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            seconds[name].append(seconds_of(work))
    return [
        {
            "variant": name,
            "seconds": round(statistics.median(taken), 2),
            "over_floor": round(statistics.median(t / f for t, f in zip(taken, seconds["floor"], strict=True)), 3),
            "mpx_per_second": round(scene[0].size / 1e6 / statistics.median(taken), 4),
            "same_labels": round(float((labels[name] == labels[plain]).mean()), 5) if name in labels else None,
        }
        for name, taken in seconds.items()
    ]


def run(options: argparse.Namespace) -> None:
    """Measure one segmenter on one scene."""
    torch.set_num_threads(options.threads)
    segmenter = Segmenter.from_pretrained(options.checkpoint, device="cpu", encoder=options.encoder)
    (bands, *others) = bands_of(segmenter.recipe).values()
    if others:
        sys.exit("this measures segmenters of one modality")
    with Raster(options.scene, bands) as raster:
        height, width = min(raster.grid.height, options.crop), min(raster.grid.width, options.crop)
        window = Window((raster.grid.height - height) // 2, (raster.grid.width - width) // 2, height, width)
        chip = raster.read(window)
    scene = np.where(chip.valid, chip.pixels, np.nan).astype(np.float32)
    tile = segmenter.how.tile
    result = {
        "scene": [Path(options.scene).name, height, width],
        "recipe": segmenter.recipe.name,
        "tile": tile,
        "seams": [[*pair, seam_score(segmenter, scene, tile, pair[1], pair[0])] for pair in SEAMS],
        "hole": hole_share(segmenter, scene, 64),
        "variants": cheaper(Path(options.checkpoint), options.encoder, scene),
        "setting": {"torch": torch.__version__, "threads": options.threads, "machine": platform.machine(),
                    "cores": os.cpu_count()},
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    aside = RESULTS / f"{options.name}.partial"
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(RESULTS / f"{options.name}.json")


def show() -> str:
    """The tables as Markdown."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        name, height, width = found["scene"]
        lines += [
            "", f"### {path.stem}: recipe {found['recipe']}, {height} x {width} px of {name}, tile {found['tile']}", "",
            f"{found['setting']['threads']} threads, torch {found['setting']['torch']}. A hole of 64 x 64 px changes "
            f"{100 * found['hole']:.2f} % of the labels within a tile of it.", "",
            "| blend | overlap | seam score |", "|---|---|---|",
            *(f"| {blend} | {overlap:g} | {'-' if score is None else f'{score:.3f}'} |"
              for blend, overlap, score in found["seams"]), "",
            "| variant | s | x floor | Mpx/s | same labels |", "|---|---|---|---|---|",
            *(_row(one) for one in found["variants"]),
        ]  # fmt: skip
    return "\n".join(lines)


def _row(one: dict[str, Any]) -> str:
    same = "-" if one["same_labels"] is None else f"{100 * one['same_labels']:.2f} %"
    return (
        f"| {one['variant']} | {one['seconds']:.1f} | {one['over_floor']:.2f} | {one['mpx_per_second']:.3f} | {same} |"
    )


def page() -> str:
    """The page of the documentation with the tables as they are now."""
    written = PAGE.read_text(encoding="utf-8")
    return f"{written[: written.index(BELOW)]}{BELOW}\n{show()}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("name", help="of the result")
    runner.add_argument("checkpoint")
    runner.add_argument("scene")
    runner.add_argument("--encoder")
    runner.add_argument("--crop", type=int, default=1024, help="pixels a side that are used, from the middle")
    runner.add_argument("--threads", type=int, default=2)
    verbs.add_parser("write")
    options = parser.parse_args(arguments)
    if options.verb == "run":
        run(options)
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
