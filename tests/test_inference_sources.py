"""Where scenes come from: modalities on other grids, and files that are far away, inside archives or in many pieces."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import rasterio
import torch
from makers import DATA, an_input, apart, area_of
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform
from torch import Tensor

from vfmseg.data.given import open_scene, open_scenes
from vfmseg.data.raster_scene import RasterScene
from vfmseg.errors import DamagedError, DataError
from vfmseg.geo import warp as warp_module
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.mosaic import mosaic, read_map
from vfmseg.geo.rasterfile import _damage
from vfmseg.geo.reader import Raster
from vfmseg.geo.validity import Chip
from vfmseg.geo.writer import MapWriter
from vfmseg.inference.contracts import Area, Model, Tiles
from vfmseg.inference.engine import label_run
from vfmseg.inference.job import Arrays
from vfmseg.inference.plan import Plan
from vfmseg.inference.products import Products
from vfmseg.inference.reading import Stored, stored_as

OPTICAL = Grid("EPSG:32633", (0.1, 0.0, 500010.0, 0.0, -0.1, 4999990.0), 150, 210)
"""21 x 15 m at 0.1 m."""


def write(path: Path, array: np.ndarray, grid: Grid | None, mask: np.ndarray | None = None, **profile: Any) -> Path:
    """Write (C, H, W) as a GeoTIFF on a grid (of which only CRS and transform count)."""
    place = {} if grid is None else {"crs": grid.crs, "transform": Affine(*grid.transform)}
    count, height, width = array.shape
    shape = {"count": count, "height": height, "width": width, "dtype": array.dtype}
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **shape, **place, **profile) as target:
            target.write(array)
            if mask is not None:
                target.write_mask(mask)
    return path


def optical(folder: Path, grid: Grid = OPTICAL) -> Path:
    rows = np.random.default_rng(0).integers(1, 255, (3, grid.height, grid.width), dtype=np.uint8)
    return write(folder / "optical.tif", rows, grid)


def pair(folder: Path, dsm: Path, grid: Grid = OPTICAL, bands: Bands | None = None) -> RasterScene:
    return open_scene({"rgb": str(optical(folder, grid)), "dsm": str(dsm)}, {"rgb": Bands(), "dsm": bands or Bands()})


def dsm_of(scene: RasterScene) -> Chip:
    chip = scene.read(Window(0, 0, scene.grid.height, scene.grid.width))["dsm"]
    assert chip.pixels.shape[1:] == chip.valid.shape == (scene.grid.height, scene.grid.width)
    assert not chip.pixels[:, ~chip.valid].any()
    assert np.isfinite(chip.pixels).all()
    return chip


def places(grid: Grid, crs: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y (h, w) of all pixel centres, in another reference system."""
    rows, cols = np.mgrid[: grid.height, : grid.width] + 0.5
    xs, ys = Affine(*grid.transform) @ (cols.ravel(), rows.ravel())
    if crs != grid.crs:
        xs, ys = map(np.asarray, transform(grid.crs, crs, xs, ys))
    return np.reshape(xs, rows.shape), np.reshape(ys, rows.shape)


def around(grid: Grid, crs: str, size: float, margin: int = 4) -> Grid:
    """A grid of square pixels of this size in another reference system that holds `grid`, on no common corner."""
    xs, ys = places(grid, crs)
    left, top = xs.min() - (margin + 0.37) * size, ys.max() + (margin + 0.21) * size
    width, height = (int(np.ptp(v) / size) + 2 * margin + 2 for v in (xs, ys))
    return Grid(crs, (size, 0.0, float(left), 0.0, -size, float(top)), height, width)


# --- the same ground ----------------------------------------------------------------------------------------

