"""How a file's numbers become values and validity: each test is a row of the table in docs/values.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from makers import toy_scene, write_raster
from PIL import Image
from rasterio.enums import ColorInterp

from vfmseg.data.raster_scene import RasterScene
from vfmseg.data.survey import survey
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.grid import Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.notes import notes_of
from vfmseg.geo.reader import Raster
from vfmseg.geo.said import BandSaid
from vfmseg.vector.area import read_area

ROOT = Path(__file__).resolve().parents[1]
LOWEST = float(np.finfo(np.float32).min)


def noise(count: int = 3, dtype: str = "uint8", height: int = 20, width: int = 30) -> np.ndarray:
    """Numbers from 1 to 250, none of them alike in all bands."""
    return np.random.default_rng(count).integers(1, 250, (count, height, width)).astype(dtype)


def read(path: Any, bands: Bands | None = None) -> tuple[np.ndarray, np.ndarray, Raster]:
    """Values, validity and the raster of a whole file."""
    raster = Raster(path, bands)
    chip = raster.read(Window(0, 0, raster.grid.height, raster.grid.width))
    return chip.pixels, chip.valid, raster


def hidden(valid: np.ndarray) -> list[tuple[int, int]]:
    """Where nothing was measured."""
    return [(int(r), int(c)) for r, c in zip(*np.nonzero(~valid), strict=True)]


def gdal_hides(path: Path) -> np.ndarray:
    """Where GDAL's mask of the whole data set hides."""
    with rasterio.open(path) as dataset:
        return np.asarray(dataset.dataset_mask() == 0)


def tag(path: Path, **said: Sequence[Any]) -> Path:
    """Set what a file says of its bands: scales, offsets, descriptions, colorinterp."""
    with rasterio.open(path, "r+") as dataset:
        for name, values in said.items():
            setattr(dataset, name, values)
    return path


# --- nodata ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [255, 254, 1])
@pytest.mark.pitfall("F13")
def test_nodata_of_8_bit_numbers(tmp_path: Path, top: int) -> None:
    array = np.where(noise() == top, 7, noise()).astype(np.uint8)
    array[0, 2:9, 3:9] = top  # roofs that are saturated in red alone
    array[:, 0] = top
    path = write_raster(tmp_path / "a.tif", array, nodata=top)
    pixels, valid, raster = read(path)
    np.testing.assert_array_equal(~valid, gdal_hides(path))
    assert hidden(valid) == [(0, col) for col in range(30)]
    assert (pixels[0, 2:9, 3:9] == top).all()
    assert raster.hidden.text() == f"5.0% by nodata {top} in all bands"


@pytest.mark.parametrize(
    ("dtype", "value"), [("int16", -9999), ("uint16", 65535), ("float32", -9999.0), ("float32", -32768.0)]
)
@pytest.mark.pitfall("F13")
def test_nodata_of_wider_numbers(tmp_path: Path, dtype: str, value: float) -> None:
    array = noise(dtype=dtype)
    array[1, 2, 3] = value
    path = write_raster(tmp_path / "a.tif", array, nodata=value)
    assert not gdal_hides(path).any()  # GDAL tells it band by band
    pixels, valid, raster = read(path)
    assert hidden(valid) == [(2, 3)]
    assert (pixels[:, 2, 3] == 0).all()
    assert raster.hidden.shares() == {f"nodata {value:g}": 1 / 600}


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
@pytest.mark.pitfall("F13")
def test_nodata_at_the_end_of_64_bits(tmp_path: Path, dtype: str) -> None:
    array, top = noise(1, dtype=dtype), np.iinfo(dtype).max
    array[0, 2, 3] = top
    path = write_raster(tmp_path / "a.tif", array)
    assert hidden(read(path, Bands(nodata=float(top)))[1]) == [(2, 3)]


