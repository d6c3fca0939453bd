"""Bands computed from elevation as it is read: what they hold, and that no window, cut or hidden pixel changes them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import rasterio
from makers import write_raster
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform

from vfmseg.data.raster_scene import RasterScene
from vfmseg.geo.bands import Bands
from vfmseg.geo.derived import DERIVED, MOST, SIDE, Derivation
from vfmseg.geo.grid import Window
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.notes import notes_of
from vfmseg.geo.reader import Raster
from vfmseg.recipe.data import DerivedName

ALL = tuple(DERIVED)


def placed(path: Path, array: np.ndarray, crs: str | None, transform: Affine, nodata: float | None = None) -> Path:
    """Write (H, W) as a GeoTIFF with a CRS and a transform."""
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=array.shape[0], width=array.shape[1], dtype=array.dtype,
        crs=crs, transform=transform, nodata=nodata,
    ) as target:  # fmt: skip
        target.write(array, 1)
    return path


def derived(path: Any, *names: str, radius: float = 100.0, **said: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values (bands, H, W) and validity of a whole file."""
    with Raster(path, Bands(derive=names, local_radius=radius, **said)) as raster:
        assert (raster.count, raster.dtype, raster.compact) == (len(names), "float32", np.float32)
        chip = raster.read(Window(0, 0, raster.grid.height, raster.grid.width))
    assert chip.pixels.dtype == np.float32
    assert not chip.pixels[:, ~chip.valid].any()
    return chip.pixels, chip.valid


def plane(height: int = 20, width: int = 30, down: float = 3.0, across: float = 4.0) -> np.ndarray:
    """Rises by `down` from row to row and `across` from column to column: exact numbers in float32."""
    y, x = np.mgrid[:height, :width]
    return (100 + down * y + across * x).astype(np.float32)


def rough(height: int = 90, width: int = 110, hole: bool = True) -> np.ndarray:
    """Noise that no sum is exact of; a hole of -9999, a lonely pixel in it, and some single pixels of -9999."""
    random = np.random.default_rng(7)
    values = (random.normal(0, 30, (height, width)).cumsum(0) + random.normal(0, 1e-3, (height, width))).astype("f4")
    if hole:
        values[20:41, 30:61] = -9999
        values[30, 45] = 12.5
        values[random.random(values.shape) < 0.01] = -9999
    return values


def test_the_recipe_knows_each_of_them() -> None:
    assert get_args(DerivedName) == ("height", "slope", "height_above_local") == ALL


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("C16")
def test_a_plane_has_its_slope_everywhere_also_at_the_edges(tmp_path: Path) -> None:
    pixels, valid = derived(write_raster(tmp_path / "a.tif", plane(), pixel=10), "slope")
    assert valid.all()
    # a rise of 5 m (3 down, 4 across) in 10 m
    np.testing.assert_array_equal(pixels, np.full_like(pixels, np.degrees(np.arctan(0.5))))


@pytest.mark.pitfall("C16")
def test_a_cone_has_one_slope_and_a_hat(tmp_path: Path) -> None:
    y, x = np.mgrid[:101, :101] - 50.0
    cone = (500 - np.hypot(y, x) * 2).astype(np.float32)  # 2 m a pixel of 2 m: 45 degrees
    (slope, above), _ = derived(
        write_raster(tmp_path / "a.tif", cone, pixel=2), "slope", "height_above_local", radius=10
    )
    ring = np.hypot(y, x)
    far = (ring > 15) & (ring < 44)
    assert np.abs(slope[far] - 45).max() < 0.1
    assert slope[50, 50] == 0
    assert above[50, 50] == above.max() > 5
    assert np.abs(above[far]).max() < 1


def test_horn_s_weights(tmp_path: Path) -> None:
    """One higher pixel: 1 : 2 : 1 of the outer columns over 8 pixels."""
    spike = np.zeros((5, 5), dtype=np.float32)
    spike[2, 3] = 8
    slope = derived(write_raster(tmp_path / "a.tif", spike, pixel=1), "slope")[0][0]
    assert slope[2, 2] == np.float32(np.degrees(np.arctan(2)))  # 2 * 8 / 8
    assert slope[1, 2] == np.float32(np.degrees(np.arctan(np.sqrt(2))))  # 8 / 8 in x and in y