TURNED = Grid("EPSG:32633", (0.08, 0.06, 500010.0, 0.06, -0.08, 4999990.0), 150, 210)
DSM = around(OPTICAL, "EPSG:32633", 0.5)
A, _, C, _, E, F = DSM.transform
WIDE = Grid("EPSG:32633", (2000.0, 0.0, 300000.0, 0.0, -2000.0, 5500000.0), 150, 210)
OTHERS = {
    "coarser": (OPTICAL, DSM),
    "neighbour zone": (OPTICAL, around(OPTICAL, "EPSG:32632", 0.5)),
    "degrees": (OPTICAL, around(OPTICAL, "EPSG:4326", 5e-6)),
    "web map": (OPTICAL, around(OPTICAL, "EPSG:3857", 0.5)),
    "optical turned": (TURNED, around(TURNED, "EPSG:32633", 0.5)),
    "both turned": (TURNED, Grid("EPSG:32633", (0.3, -0.4, 500033.0, -0.4, -0.3, 5000060.3), 200, 200)),
    "south up": (OPTICAL, Grid("EPSG:32633", (A, 0.0, C, 0.0, -E, F + E * DSM.height), DSM.height, DSM.width)),
    "a little finer": (OPTICAL, around(OPTICAL, "EPSG:32633", 0.08)),
    "much finer": (OPTICAL, around(OPTICAL, "EPSG:32633", 0.023)),
    "a whole country": (WIDE, around(WIDE, "EPSG:4326", 0.05)),
    "finer in another zone": (OPTICAL, around(OPTICAL, "EPSG:32632", 0.031)),
}


