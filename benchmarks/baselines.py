"""What a recipe's test score is worth: the same split scored without a foundation model.

    python benchmarks/baselines.py RECIPE [key.path=value ...] --baseline forest --seeds 0 1 2

`majority`: always the most frequent class of the training labels. `forest`: a random forest on the bands of the 5 x 5
pixels round each pixel. `unet`: a small U-Net trained from nothing for `--seconds` of CPU time, its weights chosen on
validation. Only `train` (and `val` for the U-Net) is learned from; the pixels scored are those that `vfmseg evaluate`
scores: labelled, and valid in every modality. Messages go to stderr, one JSON object goes to stdout.

The functions take plain arrays; scenes larger than `LARGEST` are cut into tiles of the recipe's size first.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.build.data import open_split
from vfmseg.data.scene import Scene
from vfmseg.errors import DataError, VfmsegError
from vfmseg.geo.grid import Window, cut
from vfmseg.metrics import Confusion
from vfmseg.recipe import load_recipe
from vfmseg.training.losses import IGNORE, counts, cross_entropy, dice

LARGEST = 512  # pixels a side up to which a scene is one tile
SIDE = 5  # pixels a side of the forest's neighbourhood
TRAIN_PIXELS = 400  # drawn from each training tile for the forest
TEST_PIXELS = 6000  # at most, drawn from each test tile for the forest
TREES = 200
SECONDS = 300.0  # of training and validation, for the U-Net
BATCH = 8  # crops in one step of the U-Net
CROP = 256  # pixels a side of a crop


@dataclass(frozen=True)
class Tile:
    """image float32 (C, H, W), the modalities stacked; valid bool (H, W); labels int64 (H, W), -1 = unlabelled."""

    image: np.ndarray
    valid: np.ndarray
    labels: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Labels where the image says something, else -1."""
        return np.where(self.valid, self.labels, IGNORE)


def read_tiles(scenes: Sequence[Scene], tile: int) -> list[Tile]:
    """Every scene as tiles: whole up to LARGEST pixels a side, else cut without overlap into at most `tile` pixels."""
    tiles: list[Tile] = []
    for scene in scenes:
        height, width = scene.grid.height, scene.grid.width
        whole = max(height, width) <= LARGEST
        for window in [Window(0, 0, height, width)] if whole else [part.core for part in cut(height, width, tile)]:
            chips = scene.read(window).values()
            one = Tile(
                np.concatenate([chip.pixels for chip in chips]),
                np.logical_and.reduce([chip.valid for chip in chips]),
                scene.read_labels(window),
            )
            if (one.targets != IGNORE).any():
                tiles.append(one)
    if not tiles:
        raise DataError("the scenes of this split have no labelled pixel; expected some; check the recipe's classes")
    return tiles


def majority(train: Sequence[Tile], test: Sequence[Tile], classes: int) -> Confusion:
    """Scores of always answering with the most frequent class of the training labels."""
    seen = sum(np.bincount(t.targets[t.targets != IGNORE], minlength=classes) for t in train)
    answer = int(np.argmax(seen))
    confusion = Confusion(classes)
    for tile in test:
        confusion.update(np.full(tile.labels.shape, answer), tile.targets)
    return confusion


def neighbourhoods(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(C, H, W) and (n, 2) rows and columns -> (n, C * 25): the 5 x 5 values round each, reflected at the edges."""
    reach = SIDE // 2
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))  # (C, H, W, 5, 5), a view
    return windows[:, pixels[:, 0], pixels[:, 1]].swapaxes(0, 1).reshape(len(pixels), -1)


def draw(tile: Tile, most: int | None, rng: np.random.Generator) -> np.ndarray:
    """Rows and columns (n, 2) of at most `most` labelled pixels of a tile, at random; None: all of them."""
    pixels = np.argwhere(tile.targets != IGNORE)
    if most is None or len(pixels) <= most:
        return pixels
    return pixels[rng.choice(len(pixels), most, replace=False)]


def forest(
    train: Sequence[Tile],
    test: Sequence[Tile],
    classes: int,
    seed: int = 0,
    *,
    n_jobs: int = 1,
    trees: int = TREES,
    test_pixels: int | None = TEST_PIXELS,
) -> Confusion:
    """A random forest on 5 x 5 neighbourhoods in image units; `test_pixels` None scores every labelled pixel."""
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(seed)
    drawn = [(tile, draw(tile, TRAIN_PIXELS, rng)) for tile in train]
    features = np.concatenate([neighbourhoods(tile.image, pixels) for tile, pixels in drawn])
    truth = np.concatenate([tile.labels[pixels[:, 0], pixels[:, 1]] for tile, pixels in drawn])
    model = RandomForestClassifier(trees, min_samples_leaf=5, n_jobs=n_jobs, random_state=seed)
    model.fit(features, truth)
    confusion = Confusion(classes)
    for tile in test:
        pixels = draw(tile, test_pixels, rng)
        answer = model.predict(neighbourhoods(tile.image, pixels))
        confusion.update(answer, tile.labels[pixels[:, 0], pixels[:, 1]])
    return confusion


def block(in_channels: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with GroupNorm and ReLU."""
    layers: list[nn.Module] = []
    for before in (in_channels, channels):
        layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.GroupNorm(8, channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Four scales of `width`, 2, 4 and 8 times `width` channels; about 1.1 M parameters at the default width.

    After Ronneberger et al., 2015, with GroupNorm and bilinear enlarging. Normalises its own input by `mean` and
    `std` (C,); invalid pixels become 0 after that.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int, width: int = 24) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float()[:, None, None])
        self.register_buffer("std", std.float()[:, None, None])
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([len(mean), *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(block(b + a, a) for a, b in itertools.pairwise(widths))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """(B, C, H, W) in image units and (B, H, W) bool, any size -> logits (B, K, H, W)."""
        height, width = image.shape[-2:]
        x = (image - self.mean) / self.std * valid[:, None]
        x = F.pad(x, (0, -width % 8, 0, -height % 8))  # three halvings
        skips: list[Tensor] = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], dim=1))
        return self.classify(x)[..., :height, :width]


