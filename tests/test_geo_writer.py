"""Label files: complete under their final name or not there at all, and readable by any GIS."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

from vfmseg.disk import files as files_module
from vfmseg.errors import DataError, MachineError, RecipeError, VfmsegError
from vfmseg.geo import compression as compression_module
from vfmseg.geo import writer as writer_module
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.compression import COMPRESSIONS
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.layer import Layer, label_layer, label_type
from vfmseg.geo.mosaic import mosaic, read_map
from vfmseg.geo.writer import MapWriter

UTM = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 300, 400)
IDS = (10, 30, 100)
NAMES = ("land", "wetland, flooded", "Fluß")
COLORS = ((200, 180, 100), (0, 0, 255), (255, 0, 0))


def labels_for(grid: Grid, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(-1, classes, (grid.height, grid.width))


def as_ids(labels: np.ndarray, ids: Sequence[int] = IDS) -> np.ndarray:
    """Class indexes (h, w) as stored numbers (1, h, w): IGNORE, the index -1, becomes nodata."""
    dtype, nodata = label_type(ids)
    return np.array([*ids, nodata], dtype=dtype)[labels][None]


def layer_of(tags: dict[str, str] | None = None) -> Layer:
    return label_layer(IDS, NAMES, COLORS, tags)


def save(
    path: Path, labels: np.ndarray, grid: Grid = UTM, step: int = 64, tags: dict[str, str] | None = None, **options: Any
) -> Path:
    with MapWriter(path, grid, layer_of(tags), **options) as target:
        for row in range(0, grid.height, step):
            target.write(row, as_ids(labels[row : row + step]))
    return path


def write_some(path: Path, rows: int, error: BaseException, cog: bool) -> None:
    """Begin a map, write some of its rows, and be interrupted."""
    with MapWriter(path, UTM, layer_of(), cog=cog) as target:
        target.write(0, as_ids(labels_for(UTM)[:rows]))
        raise error


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is in the file ------------------------------------------------------------------------------------


@pytest.mark.pitfall("P36")
def test_file_carries_place_classes_colours_and_legal_nodata(tmp_path: Path) -> None:
    labels = labels_for(UTM)
    path = save(tmp_path / "new" / "folder" / "labels.tif", labels, tags={"vfmseg_recipe": "flood"})
    assert names_in(path.parent) == ["labels.tif"]  # no .aux.xml: everything is inside
    with rasterio.open(path) as source:
        assert source.crs == CRS.from_epsg(32633)
        assert tuple(source.transform)[:6] == UTM.transform
        assert (source.count, source.dtypes[0], source.nodata) == (1, "uint8", 255)
        assert (source.block_shapes[0], source.profile["compress"]) == ((256, 256), "deflate")
        tags = source.tags()
        assert [tags[f"CLASS_{i}"] for i in IDS] == list(NAMES)
        assert tags["vfmseg_recipe"] == "flood"
        table = source.colormap(1)
        assert [table[i][:3] for i in IDS] == list(COLORS)
        stored = source.read(1)
    np.testing.assert_array_equal(stored, np.array([*IDS, 255])[labels])


def test_written_labels_are_read_back_as_the_same_indexes(tmp_path: Path) -> None:
    labels = labels_for(UTM)
    path = save(tmp_path / "labels.tif", labels)
    with LabelRaster(path, LabelMap(IDS, 0)) as raster:
        np.testing.assert_array_equal(raster.read(Window(0, 0, 300, 400)), labels)
        assert raster.grid == UTM


@pytest.mark.parametrize(
    "grid",
    [
        Grid("EPSG:32631", (-0.0286, 2.4998, 593124.5, 2.4998, 0.0286, 5749208.25), 20, 30),
        Grid("EPSG:4326", (9e-5, 0.0, -0.75, 0.0, -9e-5, 38.125), 20, 30),
        Grid(None, IDENTITY, 20, 30),
        Grid(None, (2.0, 0.0, 100.0, 0.0, -2.0, 50.0), 20, 30),
        Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, 10.0, 0.0), 20, 30),
    ],
    ids=["turned", "degrees", "no place", "no crs", "south up"],
)
@pytest.mark.pitfall("P36")
def test_any_grid_survives_silently(tmp_path: Path, grid: Grid) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save(tmp_path / "a.tif", labels_for(grid), grid)
        with LabelRaster(path, LabelMap(IDS, 255)) as raster:
            assert (raster.grid.crs, raster.grid.height, raster.grid.width) == (grid.crs, 20, 30)
            assert raster.grid.transform == pytest.approx(grid.transform, rel=1e-12)


def test_crs_without_a_code_survives(tmp_path: Path) -> None:
    odd = CRS.from_string("+proj=laea +lat_0=47.3 +lon_0=8.5 +x_0=100 +y_0=200 +ellps=bessel +units=m")
    grid = Grid(odd.to_wkt(version="WKT2_2019"), UTM.transform, 20, 30)
    with rasterio.open(save(tmp_path / "a.tif", labels_for(grid), grid)) as source:
        assert source.crs == odd


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ((0, 1), "uint8"),
        ((0, 254), "uint8"),
        ((0, 255), "uint16"),
        ((1, 65534), "uint16"),
        ((-1, 0, 255), "int16"),
        ((-32767, 32767), "int16"),
        ((0, 65535), "int32"),
        ((-32768, 5), "int32"),
    ],
)
@pytest.mark.pitfall("P36")
def test_nodata_fits_the_type_and_is_no_class(tmp_path: Path, ids: tuple[int, ...], dtype: str) -> None:
    grid = UTM.crop(Window(0, 0, 1, len(ids) + 1))
    labels = np.array([[IGNORE, *range(len(ids))]])
    colors = [(i, 2 * i, 3 * i) for i in range(len(ids))]
    layer = label_layer(ids, [str(i) for i in ids], colors)
    assert bool(layer.colors) == dtype.startswith("u")  # colour tables exist for unsigned types only
    with MapWriter(tmp_path / "a.tif", grid, layer) as target:
        target.write(0, as_ids(labels, ids))
    with rasterio.open(tmp_path / "a.tif") as source:
        assert source.dtypes[0] == dtype
        assert source.nodata not in ids
        assert source.read(1)[0].tolist() == [source.nodata, *ids]
        assert source.read_masks(1)[0].tolist() == [0, *[255] * len(ids)]
        assert source.tags()[f"CLASS_{ids[0]}"] == str(ids[0])
        if dtype.startswith("u"):
            assert [source.colormap(1)[i][:3] for i in ids] == colors
    assert names_in(tmp_path) == ["a.tif"]
    assert label_type(ids) == (dtype, source.nodata)


def test_ids_beyond_32_bits_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit 32 bits"):
        label_layer((0, 2**31), ("a", "b"), ((0, 0, 0), (1, 1, 1)))


@pytest.mark.pitfall("C22")
def test_pure_colours_belong_to_their_classes(tmp_path: Path) -> None:
    """Seen in colour, as a GIS shows it, class red is red and class blue is blue."""
    grid = UTM.crop(Window(0, 0, 4, 6))
    labels = np.repeat([[0, 1, 2]], 4, axis=0).repeat(2, axis=1)
    pure = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    with MapWriter(tmp_path / "a.tif", grid, label_layer((1, 2, 7), ("red", "green", "blue"), pure)) as target:
        target.write(0, as_ids(labels, (1, 2, 7)))
    with rasterio.open(tmp_path / "a.tif") as source:
        table = np.array([source.colormap(1)[i][:3] for i in range(256)])
        np.testing.assert_array_equal(table[source.read(1)], np.array(pure)[labels])


@pytest.mark.parametrize("step", [1, 7, 256, 257, 300])
@pytest.mark.pitfall("P37")
def test_rows_in_any_portions_give_the_same_bytes(tmp_path: Path, step: int) -> None:
    labels = labels_for(UTM)
    one = save(tmp_path / "one.tif", labels, step=64)
    two = save(tmp_path / "two.tif", labels, step=step)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.pitfall("P36")
def test_more_than_4_gb_becomes_bigtiff(tmp_path: Path) -> None:
    """The header is decided when the file is made, so a few rows of a huge one are enough."""
    huge = Grid("EPSG:32633", UTM.transform, 300_000, 20_000)
    with pytest.raises(ValueError, match="never written"):
        _see_header(tmp_path / "a.tif", huge)
    assert save(tmp_path / "b.tif", labels_for(UTM)).read_bytes()[:4] == b"II\x2a\x00"
    assert names_in(tmp_path) == ["b.tif"]


def _see_header(path: Path, huge: Grid) -> None:
    with MapWriter(path, huge, layer_of()) as target:
        for row in (0, 256):
            target.write(row, np.full((1, 256, huge.width), 10, dtype=np.uint8))
        with next(path.parent.iterdir()).open("rb") as file:
            assert file.read(4) == b"II\x2b\x00"


# --- interruptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("rows", [0, 10, 260, 300])
@pytest.mark.parametrize("cog", [False, True], ids=["plain", "cog"])
@pytest.mark.pitfall("P37")
def test_an_interrupted_map_leaves_nothing(tmp_path: Path, error: BaseException, rows: int, cog: bool) -> None:
    with pytest.raises(type(error)):
        write_some(tmp_path / "a.tif", rows, error, cog)
    assert names_in(tmp_path) == []


@pytest.mark.pitfall("P37")
def test_an_interrupted_map_leaves_the_old_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", labels_for(UTM))
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_some(path, 270, RuntimeError("boom"), cog=False)
    assert names_in(tmp_path) == ["a.tif"]
    assert path.read_bytes() == before
    save(path, np.zeros((300, 400), dtype=np.int64))
    with LabelRaster(path, LabelMap(IDS, 255)) as raster:
        assert not raster.read(Window(0, 0, 300, 400)).any()


SCRIPT = """
import sys
import numpy as np
from vfmseg.errors import VfmsegError
from vfmseg.geo.grid import IDENTITY, Grid
from vfmseg.geo.layer import label_layer
from vfmseg.geo.writer import MapWriter