def slope(grid: Grid, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """A plane: it rises by 2 along a pixel in x, by 3 in y."""
    a, _, c, _, _, f = grid.transform
    size = max(abs(a), abs(grid.transform[1]))
    plane: np.ndarray = (2 * (xs - c) + 3 * (ys - f)) / size
    return plane


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.pitfall("P34")
def test_a_plane_lies_where_it_lay_to_a_fiftieth_of_a_pixel(tmp_path: Path, name: str) -> None:
    """A shift by half a pixel of either grid would be off by 0.2 or more."""
    grid, other = OTHERS[name]
    plane = slope(other, *places(other, other.crs))[None].astype(np.float32)
    chip = dsm_of(pair(tmp_path, write(tmp_path / "dsm.tif", plane, other), grid))
    xs, ys = places(grid, other.crs)
    assert chip.valid.all()
    np.testing.assert_allclose(chip.pixels[0], slope(other, xs, ys), atol=0.02 * 5)


@pytest.mark.pitfall("P34")
def test_interpolation_agrees_with_gdal(tmp_path: Path) -> None:
    other = OTHERS["neighbour zone"][1]
    rough = np.random.default_rng(1).uniform(0, 100, (2, other.height, other.width)).astype(np.float32)
    path = write(tmp_path / "dsm.tif", rough, other)
    chip = dsm_of(pair(tmp_path, path))
    with rasterio.open(path) as source, WarpedVRT(
        source, crs=OPTICAL.crs, transform=Affine(*OPTICAL.transform), width=OPTICAL.width, height=OPTICAL.height,
        resampling=rasterio.enums.Resampling.bilinear, tolerance=1e-6,
    ) as warped:  # fmt: skip
        np.testing.assert_allclose(chip.pixels, warped.read(), atol=1.5)  # of 100, in 0.01 pixel
        assert np.abs(chip.pixels - warped.read()).mean() < 0.1


def test_finer_modality_is_the_mean_of_its_pixels(tmp_path: Path) -> None:
    fine = Grid("EPSG:32633", (0.02, 0.0, 500010.0, 0.0, -0.02, 4999990.0), 750, 1050)
    rough = np.random.default_rng(1).integers(0, 200, (2, 750, 1050)).astype(np.uint16)
    rough[0, :5, :2] = 65535  # 10 of 25 are missing in the first pixel, 15 in the second
    rough[0, :5, 5:8] = 65535
    chip = dsm_of(pair(tmp_path, write(tmp_path / "fine.tif", rough, fine, nodata=65535)))
    means = rough.reshape(2, 150, 5, 210, 5).mean(axis=(2, 4))
    means[:, 0, 0] = rough[:, :5, 2:5].mean(axis=(1, 2))
    means[:, 0, 1] = 0
    np.testing.assert_allclose(chip.pixels, means, rtol=1e-5)
    assert np.argwhere(~chip.valid).tolist() == [[0, 1]]


def test_whole_metres_do_not_become_steps(tmp_path: Path) -> None:
    """A DSM of int16 between whose pixels we interpolate holds fractions, and the engine keeps them."""
    rising = np.broadcast_to(np.arange(DSM.width, dtype=np.int16), (1, DSM.height, DSM.width))
    scene = pair(tmp_path, write(tmp_path / "dsm.tif", rising, DSM))
    assert len(np.unique(np.diff(dsm_of(scene).pixels[0, 0]).round(4))) == 1
    assert stored_as(scene).types == {"rgb": np.dtype("uint8"), "dsm": np.dtype("float32")}


@pytest.mark.pitfall("P34")
def test_ground_that_is_not_covered_is_invalid(tmp_path: Path) -> None:
    """Valid is exactly where the centre of a pixel lies inside the other file."""
    small = Grid("EPSG:32633", (0.5, 0.0, 500015.02, 0.0, -0.5, 4999985.03), 8, 12)
    chip = dsm_of(pair(tmp_path, write(tmp_path / "dsm.tif", np.full((1, 8, 12), 7, np.float32), small)))
    xs, ys = places(OPTICAL, "EPSG:32633")
    inside = (xs >= 500015.02) & (xs < 500021.02) & (ys <= 4999985.03) & (ys > 4999981.03)
    np.testing.assert_array_equal(chip.valid, inside)
    assert (chip.pixels[0][inside] == 7).all()


@pytest.mark.pitfall("P34")
def test_the_date_line_tears_no_hole_into_the_values(tmp_path: Path) -> None:
    """A pixel at 180 degrees is never made of pixels between the two ends of the world."""
    grid = Grid("EPSG:32601", (500.0, 0.0, 230000.0, 0.0, -500.0, 5000000.0), 200, 300)
    lons, _ = places(grid, "EPSG:4326")
    assert lons.min() < -170
    assert lons.max() > 170
    world = Grid("EPSG:4326", (0.5, 0.0, -180.0, 0.0, -0.5, 90.0), 360, 720)
    xs, _ = places(world, "EPSG:4326")
    chip = dsm_of(pair(tmp_path, write(tmp_path / "world.tif", np.abs(xs)[None].astype(np.float32), world), grid))
    assert chip.valid.mean() > 0.4
    np.testing.assert_allclose(chip.pixels[0][chip.valid], np.abs(lons)[chip.valid], atol=0.3)


# --- what is not there --------------------------------------------------------------------------------------


def holed(kind: str, folder: Path) -> tuple[Path, Bands]:
    """Two bands of 100 to 200 with holes in row 10, column 12 and row 15, column 20, which hold -9999 or worse."""
    values = np.random.default_rng(0).uniform(100, 200, (2, DSM.height, DSM.width)).astype(np.float32)
    mask = np.full(values.shape[1:], 255, np.uint8)
    mask[10, 12] = mask[15, 20] = 0
    values[:, mask == 0] = -9999
    path = folder / "dsm.tif"
    if kind == "file":
        return write(path, values, DSM, nodata=-9999), Bands()
    if kind == "recipe":
        return write(path, values, DSM), Bands(nodata=-9999)
    if kind == "file and recipe":
        values[:, 15, 20] = -1
        return write(path, values, DSM, nodata=-9999), Bands(nodata=-1)
    if kind == "one band":
        values[0, 10, 12] = values[1, 15, 20] = 150
        return write(path, values, DSM, nodata=-9999), Bands()
    if kind == "frame of zeros":
        values[:, mask == 0] = 0
        values[0, 5, 5] = 0.0  # one dark band is a measurement
        return write(path, values, DSM, nodata=0), Bands()
    if kind == "NaN":
        values[0, 10, 12], values[1, 15, 20] = np.nan, np.inf
        return write(path, values, DSM), Bands()
    if kind == "NaN and file":
        values[0, 10, 12] = np.nan
        return write(path, values, DSM, nodata=-9999), Bands()
    if kind == "mask":
        return write(path, values, DSM, mask), Bands()
    assert kind == "alpha"
    image = np.concatenate([values.clip(0, 255), values[:1].clip(0, 255), mask[None]]).astype(np.uint8)
    return write(path, image, DSM), Bands((1, 2))


@pytest.mark.parametrize(
    "kind", ["file", "recipe", "file and recipe", "one band", "frame of zeros", "NaN", "NaN and file", "mask", "alpha"]
)
@pytest.mark.pitfall("P26")
def test_holes_stay_holes_and_are_mixed_into_nothing(tmp_path: Path, kind: str) -> None:
    path, bands = holed(kind, tmp_path)
    chip = dsm_of(pair(tmp_path, path, bands=bands))
    xs, ys = places(OPTICAL, "EPSG:32633")
    a, _, c, _, e, f = DSM.transform
    rows, cols = np.floor((ys - f) / e), np.floor((xs - c) / a)
    hole = ((rows == 10) & (cols == 12)) | ((rows == 15) & (cols == 20))
    assert 40 <= hole.sum() <= 60  # both holes lie in the scene
    np.testing.assert_array_equal(~chip.valid, hole)
    dark = np.abs(rows - 5.5) + np.abs(cols - 5.5) < (4 if kind == "frame of zeros" else 0)
    values = chip.pixels[:, chip.valid & ~dark]
    assert values.min() >= 99
    assert values.max() <= 200


@pytest.mark.pitfall("P26")
def test_a_fourth_band_asked_for_by_number_is_no_alpha_on_another_grid(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(100, 200, (4, DSM.height, DSM.width), dtype=np.uint8)
    image[3, 10, 12] = 0
    path = write(tmp_path / "rgbn.tif", image, DSM)
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    chip = dsm_of(pair(tmp_path, path, bands=Bands((4, 1))))
    assert chip.valid.all()
    assert chip.pixels[0].min() < 100


# --- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("pixels", [None, 300], ids=["at once", "in little pieces"])
@pytest.mark.pitfall("P34")
def test_windows_are_cut_out_of_the_whole_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pixels: int | None
) -> None:
    grid, other = OTHERS[name]
    rng = np.random.default_rng(3)
    rough = rng.uniform(0, 100, (1, other.height, other.width)).astype(np.float32)
    rough[0, rng.uniform(size=rough.shape[1:]) < 0.02] = np.nan
    scene = pair(tmp_path, write(tmp_path / "dsm.tif", rough, other), grid)
    whole = dsm_of(scene)
    if pixels is not None:
        monkeypatch.setattr(warp_module, "PIXELS", pixels)
    for number in range(12 if pixels is None else 4):
        height, width = (1, 1) if number % 3 == 0 else rng.integers(1, 70, 2).tolist()
        row, col = rng.integers(0, grid.height - height + 1), rng.integers(0, grid.width - width + 1)
        window = Window(int(row), int(col), height, width)
        chip = scene.read(window)["dsm"]
        assert chip.pixels.tobytes() == whole.pixels[:, window.rows, window.cols].tobytes(), window
        np.testing.assert_array_equal(chip.valid, whole.valid[window.rows, window.cols])


@pytest.mark.pitfall("P34")
def test_beyond_the_scene_nothing_is_valid_though_the_other_file_reaches_further(tmp_path: Path) -> None:
    scene = pair(tmp_path, write(tmp_path / "dsm.tif", np.ones((1, DSM.height, DSM.width), np.float32), DSM))
    chip = scene.read(Window(-3, 200, 20, 20))["dsm"]
    assert chip.valid[3:, :10].all()
    assert chip.valid.sum() == 170


def test_only_the_part_below_a_window_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Window] = []
    honest = Raster._read_inside

    def spy(raster: Raster, window: Window, *kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        seen.append(window)
        return honest(raster, window, *kind)

    scene = pair(tmp_path, write(tmp_path / "dsm.tif", np.ones((1, DSM.height, DSM.width), np.float32), DSM))
    monkeypatch.setattr(Raster, "_read_inside", spy)
    scene.read(Window(100, 100, 10, 20))
    assert [w.height <= 4 and w.width <= 6 for w in seen[1:]] == [True]
    seen.clear()
    monkeypatch.setattr(warp_module, "PIXELS", 20)
    scene.read(Window(0, 0, 150, 210))
    assert max(w.height * w.width for w in seen[1:]) <= 80  # memory does not grow with the window


@pytest.mark.pitfall("P32")
def test_a_pickled_raster_reads_the_same_on_another_grid(tmp_path: Path) -> None:
    rough = np.random.default_rng(3).uniform(0, 100, (1, DSM.height, DSM.width)).astype(np.float32)
    raster = Raster(write(tmp_path / "dsm.tif", rough, DSM), None, OPTICAL)
    window = Window(20, 30, 40, 50)
    fresh = pickle.loads(pickle.dumps(raster)).read(window)
    used = raster.read(window)
    again = pickle.loads(pickle.dumps(raster)).read(window)
    assert fresh.pixels.tobytes() == used.pixels.tobytes() == again.pixels.tobytes()
    assert raster.grid == OPTICAL


# --- what cannot be laid on each other ----------------------------------------------------------------------

FAR = Grid("EPSG:32633", (0.5, 0.0, 600000.0, 0.0, -0.5, 4999990.0), 20, 30)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ((OPTICAL, FAR), r"dsm\.tif: covers nothing of the scene's first modality \(EPSG:32633, x 500010 to 500031"),
        ((OPTICAL, around(FAR, "EPSG:4326", 5e-6)), r"dsm\.tif: covers nothing of the scene's first modality"),
        ((OPTICAL, None), r"dsm\.tif: is 20 x 30 px, .* 150 x 210 px, and it has no CRS and transform; .*georeference"),
        ((None, DSM), r"dsm\.tif: .* the scene's first modality has no CRS and transform"),
    ],
    ids=["elsewhere", "elsewhere in degrees", "no place", "first without place"],
)
@pytest.mark.pitfall("P34")
def test_what_cannot_be_laid_on_each_other_is_one_clear_error(
    tmp_path: Path, grids: tuple[Grid | None, Grid | None], message: str
) -> None:
    first = write(tmp_path / "rgb.tif", np.ones((3, 150, 210), np.uint8), grids[0])
    dsm = write(tmp_path / "dsm.tif", np.ones((1, 20, 30), np.float32), grids[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=message):
            open_scene({"rgb": str(first), "dsm": str(dsm)}, {"rgb": Bands(), "dsm": Bands()})


@pytest.mark.pitfall("P34")
def test_arrays_of_two_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="array for 'dsm' has 4 x 6 px, that for 'rgb' 5 x 6; expected one size"):
        open_scene({"rgb": np.ones((3, 5, 6)), "dsm": np.ones((1, 4, 6))}, {"rgb": Bands(), "dsm": Bands()})


