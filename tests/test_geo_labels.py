"""Labels by window: ids become indexes, what nobody declared is an error, what nobody labelled is IGNORE."""

from __future__ import annotations

import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import Window
from vfmseg.geo.labels import LabelRaster

SPARSE = LabelMap((10, 30, 50, 70, 100), 255)
BINARY = LabelMap((0, 1), 255)


def write(path: Path, array: np.ndarray, **profile: Any) -> Path:
    """Write (H, W) or (C, H, W) with GDAL; `colormap` and `mask` are written too."""
    colormap, mask = profile.pop("colormap", None), profile.pop("mask", None)
    bands = array[None] if array.ndim == 2 else array
    count, height, width = bands.shape
    options = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": bands.dtype,
    } | profile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **options) as target:
            if colormap:
                target.write_colormap(1, colormap)
            target.write(bands)
            if mask is not None:
                target.write_mask(mask)
    return path


def read(path: Path, label_map: LabelMap = BINARY) -> np.ndarray:
    with LabelRaster(path, label_map) as raster:
        index = raster.read(Window(0, 0, raster.grid.height, raster.grid.width))
    assert index.dtype == np.int64
    return index


@pytest.mark.parametrize("profile", [{"driver": "JPEG"}, {"compress": "jpeg"}, {"compress": "deflate"}])
@pytest.mark.pitfall("P30")
def test_labels_that_jpeg_has_changed_are_refused(tmp_path: Path, profile: dict[str, Any]) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)
    path = write(tmp_path / "mask.tif", labels, **profile)  # told by content, not by the name
    if "deflate" in profile.values():
        np.testing.assert_array_equal(read(path), labels)
        return
    with pytest.raises(DataError, match=r"mask\.tif: is compressed as JPEG or WebP, which changes class ids"):
        read(path)


# --- the map ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(-100, 100), min_size=1, max_size=8),
    st.sampled_from([255, -1, 101]),
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
    st.sampled_from(["int16", "int32", "int64", "float32", "float64"]),
    st.randoms(use_true_random=False),
)
@pytest.mark.pitfall("P30")
def test_ids_become_their_indexes(ids: set[int], ignore: int, shape: tuple[int, ...], dtype: str, random: Any) -> None:
    label_map = LabelMap(tuple(sorted(ids - {ignore} or {7})), ignore)
    choices = [*label_map.ids, ignore]
    stored = np.array([random.choice(choices) for _ in range(int(np.prod(shape)))]).reshape(shape).astype(dtype)
    index = label_map.to_index(stored, "here")
    assert index.dtype == np.int64
    brute = [IGNORE if i == ignore else label_map.ids.index(int(i)) for i in stored.ravel()]
    assert index.ravel().tolist() == brute


@pytest.mark.pitfall("P30")
def test_unknown_ids_are_named_with_their_counts_and_never_clamped() -> None:
    stored = np.array([[0, 1, 1], [300, 300, -1], [255, 0, 7]], dtype=np.int16)
    with pytest.raises(DataError) as caught:
        BINARY.to_index(stored, "a_label.tif")
    message = str(caught.value)
    assert message.startswith("a_label.tif: unknown label ids -1 (1 pixels), 7 (1 pixels), 300 (2 pixels);")
    assert "classes 0, 1" in message
    assert "ignore_index 255" in message


@pytest.mark.pitfall("P30")
def test_many_unknown_ids_make_a_short_message() -> None:
    with pytest.raises(DataError, match=r"2 \(1 pixels\), .* 6 \(1 pixels\) and 93 more"):
        BINARY.to_index(np.arange(100, dtype=np.uint8), "x")


@pytest.mark.parametrize("value", [256, 257, 255 + 2**32, -255, 2**40])
@pytest.mark.pitfall("P30")
def test_no_id_wraps_into_another(value: int) -> None:
    with pytest.raises(DataError, match=str(value)):
        BINARY.to_index(np.array([0, value]), "x")