@pytest.mark.pitfall("F13")
def test_nodata_zero(tmp_path: Path) -> None:
    array = noise(dtype="int16")
    array[0, 2, 3] = array[:, 4, 5] = 0
    path = write_raster(tmp_path / "a.tif", array, nodata=0)
    assert hidden(read(path)[1]) == [(4, 5)]
    np.testing.assert_array_equal(~read(path)[1], gdal_hides(path))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.pitfall("F13")
def test_nodata_that_differs_between_bands(tmp_path: Path) -> None:
    array = noise()
    array[1, 2:9] = 255  # green roofs
    array[:, 0] = [[0], [255], [0]]
    path = tmp_path / "a.png"  # a picture in which one colour is transparent
    Image.fromarray(array.transpose(1, 2, 0)).save(path, transparency=(0, 255, 0))
    for bands in (None, Bands(nodata=0)):
        _, valid, _ = read(path, bands)
        np.testing.assert_array_equal(~valid, gdal_hides(path))
        assert hidden(valid) == [(0, col) for col in range(30)]


@pytest.mark.pitfall("F13")
def test_nodata_that_was_rounded(tmp_path: Path) -> None:
    array = noise(2, dtype="float32")
    array[:, 0] = LOWEST
    array[0, 5, 5] = LOWEST
    path = write_raster(tmp_path / "a.tif", array, nodata=-3.4e38)
    assert gdal_hides(path)[0].all()
    pixels, valid, raster = read(path)
    assert hidden(valid) == [*((0, col) for col in range(30)), (5, 5)]
    assert np.abs(pixels).max() < 250
    assert "no number" in raster.hidden.causes
    array = noise(1, dtype="float32")
    array[0, 1, 1] = np.float32(-12345.67) * np.float32(1 + 4e-7)
    assert array[0, 1, 1] != np.float32(-12345.67)
    array[0, 2, 2] = -12345.0
    assert hidden(read(write_raster(tmp_path / "b.tif", array, nodata=-12345.67))[1]) == [(1, 1)]


@pytest.mark.pitfall("F13")
def test_labels_with_a_filling_beyond_numbers(tmp_path: Path) -> None:
    array = np.zeros((20, 30), dtype=np.float32)
    array[3], array[4, 4] = LOWEST, 1
    labels = LabelRaster(write_raster(tmp_path / "l.tif", array, nodata=-3.4e38), LabelMap((0, 1), 255))
    found = labels.read(Window(0, 0, 20, 30))
    assert (found[3] == -1).all()
    assert (np.unique(found).tolist(), found[4, 4]) == ([-1, 0, 1], 1)


@pytest.mark.pitfall("F13")
def test_no_numbers(tmp_path: Path) -> None:
    array = noise(dtype="float32")
    array[0, 1, 1], array[1, 2, 2], array[2, 3, 3], array[0, 4, 4] = np.nan, np.inf, LOWEST, 1e36
    _, valid, raster = read(write_raster(tmp_path / "a.tif", array))
    assert hidden(valid) == [(1, 1), (2, 2), (3, 3)]
    assert raster.hidden.causes == {"no number": 3}


@pytest.mark.parametrize("fill", [-9999, 0])
@pytest.mark.pitfall("F13")
def test_a_filling_without_a_tag(tmp_path: Path, fill: int) -> None:
    array = noise(1, dtype="int16", height=200, width=200) + 1000
    array[:, :4] = fill
    scene = RasterScene(
        "a",
        {"dem": Raster(write_raster(tmp_path / "a.tif", array))},
        LabelRaster(write_raster(tmp_path / "l.tif", np.zeros((200, 200), dtype=np.uint8)), LabelMap((0, 1), 255)),
    )
    (found,) = survey([scene], 2, "all").fills
    assert (found.modality, found.band, found.value) == ("dem", 1, fill)
    assert found.share == pytest.approx(0.02, rel=0.2)
    assert found.low > 1000