def test_files_of_one_size_without_a_place_are_stacked_pixel_by_pixel(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(0, 9, (1, 150, 210)).astype(np.float32)
    chip = dsm_of(pair(tmp_path, write(tmp_path / "dsm.tif", values, None)))
    np.testing.assert_array_equal(chip.pixels, values)


# --- real files ---------------------------------------------------------------------------------------------

FORMATS = DATA / "formats"


@pytest.mark.skipif(not (FORMATS / "dem_other_grid").is_dir(), reason="the real data sets are not beside the project")
def test_real_elevation_model_in_another_reference_system_lies_below_its_image() -> None:
    """Landsat in SIRGAS 2000 zone 25S, elevation in another system: water, dark in the infrared, is low and flat."""
    files = {"image": FORMATS / "dem_other_grid" / "optical_l7.tif", "dem": FORMATS / "dem_other_grid" / "dem.tif"}
    scene = open_scene(files, {"image": Bands((4,)), "dem": Bands()})
    chips = scene.read(Window(0, 0, scene.grid.height, scene.grid.width))
    both = chips["image"].valid & chips["dem"].valid
    assert both.mean() > 0.9
    water = both & (chips["image"].pixels[0] < 20)
    assert water.mean() > 0.05
    heights = chips["dem"].pixels[0]
    assert np.median(heights[water]) < 3
    assert np.median(heights[both & ~water]) > 10
    with rasterio.open(files["dem"]) as source, WarpedVRT(
        source, crs=scene.grid.crs, transform=Affine(*scene.grid.transform), width=scene.grid.width,
        height=scene.grid.height, resampling=rasterio.enums.Resampling.bilinear,
    ) as warped:  # fmt: skip
        off = np.abs(warped.read(1) - heights)[both]
    assert np.quantile(off, 0.99) < 1


@pytest.mark.skipif(not (FORMATS / "pan_ms_pair").is_dir(), reason="the real data sets are not beside the project")
def test_real_multispectral_image_follows_its_panchromatic_one() -> None:
    files = {"pan": FORMATS / "pan_ms_pair" / "pan.tif", "ms": FORMATS / "pan_ms_pair" / "ms.tif"}
    scene = open_scene(files, {"pan": Bands(), "ms": Bands()})
    chips = scene.read(Window(0, 0, scene.grid.height, scene.grid.width))
    both = chips["pan"].valid & chips["ms"].valid
    assert both.mean() > 0.9

    def likeness(down: int, across: int) -> float:
        pan = np.roll(chips["pan"].pixels[0], (down, across), (0, 1))[both]
        return float(np.corrcoef(pan, chips["ms"].pixels.mean(axis=0)[both])[0, 1])

    assert likeness(0, 0) > 0.7
    assert likeness(0, 0) >= max(likeness(8, 0), likeness(-8, 0), likeness(0, 8), likeness(0, -8))


# --- far away, in archives, in pieces -----------------------------------------------------------------------

SCENE = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 600, 4096)