@pytest.mark.pitfall("P30")
def test_the_upper_half_of_uint64_does_not_wrap_into_ids_below_0() -> None:
    stored = np.array([0, 1, 2**64 - 1, 2**64 - 2], dtype=np.uint64)
    for label_map in (LabelMap((0, 1), -1), LabelMap((-2, -1, 0, 1), 255)):
        with pytest.raises(DataError, match=r"2 labels are not whole numbers, such as 1\.8"):
            label_map.to_index(stored, "x")
        index = label_map.to_index(stored[:2], "x")
        assert [label_map.ids[i] for i in index] == [0, 1]


@pytest.mark.pitfall("P30")
def test_minus_one_is_the_ignore_index_only_if_declared() -> None:
    stored = np.array([-1, 0, 1], dtype=np.int8)
    assert LabelMap((0, 1), -1).to_index(stored, "x").tolist() == [IGNORE, 0, 1]
    assert LabelMap((-1, 0, 1), 255).to_index(stored, "x").tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"-1 \(1 pixels\)"):
        BINARY.to_index(stored, "x")


@pytest.mark.filterwarnings("error")
@pytest.mark.pitfall("P30")
def test_float_labels_must_be_whole_numbers() -> None:
    whole = np.array([0.0, 1.0, np.nan, 255.0, -0.0], dtype=np.float32)
    assert BINARY.to_index(whole, "x").tolist() == [0, 1, IGNORE, IGNORE, 0]
    for value in (0.5, 1 - 1e-6, np.inf, -np.inf, 1e300):
        with pytest.raises(DataError, match=r"prob\.tif: 1 labels are not whole numbers"):
            BINARY.to_index(np.array([0.0, value, np.nan]), "prob.tif")


def test_labels_that_are_no_numbers_are_refused() -> None:
    for array in (np.array([1 + 1j]), np.array(["a"])):
        with pytest.raises(DataError, match="expected whole numbers"):
            BINARY.to_index(array, "x")
    assert BINARY.to_index(np.array([True, False]), "x").tolist() == [1, 0]


def test_hidden_pixels_may_hold_anything() -> None:
    stored = np.array([0, 1, 77])
    hidden = np.array([False, True, True])
    assert BINARY.to_index(stored, "x", hidden).tolist() == [0, IGNORE, IGNORE]
    assert BINARY.to_index(np.array([0.0, 1.0, 0.25]), "x", hidden).tolist() == [0, IGNORE, IGNORE]


def test_label_map_refuses_what_it_cannot_invert() -> None:
    for ids in ((1, 0), (0, 0, 1), ()):
        with pytest.raises(DataError, match="ascending"):
            LabelMap(ids, 255)
    with pytest.raises(DataError, match="ignore_index 1 is also a class id"):
        LabelMap((0, 1), 1)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.pitfall("P30")
def test_sparse_ids_are_read_from_every_type(tmp_path: Path, dtype: str) -> None:
    stored = np.array([[10, 30, 255], [100, 70, 50]]).astype(dtype)
    path = write(tmp_path / "a.tif", stored)
    assert read(path, SPARSE).tolist() == [[0, 1, IGNORE], [4, 3, 2]]


@pytest.mark.pitfall("P30")
def test_error_names_file_and_window(tmp_path: Path) -> None:
    stored = np.zeros((20, 30), dtype=np.uint16)
    stored[12, 13] = 300
    path = write(tmp_path / "a_label.tif", stored)
    with LabelRaster(path, BINARY) as raster:
        assert (raster.read(Window(0, 0, 10, 30)) == 0).all()
        with pytest.raises(DataError, match=r"a_label\.tif \(rows 10 to 19, columns 0 to 29\): .* 300 \(1 pixels\)"):
            raster.read(Window(10, 0, 20, 40))


