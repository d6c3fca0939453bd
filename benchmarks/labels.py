"""How much labels depend on what they should not depend on: tiles, holes, precision, batches.

    python benchmarks/labels.py CHECKPOINT SCENE [--crop 1024] [--encoder FOLDER]

Seams: mean |difference of probability| between neighbouring pixels across tile borders, over the same between the same
pixels where a grid shifted by half a stride has no border; 1 = no seam can be seen. Both grids are measured against
each other, so that ground which is rougher where borders happen to lie cancels. Hole: the share of pixels around a hole
cut into the scene whose label changes. Agreement: the share of pixels with the same label as in float32 with the
settings of the recipe, and the time relative to it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from vfmseg.geo.grid import Window, spans
from vfmseg.geo.reader import Raster
from vfmseg.how import How, settle
from vfmseg.scenes import bands_of
from vfmseg.segmenter import Segmenter

SEAMS = (("none", 0.0), ("none", 0.25), ("average", 0.25), ("gaussian", 0.25), ("hann", 0.25), ("hann", 0.5))


def borders(size: int, tile: int, overlap: float, blend: str) -> np.ndarray:
    """Positions i such that a tile's say ends or begins between pixels i - 1 and i."""
    parts = spans(size, tile, int(tile * overlap))
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
    how = How(blend=blend, overlap=overlap)
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


def timed(segmenter: Segmenter, scene: np.ndarray, how: How) -> tuple[np.ndarray, float]:
    """Probabilities and seconds."""
    started = time.perf_counter()
    probabilities = segmenter.probabilities(scene, how)
    return probabilities, time.perf_counter() - started


def agreements(checkpoint: str, encoder: str | None, scene: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of equal labels and relative time of other precisions and batch sizes."""
    plain = Segmenter.from_pretrained(checkpoint, device="cpu", encoder=encoder)
    truth, seconds = timed(plain, scene, How())
    variants = {
        "bf16": (Segmenter.from_pretrained(checkpoint, device="cpu", dtype="bf16", encoder=encoder), How()),
        "batch of 1": (plain, How(batch_size=1)),
        "logits averaged": (plain, How(average="logits")),
        "d4": (plain, How(tta="d4")),
    }
    found = {}
    for name, (segmenter, how) in variants.items():
        other, taken = timed(segmenter, scene, how)
        same = float((other.argmax(axis=0) == truth.argmax(axis=0)).mean())
        found[name] = {"same labels": round(same, 5), "time": round(taken / seconds, 2)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("scene")
    parser.add_argument("--encoder")
    parser.add_argument("--crop", type=int, default=1024, help="pixels a side that are used, from the middle")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
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
    tile = settle(How(), segmenter.recipe).settings.tile
    seams = {
        f"{blend}, overlap {overlap:g}": seam_score(segmenter, scene, tile, overlap, blend) for blend, overlap in SEAMS
    }
    result = {
        "scene": [height, width],
        "tile": tile,
        "seams": seams,
        "labels changed around a hole of 64 px": hole_share(segmenter, scene, 64),
        "agreement": agreements(options.checkpoint, options.encoder, scene),
        "torch": torch.__version__,
        "threads": options.threads,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