def test_height_above_local_is_the_difference_to_the_mean_of_a_square(tmp_path: Path) -> None:
    values = rough()
    path = write_raster(tmp_path / "a.tif", values, nodata=-9999, pixel=10)
    (height, above), valid = derived(path, "height", "height_above_local", radius=64)  # 6.4 px: 6 to each side
    np.testing.assert_array_equal(valid, values != -9999)
    np.testing.assert_array_equal(height, np.where(valid, values, 0))
    for row, col in ((0, 0), (25, 29), (30, 45), (50, 50), (89, 109)):
        part = slice(max(0, row - 6), row + 7), slice(max(0, col - 6), col + 7)
        if valid[row, col]:
            mean = values[part][valid[part]].astype(np.float64).mean()
            assert above[row, col] == pytest.approx(values[row, col] - mean, abs=1e-5)


@pytest.mark.pitfall("C16")
def test_a_scene_that_lies_1000_m_higher_is_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 4000, (40, 50)).astype(np.float32) / 8  # exact in float32, also 1000 m higher
    names = ("slope", "height_above_local")
    low = derived(write_raster(tmp_path / "a.tif", values), *names)[0]
    high = derived(write_raster(tmp_path / "b.tif", values + 1000), *names)[0]
    np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857", "EPSG:2264"])
def test_one_surface_in_other_coordinates(tmp_path: Path, crs: str) -> None:
    """The same waves in UTM, degrees, web Mercator (36.0 m on the map are 18 at 60 degrees north) and US feet."""
    lon, lat = (-80.0, 35.5) if crs == "EPSG:2264" else (15.0, 60.0)
    utm = "EPSG:32617" if crs == "EPSG:2264" else "EPSG:32633"
    (x,), (y,) = transform("EPSG:4326", crs, [lon], [lat])
    across, down = {"EPSG:4326": (0.00032, 0.00016), "EPSG:3857": (36.0, 36.0), "EPSG:2264": (60.0, 60.0)}.get(
        crs, (18.0, 18.0)
    )
    place = Affine(across, 0, x, 0, -down, y)
    cols, rows = np.meshgrid(np.arange(80) + 0.5, np.arange(80) + 0.5)
    east, north = transform(crs, utm, *(part.ravel() for part in place @ (cols, rows)))
    east, north = (np.array(part).reshape(80, 80) for part in (east, north))
    waves = 40 * np.sin(east / 170) * np.cos(north / 210)
    rise = 40 * np.hypot(np.cos(east / 170) * np.cos(north / 210) / 170, np.sin(east / 170) * np.sin(north / 210) / 210)
    path = placed(tmp_path / "a.tif", waves.astype(np.float32), crs, place)
    (slope, above), valid = derived(path, "slope", "height_above_local", radius=180)
    assert valid.all()
    inner = (slice(12, -12), slice(12, -12))
    expected = np.degrees(np.arctan(rise))[inner]
    assert np.abs(slope[inner] - expected).max() < 0.01 * expected.max()
    # the mean of a wave over 21 x 21 pixels of 18 m is the wave, times sin(u) / u for each direction
    share = np.prod([np.sin(189 / length) / (189 / length) for length in (170, 210)])
    assert np.abs(above[inner] - waves[inner] * (1 - share)).max() < 0.02 * 40