@pytest.mark.pitfall("P26")
def test_beyond_the_edge_is_unlabelled_never_class_0(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 2, (7, 11)).astype(np.uint8)
    path = write(tmp_path / "a.tif", stored)
    around = 40
    wide = np.pad(stored.astype(np.int64), around, constant_values=IGNORE)
    with LabelRaster(path, BINARY) as raster:
        for row, col, height, width in [
            (0, 0, 7, 11),
            (-3, -5, 9, 9),
            (5, 8, 10, 10),
            (2, 3, 2, 2),
            (-30, 0, 5, 5),
            (7, 11, 4, 4),
        ]:
            index = raster.read(Window(row, col, height, width))
            there = wide[row + around : row + around + height, col + around : col + around + width]
            np.testing.assert_array_equal(index, there)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 9), ("int16", -1), ("float32", float("nan")), ("float32", -9999.0)]
)
@pytest.mark.pitfall("P26")
def test_nodata_of_the_file_is_unlabelled(tmp_path: Path, dtype: str, nodata: float) -> None:
    stored = np.array([[0, 1, nodata, 255]]).astype(dtype)
    path = write(tmp_path / "a.tif", stored, nodata=nodata)
    assert read(path).tolist() == [[0, 1, IGNORE, IGNORE]]


@pytest.mark.pitfall("P30")
def test_nodata_of_the_file_that_is_a_class_stays_that_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.array([[0, 1, 1]], dtype=np.uint8), nodata=0)
    assert read(path).tolist() == [[0, 1, 1]]


@pytest.mark.pitfall("P26")
def test_hidden_by_alpha_or_mask_band_is_unlabelled(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 1, 99]], dtype=np.uint8)
    shown = np.array([[255, 255, 0, 0]], dtype=np.uint8)
    grey_alpha = write(tmp_path / "a.tif", np.stack([stored, shown]), alpha="yes")
    masked = write(tmp_path / "b.tif", stored, mask=shown)
    png = write(tmp_path / "c.png", np.stack([stored, shown]), driver="PNG")
    for path in (grey_alpha, masked, png):
        assert read(path).tolist() == [[0, 1, IGNORE, IGNORE]], path


@pytest.mark.pitfall("P26")
def test_labels_behind_an_alpha_band_keep_their_own_nodata(tmp_path: Path) -> None:
    shown = np.array([[0, 255, 255, 255]], dtype=np.uint8)
    write(tmp_path / "a.tif", np.stack([shown, np.array([[1, 0, 9, 1]], dtype=np.uint8)]))
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}">{extra}<SimpleSource><SourceFilename relativeToVRT="1">a.tif'
        f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band, extra in ((1, "<ColorInterp>Alpha</ColorInterp>"), (2, "<NoDataValue>9</NoDataValue>"))
    )
    path = tmp_path / "a.vrt"
    path.write_text(f'<VRTDataset rasterXSize="4" rasterYSize="1">{bands}</VRTDataset>')
    assert read(path).tolist() == [[IGNORE, 0, IGNORE, 1]]


