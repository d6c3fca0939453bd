"""Scenes that stay decoded in memory: which, how many, and that their windows are those that the files give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from makers import write_raster

from vfmseg.data import raster_scene
from vfmseg.data.kept import Kept
from vfmseg.data.raster_scene import RasterScene
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Window
from vfmseg.geo.reader import Raster

WINDOWS = [
    Window(0, 0, 40, 50),
    Window(3, 7, 16, 16),
    Window(30, 40, 20, 20),
    Window(-5, -5, 12, 12),
    Window(60, 0, 4, 4),
]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """An empty store of 64 kB."""
    store = Kept(limit=2**16)
    monkeypatch.setattr(raster_scene, "KEPT", store)
    return store


def image(path: Path, seed: int = 0, dtype: str = "uint8", nodata: float | None = None) -> Path:
    """40 x 50 pixels, some of which hold 7; a strip is as wide as the image."""
    values = np.random.default_rng(seed).integers(7, 30, (1, 40, 50)).astype(dtype)
    return write_raster(path, values, nodata=nodata)


@pytest.mark.parametrize("bands", [Bands(), Bands(scale=0.1, offset=-3.0)])
@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 7), ("uint16", 7), ("float32", 7), ("uint8", None)])
def test_windows_from_memory_are_those_of_the_file(
    tmp_path: Path, kept: Kept, dtype: str, nodata: float | None, bands: Bands
) -> None:
    kept.limit = 2**20  # larger types are larger images
    path = image(tmp_path / "a.tif", dtype=dtype, nodata=nodata)
    plain, scene = (RasterScene("a", {"rgb": Raster(path, bands)}, keep=keep) for keep in (False, True))
    for window in WINDOWS:
        for _ in range(2):
            one, two = plain.read(window)["rgb"], scene.read(window)["rgb"]
            assert two.pixels.dtype == np.float32
            assert np.array_equal(one.pixels, two.pixels)
            assert np.array_equal(one.valid, two.valid)
            two.pixels[:] = 99  # what is done to a window is not done to the next
            two.valid[:] = False
    assert scene.hidden()["rgb"].pixels == 40 * 50  # read once
    assert plain.hidden()["rgb"].pixels > 40 * 50


def test_what_is_kept_has_a_bound_and_the_oldest_goes_first(tmp_path: Path, kept: Kept) -> None:
    """33 images of 2000 bytes, of which all are valid, in 64 kB; another of 34 pushes out the one not used longest."""
    scenes = [RasterScene(f"{i}", {"rgb": Raster(image(tmp_path / f"{i}.tif", i))}, keep=True) for i in range(34)]
    for number, scene in enumerate(scenes):
        scene.read(WINDOWS[1])
        assert kept.size <= kept.limit
        if number == 20:
            scenes[0].read(WINDOWS[2])
    for scene in (scenes[33], scenes[0], scenes[1]):
        scene.read(WINDOWS[1])
    read = [scenes[i].hidden()["rgb"].pixels // 2000 for i in (33, 0, 1)]
    assert read == [1, 1, 2]


def test_tiled_and_large_images_are_read_by_window(tmp_path: Path, kept: Kept) -> None:
    with rasterio.open(
        tmp_path / "tiled.tif", "w", driver="GTiff", count=1, height=40, width=50, dtype="uint8", tiled=True,
        blockxsize=16, blockysize=16, crs="EPSG:32633", transform=rasterio.transform.from_origin(0, 9, 1, 1),
    ) as target:  # fmt: skip
        target.write(np.ones((1, 40, 50), np.uint8))
    large = write_raster(tmp_path / "large.tif", np.ones((1, 90, 90), np.uint8))
    for path in (tmp_path / "tiled.tif", large):
        scene = RasterScene("a", {"rgb": Raster(path)}, keep=True)
        scene.read(Window(0, 0, 8, 8))
        assert scene.hidden()["rgb"].pixels == 64
    assert kept.size == 0


def test_bands_that_are_read_in_another_order_are_read_anew(tmp_path: Path, kept: Kept) -> None:
    """`follow` changes what a raster gives; what was kept of it is of no use any more."""
    path = image(tmp_path / "a.tif")
    scene = RasterScene("a", {"rgb": Raster(path)}, keep=True)
    scene.read(WINDOWS[1])
    scene.follow(scene.said())
    assert kept.size == 0
    scene.read(WINDOWS[1])
    assert scene.hidden()["rgb"].pixels == 2 * 2000
