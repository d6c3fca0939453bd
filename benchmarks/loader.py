"""Samples per second of the loader alone: random resized windows of unlabelled scenes, read, resized and turned.

    python benchmarks/loader.py                                  # tiled GeoTIFFs of noise, made in a temporary folder
    python benchmarks/loader.py --images "FOLDER/**/*.jpg"       # files of one's own: a pattern, folder or file
    python benchmarks/loader.py --bits 16 --workers 2 --samples 2000

Prints one row: scenes, megapixels in all, window, workers, samples/s (median of the parts that were timed, lowest and
highest) and the share of pixels read from files to pixels given to the model. One thread a process; a first part that
fills caches and starts the workers is not timed. What is measured is what `vfmseg pretrain` does before a batch goes to
the model: `UnlabelledWindows` in batches of 32 through torch's DataLoader.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from torch.utils.data import DataLoader

from vfmseg.build.training import augment_of
from vfmseg.build.unlabelled import Unlabelled, open_unlabelled, windows_of
from vfmseg.data.sample import Batch, collate
from vfmseg.data.windows import Draw, epoch_draws, rank_batches
from vfmseg.recipe.train import AugmentSection
from vfmseg.recipe.unlabelled import UnlabelledSection

SIDE = 4096  # pixels of a scene that is made
SCENES = 4
BATCH = 32
PARTS = 5


def make_scenes(folder: Path, bits: int, bands: int, compress: str) -> None:
    """Scenes of smooth noise, tiled by 256, as imagery is stored; smooth, so that compression finds something."""
    random = np.random.default_rng(0)
    top = 255 if bits == 8 else 10000
    for number in range(SCENES):
        coarse = random.uniform(0, 1, (bands, SIDE // 16, SIDE // 16)).astype(np.float32)
        smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], (SIDE, SIDE), mode="bilinear")[0]
        noise = random.normal(0, 0.01, (bands, SIDE, SIDE)).astype(np.float32)
        values = ((smooth.numpy() + noise).clip(0.001, 1) * top).astype(np.uint8 if bits == 8 else np.uint16)
        with rasterio.open(
            folder / f"scene{number}.tif", "w", driver="GTiff", count=bands, height=SIDE, width=SIDE,
            dtype=values.dtype, crs="EPSG:32633", transform=from_origin(500000, 5000000, 1, 1), tiled=True,
            blockxsize=256, blockysize=256, compress=compress, interleave="pixel",
        ) as target:  # fmt: skip
            target.write(values)


def opened(images: str, tile: int, scale: tuple[float, float], samples: int) -> tuple[UnlabelledSection, Unlabelled]:
    """The scenes, through the section of a recipe."""
    section = UnlabelledSection.model_validate(
        {"modalities": {"image": {"normalize": "dataset"}}, "scenes": {"image": images}, "tile": tile,
         "scale": list(scale), "samples_per_epoch": samples}
    )  # fmt: skip
    return section, open_unlabelled(section, lambda name: ((0.0,), (1.0,)))


def batches(section: UnlabelledSection, data: Unlabelled, workers: int) -> Iterator[Batch]:
    """Batches as the loop takes them."""
    windows = windows_of(section, data, 0, augment_of(AugmentSection(), data.inputs))
    draws: list[Draw] = epoch_draws(len(windows), len(windows), 0, 0)
    yield from DataLoader(
        windows,
        batch_sampler=rank_batches(draws, BATCH, 0, 1),
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )


def rates(section: UnlabelledSection, data: Unlabelled, samples: int, workers: int) -> list[float]:
    """Samples per second of each part but the first."""
    found = []
    count, started, part = 0, time.perf_counter(), samples // (PARTS + 1)
    for batch in batches(section, data, workers):
        count += len(batch)
        if count >= part:
            now = time.perf_counter()
            found.append(count / (now - started))
            count, started = 0, now
    return found[1:]


def main() -> None:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="pattern, folder or file; left out: scenes are made")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--compress", default="none", help="of the scenes that are made: none, deflate, lzw, jpeg")
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--scale", type=float, nargs=2, default=(0.5, 2.0))
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            make_scenes(Path(folder), options.bits, options.bands, options.compress)
        what = options.images or f"{options.bands} x {options.bits} bit GeoTIFF, {options.compress}"
        section, data = opened(options.images or folder, options.tile, tuple(options.scale), options.samples)
        before = sum(hidden.pixels for scene in data.scenes for hidden in scene.hidden().values())
        found = rates(section, data, options.samples, options.workers)
        after = sum(hidden.pixels for scene in data.scenes for hidden in scene.hidden().values())
    size = sum(scene.grid.height * scene.grid.width for scene in data.scenes) / 1e6
    # other processes count the pixels that they read themselves
    ratio = "-" if options.workers else f"{(after - before) / (options.samples * options.tile**2):.2f}"
    print("| images | scenes | Mpx | window | workers | samples/s | read / given |")
    print(
        f"| {what} | {len(data.scenes)} | {size:.0f} | {options.tile} px x {options.scale[0]:g} to "
        f"{options.scale[1]:g} | {options.workers} | {statistics.median(found):.0f} ({min(found):.0f} to "
        f"{max(found):.0f}) | {ratio} |"
    )


if __name__ == "__main__":
    main()