def band_statistics(tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
    """Mean and std (C,) of the valid pixels."""
    pixels = np.concatenate([tile.image[:, tile.valid] for tile in tiles], axis=1).astype(np.float64)
    return torch.from_numpy(pixels.mean(axis=1)), torch.from_numpy(pixels.std(axis=1).clip(min=1e-6))


def random_crop(tile: Tile, size: int, rng: np.random.Generator) -> Tile:
    """A random square, turned by a quarter and mirrored at random; what lies outside the tile is invalid."""
    top, left = (int(rng.integers(0, max(0, n - size) + 1)) for n in tile.labels.shape)
    window = (slice(top, top + size), slice(left, left + size))
    quarters, mirror = int(rng.integers(4)), bool(rng.integers(2))

    def cropped(array: np.ndarray, fill: float) -> np.ndarray:
        part = array[(..., *window)]
        short = [(0, size - n) for n in part.shape[-2:]]
        part = np.pad(part, [(0, 0)] * (part.ndim - 2) + short, constant_values=fill)
        part = np.rot90(part, quarters, axes=(-2, -1))
        return np.ascontiguousarray(part[..., ::-1] if mirror else part)

    return Tile(cropped(tile.image, 0), cropped(tile.valid, False), cropped(tile.labels, IGNORE))


def stacked(tiles: Sequence[Tile]) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of one size as a batch: images, valid masks and targets."""
    return (
        torch.from_numpy(np.stack([tile.image for tile in tiles])),
        torch.from_numpy(np.stack([tile.valid for tile in tiles])),
        torch.from_numpy(np.stack([tile.targets for tile in tiles])),
    )


def batches(tiles: Sequence[Tile], size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random crops without end; each pass takes every tile once, in a new order."""
    waiting: list[Tile] = []
    while True:
        for i in rng.permutation(len(tiles)):
            waiting.append(random_crop(tiles[i], size, rng))
            if len(waiting) == min(BATCH, len(tiles)):
                yield stacked(waiting)
                waiting = []


@torch.no_grad()
def score(model: nn.Module, tiles: Sequence[Tile], classes: int) -> Confusion:
    """One confusion matrix over whole tiles, one at a time, as they may differ in size."""
    model.eval()
    confusion = Confusion(classes)
    for tile in tiles:
        image, valid, targets = stacked([tile])
        confusion.update(model(image, valid).argmax(dim=1), targets)
    model.train()
    return confusion


def mean_iou(confusion: Confusion) -> float:
    """mIoU of a matrix, whatever its classes are called."""
    value = confusion.scores([str(i) for i in range(confusion.classes)])["miou"]
    return -1.0 if value is None else value


@dataclass(frozen=True)
class UNetRun:
    """A trained U-Net on the test tiles, and how it came about."""

    confusion: Confusion
    parameters: int
    steps: int
    validation: list[float]  # mIoU on validation, in order; the weights of the best one were kept
    seconds: float


def unet(
    train: Sequence[Tile],
    val: Sequence[Tile],
    test: Sequence[Tile],
    classes: int,
    seed: int = 0,
    *,
    seconds: float = SECONDS,
    steps: int | None = None,
    lr: float = 1e-3,
    width: int = 24,
) -> UNetRun:
    """Train a small U-Net from nothing for `seconds` of CPU time (validation counted in), keep the best on `val`,
    score `test`.

    The learning rate warms up and falls along the time spent, so a run depends on the machine's speed; with `steps` it
    ends, and is scheduled, by the number of steps instead, and the same seed gives the same run.
    """
    started = time.process_time()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = UNet(*band_statistics(train), classes, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    size = min(CROP, max(max(tile.labels.shape) for tile in train))
    every = max(25, math.ceil(len(train) / BATCH))  # steps between two validations
    best, best_state, validation, step = -math.inf, copy.deepcopy(model.state_dict()), [], 0
    for image, valid, targets in batches(train, size, rng):
        done = step / steps if steps is not None else (time.process_time() - started) / seconds
        if step == 0:
            done = 0.0  # the first step is made whatever the start has cost
        if done < 1:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
            logits, divisors = model(image, valid), counts(targets)
            loss = cross_entropy(logits, targets) / divisors["pixels"].clamp(min=1)
            loss = loss + dice(logits, targets) / divisors["samples"].clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        if step % every == 0 or done >= 1:
            validation.append(mean_iou(score(model, val, classes)))
            if validation[-1] > best:
                best, best_state = validation[-1], copy.deepcopy(model.state_dict())
        if done >= 1:
            break
    model.load_state_dict(best_state)
    parameters = sum(p.numel() for p in model.parameters())
    return UNetRun(score(model, test, classes), parameters, step, validation, time.process_time() - started)


@dataclass(frozen=True)
class Splits:
    """The tiles of a recipe by split, and its class names in index order."""

    tiles: dict[str, list[Tile]]
    names: list[str]


def load(recipe_path: str | Path, overrides: Sequence[str], baseline: str) -> Splits:
    """Read the splits that a baseline needs into memory; `val` only for the U-Net."""
    recipe = load_recipe(recipe_path, overrides)
    needed = ["train", "test"] + (["val"] if baseline == "unet" else [])
    tiles = {split: read_tiles(open_split(recipe, split), recipe.data.tile) for split in needed}
    return Splits(tiles, [recipe.data.classes[i].name for i in sorted(recipe.data.classes)])


def run(
    baseline: str,
    splits: Splits,
    seed: int,
    *,
    seconds: float = SECONDS,
    n_jobs: int = 1,
    test_pixels: int | None = TEST_PIXELS,
) -> dict[str, Any]:
    """One baseline, one seed: {"seed", "seconds", "scores"}, for the U-Net also how its training went."""
    started = time.perf_counter()
    train, test, classes = splits.tiles["train"], splits.tiles["test"], len(splits.names)
    more: dict[str, Any] = {}
    if baseline == "majority":
        confusion = majority(train, test, classes)
    elif baseline == "forest":
        confusion = forest(train, test, classes, seed, n_jobs=n_jobs, test_pixels=test_pixels)
    else:
        trained = unet(train, splits.tiles["val"], test, classes, seed, seconds=seconds)
        confusion = trained.confusion
        more = {"steps": trained.steps, "parameters": trained.parameters, "validation": trained.validation}
    taken = round(time.perf_counter() - started, 1)
    print(f"{baseline} seed {seed}: mIoU {mean_iou(confusion):.3f}, {taken} s", file=sys.stderr, flush=True)
    return {"seed": seed, "seconds": taken, **more, "scores": confusion.scores(splits.names)}


def measure(
    baseline: str, recipe: str | Path, overrides: Sequence[str], seed: int, seconds: float
) -> tuple[dict[str, Any], int | None]:
    """Test scores and trainable parameters (None: not counted) of a baseline on the data of a recipe; `seconds` is
    the U-Net's."""
    result = run(baseline, load(recipe, overrides, baseline), seed, seconds=seconds)
    return result["scores"], result.get("parameters")


def summary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a baseline for every seed and add mean and spread."""
    splits = load(arguments.recipe, arguments.overrides, arguments.baseline)
    # nothing is random in the majority class
    seeds = arguments.seeds[:1] if arguments.baseline == "majority" else arguments.seeds
    most = None if arguments.all_pixels else TEST_PIXELS
    runs = [
        run(arguments.baseline, splits, seed, seconds=arguments.seconds, n_jobs=arguments.jobs, test_pixels=most)
        for seed in seeds
    ]
    miou = [one["scores"]["miou"] for one in runs]
    return {
        "recipe": str(arguments.recipe),
        "baseline": arguments.baseline,
        "split": "test",
        "miou": statistics.fmean(miou),
        "miou_std": statistics.stdev(miou) if len(miou) > 1 else None,
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print; 2 if the recipe or its data are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--baseline", choices=("majority", "forest", "unet"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU time of the U-Net's training, each seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes of the forest")
    parser.add_argument("--all-pixels", action="store_true", help="the forest answers every test pixel")
    try:
        result = summary(parser.parse_args(argv))
    except VfmsegError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, indent=1, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
