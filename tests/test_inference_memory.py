"""Memory of a job that writes everything there is: below what was estimated for it, and not the votes several times."""

from __future__ import annotations

import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import apart
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.validity import Chip
from vfmseg.inference import job as job_module
from vfmseg.inference.contracts import Finished, Model, Tiles
from vfmseg.inference.job import Arrays, into, into_files, prepare
from vfmseg.inference.output import Output
from vfmseg.inference.plan import Plan
from vfmseg.inference.products import EXTRAS, Products
from vfmseg.inference.reading import Stored
from vfmseg.recipe.predict import PredictSection

CLASSES = 40


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operators of this thread have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        made = func(*args, **(kwargs or {}))
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:  # else a view
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


class Endless:
    """A scene that is made as it is read."""

    def __init__(self, height: int, width: int) -> None:
        self.grid = Grid(None, IDENTITY, height, width)

    def read(self, window: Window) -> dict[str, Chip]:
        return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}


def even(tiles: Tiles) -> Tensor:
    """A model that gives every class the same share, and takes no memory but for its answer."""
    images, _ = apart(tiles)
    batch, _, height, width = images["x"].shape
    return torch.full((batch, CLASSES, height, width), 1 / CLASSES)


@pytest.mark.parametrize("logits", [False, True], ids=["probabilities", "logits"])
@pytest.mark.pitfall("P34")
def test_products_take_memory_for_a_few_rows_whatever_the_height(logits: bool) -> None:
    peaks = []
    for height in (64, 256):
        sums = torch.rand(CLASSES, height, 128)
        finished = Finished(sums, torch.ones(height, 128), np.ones((height, 128), bool))
        with Live() as live:
            Products(tuple(range(CLASSES)), EXTRAS, logits)(finished)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
    assert 2 * 4 * CLASSES * 8 * 128 <= peaks[0] <= 9 * (CLASSES + 3) * 8 * 128


@pytest.mark.parametrize(("tile", "extras"), [(32, ()), (32, EXTRAS), (128, EXTRAS)])
@pytest.mark.pitfall("P34")
def test_memory_stays_below_the_estimate_with_every_product_and_many_classes(
    tmp_path: Path, tile: int, extras: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peaks of numpy (of all threads, so also of readers and writers) and of torch come at different times."""
    monkeypatch.setattr("vfmseg.inference.shards.JOINED", 2**20)  # joining comes later and has a bound of its own
    products = Products(tuple(range(CLASSES)), extras)
    layers = products.layers(["a"] * CLASSES, [(0, 0, 0)] * CLASSES, {})
    job = prepare(
        [Endless(512, 800)], Stored((64, 256)), {"x": 1}, Model(even, CLASSES), products, products.bytes_a_pixel,
        PredictSection(tile=tile, overlap=0.25, blend="hann", batch_size=4),
    )  # fmt: skip
    tracemalloc.start()
    try:
        with Live() as live:
            into_files(job, Output(tmp_path / "labels.tif"), layers, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + live.peak < job.memory


HOLES = """
import numpy as np, psutil
from vfmseg.inference.job import _give_back
one = np.ones(16 * 2**20, np.uint8)
del one  # from now on glibc takes blocks of up to this size from its heap
blocks = [np.ones(2**20, np.uint8) for _ in range(200)]
above = np.ones(2**20, np.uint8)  # keeps the heap from shrinking
del blocks
before = psutil.Process().memory_info().rss
_give_back()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
@pytest.mark.pitfall("P34")
def test_what_a_strip_has_freed_goes_back_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150 * 2**20
    calls = []
    monkeypatch.setattr(job_module, "_give_back", lambda: calls.append(1))
    scene, products = Endless(64, 400), Products((0, 1))
    job = prepare([scene], Stored(), {"x": 1}, Model(two, 2), products, 1, PredictSection(tile=32))
    job = replace(job, plan=Plan(64, 400, 32, 0.25, True, 4, 100))
    assert len(job.plan.strips) > 2
    into(job, Arrays(64, 400))
    assert len(calls) == len(job.plan.strips)


def two(tiles: Tiles) -> Tensor:
    """A model of two classes."""
    images, _ = apart(tiles)
    batch, _, height, width = images["x"].shape
    return torch.full((batch, 2, height, width), 0.5)