@pytest.mark.pitfall("F13")
def test_what_is_far_from_a_filling_is_not_told(tmp_path: Path) -> None:
    label = LabelRaster(write_raster(tmp_path / "l.tif", np.zeros((64, 64), dtype=np.uint8)), LabelMap((0, 1), 255))
    flags = (noise(1, height=64, width=64) > 100).astype(np.uint8) * 255
    for array in (toy_scene(1)[0], flags, np.zeros((1, 64, 64), dtype=np.uint8)):
        scene = RasterScene("a", {"rgb": Raster(write_raster(tmp_path / "a.tif", array))}, label)
        assert survey([scene], 2, "all").fills == []


@pytest.mark.pitfall("F13")
def test_nodata_of_the_recipe(tmp_path: Path) -> None:
    array = noise(dtype="uint8")
    array[0, 1, 1] = 7
    array[array == 9] = 10
    array[:, 2, 2] = 9
    path = write_raster(tmp_path / "a.tif", array, nodata=9)
    where = hidden((array != 7).all(axis=0))
    assert hidden(read(path, Bands(nodata=7))[1]) == sorted([*where, (2, 2)])


@pytest.mark.pitfall("F13")
def test_a_class_that_validity_hides_is_counted(tmp_path: Path) -> None:
    array, labels = toy_scene(3)
    mask = np.where(labels == 1, 0, 255).astype(np.uint8)
    path = write_raster(tmp_path / "a.tif", array)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    scene = RasterScene(
        "a", {"rgb": Raster(path)}, LabelRaster(write_raster(tmp_path / "l.tif", labels), LabelMap((0, 1), 255))
    )
    found = survey([scene], 2, "all")
    assert found.visible.tolist() == [found.labelled[0], 0]
    assert found.labelled[1] == (labels == 1).sum() > 0
    assert set(found.hidden["rgb"].causes) == {"mask"}


# --- masks and alpha ------------------------------------------------------------------------------------------


