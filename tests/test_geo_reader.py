"""Imagery by window: every stored type, every way of saying "nothing here", every way of being broken."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import write_raster
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import IDENTITY, Window
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.reader import Raster

PLACE: dict[str, Any] = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500000, 0, -10, 5000000)}


def write(path: Path, array: np.ndarray, mask: np.ndarray | None = None, **profile: Any) -> Path:
    """Write (C, H, W) with GDAL; GeoTIFF unless the profile says otherwise."""
    count, height, width = array.shape
    options = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": array.dtype,
    } | profile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **options) as target:
            target.write(array)
            if mask is not None:
                target.write_mask(mask)
    return path


def noise(count: int = 3, height: int = 20, width: int = 30, dtype: str = "uint8", low: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(low, 200, (count, height, width)).astype(dtype)


def whole(raster: Raster) -> Window:
    return Window(0, 0, raster.grid.height, raster.grid.width)


def read_all(path: Any, bands: Bands | None = None) -> tuple[np.ndarray, np.ndarray]:
    with Raster(path, bands) as raster:
        chip = raster.read(whole(raster))
    assert chip.pixels.dtype == np.float32
    assert chip.valid.dtype == bool
    assert not chip.pixels[:, ~chip.valid].any()
    return chip.pixels, chip.valid


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.pitfall("P24")
def test_every_stored_type_keeps_its_values(tmp_path: Path, dtype: str) -> None:
    array = noise(dtype="int16").astype(dtype) - np.array(100 if dtype[0] != "u" else 0, dtype=dtype)
    array[array == 0] = 1
    pixels, valid = read_all(write(tmp_path / "a.tif", array, **PLACE))
    np.testing.assert_array_equal(pixels, array.astype(np.float32))
    assert valid.all()
    assert Raster(tmp_path / "a.tif").dtype == dtype


@pytest.mark.parametrize("driver", ["GTiff", "PNG"])
@pytest.mark.pitfall("P24")
def test_16_bit_ramp_is_neither_clipped_nor_reduced(tmp_path: Path, driver: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256)
    pixels, _ = read_all(write(tmp_path / "ramp", ramp, driver=driver), Bands(scale=0.0001))
    flat = pixels.ravel()
    assert (np.diff(flat) > 0).all()
    assert flat[-1] == pytest.approx(6.5535)


@pytest.mark.pitfall("P24")
def test_scale_and_offset_turn_stored_numbers_into_values(tmp_path: Path) -> None:
    array = noise(2, dtype="int16")
    path = write(tmp_path / "a.tif", array)
    pixels, _ = read_all(path, Bands(scale=0.5, offset=-3))
    np.testing.assert_array_equal(pixels, array * 0.5 - 3)


@pytest.mark.pitfall("P24")
def test_wide_integers_are_scaled_before_they_lose_digits(tmp_path: Path) -> None:
    array = np.array([[[2_000_000_001, 2_000_000_003]]], dtype=np.int32)
    pixels, _ = read_all(write(tmp_path / "a.tif", array), Bands(offset=-2_000_000_000.0))
    assert pixels.ravel().tolist() == [1, 3]


@pytest.mark.pitfall("C22")
def test_pure_colours_keep_their_bands(tmp_path: Path) -> None:
    """Red is 200 in the first band, whatever the format; only `bands` reorders."""
    image = np.zeros((3, 16, 48), dtype=np.uint8)
    for band in range(3):
        image[band, :, 16 * band : 16 * band + 16] = 200
    for name, profile in {
        "pixel.tif": {"interleave": "pixel"},
        "band.tif": {"interleave": "band"},
        "a.png": {"driver": "PNG"},
        "ycc.tif": {"compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel", "jpeg_quality": 100},
        "a.jpg": {"driver": "JPEG", "quality": 100},
    }.items():
        path = write(tmp_path / name, image, **profile)
        pixels, _ = read_all(path)
        np.testing.assert_allclose(pixels[:, :, 4::16], image[:, :, 4::16], atol=4, err_msg=name)
        backwards, _ = read_all(path, Bands((3, 2, 1)))
        np.testing.assert_array_equal(backwards, pixels[::-1])


def test_bands_are_picked_in_the_order_asked_for_also_twice(tmp_path: Path) -> None:
    array = noise(5)
    path = write(tmp_path / "a.tif", array)
    pixels, _ = read_all(path, Bands((5, 1, 1, 3)))
    np.testing.assert_array_equal(pixels, array[[4, 0, 0, 2]])
    assert Raster(path, Bands((5, 1))).count == 2
    assert Raster(path).count == 5


# --- windows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    array = noise(2, 7, 11, low=1)
    array[:, 3, 4] = 0
    return write(tmp_path_factory.mktemp("small") / "a.tif", array, nodata=0), array


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 25), st.integers(1, 25))
@pytest.mark.pitfall("P34")
def test_windows_of_any_position_have_exactly_their_size(
    small: tuple[Path, np.ndarray], row: int, col: int, height: int, width: int
) -> None:
    path, array = small
    around = 50
    pixels = np.pad(array, ((0, 0), (around, around), (around, around))).astype(np.float32)
    valid = np.pad((array != 0).all(axis=0), around)
    with Raster(path) as raster:
        chip = raster.read(Window(row, col, height, width))
    there = (slice(row + around, row + around + height), slice(col + around, col + around + width))
    assert chip.pixels.shape == (2, height, width)
    np.testing.assert_array_equal(chip.pixels, pixels[:, there[0], there[1]])
    np.testing.assert_array_equal(chip.valid, valid[there])


# --- validity -----------------------------------------------------------------------------------------------


def spots(valid: np.ndarray) -> list[tuple[int, int]]:
    """Where pixels are invalid."""
    return [(int(r), int(c)) for r, c in zip(*np.nonzero(~valid), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("uint8", 255), ("uint16", 65535), ("int16", -9999), ("float32", -9999.0), ("float32", -3.4028235e38)],
)
@pytest.mark.parametrize("said_by", ["file", "recipe"])
@pytest.mark.pitfall("P26")
def test_a_nodata_value_in_any_band_hides_the_pixel(tmp_path: Path, dtype: str, value: float, said_by: str) -> None:
    array = noise(dtype=dtype)
    array[1, 2, 3] = value
    array[:, 4, 5] = value
    path = write(tmp_path / "a.tif", array, nodata=value if said_by == "file" else None)
    _, valid = read_all(path, Bands(scale=0.5, offset=1, nodata=value if said_by == "recipe" else None))
    # any 8-bit number may be a measurement, so the file's value hides where all bands hold it, as GDAL's masks say
    alone = said_by == "recipe" or dtype != "uint8"
    assert spots(valid) == ([(2, 3), (4, 5)] if alone else [(4, 5)])


@pytest.mark.parametrize("said_by", ["file", "recipe"])
@pytest.mark.pitfall("P26")
def test_nodata_0_hides_only_where_all_bands_are_0(tmp_path: Path, said_by: str) -> None:
    array = noise()
    for band in range(3):
        array[band, 2, 3 + band] = 0  # a dark measurement in one band
    array[:, 4, 5] = 0
    path = write(tmp_path / "a.tif", array, nodata=0 if said_by == "file" else None)
    bands = Bands(nodata=0 if said_by == "recipe" else None)
    assert spots(read_all(path, bands)[1]) == [(4, 5)]
    # "all bands" are the ones that are read
    assert spots(read_all(path, Bands((2,), nodata=bands.nodata))[1]) == [(2, 4), (4, 5)]


@pytest.mark.pitfall("P26")
def test_zeros_without_a_nodata_value_are_measurements(tmp_path: Path) -> None:
    assert read_all(write(tmp_path / "a.tif", np.zeros((3, 5, 5), dtype=np.uint8)))[1].all()


@pytest.mark.pitfall("P26")
def test_nodata_of_the_recipe_joins_the_one_of_the_file(tmp_path: Path) -> None:
    array = noise(dtype="int16")
    array[0, 1, 1] = -32768
    array[:, 2, 2] = 0
    path = write(tmp_path / "a.tif", array, nodata=-32768)
    assert spots(read_all(path, Bands(nodata=0))[1]) == [(1, 1), (2, 2)]


@pytest.mark.pitfall("P26")
def test_every_band_has_its_own_nodata_value(tmp_path: Path) -> None:
    array = np.full((2, 4, 5), 9, dtype=np.uint8)
    array[0, 0, 0] = array[1, 1, 1] = 7
    array[0, 2, 2] = array[1, 3, 3] = 8
    array[:, 2, 4] = 7, 8
    write(tmp_path / "a.tif", array)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><NoDataValue>{nodata}</NoDataValue><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource>'
        "</VRTRasterBand>"
        for band, nodata in ((1, 7), (2, 8))
    )
    path = tmp_path / "a.vrt"
    path.write_text(f'<VRTDataset rasterXSize="5" rasterYSize="4">{bands}</VRTDataset>')
    assert spots(read_all(path)[1]) == [(2, 4)]
    assert spots(read_all(path, Bands((2,)))[1]) == [(2, 4), (3, 3)]


@pytest.mark.parametrize("value", [-9999.0, 255.5, float("nan"), float("inf")])
@pytest.mark.pitfall("P26")
def test_nodata_that_the_type_cannot_hold_hides_nothing(tmp_path: Path, value: float) -> None:
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert read_all(write(tmp_path / "a.tif", array), Bands(nodata=value))[1].all()


@pytest.mark.parametrize("nodata", [None, float("nan"), -1.0])
@pytest.mark.pitfall("P26")
def test_nan_and_infinity_hide_the_pixel_and_spread_nowhere(tmp_path: Path, nodata: float | None) -> None:
    array = noise(dtype="float32")
    array[0, 2, 3] = np.nan
    array[1, 4, 5] = np.inf
    array[2, 6, 7] = -np.inf
    pixels, valid = read_all(write(tmp_path / "a.tif", array, nodata=nodata), Bands(scale=0.0, offset=2.0))
    assert spots(valid) == [(2, 3), (4, 5), (6, 7)]
    assert np.isfinite(pixels).all()
    # a band that nobody reads hides nothing
    assert spots(read_all(tmp_path / "a.tif", Bands((2, 3)))[1]) == [(4, 5), (6, 7)]


@pytest.mark.pitfall("P26")
def test_float64_beyond_float32_is_invalid_without_a_warning(tmp_path: Path) -> None:
    array = noise(1, dtype="float64")
    array[0, 2, 3] = -1.7976931348623157e308
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spots(read_all(write(tmp_path / "a.tif", array))[1]) == [(2, 3)]


def alpha_of(height: int, width: int) -> np.ndarray:
    """Alpha that hides two pixels and half shows a third."""
    alpha = np.full((height, width), 255, dtype=np.uint8)
    alpha[0, 0] = alpha[5, 6] = 0
    alpha[7, 7] = 128
    return alpha


@pytest.mark.parametrize("driver", ["GTiff", "PNG"])
@pytest.mark.pitfall("P26")
def test_alpha_hides_and_is_no_band(tmp_path: Path, driver: str) -> None:
    image = noise()
    path = write(tmp_path / "a", np.concatenate([image, alpha_of(20, 30)[None]]), driver=driver)
    with Raster(path) as raster:
        assert raster.count == 3
    pixels, valid = read_all(path)
    assert spots(valid) == [(0, 0), (5, 6)]
    np.testing.assert_array_equal(pixels, np.where(valid, image, 0))
    assert spots(read_all(path, Bands((1,)))[1]) == [(0, 0), (5, 6)]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.pitfall("P26")
def test_a_fourth_band_asked_for_by_number_is_data_though_the_file_calls_it_alpha(tmp_path: Path) -> None:
    """GDAL marks the fourth band of any 8-bit file as alpha unless told otherwise; here it holds infrared."""
    array = noise(4)
    array[3, 2, 3] = 0
    path = write(tmp_path / "rgbn.tif", array)
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    pixels, valid = read_all(path, Bands((1, 2, 3, 4)))
    assert valid.all()
    np.testing.assert_array_equal(pixels, array)


@pytest.mark.parametrize("kind", ["internal", "external"])
@pytest.mark.pitfall("P26")
def test_mask_band_hides(tmp_path: Path, kind: str) -> None:
    mask = np.full((20, 30), 255, dtype=np.uint8)
    mask[3, 4] = mask[19, 29] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal"):
        path = write(tmp_path / "a.tif", noise(), mask=mask)
    assert (tmp_path / "a.tif.msk").exists() == (kind == "external")
    for bands in (None, Bands((2,))):
        assert spots(read_all(path, bands)[1]) == [(3, 4), (19, 29)]
    with Raster(path) as raster:
        assert spots(raster.read(Window(2, 2, 4, 4)).valid) == [(1, 2)]


@pytest.mark.pitfall("P26")
def test_bands_may_have_masks_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", noise(2, 4, 5))
    masks = np.full((2, 4, 5), 255, dtype=np.uint8)
    masks[0, 1, 1] = masks[1, 2, 3] = 0
    write(tmp_path / "m.tif", masks, photometric="MINISBLACK", alpha="no")
    source = '<SourceFilename relativeToVRT="1">{}.tif</SourceFilename><SourceBand>{}</SourceBand>'
    source = f"<SimpleSource>{source}</SimpleSource>"
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{n}">{source.format("a", n)}<MaskBand><VRTRasterBand dataType="Byte">'
        f"{source.format('m', n)}</VRTRasterBand></MaskBand></VRTRasterBand>"
        for n in (1, 2)
    )
    path = tmp_path / "a.vrt"
    path.write_text(f'<VRTDataset rasterXSize="5" rasterYSize="4">{bands}</VRTDataset>')
    assert spots(read_all(path)[1]) == [(1, 1), (2, 3)]
    assert spots(read_all(path, Bands((2,)))[1]) == [(2, 3)]


@pytest.mark.pitfall("P26")
def test_mask_band_nodata_and_nan_add_up(tmp_path: Path) -> None:
    array = noise(dtype="float32")
    array[0, 1, 1] = -9999
    array[2, 2, 2] = np.nan
    mask = np.full((20, 30), 255, dtype=np.uint8)
    mask[3, 3] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = write(tmp_path / "a.tif", array, mask=mask, nodata=-9999)
    assert spots(read_all(path)[1]) == [(1, 1), (2, 2), (3, 3)]


# --- several files ------------------------------------------------------------------------------------------


def test_files_are_stacked_and_bands_count_through_them(tmp_path: Path) -> None:
    first, second = noise(3), noise(2, dtype="uint16") + 300
    first[:, 4, 5] = 7
    paths = [
        write(tmp_path / "a.tif", first, nodata=7, **PLACE),
        write(tmp_path / "b.tif", second, nodata=309, **PLACE),
    ]
    hidden = (first == 7).all(axis=0) | (second == 309).any(axis=0)
    assert hidden.any()
    assert not hidden.all()
    both = np.concatenate([first, second]).astype(np.float32)
    pixels, valid = read_all(paths)
    np.testing.assert_array_equal(valid, ~hidden)
    np.testing.assert_array_equal(pixels, np.where(hidden, 0, both))
    chosen, there = read_all(paths, Bands((5, 2), nodata=None))
    np.testing.assert_array_equal(there, (second[1] != 309) & (first[1] != 7))
    np.testing.assert_array_equal(chosen[0][there], both[4][there])
    np.testing.assert_array_equal(chosen[1][there], both[1][there])
    with Raster(paths) as raster:
        assert (raster.count, raster.dtype, raster.grid.crs) == (5, "uint16", "EPSG:32633")
        assert raster.path == (str(paths[0]), str(paths[1]))
    with Raster(paths, Bands((3,))) as raster:
        assert raster.dtype == "uint8"


@pytest.mark.pitfall("P26")
def test_frame_of_a_stack_is_where_every_file_is_0(tmp_path: Path) -> None:
    red, green = noise(1), noise(1)
    red[0, 1, 1] = 0
    red[0, 2, 2] = green[0, 2, 2] = 0
    paths = [write(tmp_path / f"{name}.tif", band, nodata=0) for name, band in {"r": red, "g": green}.items()]
    assert spots(read_all(paths)[1]) == [(2, 2)]


@pytest.mark.parametrize("change", ["size", "place", "crs"])
@pytest.mark.pitfall("P34")
def test_files_on_different_grids_are_not_stacked(tmp_path: Path, change: str) -> None:
    one = write(tmp_path / "one.tif", noise(1), **PLACE)
    place, array = dict(PLACE), noise(1)
    if change == "size":
        array = noise(1, 20, 31)
    elif change == "place":
        place["transform"] = Affine(10, 0, 500005, 0, -10, 5000000)
    else:
        place["crs"] = "EPSG:32634"
    two = write(tmp_path / "two.tif", array, **place)
    with pytest.raises(DataError, match=r"two\.tif.*one\.tif"):
        Raster([one, two]).read(Window(0, 0, 5, 5))


# --- place --------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("P34")
def test_turned_transform_and_crs_arrive_as_written(tmp_path: Path) -> None:
    turned = Affine(-0.0286, 2.4998, 593124.12, 2.4998, 0.0286, 5749208.25)
    path = write(tmp_path / "a.tif", noise(), crs="EPSG:32631", transform=turned)
    with Raster(path) as raster:
        grid = raster.grid
    assert grid.transform == pytest.approx(tuple(turned)[:6])
    assert (grid.crs, grid.height, grid.width, grid.georeferenced) == ("EPSG:32631", 20, 30, True)


def test_crs_without_a_code_is_kept_whole(tmp_path: Path) -> None:
    odd = "+proj=laea +lat_0=47.3 +lon_0=8.5 +x_0=100 +y_0=200 +ellps=bessel +units=m"
    close = "+proj=utm +zone=33 +ellps=GRS80 +units=m"  # GDAL names EPSG:25833 for it, which has a datum
    for crs in (odd, close):
        path = write(tmp_path / "a.tif", noise(), crs=crs, transform=PLACE["transform"])
        with Raster(path) as raster, rasterio.open(path) as source:
            assert CRS.from_user_input(raster.grid.crs) == source.crs


def test_no_crs_is_silent_and_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.png", noise(), driver="PNG")
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Raster(path) as raster:
            raster.read(whole(raster))
            grid = raster.grid
    assert caplog.records == []
    assert (grid.crs, grid.transform, grid.georeferenced) == (None, IDENTITY, False)


# --- formats and damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("driver", "suffix"), [("JPEG", "tif"), ("PNG", "jpg"), ("GTiff", "png"), ("PNG", "dat")])
def test_formats_are_told_by_content_not_by_suffix(tmp_path: Path, driver: str, suffix: str) -> None:
    flat = np.stack([np.full((32, 32), value, dtype=np.uint8) for value in (10, 100, 200)])
    pixels, _ = read_all(write(tmp_path / f"lies.{suffix}", flat, driver=driver))
    np.testing.assert_allclose(pixels, flat, atol=3)


@pytest.mark.parametrize("index", [4, 0, -1])
def test_band_out_of_range_names_file_band_and_count(tmp_path: Path, index: int) -> None:
    path = write(tmp_path / "three.tif", noise(3))
    with pytest.raises(DataError, match=rf"three\.tif: band {index} is asked for, but there are 3 bands.*1 to 3"):
        Raster(path, Bands((1, index))).read(Window(0, 0, 4, 4))
    stack = [path, write(tmp_path / "four.tif", noise(1))]
    with pytest.raises(DataError, match=r"three\.tif \+ .*four\.tif: band 5 .* 4 bands"):
        _ = Raster(stack, Bands((5,))).count


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff\x00" * 2000
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("profile", "harm"),
    [
        ({}, cut_short),
        ({"compress": "deflate"}, cut_short),
        ({"compress": "lzw", "tiled": True, "blockxsize": 64, "blockysize": 64}, cut_short),
        ({"compress": "jpeg"}, cut_short),
        ({"driver": "PNG"}, cut_short),
        ({"driver": "JPEG"}, cut_short),
        ({"compress": "deflate"}, garble),
        ({"driver": "PNG"}, garble),
    ],
)
@pytest.mark.pitfall("P62")
def test_damaged_file_is_an_error_with_file_and_window_never_zeros(
    tmp_path: Path, profile: dict[str, Any], harm: Callable[[Path], None]
) -> None:
    path = write(tmp_path / "hurt.img", np.random.default_rng(0).integers(0, 255, (3, 300, 300), np.uint8), **profile)
    harm(path)
    with Raster(path) as raster:
        _ = raster.grid  # the header is whole
        with pytest.raises(DataError, match=r"hurt\.img: rows \d+ to \d+, columns 20 to 299 .*damaged or cut short"):
            _ = [raster.read(Window(row, 20, 100, 280)) for row in (0, 100, 200)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "0 bytes"),
        (b"hello, this is no raster", "GDAL"),
        (b"II*\0\xff\xff\xff\xff", "GDAL"),
    ],
    ids=["missing", "empty", "text", "header only"],
)
def test_a_file_that_is_no_raster_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.tif.*{message}"):
        _ = Raster(path).grid


@pytest.mark.parametrize("profile", [{}, {"compress": "jpeg"}, {"driver": "PNG"}, {"driver": "JPEG"}], ids=str)
@pytest.mark.pitfall("P62")
def test_bytes_at_random_in_a_header_never_end_in_a_traceback(tmp_path: Path, profile: dict[str, Any]) -> None:
    content = write(tmp_path / "whole", noise(3, 32, 32), **profile, **PLACE).read_bytes()
    draws = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        hurt = bytearray(content)
        for place in draws.integers(0, min(len(hurt), 600), 4):
            hurt[place] = draws.integers(256)
        (tmp_path / "hurt").write_bytes(hurt)
        try:
            with Raster(tmp_path / "hurt") as raster:
                raster.read(Window(0, 0, min(raster.grid.height, 64), min(raster.grid.width, 64)))
        except DataError as error:
            refused += "hurt: " in str(error)
    assert refused > 20


def test_a_folder_and_a_container_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        _ = Raster(tmp_path).grid
    both = tmp_path / "both.gpkg"
    for name in ("left", "right"):
        write(both, noise(), driver="GPKG", RASTER_TABLE=name, APPEND_SUBDATASET=name == "right", **PLACE)
    with pytest.raises(DataError, match=r"both\.gpkg: has no bands of its own.*one of the 2 .*GPKG:.*left"):
        _ = Raster(both).grid
    with pytest.raises(DataError, match="at least one file"):
        Raster([])


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "slc.tif", np.ones((1, 4, 4), dtype=np.complex64))
    with pytest.raises(DataError, match=r"slc\.tif: band 1 holds complex numbers \(complex64\)"):
        _ = Raster(path).count


def test_messages_of_gdal_do_not_reach_stderr(tmp_path: Path) -> None:
    path = write(tmp_path / "hurt.tif", np.random.default_rng(0).integers(0, 255, (3, 300, 300), np.uint8))
    cut_short(path)
    odd = write(tmp_path / "odd.tif", noise())
    content = bytearray(odd.read_bytes())
    first = int.from_bytes(content[4:8], "little") + 2  # the first two entries of the directory change places
    content[first : first + 24] = content[first + 12 : first + 24] + content[first : first + 12]
    odd.write_bytes(content)  # readable, but GDAL warns
    script = (
        "import sys\nfrom vfmseg.errors import DataError\nfrom vfmseg.geo.grid import Window\n"
        "from vfmseg.geo.reader import Raster\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        print(Raster(path).read(Window(0, 0, 300, 300)).valid.sum())\n"
        "    except DataError as error:\n        print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "none.tif"), str(odd)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[2] == "600"


# --- processes and threads ----------------------------------------------------------------------------------


@pytest.mark.pitfall("P32")
def test_pickled_raster_opens_the_file_itself(tmp_path: Path) -> None:
    array = noise()
    path = write(tmp_path / "a.tif", array)
    raster = Raster(path, Bands((2,)))
    before = raster.read(whole(raster)).pixels
    copy = pickle.loads(pickle.dumps(raster))
    np.testing.assert_array_equal(copy.read(whole(raster)).pixels, before)
    raster.close()
    raster.close()
    np.testing.assert_array_equal(raster.read(whole(raster)).pixels, before)


def test_opening_waits_until_the_first_need(tmp_path: Path) -> None:
    raster = Raster(tmp_path / "later.tif")
    array = noise()
    write(tmp_path / "later.tif", array)
    np.testing.assert_array_equal(raster.read(whole(raster)).pixels, array)


@pytest.mark.pitfall("P32")
def test_threads_share_a_raster_without_mixing_windows(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(1, 60000, (3, 256, 256)).astype(np.uint16)
    path = write(tmp_path / "a.tif", array, compress="deflate", tiled=True, blockxsize=32, blockysize=32)
    windows = [Window(r, c, 48, 48) for r in range(0, 208, 16) for c in range(0, 208, 16)]
    with Raster(path) as raster, ThreadPoolExecutor(8) as pool:
        for window, chip in zip(windows, pool.map(raster.read, windows), strict=True):
            np.testing.assert_array_equal(chip.pixels, array[:, window.rows, window.cols])


@pytest.mark.pitfall("P32")
def test_no_thread_finds_a_file_that_another_has_closed(tmp_path: Path) -> None:
    class Watched:
        """A lock that looks, when it is given back, at what the next thread would find."""

        def __enter__(self) -> None:
            seen.append("taken")

        def __exit__(self, *_: object) -> None:
            assert file._dataset is None or not file._dataset.closed

    seen: list[str] = []
    file = RasterFile(write(tmp_path / "a.tif", noise()))
    file.read([1], Window(0, 0, 2, 2))
    file._lock = Watched()  # type: ignore[assignment]
    file.close()
    file.close()
    assert file.read([1], Window(0, 0, 2, 2)).shape == (1, 2, 2)
    assert seen


def _read_in_child(raster: Raster, rows: list[int], results: Any) -> None:
    results.put([raster.read(Window(row, 0, 8, 512)).pixels.tobytes() for row in rows])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.pitfall("P32")
def test_forked_workers_do_not_share_a_file_position(tmp_path: Path) -> None:
    """Parent and children read different rows at once from a raster that was opened before the fork."""
    array = np.random.default_rng(0).integers(1, 60000, (2, 512, 512)).astype(np.uint16)
    path = write(tmp_path / "a.tif", array)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    orders = [list(range(0, 512, 8)), list(range(504, -1, -8))]
    with Raster(path) as raster:
        raster.read(Window(0, 0, 1, 1))
        dataset = raster._files[0]._dataset
        children = [context.Process(target=_read_in_child, args=(raster, rows, results)) for rows in orders]
        for child in children:
            child.start()
        mine = [raster.read(Window(row, 0, 8, 512)).pixels.tobytes() for row in orders[0]]
        answers = [results.get(timeout=60) for _ in children]
        for child in children:
            child.join(timeout=60)
        assert raster._files[0]._dataset is dataset  # the parent keeps its handle
    truth = [array[:, row : row + 8].astype(np.float32).tobytes() for row in orders[0]]
    assert mine == truth
    assert sorted(map(hash, map(tuple, answers))) == sorted([hash(tuple(truth)), hash(tuple(truth[::-1]))])


def test_gdal_keeps_32_mebibytes_of_blocks() -> None:
    """rasterio hands the number on as bytes: 32 would switch the cache off, for the whole process."""
    from rasterio.env import getenv

    from vfmseg.geo.opening import gdal

    with gdal():
        assert int(getenv()["GDAL_CACHEMAX"]) == 32 * 2**20


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "int32"])
@pytest.mark.parametrize("window", [Window(0, 0, 40, 50), Window(3, 5, 20, 30), Window(-4, 30, 60, 40)])
def test_compact_reading_gives_the_same_values_in_the_type_of_the_file(
    tmp_path: Path, dtype: str, window: Window
) -> None:
    array = np.random.default_rng(0).integers(1, 120, (2, 40, 50)).astype(dtype)
    array[:, 10:14, 7:20] = 7
    path = write_raster(tmp_path / "a.tif", array, nodata=7)
    for bands in (Bands(), Bands(scale=0.5, offset=1.0)):
        with Raster(path, bands) as raster:
            plain, compact = raster.read(window), raster.read(window, compact=True)
            assert plain.pixels.dtype == np.float32
            assert compact.pixels.dtype == raster.compact
        np.testing.assert_array_equal(compact.pixels, plain.pixels)
        np.testing.assert_array_equal(compact.valid, plain.valid)
        assert not compact.valid.all()
