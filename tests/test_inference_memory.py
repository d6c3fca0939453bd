"""Memory of a job that writes everything there is: below what was estimated for it, and not the votes several times."""

from __future__ import annotations

import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
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
from vfmseg.inference.contracts import Finished, Model, Tiles
from vfmseg.inference.job import into_files, prepare
from vfmseg.inference.output import Output
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
        with Live() as whole:  # what it would take at once, counted in the same way
            sums / 2
        assert whole.peak >= sums.nbytes
    assert 0 < peaks[0] == peaks[1] <= sums[:, :19].nbytes


@pytest.mark.parametrize(
    ("tile", "extras", "overlap"), [(32, (), 0.25), (32, EXTRAS, 0.25), (128, EXTRAS, 0.25), (128, (), 0.7)]
)
@pytest.mark.pitfall("P34")
def test_memory_stays_below_the_estimate_with_every_product_and_many_classes(
    tmp_path: Path, tile: int, extras: tuple[str, ...], overlap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peaks of numpy (of all threads, so also of readers and writers) and of torch come at different times.

    Where many tiles meet (overlap 0.7) their sums are kept in float64.
    """
    monkeypatch.setattr("vfmseg.inference.shards.JOINED", 2**20)  # joining comes later and has a bound of its own
    products = Products(tuple(range(CLASSES)), extras)
    layers = products.layers(["a"] * CLASSES, [(0, 0, 0)] * CLASSES, {})
    job = prepare(
        [Endless(512, 800)], Stored((64, 256)), {"x": 1}, Model(even, CLASSES), products, products.bytes_a_pixel,
        PredictSection(tile=tile, overlap=overlap, batch_size=1 if overlap > 0.5 else 4),
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
from dataclasses import replace
import numpy as np, psutil, torch
from vfmseg.geo.grid import IDENTITY, Grid
from vfmseg.geo.validity import Chip
from vfmseg.inference.contracts import Model
from vfmseg.inference.job import Arrays, into, prepare
from vfmseg.inference.plan import Plan
from vfmseg.inference.products import Products
from vfmseg.inference.reading import Stored
from vfmseg.recipe.predict import PredictSection

class Endless:
    grid = Grid(None, IDENTITY, 64, 400)
    def read(self, window):
        return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}

strips, above, seen = [], [], []  # right edges in pixels; what keeps the heap from shrinking; resident bytes

def resident():
    return psutil.Process().memory_info().rss

def vote(tiles):
    first = min(window.col for window in tiles.windows if window is not None)
    if not seen or first >= strips[len(seen) // 2 - 1]:  # the first batch of a strip
        before = resident()
        blocks = [np.ones(2**20, np.uint8) for _ in range(200)]
        above.append(np.ones(2**20, np.uint8))
        del blocks
        seen.extend((before, resident()))
    return torch.full((len(tiles.windows), 2, 32, 32), 0.5)

one = np.ones(16 * 2**20, np.uint8)
del one  # from now on glibc takes blocks of up to this size from its heap
how = PredictSection(tile=32, overlap=0, blend="none", batch_size=1)
job = prepare([Endless()], Stored(), {"x": 1}, Model(vote, 2), Products((0, 1)), 1, how)
job = replace(job, plan=Plan(64, 400, 32, 0, False, 1, widest=128))
strips += [job.plan.strip_columns(i)[1] for i in range(len(job.plan.strips))]
into(job, Arrays(64, 400))
print(len(strips), *seen, resident())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
@pytest.mark.pitfall("P34")
def test_what_a_strip_has_freed_goes_back_to_the_system() -> None:
    """The model leaves 200 MiB of holes in the heap at the start of each strip: the next one finds them gone."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    strips, *seen = map(int, done.stdout.split())
    assert strips > 2
    assert len(seen) == 2 * strips + 1
    for strip in range(strips):
        assert seen[2 * strip + 1] - seen[2 * strip + 2] > 150 * 2**20