def palette_png(path: Path, rows: list[list[int]], bits: int, transparent: int | None = None) -> Path:
    """A palette PNG of 1, 2, 4 or 8 bits a pixel, written byte by byte: GDAL itself writes 8 only."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = b""
    for row in rows:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    colours = bytes([255, 255, 255, 0, 0, 255, 0, 255, 255, 255, 0, 0])[: 3 * min(4, 2**bits)]
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 3, 0, 0, 0))
    content += chunk(b"PLTE", colours)
    if transparent is not None:
        content += chunk(b"tRNS", b"\xff" * transparent + b"\0")
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.pitfall("P29")
def test_palette_png_keeps_its_indexes(tmp_path: Path, bits: int) -> None:
    rows = [[0, 1, 1], [1, 0, 1]] if bits == 1 else [[0, 1, 2], [3, 2, 1]]
    path = palette_png(tmp_path / "a.png", rows, bits)
    assert read(path, LabelMap((0, 1, 2, 3), 255)).tolist() == rows


@pytest.mark.pitfall("P29")
def test_transparent_palette_entry_is_unlabelled_unless_it_is_a_class(tmp_path: Path) -> None:
    path = palette_png(tmp_path / "a.png", [[0, 1, 2]], 8, transparent=2)
    assert read(path, LabelMap((0, 1), 255)).tolist() == [[0, 1, IGNORE]]
    assert read(path, LabelMap((0, 1, 2), 255)).tolist() == [[0, 1, 2]]


@pytest.mark.pitfall("P29")
def test_palette_tiff_keeps_its_indexes(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 1]], dtype=np.uint8)
    path = write(tmp_path / "a.tif", stored, colormap={0: (255, 0, 0), 1: (0, 0, 255)})
    assert read(path).tolist() == [[0, 1, 1]]


@pytest.mark.pitfall("C21")
def test_foreign_palette_entry_raises_instead_of_becoming_class_0(tmp_path: Path) -> None:
    path = palette_png(tmp_path / "a.png", [[0, 1, 3]], 8)
    with pytest.raises(DataError, match=r"a\.png .*unknown label ids 3 \(1 pixels\)"):
        read(path)


@pytest.mark.parametrize(("count", "alpha"), [(3, False), (4, True), (2, False)])
@pytest.mark.pitfall("C21")
def test_labels_in_colours_or_several_bands_are_refused(tmp_path: Path, count: int, alpha: bool) -> None:
    colours = np.random.default_rng(0).integers(1, 255, (count, 4, 4), dtype=np.uint8)
    colours[3:] = 255  # alpha
    path = write(tmp_path / "colours.tif", colours)
    with pytest.raises(DataError, match=rf"colours\.tif: has {count - alpha} bands.*expected one band of class ids"):
        LabelRaster(path, BINARY).read(Window(0, 0, 2, 2))


@pytest.mark.pitfall("P62")
def test_missing_and_truncated_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tif: there is no such file"):
        _ = LabelRaster(tmp_path / "none.tif", BINARY).grid
    path = write(tmp_path / "short.tif", np.random.default_rng(0).integers(0, 2, (300, 300)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:50000])
    with LabelRaster(path, BINARY) as raster, pytest.raises(DataError, match=r"short\.tif: rows 200 to 299"):
        raster.read(Window(200, 0, 100, 300))


def test_pickled_labels_open_the_file_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.array([[0, 1, 255]], dtype=np.uint8))
    raster = LabelRaster(path, BINARY)
    before = raster.read(Window(0, 0, 1, 3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(raster)).read(Window(0, 0, 1, 3)), before)


def test_no_crs_is_silent(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.zeros((3, 3), dtype=np.uint8), driver="PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not read(path).any()


@pytest.mark.pitfall("F19")
def test_a_grey_picture_of_three_equal_bands_holds_class_ids(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 2, (20, 30)).astype(np.uint8)
    Image.fromarray(np.stack([ids] * 3, axis=-1)).save(tmp_path / "grey.png")
    with LabelRaster(tmp_path / "grey.png", BINARY) as labels:
        np.testing.assert_array_equal(labels.read(Window(0, 0, 20, 30)), ids)
    coloured = np.stack([ids, ids, 1 - ids], axis=-1)
    Image.fromarray(coloured).save(tmp_path / "colours.png")
    with LabelRaster(tmp_path / "colours.png", BINARY) as labels, pytest.raises(DataError, match="in colours"):
        labels.read(Window(0, 0, 20, 30))


@pytest.mark.parametrize(("tiles", "fits"), [("PNG", True), ("JPEG", False), ("WEBP", False)])
@pytest.mark.pitfall("F19")
def test_labels_in_a_table_of_a_geopackage(tmp_path: Path, tiles: str, fits: bool) -> None:
    ids = np.random.default_rng(0).integers(0, 2, (512, 512)).astype(np.uint8)
    place = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(500000, 5000000, 10, 10)}
    for table, more in (("img", {}), ("lab", {"APPEND_SUBDATASET": "YES"})):
        write(tmp_path / "a.gpkg", ids, driver="GPKG", RASTER_TABLE=table,
              TILE_FORMAT=tiles if table == "lab" else "JPEG", **place, **more)  # fmt: skip
    with LabelRaster(f"GPKG:{tmp_path / 'a.gpkg'}:lab", BINARY) as labels:
        if fits:
            np.testing.assert_array_equal(labels.read(Window(0, 0, 512, 512)), ids)
        else:
            with pytest.raises(DataError, match="JPEG or WebP, which changes class ids"):
                _ = labels.grid