@pytest.mark.pitfall("F13")
def test_mask_band(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", noise())
    mask = np.full((20, 30), 255, dtype=np.uint8)
    mask[3, 4] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    _, valid, raster = read(path)
    np.testing.assert_array_equal(~valid, gdal_hides(path))
    assert (hidden(valid), raster.hidden.causes) == ([(3, 4)], {"mask": 1})


@pytest.mark.parametrize(("dtype", "opaque"), [("uint8", 255), ("uint8", 1), ("uint16", 65535), ("uint16", 255)])
@pytest.mark.pitfall("F13")
def test_alpha(tmp_path: Path, dtype: str, opaque: int) -> None:
    array = noise(4, dtype=dtype)
    array[3] = opaque
    array[3, :5], array[3, 5] = 0, opaque // 2 or 1  # a soft edge
    path = tag(
        write_raster(tmp_path / "a.tif", array),
        colorinterp=[ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha],
    )
    pixels, valid, raster = read(path)
    assert (len(pixels), notes_of(raster)) == (3, {})
    np.testing.assert_array_equal(~valid, gdal_hides(path))
    assert raster.hidden.causes == {"alpha": 150}


@pytest.mark.pitfall("F13")
def test_alpha_of_one_other_number(tmp_path: Path) -> None:
    array = noise(4)
    array[3], array[:, :5] = 127, 0  # a map that was exported half transparent
    path = write_raster(tmp_path / "a.tif", array)
    pixels, valid, _ = read(path)
    assert len(pixels) == 3
    np.testing.assert_array_equal(~valid, gdal_hides(path))


@pytest.mark.pitfall("F13")
def test_infrared_of_water_alone(tmp_path: Path) -> None:
    array = noise(4)
    array[3] = 0
    pixels, valid, _ = read(write_raster(tmp_path / "a.tif", array))
    assert len(pixels) == 4
    assert valid.all()


@pytest.mark.parametrize("water", [0, 3])
@pytest.mark.pitfall("F13")
def test_infrared_marked_as_alpha(tmp_path: Path, water: int) -> None:
    array = noise(4)
    array[3, :, :20] = water
    array[3, :, 20:] = 150 if water == 0 else array[3, :, 20:]
    path = write_raster(tmp_path / "a.tif", array)  # GDAL marks the fourth band of an 8-bit file as alpha
    assert gdal_hides(path).any() == (water == 0)
    pixels, valid, raster = read(path)
    assert valid.all()
    np.testing.assert_array_equal(pixels, array)
    assert "marks band 4 as alpha, but it holds other numbers" in notes_of(raster)["alpha"]
    # a model of three bands reads the three that are not marked
    three = Raster(path, Bands(like=(BandSaid(),) * 3))
    assert three.band_numbers == (1, 2, 3)
    assert three.read(Window(0, 0, 20, 30)).valid.all()
    # and a model of four reads all, also of a scene without land, where it cannot be told
    array[3] = 0
    sea = Raster(write_raster(tmp_path / "sea.tif", array), Bands(like=(BandSaid(),) * 4))
    assert sea.band_numbers == (1, 2, 3, 4)
    assert sea.read(Window(0, 0, 20, 30)).valid.all()


@pytest.mark.pitfall("F13")
def test_alpha_asked_for_by_number(tmp_path: Path) -> None:
    array = noise(4)
    array[3] = 255
    array[3, 2, 3] = 0
    pixels, valid, _ = read(write_raster(tmp_path / "a.tif", array), Bands((1, 4)))
    assert valid.all()
    np.testing.assert_array_equal(pixels, array[[0, 3]])


# --- scale and offset -----------------------------------------------------------------------------------------

REFLECTANCE = 1e-4, -0.1


def packed(path: Path, scale: float, offset: float) -> Path:
    """A file of reflectances 0 to 0.4, stored with this scale and offset."""
    values = np.linspace(0, 0.4, 600).reshape(1, 20, 30)
    write_raster(path, np.round((values - offset) / scale).astype(np.uint16))
    return tag(path, scales=(scale,), offsets=(offset,))


@pytest.mark.pitfall("F16")
def test_scale_and_offset_of_the_file(tmp_path: Path) -> None:
    one = read(packed(tmp_path / "a.tif", 1e-4, 0.0))
    like = one[2].said
    assert like[0].scaled
    for scale, offset in (REFLECTANCE, (2e-5, -0.05)):
        other = read(packed(tmp_path / "b.tif", scale, offset), Bands(like=like))
        np.testing.assert_allclose(other[0], one[0], atol=1e-4)
        assert notes_of(other[2]) == {}
        assert other[2].compact == np.float32


@pytest.mark.pitfall("F16")
def test_scale_in_the_training_files_alone(tmp_path: Path) -> None:
    like = (BandSaid(scale=1e-4),)
    array = noise(1, dtype="uint16")
    pixels, _, raster = read(write_raster(tmp_path / "a.tif", array), Bands(like=like))
    np.testing.assert_array_equal(pixels, array)
    assert "carries no scale and offset, the training files do" in notes_of(raster)["scale"]


@pytest.mark.pitfall("F16")
def test_scale_in_the_scene_alone(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tif", *REFLECTANCE)
    pixels, _, raster = read(path, Bands(like=(BandSaid(),)))
    assert pixels.max() == 5000
    assert "says scale 0.0001 and offset -0.1, the training files nothing" in notes_of(raster)["scale"]


@pytest.mark.pitfall("F16")
def test_scale_of_the_recipe(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tif", *REFLECTANCE)
    pixels, _, raster = read(path, Bands(scale=1.0))
    assert (pixels.max(), raster.compact) == (5000, np.dtype("uint16"))
    assert "but the recipe's are used" in notes_of(raster)["scale"]
    pixels, _, raster = read(path, Bands(scale=1e-4, offset=-0.1))
    assert pixels.max() == pytest.approx(0.4)
    assert notes_of(raster) == {}


@pytest.mark.pitfall("F16")
def test_arrays_are_stored_numbers_or_values() -> None:
    stored, like = noise(1, dtype="uint16"), (BandSaid(scale=0.5, offset=1.0),)
    window = Window(0, 0, 20, 30)
    for array, expected in ((stored, stored * 0.5 + 1), (stored.astype(np.float32), stored)):
        with ArrayRaster(array, Bands(like=like), "s2") as raster:
            np.testing.assert_array_equal(raster.read(window).pixels, expected)
    # of an array with more bands than the model has, those that it reads
    with ArrayRaster(noise(4, dtype="uint16"), Bands((3, 1), like=like[:1] * 2), "s2") as raster:
        np.testing.assert_array_equal(raster.read(window).pixels, noise(4, dtype="uint16")[[2, 0]] * 0.5 + 1)


# --- the order of bands ---------------------------------------------------------------------------------------

RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


@pytest.mark.pitfall("F16")
def test_order_by_colours(tmp_path: Path) -> None:
    array = noise()
    like = read(tag(write_raster(tmp_path / "rgb.tif", array), colorinterp=RGB))[2].said
    more = np.concatenate([array[::-1], noise(1)])
    path = tag(write_raster(tmp_path / "bgrn.tif", more), colorinterp=[*RGB[::-1], ColorInterp.undefined])
    pixels, _, raster = read(path, Bands(like=like))
    np.testing.assert_array_equal(pixels, array)
    assert notes_of(raster)["order"] == "has red, green, blue as its bands 3, 2, 1, and is read so"
    same = read(tmp_path / "rgb.tif", Bands(like=like))[2]
    assert (same.band_numbers, notes_of(same)) == ((1, 2, 3), {})
    alpha = np.concatenate([array, np.full_like(array[:1], 255)])
    same = read(write_raster(tmp_path / "rgba.tif", alpha), Bands(like=like))[2]
    assert (same.band_numbers, notes_of(same)) == ((1, 2, 3), {})


@pytest.mark.pitfall("F16")
def test_order_by_names(tmp_path: Path) -> None:
    array = noise(3, dtype="uint16")
    first = tag(write_raster(tmp_path / "a.tif", array), descriptions=("B04", "B08", "B02"))
    like = read(first)[2].said
    other = tag(write_raster(tmp_path / "b.tif", array[[2, 0, 1]]), descriptions=("b02", "b04", "b08"))
    np.testing.assert_array_equal(read(other, Bands((1, 2, 3), like=like))[0], array)
    # whoever names the bands of this very scene is believed
    np.testing.assert_array_equal(read(other, Bands((1, 2, 3), like=like, chosen=True))[0], array[[2, 0, 1]])
    # names that only count tell nothing
    counting = tag(write_raster(tmp_path / "d.tif", array), descriptions=("Band 3", "Band 2", "Band 1"))
    like = read(counting)[2].said
    other = tag(write_raster(tmp_path / "e.tif", array), descriptions=("Band 1", "Band 2", "Band 3"))
    assert read(other, Bands(like=like))[2].band_numbers == (1, 2, 3)
    like = read(first)[2].said
    # a name that stands twice tells nothing
    twice = tag(write_raster(tmp_path / "c.tif", array), descriptions=("B04", "B04", "B02"))
    assert read(twice, Bands(like=like))[2].band_numbers == (1, 2, 3)


@pytest.mark.pitfall("F16")
def test_order_that_is_told_in_part(tmp_path: Path) -> None:
    array = noise(4, dtype="uint16")
    infrared = [*RGB, ColorInterp.undefined]
    like = read(tag(write_raster(tmp_path / "a.tif", array), colorinterp=infrared))[2].said
    path = tag(write_raster(tmp_path / "b.tif", array), colorinterp=[*RGB[::-1], ColorInterp.undefined])
    pixels, _, raster = read(path, Bands(like=like))
    np.testing.assert_array_equal(pixels, array)
    assert "bands 1, 3 are blue, red, and in the training files they are red, blue" in notes_of(raster)["order"]
    assert notes_of(read(tmp_path / "a.tif", Bands(like=like))[2]) == {}


@pytest.mark.pitfall("F16")
def test_order_that_is_not_told(tmp_path: Path) -> None:
    array = noise(dtype="uint16")
    like = tuple(BandSaid(color=color) for color in ("red", "green", "blue"))
    pixels, _, raster = read(write_raster(tmp_path / "a.tif", array), Bands(like=like))
    np.testing.assert_array_equal(pixels, array)
    expected = "does not say which of its bands are red, green, blue: 1, 2, 3 are taken for them"
    assert notes_of(raster) == {"unnamed": expected}
    one = read(write_raster(tmp_path / "dem.tif", array[:1]), Bands(like=(BandSaid("tile 33"),)))[2]
    assert notes_of(one) == {}
    silent = read(tmp_path / "a.tif", Bands(like=read(tmp_path / "a.tif")[2].said))[2]
    assert notes_of(silent) == {}


# --- orientation ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.pitfall("F14")
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, Any] = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(noise(height=24, width=40).transpose(1, 2, 0)).save(path, exif=exif, **options)
    with rasterio.open(path) as dataset:
        stored = Image.fromarray(dataset.read().transpose(1, 2, 0))
    assert stored.size == (40, 24)  # GDAL gives it as it is stored
    stored.getexif()[274] = orientation
    shown = np.asarray(ImageOps.exif_transpose(stored)).transpose(2, 0, 1)
    pixels, valid, raster = read(path)
    assert valid.all()
    np.testing.assert_array_equal(pixels, shown)
    window = Window(3, 5, 7, 11)
    np.testing.assert_array_equal(raster.read(window).pixels, shown[:, window.rows, window.cols])
    assert ("turned" in notes_of(raster)) == (orientation != 1)


@pytest.mark.pitfall("F14")
def test_orientation_of_a_file_with_a_place(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(height=24, width=40).transpose(1, 2, 0)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.jgw").write_text("10\n0\n0\n-10\n500000\n5000000\n")
    assert read(tmp_path / "a.jpg")[0].shape == (3, 24, 40)


# --- places ---------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("F19")
def test_heights_in_the_reference_system(tmp_path: Path) -> None:
    flat = Raster(write_raster(tmp_path / "a.tif", noise())).grid
    high = Raster(write_raster(tmp_path / "b.tif", noise(), crs="EPSG:32633+5773")).grid
    assert flat.same_place(high)


@pytest.mark.pitfall("F15")
def test_longitudes_on_either_side_of_180(tmp_path: Path) -> None:
    scene = write_raster(tmp_path / "fiji.tif", noise(), crs="EPSG:4326", origin=(179.9, -17.0), pixel=0.01)
    grid = Raster(scene).grid  # from 179.9 to 180.2
    ring = "[[-179.99,-17.1],[-179.99,-17.05],[-179.9,-17.05],[-179.9,-17.1],[-179.99,-17.1]]"
    area = tmp_path / "east.geojson"
    area.write_text(f'{{"type": "Polygon", "coordinates": [{ring}]}}')
    mask = read_area(area, grid).mask(Window(0, 0, grid.height, grid.width))
    assert (np.nonzero(mask.any(axis=0))[0].tolist(), np.nonzero(mask.any(axis=1))[0].tolist()) == (
        list(range(11, 20)), list(range(5, 10))
    )  # fmt: skip


# --- the page -------------------------------------------------------------------------------------------------


def test_every_row_of_the_page_is_a_test() -> None:
    rows = re.findall(r"`(\w+)` \|$", (ROOT / "docs" / "values.md").read_text(encoding="utf-8"), re.MULTILINE)
    source = Path(__file__).read_text(encoding="utf-8")
    tests = re.findall(r"^@pytest.mark.pitfall\(.*\)\ndef test_(\w+)", source, re.MULTILINE)
    assert sorted(rows) == sorted(tests)