def pointwise(tiles: Tiles) -> Tensor:
    """A model that looks at one pixel at a time: dark, middle or bright."""
    images, _ = apart(tiles)
    values = images["x"][:, 0] / 255
    return torch.stack([-((values - k / 2) ** 2) for k in range(3)], dim=1).softmax(dim=1)


def labels_of(path: str, area: Area | None = None) -> np.ndarray:
    scene = open_scene({"x": path}, {"x": Bands()})
    sink = Arrays(scene.grid.height, scene.grid.width)
    plan = Plan(scene.grid.height, scene.grid.width, 128, 0.25, True, 4)
    for run in plan.runs(plan.shards):
        label_run(
            [scene, open_scene({"x": path}, {"x": Bands()})], stored_as(scene), plan, run, Model(pointwise, 3), "hann",
            Products((1, 2, 3)), sink, area=area,
        )  # fmt: skip
    return sink.kept["labels"][0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of noise (so that it does not compress) with a hole."""
    rows = np.random.default_rng(0).integers(1, 255, (1, SCENE.height, SCENE.width), dtype=np.uint8)
    rows[0, 50:90, 60:300] = 0
    path = tmp_path_factory.mktemp("plain") / "scene.tif"
    with MapWriter(path, SCENE, Layer("uint8", 0)) as target:
        target.write(0, rows)
    return path


@pytest.fixture(scope="module")
def expected(plain: Path) -> np.ndarray:
    labels = labels_of(str(plain))
    with rasterio.open(plain) as source:
        values = source.read(1)
    np.testing.assert_array_equal(labels, np.where(values == 0, 255, 1 + (values > 63).astype(int) + (values > 191)))
    return labels


def test_a_mosaic_of_many_tiles_is_labelled_as_the_plain_file(
    tmp_path: Path, plain: Path, expected: np.ndarray
) -> None:
    pieces = []
    for row in range(0, SCENE.height, 150):
        for col in range(0, SCENE.width, 500):
            window = Window(row, col, 150, min(500, SCENE.width - col))
            name = f"{row}_{col}.tif"
            with MapWriter(tmp_path / name, SCENE.crop(window), Layer("uint8", 0)) as target:
                target.write(0, read_map(plain, window))
            pieces.append((name, window))
    (tmp_path / "all.vrt").write_text(mosaic(SCENE, Layer("uint8", 0), pieces), encoding="utf-8")
    assert len(pieces) == 36
    np.testing.assert_array_equal(labels_of(str(tmp_path / "all.vrt")), expected)


def test_a_file_in_an_archive_is_labelled_as_the_plain_file(tmp_path: Path, plain: Path, expected: np.ndarray) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(plain, "inside/scene.tif")
    np.testing.assert_array_equal(labels_of(f"/vsizip/{tmp_path / 'a.zip'}/inside/scene.tif"), expected)


@pytest.fixture
def server(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server on this machine that has a fresh copy of the scene (GDAL remembers what it has fetched)."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    shutil.copy(plain, tmp_path / "scene.tif")
    words = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("https://host/a.tif", True),
        ("s3://bucket/a.tif", True),
        ("/vsicurl/https://host/a.tif", True),
        ("/vsizip//vsis3/bucket/a.zip/a.tif", True),
        ("/vsizip/a.zip/a.tif", False),
        ("/vsimem/a.tif", False),
        ("data/vsis3.tif", False),
    ],
)
@pytest.mark.pitfall("P62")
def test_what_a_server_did_not_send_is_not_called_damaged_alone(path: str, remote: bool) -> None:
    with pytest.raises(DamagedError) as caught, _damage(path, Window(0, 0, 1, 1)):
        raise rasterio.errors.RasterioIOError("nothing came")
    assert ("the server did not answer" in str(caught.value)) is remote


@pytest.mark.parametrize("retries", [None, "0"])
@pytest.mark.pitfall("P62")
def test_a_server_that_was_busy_is_asked_again(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, retries: str | None
) -> None:
    """Unless the user's own settings say otherwise."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    if retries is not None:
        monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", retries)
    shutil.copy(plain, tmp_path / "busy.tif")
    words = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(tmp_path), "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process, Raster(str(plain)) as local:
        try:
            assert process.stdout is not None
            address = f"/vsicurl/http://127.0.0.1:{int(process.stdout.readline())}/busy.tif"
            with Raster(address) as raster:
                if retries is None:
                    part = Window(10, 20, 30, 40)
                    np.testing.assert_array_equal(raster.read(part).pixels, local.read(part).pixels)
                else:
                    with pytest.raises(DataError, match=r"busy\.tif: cannot be opened"):
                        _ = raster.grid
        finally:
            process.kill()


def test_a_file_behind_a_server_is_labelled_as_the_plain_file(server: str, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(labels_of(f"/vsicurl/{server}/scene.tif"), expected)


@pytest.mark.pitfall("P33")
def test_of_a_file_behind_a_server_only_the_area_is_fetched(server: str, plain: Path, expected: np.ndarray) -> None:
    mask = np.zeros(expected.shape, bool)
    mask[10:70, 20:100] = True
    area = area_of(mask)
    labels = labels_of(f"/vsicurl/{server}/scene.tif", area)
    np.testing.assert_array_equal(labels, np.where(mask, expected, 255))
    size = plain.stat().st_size
    assert size > 2e6
    with urlopen(f"{server}/served") as answer:
        served = int(answer.read())
    assert 0 < served < size / 4


@pytest.mark.pitfall("P33")
def test_tiles_that_meet_the_area_see_all_their_pixels_also_those_that_lie_far_outside_of_it() -> None:
    """The area is one pixel wide and lies beside the edges of what is read at a time."""

    def above_the_mean(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        higher = (images["x"] - images["x"].mean(dim=(2, 3), keepdim=True)).sigmoid()
        return torch.cat([higher, 1 - higher], dim=1)

    rows, cols = np.mgrid[:200, :2200]
    scene = open_scene({"x": ((rows * 7 + cols) % 91 + 1.0)[None]}, {"x": Bands()})
    mask = np.zeros((200, 2200), bool)
    mask[64:128:63, 1000:1100] = mask[100, 1024] = True
    plan, answers = Plan(200, 2200, 64, 0.5, True, 4), []
    for area in (None, area_of(mask)):
        sink = Arrays(200, 2200)
        for run in plan.runs(plan.shards):
            label_run(
                [scene], Stored((64, 64)), plan, run, Model(above_the_mean, 2), "hann",
                Products((1, 2), ("confidence",)), sink, area=area,
            )  # fmt: skip
        answers.append(sink.kept["confidence"][0])
    np.testing.assert_array_equal(answers[1], np.where(mask, answers[0], 255))


@pytest.mark.pitfall("P62")
def test_a_file_that_a_server_does_not_have_is_named(server: str) -> None:
    with pytest.raises(DataError, match=r"none\.tif: cannot be opened \(.*404"):
        labels_of(f"/vsicurl/{server}/none.tif")


@pytest.mark.pitfall("P62")
def test_ground_control_points_are_not_used_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfmseg.terminal._said", set())
    points = [GroundControlPoint(row, col, 10 + col / 8, 50 - row / 8) for row in (0, 8) for col in (0, 8)]
    path = tmp_path / "raw.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=8, width=8, dtype="uint8", gcps=points, crs="EPSG:4326"
    ) as target:
        target.write(np.ones((1, 8, 8), dtype=np.uint8))
    open_scenes(str(path), (an_input("image", 1),), 1)
    said = capsys.readouterr().err
    assert said.count("no CRS") == 1
    assert "4 ground control points" in said