def test_without_a_place_a_pixel_is_a_metre_and_that_is_told(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", plane(), crs=None)
    raster = Raster(path, Bands(derive=("slope",)))
    assert raster.read(Window(5, 5, 1, 1)).pixels.item() == np.float32(np.degrees(np.arctan(5)))
    assert "a pixel for 1 x 1 m" in notes_of(raster)["metres"]
    said = Raster(path, Bands(derive=("slope", "height_above_local"), pixel_size=50))
    assert said.read(Window(5, 5, 1, 1)).pixels[0].item() == np.float32(np.degrees(np.arctan(0.1)))
    assert said.derivation is not None
    assert (said.derivation.sides, notes_of(said)) == ((2, 2), {})
    placed_one = Raster(write_raster(tmp_path / "b.tif", plane()), Bands(derive=("slope",), pixel_size=50))
    assert placed_one.read(Window(5, 5, 1, 1)).pixels.item() == np.float32(np.degrees(np.arctan(0.5)))
    assert notes_of(placed_one) == {}


def test_elevation_without_a_place_lies_on_the_first_modality(tmp_path: Path) -> None:
    """A PNG, or an array, beside a GeoTIFF of 10 m: its pixels are 10 m as well."""
    rgb = write_raster(tmp_path / "rgb.tif", np.zeros((3, 20, 30), np.uint8))
    dem = write_raster(tmp_path / "dem.tif", plane(), crs=None)
    bands = Bands(derive=("slope",))
    for one in (Raster(dem, bands), ArrayRaster(plane()[None], bands, "dem")):
        with RasterScene("a", {"rgb": Raster(rgb), "dem": one}).rasters["dem"] as raster:
            assert raster.read(Window(0, 0, 1, 1)).pixels.item() == np.float32(np.degrees(np.arctan(0.5)))
            assert notes_of(raster) == {}


def test_a_radius_of_very_many_pixels_is_cut_and_told(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", rough(hole=False), pixel=0.09)
    raster = Raster(path, Bands(derive=("height_above_local",)))
    assert raster.derivation is not None
    assert raster.derivation.sides == (MOST, MOST)
    assert "over 1111 of them to each side, and takes 256" in notes_of(raster)["radius"]
    coarse = Derivation(("height_above_local",), 5.0, Raster(write_raster(tmp_path / "b.tif", plane())).grid)
    assert coarse.sides == (1, 1)


# --- validity -------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("P26")
def test_what_is_hidden_changes_nothing(tmp_path: Path) -> None:
    """Numbers under an invalid mask may be anything: nodata, NaN, infinity."""
    values = rough()
    hidden = values == -9999
    results = []
    for number, garbage in enumerate((-9999, np.nan, np.inf, 1e30)):
        filled = np.where(hidden, np.float32(garbage), values)
        path = placed(tmp_path / f"{number}.tif", filled, "EPSG:32633", from_origin(0, 0, 10, 10), nodata=garbage)
        results.append(derived(path, *ALL))
    for pixels, valid in results[1:]:
        np.testing.assert_array_equal(pixels, results[0][0])
        np.testing.assert_array_equal(valid, results[0][1])


@pytest.mark.pitfall("P26")
def test_nan_under_an_invalid_mask_reaches_no_neighbour(tmp_path: Path) -> None:
    grid = Raster(write_raster(tmp_path / "a.tif", plane())).grid
    valid = np.ones((20, 30), dtype=bool)
    valid[8:12, 3:9] = False

    def read(window: Window, asked: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.where(valid, plane(), np.nan)[None, window.rows, window.cols], valid[window.rows, window.cols]

    pixels, good, lost = Derivation(ALL, 40.0, grid).read(Window(0, 0, 20, 30), read)
    np.testing.assert_array_equal(good, valid)
    assert np.isfinite(pixels).all()
    assert not lost.any()


@pytest.mark.pitfall("P26")
def test_beside_a_hole_the_slope_of_a_plane_is_still_its_slope(tmp_path: Path) -> None:
    values = plane()
    values[5:9, 10:20] = -9999
    values[15, ::2] = -9999
    pixels, valid = derived(write_raster(tmp_path / "a.tif", values, nodata=-9999), "slope")
    np.testing.assert_array_equal(valid, values != -9999)
    assert set(np.unique(pixels[0][valid])) == {np.float32(np.degrees(np.arctan(0.5)))}


@pytest.mark.pitfall("P26", "F13")
def test_a_pixel_alone_has_a_height_but_no_slope_and_that_is_counted(tmp_path: Path) -> None:
    values = np.full((9, 9), -9999, dtype=np.float32)
    values[4, 4] = 7
    path = write_raster(tmp_path / "a.tif", values, nodata=-9999)
    (height, above), valid = derived(path, "height", "height_above_local")
    assert (valid.sum(), height[4, 4], above[4, 4]) == (1, 7, 0)
    raster = Raster(path, Bands(derive=ALL))
    assert not raster.read(Window(0, 0, 9, 9)).valid.any()
    assert raster.hidden.causes["elevation without valid neighbours"] == 1


def test_what_is_hidden_is_counted_once_also_under_margins(tmp_path: Path) -> None:
    values = rough()
    raster = Raster(write_raster(tmp_path / "a.tif", values, nodata=-9999), Bands(derive=("height_above_local",)))
    for row in range(0, 90, 30):
        raster.read(Window(row, 0, 30, 110))
    assert (raster.hidden.pixels, raster.hidden.causes) == (9900, {"nodata -9999": int((values == -9999).sum())})


# --- windows --------------------------------------------------------------------------------------------------


def windows(height: int, width: int) -> list[Window]:
    random = np.random.default_rng(3)
    corners = random.integers(0, (height, width), (20, 2)) - 5
    sizes = random.integers(6, (height // 2, width // 2), (20, 2))  # reaches into the scene
    return [Window(*map(int, (*corner, *size))) for corner, size in zip(corners, sizes, strict=True)]


@pytest.mark.parametrize("how", ["file", "array", "coarser grid", "finer grid", "turned grid"])
@pytest.mark.pitfall("C16", "P25")
def test_every_window_has_the_bits_of_the_whole(tmp_path: Path, how: str) -> None:
    values, bands = rough(), Bands(derive=ALL, local_radius=75, nodata=-9999)
    values[5, 50] = 1e20  # in a running total it would swallow the digits of all that follows it in a window
    path = write_raster(tmp_path / "a.tif", values, pixel=10)
    onto = None
    if how.endswith("grid"):
        pixel = {"coarser grid": 27.0, "finer grid": 3.0, "turned grid": 8.0}[how]
        place = from_origin(500000, 5000000, pixel, pixel) * Affine.rotation(-20 if how == "turned grid" else 0)
        onto = Raster(placed(tmp_path / "b.tif", np.zeros((120, 100), "u1"), "EPSG:32633", place)).grid
    raster = ArrayRaster(values[None], bands, "dem") if how == "array" else Raster(path, bands, onto=onto)
    with raster:
        grid = raster.grid
        whole = raster.read(Window(0, 0, grid.height, grid.width))
        assert 0 < whole.valid.sum() < whole.valid.size
        assert len(np.unique(whole.pixels)) > 1000
        reader = raster if how == "array" else pickle.loads(pickle.dumps(raster))  # as it comes to a worker
        for window in windows(grid.height, grid.width):
            chip = reader.read(window)
            inside = window.clip(grid.height, grid.width)
            here = Window(inside.row - window.row, inside.col - window.col, inside.height, inside.width)
            np.testing.assert_array_equal(
                chip.pixels[:, here.rows, here.cols], whole.pixels[:, inside.rows, inside.cols]
            )
            np.testing.assert_array_equal(chip.valid[here.rows, here.cols], whole.valid[inside.rows, inside.cols])


def test_a_window_of_several_parts_has_the_bits_of_each(tmp_path: Path) -> None:
    """Large windows are worked on in parts of 512 pixels."""
    values = rough(SIDE + 40, SIDE + 90)
    raster = Raster(write_raster(tmp_path / "a.tif", values, nodata=-9999), Bands(derive=ALL))
    whole = raster.read(Window(0, 0, *values.shape))
    across = Window(SIDE - 20, SIDE - 20, 40, 40)
    part = raster.read(across)
    np.testing.assert_array_equal(part.pixels, whole.pixels[:, across.rows, across.cols])
    assert part.pixels.any(axis=(1, 2)).all()


def test_elevation_on_another_grid_is_derived_before_it_is_warped(tmp_path: Path) -> None:
    """So the values do not hang on the pixel size of the first modality."""
    random = np.random.default_rng(1)
    values = random.normal(0, 20, (30, 30)).astype(np.float32)
    path = write_raster(tmp_path / "a.tif", values, pixel=30)
    own = derived(path, "slope", "height_above_local", radius=90)[0]
    for pixel in (30, 10, 6):  # odd ratios: centres of the coarse pixels are centres of fine ones
        onto = Raster(write_raster(tmp_path / "b.tif", np.zeros((900 // pixel,) * 2, np.uint8), pixel=pixel)).grid
        moved = Raster(path, Bands(derive=("slope", "height_above_local"), local_radius=90), onto=onto)
        every = 30 // pixel
        fine = moved.read(Window(0, 0, onto.height, onto.width)).pixels
        np.testing.assert_array_equal(fine[:, every // 2 :: every, every // 2 :: every], own)
