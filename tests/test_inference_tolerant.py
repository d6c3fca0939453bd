"""A damaged block in the middle of a scene: an error, or, where that was asked for, nodata and nothing else."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import apart
from rasterio.transform import Affine
from torch import Tensor

from vfmseg.data.given import open_scene
from vfmseg.data.raster_scene import RasterScene
from vfmseg.errors import DamagedError, DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.mosaic import mosaic
from vfmseg.geo.validity import Chip
from vfmseg.inference.contracts import Model, Report, Tiles
from vfmseg.inference.engine import label_run
from vfmseg.inference.job import Arrays
from vfmseg.inference.plan import Plan
from vfmseg.inference.products import Products
from vfmseg.inference.reading import SceneSource, stored_as
from vfmseg.inference.tolerant import Tolerant, Unreadable

HEIGHT, WIDTH, BLOCK = 500, 700, 64
HURT = Window(192, 256, 64, 64)


def write(path: Path, array: np.ndarray, size: float = 1.0, **profile: Any) -> Path:
    options = {"driver": "GTiff", "compress": "deflate", "crs": "EPSG:32633"} | profile
    with rasterio.open(
        path, "w", count=len(array), height=array.shape[1], width=array.shape[2], dtype=array.dtype,
        transform=Affine(size, 0, 500000, 0, -size, 5000000), **options,
    ) as target:  # fmt: skip
        target.write(array)
    return path


def garble(path: Path, row: int, col: int, band: int = 1) -> None:
    """Overwrite one block of a GeoTIFF with what no inflater accepts."""
    with rasterio.open(path) as source:
        offset, size = (
            int(source.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=band)) for what in ("OFFSET", "SIZE")
        )
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"\xff" * size
    path.write_bytes(content)


def noise(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (count, HEIGHT, WIDTH), dtype=np.uint8)


TILED = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A scene, and its copy with a damaged block."""
    folder = tmp_path_factory.mktemp("scenes")
    whole = write(folder / "whole.tif", noise(), **TILED)
    hurt = write(folder / "hurt.tif", noise(), **TILED)
    garble(hurt, HURT.row // BLOCK, HURT.col // BLOCK)
    return str(whole), str(hurt)


def pointwise(tiles: Tiles) -> Tensor:
    images, _ = apart(tiles)
    values = images["x"][:, 0] / 255
    return torch.stack([-((values - k / 2) ** 2) for k in range(3)], dim=1).softmax(dim=1)


def opened(path: str) -> RasterScene:
    return open_scene({"x": path}, {"x": Bands()})


def label(path: str, unreadable: Unreadable | None, blend: str = "hann", readers: int = 2) -> tuple[np.ndarray, Report]:
    scenes = [opened(path) for _ in range(readers)]
    stored = stored_as(scenes[0])
    sources: list[SceneSource] = list(scenes)
    if unreadable is not None:
        sources = [Tolerant(scene, scene.bands(), stored.block, unreadable) for scene in scenes]
    plan, sink, report = Plan(HEIGHT, WIDTH, 96, 0.25, blend != "none", 4), Arrays(HEIGHT, WIDTH), Report()
    for run in plan.runs(plan.shards):
        report.add(label_run(sources, stored, plan, run, Model(pointwise, 3), blend, Products((1, 2, 3)), sink))
    return sink.kept["labels"][0], report


@pytest.mark.parametrize("blend", ["hann", "none"])
@pytest.mark.pitfall("P62")
def test_only_the_damaged_block_is_nodata_and_all_else_is_as_before(files: tuple[str, str], blend: str) -> None:
    whole, hurt = files
    unreadable = Unreadable()
    expected, _ = label(whole, None, blend)
    labels, report = label(hurt, unreadable, blend)
    expected[HURT.rows, HURT.cols] = 255
    np.testing.assert_array_equal(labels, expected)
    assert unreadable.pixels == 64 * 64
    (message,) = unreadable.messages
    assert re.search(r"hurt\.tif: rows 192 to 255, columns 256 to 319 cannot be read", message)
    assert report.pixels == HEIGHT * WIDTH


@pytest.mark.pitfall("P62")
def test_a_tile_that_a_vrt_misses_is_nodata_never_a_class(tmp_path: Path) -> None:
    left, right = Window(0, 0, HEIGHT, 350), Window(0, 350, HEIGHT, 350)
    pieces = [(f"{window.col}.tif", window) for window in (left, right)]
    for name, window in pieces:
        write(tmp_path / name, noise()[:, window.rows, window.cols], **TILED)
    shown = mosaic(Grid(None, IDENTITY, HEIGHT, WIDTH), Layer("uint8", 0, ("a", "b")), pieces)
    vrt = tmp_path / "v.vrt"
    vrt.write_text(re.sub("<NoDataValue>0</NoDataValue>", "", shown))
    expected, _ = label(str(vrt), None)
    (tmp_path / "350.tif").unlink()
    with pytest.raises(DataError, match=r"v\.vrt: rows .* cannot be read"):
        label(str(vrt), None)
    unreadable = Unreadable()
    labels, _ = label(str(vrt), unreadable)
    lost = {column for block in unreadable.blocks for column in range(block.col, block.col + block.width)}
    assert lost >= set(range(350, WIDTH))
    kept = [column for column in range(WIDTH) if column not in lost]
    assert len(kept) > 200
    np.testing.assert_array_equal(labels[:, kept], expected[:, kept])
    assert (labels[:, sorted(lost)] == 255).all()


@pytest.mark.pitfall("P62")
def test_without_leave_the_error_names_file_and_window(files: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"hurt\.tif: rows \d+ to \d+, columns \d+ to \d+ cannot be read") as caught:
        label(files[1], None)
    rows, cols = re.findall(r"(\d+) to (\d+)", str(caught.value))
    assert int(rows[0]) <= HURT.row <= int(rows[1])
    assert int(cols[0]) <= HURT.col <= int(cols[1])


def test_a_whole_scene_loses_nothing_by_leave(files: tuple[str, str]) -> None:
    unreadable = Unreadable()
    np.testing.assert_array_equal(label(files[0], unreadable)[0], label(files[0], None)[0])
    assert (unreadable.messages, unreadable.pixels) == ([], 0)


@pytest.mark.parametrize(
    "window",
    [Window(0, 0, HEIGHT, WIDTH), Window(200, 300, 5, 7), Window(150, 250, 100, 10), Window(-20, -30, 300, 400),
     Window(250, 310, 300, 500), Window(400, 0, 90, 700)],
    ids=str,
)  # fmt: skip
@pytest.mark.pitfall("P34")
def test_windows_of_any_position_are_put_together_right(files: tuple[str, str], window: Window) -> None:
    whole = opened(files[0]).read(window)["x"]
    scene = opened(files[1])
    tolerant = Tolerant(scene, scene.bands(), stored_as(scene).block, Unreadable())
    chip = tolerant.read(window)["x"]
    rows, cols = np.arange(window.row, window.row + window.height), np.arange(window.col, window.col + window.width)
    hit = ((rows >= 192) & (rows < 256))[:, None] & ((cols >= 256) & (cols < 320))
    np.testing.assert_array_equal(chip.valid, whole.valid & ~hit)
    np.testing.assert_array_equal(chip.pixels, np.where(hit, 0, whole.pixels))
    assert tolerant.grid == scene.grid


@pytest.mark.parametrize("layout", ["bands apart", "strips"])
def test_other_layouts_lose_one_block_too(tmp_path: Path, layout: str) -> None:
    profile: dict[str, Any] = {**TILED, "interleave": "band"} if layout == "bands apart" else {"blockysize": 8}
    path = write(tmp_path / "a.tif", noise(), **profile)
    garble(path, 3, 4 if layout == "bands apart" else 0, band=2 if layout == "bands apart" else 1)
    unreadable = Unreadable()
    labels, _ = label(str(path), unreadable)
    missing = np.zeros(labels.shape, bool)
    if layout == "bands apart":
        missing[192:256, 256:320] = True
    else:
        missing[24:32] = True
    np.testing.assert_array_equal(labels == 255, missing)
    assert unreadable.pixels == missing.sum()


def test_damage_in_a_modality_on_another_grid_hides_the_ground_below_it(tmp_path: Path) -> None:
    image = write(tmp_path / "image.tif", noise(), **TILED)
    heights = np.random.default_rng(1).uniform(0, 9, (1, HEIGHT // 2, WIDTH // 2)).astype(np.float32)
    dsm = write(tmp_path / "dsm.tif", heights, 2.0, **TILED)
    garble(dsm, 1, 2)  # rows 64 to 127, columns 128 to 191: twice that on the image's grid
    scene = open_scene({"x": str(image), "dsm": str(dsm)}, {"x": Bands(), "dsm": Bands()})
    unreadable = Unreadable()
    chips = Tolerant(scene, scene.bands(), stored_as(scene).block, unreadable).read(Window(0, 0, HEIGHT, WIDTH))
    assert not chips["dsm"].valid[128:256, 256:384].any()
    assert chips["dsm"].valid.mean() > 0.8
    assert all("dsm.tif: rows" in message for message in unreadable.messages)
    # pixels beside the damage are interpolated across its edge, so the blocks that hold them are given up as well
    assert chips["dsm"].valid[:64].all()
    assert chips["dsm"].valid[:, :192].all()


@pytest.mark.pitfall("P32")
def test_what_threads_give_up_is_counted_whole_and_once() -> None:
    unreadable = Unreadable()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: unreadable.add(DamagedError(str(i)), Window(i % 1000, 0, 2, 3)), range(2000)))
    assert (len(unreadable.messages), unreadable.pixels) == (1000, 6000)


@pytest.mark.parametrize("window", [Window(0, 0, 100, 64), Window(100, 10, 28, 40), Window(70, 0, 60, 64)])
@pytest.mark.pitfall("P62")
def test_what_is_lost_does_not_depend_on_the_window(window: Window) -> None:
    """A second modality is damaged in a part of a block of the first: the whole block goes, whoever asks for what."""

    class Hurt:
        grid = Grid(None, IDENTITY, 200, 64)

        def read(self, window: Window) -> dict[str, Chip]:
            if window.row < 120 and window.row + window.height > 110:
                raise DamagedError(f"{window} cannot be read")
            return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}

    lost = Unreadable()
    rows = np.arange(window.row, window.row + window.height)
    found = Tolerant(Hurt(), {"x": 1}, (64, 64), lost).read(window)["x"]
    np.testing.assert_array_equal(found.valid, np.repeat((rows // 64 != 1)[:, None], window.width, axis=1))
    np.testing.assert_array_equal(found.pixels[0], found.valid)
    assert list(lost.blocks) == [Window(64, 0, 64, 64)]