def save(path, height, width=300, cog=False):
    rows = np.random.default_rng(0).integers(0, 200, (1, height, width), dtype=np.uint8)
    rows[rows == 0] = 255
    layer = label_layer(range(200), [str(i) for i in range(200)], [(1, 2, 3)] * 200)
    with MapWriter(path, Grid(None, IDENTITY, height, width), layer, cog=cog) as target:
        for row in range(0, height, 100):
            yield row
            target.write(row, rows[:, row : row + 100])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.pitfall("P37")
def test_a_killed_process_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    code = SCRIPT + (
        "import os, signal\nfor row in save(sys.argv[1], 1000):\n"
        "    if row == 900:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not path.exists()
    assert all(name.startswith(".a.tif.") for name in names_in(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
@pytest.mark.parametrize("shape", ["400", "600, 700, True"], ids=["plain", "cog"])
@pytest.mark.pitfall("P37")
def test_full_disk_is_a_machine_error_and_leaves_nothing(tmp_path: Path, shape: str) -> None:
    """A limit on file size stops the disk after some bytes: in a write, in the last flush, or in the header.

    GDAL reports only the first of these three.
    """
    whole = tmp_path / "whole.tif"
    code = SCRIPT + f"list(save(sys.argv[1], {shape}))\n"
    subprocess.run([sys.executable, "-c", code, str(whole)], check=True)
    size = whole.stat().st_size
    whole.unlink()
    limits = [0, 1, 500, size // 3, size * 2 // 3, *range(size - 2600, size, 400), size - 1]
    enough = 2 * size if "True" in shape else size  # a COG is made of another file, which may be larger
    code = (
        SCRIPT
        + "import os, resource\nfor limit in map(int, sys.argv[2:]):\n"
        + "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        + f"    try:\n        list(save(sys.argv[1], {shape}))\n        print(limit, 'written')\n"
        + "    except VfmsegError as error:\n        print(limit, type(error).__name__, error)\n"
        + "        assert not os.listdir(os.path.dirname(sys.argv[1])), os.listdir(os.path.dirname(sys.argv[1]))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.tif"), *map(str, [*limits, enough])]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == [*limits, enough]
    for line in lines[:-1]:
        assert " MachineError " in line, line
        assert "a.tif: could not be written" in line
        assert "free space" in line
    assert lines[-1].endswith("written")  # the same file fits when the limit is its size
    assert names_in(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("where", ["create", "write", "copy", "sync", "rename"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RasterioIOError("write failed")],
    ids=["python", "gdal"],
)
@pytest.mark.pitfall("P37")
def test_disk_errors_at_any_step_are_machine_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    labels = labels_for(UTM)
    path = tmp_path / "a.tif"
    with pytest.raises(MachineError, match=r"a\.tif: could not be written \(") as caught:
        _save_and_fail(path, labels, monkeypatch, where, fail)
    assert caught.value.exit_code == 3
    assert names_in(tmp_path) == []


def _save_and_fail(path: Path, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch, where: str, fail: Any) -> None:
    if where == "create":
        monkeypatch.setattr(writer_module, "open_dataset", fail)
    elif where == "rename":
        monkeypatch.setattr(os, "replace", fail)
    elif where == "copy":
        monkeypatch.setattr(rasterio.shutil, "copy", fail)
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    with MapWriter(path, UTM, layer_of(), cog=where == "copy") as target:
        if where == "write":
            real, target._dataset = target._dataset, _Failing(fail)
            real.close()
        target.write(0, as_ids(labels))


class _Failing:
    """A data set whose disk is gone."""

    def __init__(self, fail: Any) -> None:
        self.write = self.close = fail


@pytest.mark.pitfall("P37")
def test_what_the_disk_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = files_module.flush

    def damage(path: Path) -> None:
        with rasterio.open(path, "r+") as target:
            target.write(np.full((1, 1, 1), 30, dtype=np.uint8), window=rasterio.windows.Window(399, 299, 1, 1))
        honest(path)

    monkeypatch.setattr(files_module, "flush", damage)
    with pytest.raises(MachineError, match="differs from what was written"):
        save(tmp_path / "a.tif", np.zeros((300, 400), dtype=np.int64))
    assert names_in(tmp_path) == []


# --- cloud-optimised ----------------------------------------------------------------------------------------

LARGE = Grid("EPSG:32631", (-0.0286, 2.4998, 593124.5, 2.4998, 0.0286, 5749208.25), 1100, 1300)


def layout_of(path: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as source:
            layout: str | None = source.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")
    return layout


@pytest.mark.parametrize("grid", [UTM, LARGE, Grid(None, IDENTITY, 1100, 600)], ids=["small", "turned", "no place"])
@pytest.mark.pitfall("P36")
def test_cog_holds_what_the_plain_map_holds(tmp_path: Path, grid: Grid) -> None:
    labels = labels_for(grid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = save(tmp_path / "plain.tif", labels, grid, tags={"vfmseg_recipe": "flood"})
        cog = save(tmp_path / "cog.tif", labels, grid, tags={"vfmseg_recipe": "flood"}, cog=True)
    assert names_in(tmp_path) == ["cog.tif", "plain.tif"]
    assert (layout_of(plain), layout_of(cog)) == (None, "COG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(plain) as one, rasterio.open(cog) as two:
            assert (two.crs, two.transform, two.nodata, two.dtypes) == (one.crs, one.transform, 255, one.dtypes)
            assert two.profile["compress"] == "deflate"
            assert one.tags().items() <= two.tags().items()
            assert two.colormap(1) == one.colormap(1)
            np.testing.assert_array_equal(two.read(), one.read())
            assert bool(two.overviews(1)) == (max(grid.height, grid.width) > 512)


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("cog", [False, True], ids=["plain", "cog"])
@pytest.mark.pitfall("P36")
def test_every_compression_holds_the_same_numbers(tmp_path: Path, compress: str, cog: bool) -> None:
    labels = labels_for(LARGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizes = []
        for level in (1, 9):
            path = save(tmp_path / "a.tif", labels, LARGE, level=level, cog=cog, compress=compress)
            sizes.append(path.stat().st_size)
    assert (sizes[0] > sizes[1]) == (compress != "lzw")
    with rasterio.open(path) as source:
        assert source.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == compress.upper()
        np.testing.assert_array_equal(source.read(), as_ids(labels))


@pytest.mark.pitfall("P62")
def test_a_compression_that_gdal_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="compress = 'zst'; did you mean 'zstd'"):
        save(tmp_path / "a.tif", labels_for(UTM), compress="zst")
    monkeypatch.setattr(compression_module, "_works", lambda name: name != "zstd")
    with pytest.raises(MachineError, match="compress = zstd: the GDAL of this machine was built without it"):
        save(tmp_path / "a.tif", labels_for(UTM), compress="zstd")
    assert names_in(tmp_path) == []


def test_whether_gdal_has_a_compression_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = compression_module._works.__wrapped__
    assert all(tried(name) for name in COMPRESSIONS)
    assert not tried("nonsense")  # GDAL would leave it out without an error

    def refuse() -> None:
        raise RasterioIOError("Cannot create TIFF file due to missing codec for ZSTD.")

    monkeypatch.setattr(compression_module, "MemoryFile", refuse)
    assert not tried("zstd")


@pytest.mark.parametrize("ids", [IDS, (-5, 7, 1000)], ids=["colours", "no colours"])
@pytest.mark.pitfall("P35")
def test_overviews_of_classes_hold_no_number_that_was_not_there(tmp_path: Path, ids: tuple[int, ...]) -> None:
    labels = labels_for(LARGE)
    with MapWriter(tmp_path / "a.tif", LARGE, label_layer(ids, NAMES, COLORS), cog=True) as target:
        target.write(0, as_ids(labels, ids))
    with rasterio.open(tmp_path / "a.tif") as source:
        assert source.overviews(1) == [2, 4]
        allowed = {*ids, int(source.nodata)}
    for level in (0, 1):
        with rasterio.open(tmp_path / "a.tif", overview_level=level) as source:
            seen = source.read(1)
        assert max(seen.shape) < 700
        assert set(np.unique(seen).tolist()) <= allowed


def test_overviews_of_shares_are_means_and_leave_nodata_out(tmp_path: Path) -> None:
    rows = np.zeros((1, LARGE.height, LARGE.width), dtype=np.uint8)
    rows[0, ::2, ::2] = 200
    rows[0, 1::2] = 100
    rows[0, 600:] = 255
    with MapWriter(tmp_path / "a.tif", LARGE, Layer("uint8", 255, ("share",), 1 / 254), cog=True) as target:
        target.write(0, rows)
    with rasterio.open(tmp_path / "a.tif", overview_level=0) as source:
        seen = source.read(1)
    assert (seen[:300] == 100).all()
    assert (seen[300:] == 255).all()


@pytest.mark.parametrize("cog", [False, True], ids=["plain", "cog"])
def test_bands_names_scale_and_nodata_are_read_back(tmp_path: Path, cog: bool) -> None:
    grid = UTM.crop(Window(0, 0, 600, 520))
    rows = np.random.default_rng(1).integers(0, 256, (3, 600, 520), dtype=np.uint8)
    layer = Layer("uint8", 255, NAMES, 1 / 254, {"vfmseg_recipe": "flood"})
    with MapWriter(tmp_path / "a.tif", grid, layer, cog=cog) as target:
        for row in range(0, 600, 90):
            target.write(row, rows[:, row : row + 90])
    assert names_in(tmp_path) == ["a.tif"]
    assert layout_of(tmp_path / "a.tif") == ("COG" if cog else None)
    with rasterio.open(tmp_path / "a.tif") as source:
        assert source.descriptions == NAMES
        assert source.scales == (1 / 254,) * 3
        assert source.nodatavals == (255,) * 3
        assert source.tags()["vfmseg_recipe"] == "flood"
        np.testing.assert_array_equal(source.read(), rows)
        np.testing.assert_array_equal(source.read(masked=True).mask, rows == 255)
    np.testing.assert_array_equal(read_map(tmp_path / "a.tif", Window(5, 6, 300, 9)), rows[:, 5:305, 6:15])


@pytest.mark.parametrize("cog", [False, True], ids=["plain", "cog"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.pitfall("P36")
def test_no_band_of_several_is_taken_for_a_colour_or_alpha(tmp_path: Path, count: int, cog: bool) -> None:
    grid = UTM.crop(Window(0, 0, 20, 30))
    with MapWriter(tmp_path / "a.tif", grid, Layer("uint8", 255, ("x",) * count, 1 / 254), cog=cog) as target:
        target.write(0, np.zeros((count, 20, 30), dtype=np.uint8))
    with rasterio.open(tmp_path / "a.tif") as source:
        assert not {ColorInterp.alpha, ColorInterp.red, ColorInterp.palette} & set(source.colorinterp)
        assert (source.read_masks() == 255).all()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.pitfall("P37")
def test_an_interruption_while_the_cog_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    copy = rasterio.shutil.copy

    def interrupted(*words: Any, **options: Any) -> None:
        copy(*words, **options)
        raise error

    path = save(tmp_path / "a.tif", labels_for(UTM))
    before = path.read_bytes()
    monkeypatch.setattr(rasterio.shutil, "copy", interrupted)
    with pytest.raises(type(error)):
        save(path, labels_for(UTM), cog=True)
    assert names_in(tmp_path) == ["a.tif"]
    assert path.read_bytes() == before


# --- several pieces as one ----------------------------------------------------------------------------------


@pytest.mark.pitfall("P36")
def test_a_mosaic_shows_its_pieces_in_place_and_nodata_between_them(tmp_path: Path) -> None:
    labels = labels_for(LARGE)
    stored = as_ids(labels)
    left, right = Window(0, 0, 1100, 500), Window(40, 700, 1000, 600)
    layer = layer_of()
    (tmp_path / "pieces").mkdir()
    for name, window in {"left": left, "right & low": right}.items():
        with MapWriter(tmp_path / "pieces" / f"{name}.tif", LARGE.crop(window), layer) as target:
            target.write(0, stored[:, window.rows, window.cols])
    text = mosaic(LARGE, layer, [("pieces/left.tif", left), ("pieces/right & low.tif", right)])
    (tmp_path / "all.vrt").write_text(text, encoding="utf-8")
    expected = np.full_like(stored, 255)
    for window in (left, right):
        expected[:, window.rows, window.cols] = stored[:, window.rows, window.cols]
    with rasterio.open(tmp_path / "all.vrt") as source, rasterio.open(tmp_path / "pieces" / "left.tif") as piece:
        np.testing.assert_array_equal(source.read(), expected)
        assert (source.nodata, source.dtypes, source.crs) == (255, ("uint8",), CRS.from_string("EPSG:32631"))
        assert tuple(source.transform)[:6] == LARGE.transform
        assert [source.colormap(1)[i] for i in IDS] == [piece.colormap(1)[i] for i in IDS]
        assert layer.tags.items() <= source.tags().items()


def test_a_mosaic_of_several_bands_keeps_names_scale_and_a_crs_without_a_code(tmp_path: Path) -> None:
    odd = CRS.from_string("+proj=laea +lat_0=47.3 +lon_0=8.5 +x_0=100 +y_0=200 +ellps=bessel +units=m")
    grid = Grid(odd.to_wkt(version="WKT2_2019"), UTM.transform, 20, 30)
    rows = np.random.default_rng(1).integers(0, 250, (3, 20, 12), dtype=np.uint8)
    layer, window = Layer("uint8", 255, NAMES, 1 / 254), Window(0, 18, 20, 12)
    with MapWriter(tmp_path / "p.tif", grid.crop(window), layer) as target:
        target.write(0, rows)
    (tmp_path / "all.vrt").write_text(mosaic(grid, layer, [("p.tif", window)]), encoding="utf-8")
    with rasterio.open(tmp_path / "all.vrt") as source:
        np.testing.assert_array_equal(source.read()[:, :, 18:], rows)
        assert (source.read()[:, :, :18] == 255).all()
        assert (source.descriptions, source.scales, source.crs) == (NAMES, (1 / 254,) * 3, odd)


@pytest.mark.parametrize("ids", [(0, 300), (-1, 5), (-40000, 5)], ids=["uint16", "int16", "int32"])
def test_a_mosaic_of_any_type_of_ids_opens(tmp_path: Path, ids: tuple[int, int]) -> None:
    layer = label_layer(ids, ("a", "b"), ((1, 2, 3), (4, 5, 6)))
    with MapWriter(tmp_path / "p.tif", UTM, layer) as target:
        target.write(0, as_ids(labels_for(UTM, 2), ids))
    (tmp_path / "all.vrt").write_text(mosaic(UTM, layer, [("p.tif", Window(0, 0, 300, 400))]), encoding="utf-8")
    with rasterio.open(tmp_path / "all.vrt") as one, rasterio.open(tmp_path / "p.tif") as two:
        assert (one.nodata, one.dtypes) == (two.nodata, two.dtypes)
        np.testing.assert_array_equal(one.read(), two.read())


@pytest.mark.pitfall("P62")
def test_a_damaged_piece_is_named_with_its_window(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", labels_for(UTM))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.tif: rows 200 to 299, columns 0 to 399 cannot be read: .*damaged"):
        read_map(path, Window(200, 0, 100, 400))


# --- wrong use ----------------------------------------------------------------------------------------------


@pytest.mark.pitfall("P62")
def test_rows_left_out_are_an_error_never_a_class(tmp_path: Path) -> None:
    labels = labels_for(UTM)
    with pytest.raises(ValueError, match="rows 290 to 299 of columns 0 to 399 were never written"):
        save(tmp_path / "a.tif", labels[:290], step=290)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("row", "shape"),
    [(0, (1, 5, 400)), (6, (1, 5, 400)), (5, (1, 5, 399)), (5, (1, 296, 400)), (5, (2, 5, 400)), (5, (5, 400))],
    ids=str,
)
@pytest.mark.pitfall("P62")
def test_rows_out_of_place_are_refused(tmp_path: Path, row: int, shape: tuple[int, ...]) -> None:
    target = MapWriter(tmp_path / "a.tif", UTM, layer_of())
    with pytest.raises(ValueError, match="not open"):
        target.write(0, np.zeros((1, 5, 400), dtype=np.uint8))
    with target:
        target.write(0, np.zeros((1, 5, 400), dtype=np.uint8))
        with pytest.raises(ValueError, match="from 5 on"):
            target.write(row, np.zeros(shape, dtype=np.uint8))
        with pytest.raises(ValueError, match="from column 256 on"):
            target.write(5, np.zeros((1, 5, 400), dtype=np.uint8), 256)
        target.write(5, np.zeros((1, 295, 400), dtype=np.uint8))  # a refused portion changes nothing
    assert names_in(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("cog", [False, True])
@pytest.mark.pitfall("P37")
def test_a_wide_map_may_come_in_strips(tmp_path: Path, cog: bool) -> None:
    labels = as_ids(labels_for(LARGE))
    with MapWriter(tmp_path / "a.tif", LARGE, layer_of(), cog=cog) as target:
        for first, end in ((0, 256), (256, 768), (768, LARGE.width)):
            for row in range(0, LARGE.height, 100):
                target.write(row, labels[:, row : row + 100, first:end], first)
    with rasterio.open(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(source.read(), labels)


@pytest.mark.pitfall("P62")
def test_strips_left_out_or_out_of_place_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    strip = np.zeros((1, 300, 256), dtype=np.uint8)
    with (
        pytest.raises(ValueError, match="columns 256 to 399 were never written"),
        MapWriter(path, UTM, layer_of()) as target,
    ):
        target.write(0, strip)
    with pytest.raises(ValueError, match="expected rows"), MapWriter(path, UTM, layer_of()) as target:
        target.write(0, strip[..., :200])  # not full blocks wide
    with MapWriter(path, UTM, layer_of()) as target:
        target.write(0, strip[:, :9])
        with pytest.raises(ValueError, match="expected rows"):
            target.write(9, strip[:, 9:], 256)  # rows of this strip at the column of the next
        target.write(9, strip[:, 9:])
        target.write(0, np.zeros((1, 300, 144), dtype=np.uint8), 256)
    for first, col in ((strip, 300), (strip[:, :299], 256)):  # a gap; rows are missing
        with MapWriter(path, UTM, layer_of()) as target:
            target.write(0, first)
            with pytest.raises(ValueError, match="expected rows"):
                target.write(0, np.zeros((1, 300, 400 - col), dtype=np.uint8), col)
            target.write(first.shape[1], strip[:, first.shape[1] :])
            target.write(0, np.zeros((1, 300, 144), dtype=np.uint8), 256)
    path.unlink()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("dtype", ["int64", "uint16", "int8", "float32"])
@pytest.mark.pitfall("P30")
def test_numbers_of_another_type_are_refused_never_wrapped(tmp_path: Path, dtype: str) -> None:
    rows = np.full((1, 300, 400), 100, dtype=dtype)
    with MapWriter(tmp_path / "a.tif", UTM, layer_of()) as target:
        with pytest.raises(ValueError, match=rf"of {dtype}; expected .* of uint8"):
            target.write(0, rows)
        target.write(0, rows.astype(np.uint8))


@pytest.mark.pitfall("P30")
def test_every_class_needs_a_name_and_a_colour() -> None:
    with pytest.raises(ValueError, match="as many of each"):
        label_layer(IDS, NAMES[:2], COLORS)
    with pytest.raises(ValueError, match="as many of each"):
        label_layer(IDS, NAMES, COLORS[:2])


@pytest.mark.parametrize("path", ["s3://bucket/labels.tif", "/vsis3/bucket/labels.tif", "/vsimem/labels.tif"])
@pytest.mark.pitfall("P63")
def test_paths_that_are_no_place_on_disk_make_no_folders_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"{path}: maps are written to this machine's disks only"):
        MapWriter(path, UTM, label_layer(IDS, NAMES, COLORS))
    assert names_in(tmp_path) == []


@pytest.mark.pitfall("P63")
def test_sidecars_of_an_overwritten_map_go_with_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", labels_for(UTM))
    for suffix in (".aux.xml", ".ovr", ".msk"):
        Path(f"{path}{suffix}").write_text("of the old map")
    other = tmp_path / "b.tif.aux.xml"
    other.write_text("of another map")
    save(path, labels_for(UTM))
    assert names_in(tmp_path) == ["a.tif", "b.tif.aux.xml"]


def test_targets_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "a.tif"):
        with pytest.raises(VfmsegError, match=str(path)) as caught:
            save(path, labels_for(UTM))
        assert isinstance(caught.value, DataError)
    assert names_in(tmp_path) == ["file"]


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)  # the administrator, as whom tests often run, may write anywhere
    with pytest.raises(DataError, match=r"a\.tif: cannot be created \(Permission denied: .*where you may write"):
        save(tmp_path / "a.tif", labels_for(UTM))
