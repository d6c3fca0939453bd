"""Label files: complete under their final name or not there at all, and readable by any GIS."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioIOError

from vfmseg.errors import DataError, MachineError, VfmsegError
from vfmseg.geo import writer as writer_module
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.labels import IGNORE, LabelMap, LabelRaster
from vfmseg.geo.writer import LabelWriter, label_type

UTM = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 300, 400)
IDS = (10, 30, 100)
NAMES = ("land", "wetland, flooded", "Fluß")
COLORS = ((200, 180, 100), (0, 0, 255), (255, 0, 0))


def labels_for(grid: Grid, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(-1, classes, (grid.height, grid.width))


def save(path: Path, labels: np.ndarray, grid: Grid = UTM, step: int = 64, **options: Any) -> Path:
    with LabelWriter(path, grid, IDS, NAMES, COLORS, **options) as target:
        for row in range(0, grid.height, step):
            target.write(row, labels[row : row + step])
    return path


def write_some(path: Path, rows: int, error: BaseException) -> None:
    """Begin a map, write some of its rows, and be interrupted."""
    with LabelWriter(path, UTM, IDS, NAMES, COLORS) as target:
        target.write(0, labels_for(UTM)[:rows])
        raise error


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is in the file ------------------------------------------------------------------------------------


def test_p36_file_carries_place_classes_colours_and_legal_nodata(tmp_path: Path) -> None:
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
def test_p36_any_grid_survives_silently(tmp_path: Path, grid: Grid) -> None:
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
def test_p36_nodata_fits_the_type_and_is_no_class(tmp_path: Path, ids: tuple[int, ...], dtype: str) -> None:
    grid = UTM.crop(Window(0, 0, 1, len(ids) + 1))
    labels = np.array([[IGNORE, *range(len(ids))]])
    colors = [(i, 2 * i, 3 * i) for i in range(len(ids))]
    with LabelWriter(tmp_path / "a.tif", grid, ids, [str(i) for i in ids], colors) as target:
        target.write(0, labels)
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


def test_ids_beyond_32_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not fit 32 bits"):
        LabelWriter(tmp_path / "a.tif", UTM, (0, 2**31), ("a", "b"), ((0, 0, 0), (1, 1, 1)))


def test_c22_pure_colours_belong_to_their_classes(tmp_path: Path) -> None:
    """Seen in colour, as a GIS shows it, class red is red and class blue is blue."""
    grid = UTM.crop(Window(0, 0, 4, 6))
    labels = np.repeat([[0, 1, 2]], 4, axis=0).repeat(2, axis=1)
    pure = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    with LabelWriter(tmp_path / "a.tif", grid, (1, 2, 7), ("red", "green", "blue"), pure) as target:
        target.write(0, labels)
    with rasterio.open(tmp_path / "a.tif") as source:
        table = np.array([source.colormap(1)[i][:3] for i in range(256)])
        np.testing.assert_array_equal(table[source.read(1)], np.array(pure)[labels])


@pytest.mark.parametrize("step", [1, 7, 256, 257, 300])
def test_p37_rows_in_any_portions_give_the_same_bytes(tmp_path: Path, step: int) -> None:
    labels = labels_for(UTM)
    one = save(tmp_path / "one.tif", labels, step=64)
    two = save(tmp_path / "two.tif", labels, step=step)
    assert one.read_bytes() == two.read_bytes()


def test_p36_more_than_4_gb_becomes_bigtiff(tmp_path: Path) -> None:
    """The header is decided when the file is made, so a few rows of a huge one are enough."""
    huge = Grid("EPSG:32633", UTM.transform, 300_000, 20_000)
    with pytest.raises(ValueError, match="never written"):
        _see_header(tmp_path / "a.tif", huge)
    assert save(tmp_path / "b.tif", labels_for(UTM)).read_bytes()[:4] == b"II\x2a\x00"
    assert names_in(tmp_path) == ["b.tif"]


def _see_header(path: Path, huge: Grid) -> None:
    with LabelWriter(path, huge, IDS, NAMES, COLORS) as target:
        for row in (0, 256):
            target.write(row, np.zeros((256, huge.width), dtype=np.int64))
        with next(path.parent.iterdir()).open("rb") as file:
            assert file.read(4) == b"II\x2b\x00"


# --- interruptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("rows", [0, 10, 260, 300])
def test_p37_an_interrupted_map_leaves_nothing(tmp_path: Path, error: BaseException, rows: int) -> None:
    with pytest.raises(type(error)):
        write_some(tmp_path / "a.tif", rows, error)
    assert names_in(tmp_path) == []


def test_p37_an_interrupted_map_leaves_the_old_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", labels_for(UTM))
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_some(path, 270, RuntimeError("boom"))
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
from vfmseg.geo.writer import LabelWriter

def save(path, height):
    rows = np.random.default_rng(0).integers(-1, 200, (height, 300))
    ids = range(200)
    with LabelWriter(path, Grid(None, IDENTITY, height, 300), ids, [str(i) for i in ids], [(1, 2, 3)] * 200) as target:
        for row in range(0, height, 100):
            yield row
            target.write(row, rows[row : row + 100])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_p37_a_killed_process_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
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
def test_p37_full_disk_is_a_machine_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size stops the disk after some bytes: in a write, in the last flush, or in the header.

    GDAL reports only the first of these three.
    """
    whole = tmp_path / "whole.tif"
    code = SCRIPT + "list(save(sys.argv[1], 400))\n"
    subprocess.run([sys.executable, "-c", code, str(whole)], check=True)
    size = whole.stat().st_size
    whole.unlink()
    limits = [0, 1, 500, size // 3, size * 2 // 3, *range(size - 2600, size, 400), size - 1]
    code = (
        SCRIPT
        + "import resource\nfor limit in map(int, sys.argv[2:]):\n"
        + "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        + "    try:\n        list(save(sys.argv[1], 400))\n        print(limit, 'written')\n"
        + "    except VfmsegError as error:\n        print(limit, type(error).__name__, error)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.tif"), *map(str, [*limits, size])]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == [*limits, size]
    for line in lines[:-1]:
        assert " MachineError " in line, line
        assert "a.tif: could not be written" in line
        assert "free space" in line
    assert lines[-1].endswith("written")  # the same file fits when the limit is its size
    assert names_in(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("where", ["create", "write", "sync", "rename"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RasterioIOError("write failed")],
    ids=["python", "gdal"],
)
def test_p37_disk_errors_at_any_step_are_machine_errors(
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
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    with LabelWriter(path, UTM, IDS, NAMES, COLORS) as target:
        if where == "write":
            real, target._dataset = target._dataset, _Failing(fail)
            real.close()
        target.write(0, labels)


class _Failing:
    """A data set whose disk is gone."""

    def __init__(self, fail: Any) -> None:
        self.write = self.close = fail


def test_p37_what_the_disk_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = writer_module._sync

    def damage(path: Path) -> None:
        with rasterio.open(path, "r+") as target:
            target.write(np.full((1, 1, 1), 30, dtype=np.uint8), window=rasterio.windows.Window(399, 299, 1, 1))
        honest(path)

    monkeypatch.setattr(writer_module, "_sync", damage)
    with pytest.raises(MachineError, match="differs from what was written"):
        save(tmp_path / "a.tif", np.zeros((300, 400), dtype=np.int64))
    assert names_in(tmp_path) == []


# --- wrong use ----------------------------------------------------------------------------------------------


def test_p62_rows_left_out_are_an_error_never_a_class(tmp_path: Path) -> None:
    labels = labels_for(UTM)
    with pytest.raises(ValueError, match="rows 290 to 299 were never written"):
        save(tmp_path / "a.tif", labels[:290], step=290)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("row", "shape"), [(0, (5, 400)), (6, (5, 400)), (5, (5, 399)), (5, (296, 400)), (5, (5,))], ids=str
)
def test_p62_rows_out_of_place_are_refused(tmp_path: Path, row: int, shape: tuple[int, ...]) -> None:
    target = LabelWriter(tmp_path / "a.tif", UTM, IDS, NAMES, COLORS)
    with pytest.raises(ValueError, match="not open"):
        target.write(0, np.zeros((5, 400), dtype=np.int64))
    with target:
        target.write(0, np.zeros((5, 400), dtype=np.int64))
        with pytest.raises(ValueError, match="from 5 on"):
            target.write(row, np.zeros(shape, dtype=np.int64))
        target.write(5, np.zeros((295, 400), dtype=np.int64))  # a refused portion changes nothing
    assert names_in(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("wrong", [3, -2, 255])
def test_p30_indexes_beyond_the_classes_are_refused(tmp_path: Path, wrong: int) -> None:
    labels = labels_for(UTM)
    labels[70, 7] = wrong
    with pytest.raises(ValueError, match="expected -1 to 2"):
        save(tmp_path / "a.tif", labels)
    with pytest.raises(ValueError, match="as many of each"):
        LabelWriter(tmp_path / "a.tif", UTM, IDS, NAMES[:2], COLORS)
    assert names_in(tmp_path) == []


def test_p63_existing_file_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_text("precious")
    with pytest.raises(DataError, match=r"a\.tif: exists already"):
        save(path, labels_for(UTM), overwrite=False)
    assert path.read_text() == "precious"
    save(path, labels_for(UTM))
    assert names_in(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("path", ["s3://bucket/labels.tif", "/vsis3/bucket/labels.tif", "/vsimem/labels.tif"])
def test_p63_paths_that_are_no_place_on_disk_make_no_folders_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"{path}: maps are written to this machine's disks only"):
        LabelWriter(path, UTM, IDS, NAMES, COLORS)
    assert names_in(tmp_path) == []


def test_p63_sidecars_of_an_overwritten_map_go_with_it(tmp_path: Path) -> None:
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
