"""One measurement of scene.py, in a process of its own: a contender labels a scene, one line of JSON tells the cost.

    PYTHON benchmarks/scene_peers.py CONTENDER SCENE LABELS --model conv [--trace FILE]

Runs in the environment of the contender: needs torch, numpy and rasterio, and the contender's package. Every function
below imports its package, prepares, and returns what is measured: from the file of the scene to the file of the labels.
Other packages are called as their documentation says, with the tile, stride and batch of the others.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from torch import Tensor, nn

from vfmseg.inference.output import Output
from vfmseg.recipe.predict import PredictSection

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from scene_models import BANDS, CLASSES, MEAN, MODELS, SPREAD, build  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")
MEBI = 2**20
EVERY = 0.05  # seconds between two looks at the memory
POINTS = 2000  # of a trace, at most; each is the largest of those it stands for


# --------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Task:
    """What is to be done."""

    scene: Path
    labels: Path
    net: nn.Module
    tile: int
    stride: int
    batch: int

    @property
    def overlap(self) -> int:
        """Pixels that neighbouring tiles share."""
        return self.tile - self.stride


def starts(size: int, tile: int, stride: int) -> list[int]:
    """First pixels of the tiles along an axis; the last tile is pulled back into the scene."""
    if size < tile:
        raise SystemExit(f"the scene has {size} px a side, less than a tile")
    return [*range(0, size - tile, stride), size - tile]


def read_tile(dataset: Any, row: int, col: int, tile: int) -> Tensor:
    """float32 (C, t, t)."""
    return torch.from_numpy(dataset.read(window=Window(col, row, tile, tile)).astype(np.float32))


def label_profile(dataset: Any) -> dict[str, Any]:
    """Of the label files that this file writes itself."""
    return {
        "driver": "GTiff", "width": dataset.width, "height": dataset.height, "count": 1, "dtype": "uint8",
        "crs": dataset.crs, "transform": dataset.transform, "tiled": True, "blockxsize": 256, "blockysize": 256,
        "compress": "deflate", "nodata": 255,
    }  # fmt: skip


def floor(task: Task) -> Callable[[], None]:
    """As many tiles as the scene's grid has, in the batches of all others, through the module alone, from memory."""
    with rasterio.open(task.scene) as dataset:
        rows, cols = (starts(size, task.tile, task.stride) for size in dataset.shape)
        places = islice(cycle((row, col) for row in rows for col in cols), 2 * task.batch)
        tiles = torch.stack([read_tile(dataset, row, col, task.tile) for row, col in places])
    batches = tiles.split(task.batch)
    count, left = divmod(len(rows) * len(cols), task.batch)

    def work() -> None:
        with torch.inference_mode():
            for batch in islice(cycle(batches), count):
                task.net(batch)
            if left:
                task.net(batches[0][:left])

    return work


def hand(task: Task) -> Callable[[], None]:
    """A plain loop: read a tile, argmax, write the part of the tile that is its own; nothing is blended."""

    def work() -> None:
        with rasterio.open(task.scene) as dataset, rasterio.open(task.labels, "w", **label_profile(dataset)) as target:
            axes = [starts(size, task.tile, task.stride) for size in dataset.shape]
            (rows, tops), (cols, lefts) = ((axis, edges(axis, task.tile)) for axis in axes)
            places = [(i, j) for i in range(len(rows)) for j in range(len(cols))]
            for first in range(0, len(places), task.batch):
                part = places[first : first + task.batch]
                batch = torch.stack([read_tile(dataset, rows[i], cols[j], task.tile) for i, j in part])
                with torch.inference_mode():
                    labels = task.net(batch).argmax(dim=1).to(torch.uint8).numpy()
                for (i, j), tile in zip(part, labels):
                    window = Window(lefts[j], tops[i], lefts[j + 1] - lefts[j], tops[i + 1] - tops[i])
                    own = tile[tops[i] - rows[i] : tops[i + 1] - rows[i], lefts[j] - cols[j] : lefts[j + 1] - cols[j]]
                    target.write(own, 1, window=window)

    return work


def edges(axis: Sequence[int], tile: int) -> list[int]:
    """Where the own parts of the tiles begin, in the middle of the overlaps; and the end of the last."""
    return [0, *((a + tile + b) // 2 for a, b in pairwise(axis)), axis[-1] + tile]


def vfmseg(task: Task, blend: str = "hann") -> Callable[[], None]:
    """The engine that `vfmseg predict` and `Segmenter.predict` stand on, with its own defaults."""
    sys.path.insert(0, str(ROOT))
    from vfmseg.data.given import open_scene
    from vfmseg.geo.bands import Bands
    from vfmseg.inference.contracts import Model, Tiles
    from vfmseg.inference.job import into_files, prepare
    from vfmseg.inference.products import Products
    from vfmseg.inference.reading import stored_as

    def vote(tiles: Tiles) -> Tensor:
        with torch.inference_mode():
            return task.net(tiles.images["image"].pixels).softmax(dim=1)

    def work() -> None:
        scene = open_scene({"image": str(task.scene)}, {"image": Bands()})
        ids = tuple(range(CLASSES))
        products = Products(ids)
        layers = products.layers([str(i) for i in ids], [(25 * i, 25 * i, 25 * i) for i in ids], {})
        settings = PredictSection(
            tile=task.tile, overlap=(task.overlap + 0.5) / task.tile, blend=blend, batch_size=task.batch
        )
        job = prepare([scene], stored_as(scene), scene.bands(), Model(vote, CLASSES), products, 1, settings)
        into_files(job, Output(task.labels, overwrite=True), layers, {})
        scene.close()

    return work


def vfmseg_cut(task: Task) -> Callable[[], None]:
    """The same without blending."""
    return vfmseg(task, "none")


def torchgeo(task: Task) -> Callable[[], None]:
    """The loop of TorchGeo's documentation; it writes no maps, so each tile's part is written as in the hand loop."""
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler

    def own(start: int, size: int) -> tuple[int, int]:
        """Begin and end of a tile's part along an axis; the tile may reach beyond the scene on both sides."""
        begin = start + task.overlap // 2 if start > 0 else 0
        end = start + task.tile
        return begin, end - (task.overlap - task.overlap // 2) if end < size else size

    def work() -> None:
        dataset = RasterDataset(str(task.scene))
        sampler = GridGeoSampler(dataset, size=task.tile, stride=task.stride)
        loader = DataLoader(dataset, sampler=sampler, batch_size=task.batch, collate_fn=stack_samples)
        with rasterio.open(task.scene) as source:
            profile, place = label_profile(source), source.transform
        with rasterio.open(task.labels, "w", **profile) as target:
            for batch in loader:
                with torch.inference_mode():
                    tiles = task.net(batch["image"]).argmax(dim=1).to(torch.uint8).numpy()
                for (x, y, _), tile in zip(batch["bounds"], tiles):
                    col, row = (round(number) for number in ~place * (x.start, y.stop))
                    (top, bottom), (left, right) = own(row, target.height), own(col, target.width)
                    part = tile[top - row : bottom - row, left - col : right - col]
                    target.write(part, 1, window=Window(left, top, right - left, bottom - top))

    return work


def terratorch(task: Task) -> Callable[[], None]:
    """As in TerraTorch's guide to inference: the scene as one tensor, tiled inference, argmax."""
    from terratorch.tasks.tiled_inference import tiled_inference

    def work() -> None:
        with rasterio.open(task.scene) as source:
            profile = label_profile(source)
            image = torch.tensor(source.read(), dtype=torch.float, device="cpu").unsqueeze(0)
        votes = tiled_inference(task.net, image, crop=task.tile, stride=task.stride, batch_size=task.batch)
        labels = votes.squeeze(0).argmax(dim=0).to(torch.uint8).numpy()
        with rasterio.open(task.labels, "w", **profile) as target:
            target.write(labels, 1)

    return work


def geoai(task: Task) -> Callable[[], None]:
    """As in geoai's reference. Its own scaling, by each tile's maximum, is replaced: the module scales for all."""
    from geoai.inference import predict_geotiff

    def work() -> None:
        predict_geotiff(
            model=task.net,
            input_raster=str(task.scene),
            output_raster=str(task.labels),
            tile_size=task.tile,
            overlap=task.overlap,
            batch_size=task.batch,
            num_classes=CLASSES,
            output_dtype="uint8",
            output_nodata=255,
            preprocess_fn=lambda tile: tile.astype(np.float32),
            postprocess_fn=lambda votes: votes.argmax(axis=0),
            device="cpu",
            compress="deflate",
            verbose=False,
        )

    return work


CONTENDERS: dict[str, tuple[Callable[[Task], Callable[[], None]], str | None]] = {
    "floor": (floor, None),
    "hand": (hand, None),
    "torchgeo": (torchgeo, "torchgeo"),
    "terratorch": (terratorch, "terratorch"),
    "geoai": (geoai, "geoai-py"),
    "vfmseg": (vfmseg, "vfmseg"),
    "vfmseg-cut": (vfmseg_cut, "vfmseg"),
}


# ------------------------------------------------------------------------------------------------------------ measure


class Watch:
    """Looks at the resident memory of this process every 50 ms, in a thread; ends the process where it is too much."""

    def __init__(self, most_gib: float) -> None:
        self.most = most_gib * 2**30
        self.base = resident()
        self.started = time.perf_counter()
        self.series: list[tuple[float, int]] = [(0.0, self.base)]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(EVERY):
            self.note()

    def note(self) -> None:
        """Look now."""
        now = resident()
        self.series.append((time.perf_counter() - self.started, now))
        if now > self.most:
            print(json.dumps({"failed": f"RSS over {self.most / 2**30:g} GiB"}), flush=True)
            os._exit(3)

    def close(self) -> None:
        """Look once more and stop."""
        self._end.set()
        self._thread.join()
        self.note()

    @property
    def growth(self) -> float:
        """Peak over the start, MiB."""
        return (max(rss for _, rss in self.series) - self.base) / MEBI

    def trace(self) -> dict[str, list[float]]:
        """The series, thinned to the largest of neighbours."""
        step = max(1, math.ceil(len(self.series) / POINTS))
        kept = [max(self.series[i : i + step], key=lambda point: point[1]) for i in range(0, len(self.series), step)]
        return {
            "seconds": [round(seconds, 2) for seconds, _ in kept],
            "growth_mib": [round((rss - self.base) / MEBI, 1) for _, rss in kept],
        }


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * PAGE


def measure(contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, run a batch to warm up, label the scene."""
    torch.set_num_threads(options.threads)
    net = build(options.model)
    seen: list[int] = []  # tiles in each batch
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    prepare, package = CONTENDERS[contender]
    work = prepare(Task(options.scene, options.labels, net, options.tile, options.stride, options.batch))
    with torch.inference_mode():
        net(MEAN + SPREAD * torch.randn(options.batch, BANDS, options.tile, options.tile))
    seen.clear()
    gc.collect()
    watch = Watch(options.most_gib)
    started, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    watch.close()
    if options.trace:
        options.trace.write_text(json.dumps(watch.trace()) + "\n")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "growth_mib": round(watch.growth, 1),
        "loaded_mib": round(watch.base / MEBI, 1),
        "tiles": sum(seen),
        "versions": versions(package),
    }


def versions(package: str | None) -> dict[str, str]:
    """Of what matters for the figures; `contender`: of the package measured."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "rasterio")}
    found |= {"python": sys.version.split()[0], "gdal": rasterio.__gdal_version__}
    if package == "vfmseg":
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        found["contender"] = re.search(r'^version = "(.+)"', text, re.MULTILINE)[1]
    elif package is not None:
        found["contender"] = importlib.metadata.version(package)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("scene", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="conv")
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--stride", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--most-gib", type=float, default=20.0)
    parser.add_argument("--trace", type=Path, help="write RSS over time to this file")
    options = parser.parse_args()
    try:
        result = measure(options.contender, options)
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
