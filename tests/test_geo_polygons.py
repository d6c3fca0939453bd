"""Label maps as polygons: the same whatever the bands of rows, and a file that is complete or not there."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.warp import transform

pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")

from vfmseg.errors import DataError, MachineError  # noqa: E402
from vfmseg.geo.grid import IDENTITY, Grid  # noqa: E402
from vfmseg.geo.layer import Layer, label_layer  # noqa: E402
from vfmseg.geo.writer import MapWriter  # noqa: E402
from vfmseg.vector import polygons as module  # noqa: E402
from vfmseg.vector.polygons import write_polygons  # noqa: E402
from vfmseg.vector.tracing import trace  # noqa: E402
from vfmseg.vector.vectorfile import publish_polygons  # noqa: E402

TURN = (0.6, 0.5, 700.0, 0.8, -0.7, 300.0)
UTM = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
NAMES = {0: "ground", 1: "water, deep", 2: "Fluß", 300: "far id"}
N = 9  # stands for nodata in the maps below

RING = [
    [1, 1, 1, 1, 1],
    [1, 0, 0, 0, 1],
    [1, 0, 2, 0, 1],
    [1, 0, 0, 0, 1],
    [1, 1, 1, 1, 1],
]
PINCHED = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]
STEPS = [[1, 0], [0, 1], [1, 0]]


def comb(teeth: int = 6, height: int = 40) -> np.ndarray:
    """Teeth that hang from the top, and others that stand on the ground between them."""
    labels = np.zeros((height, 4 * teeth), dtype=np.int64)
    for i in range(teeth):
        labels[:-2, 4 * i] = 1
    labels[0] = 1
    return labels


def spiral(size: int = 33) -> np.ndarray:
    """One line of pixels that winds inwards with a gap of one pixel."""
    labels = np.zeros((size, size), dtype=np.int64)
    row, col, (dr, dc) = 0, 0, (0, 1)
    for length in [size - 1, *(n for n in range(size - 1, 1, -2) for _ in (0, 1))]:
        for _ in range(length):
            labels[row, col] = 1
            row, col = row + dr, col + dc
        dr, dc = dc, -dr
    return labels


def save(path: Path, labels: Any, place: Any = UTM, crs: str | None = "EPSG:32633") -> Path:
    """A label map as the package writes it; 9 becomes nodata."""
    labels = np.asarray(labels)
    layer = label_layer(tuple(NAMES), tuple(NAMES.values()), [(1, 2, 3)] * len(NAMES))
    stored = np.where(labels == N, layer.nodata, labels).astype(layer.dtype)
    with MapWriter(path, Grid(crs, place, *labels.shape), layer) as target:
        target.write(0, stored[None])
    return path


def load(path: Path) -> list[tuple[Any, int, str, float]]:
    """(polygon, class id, class name, area) of each feature."""
    meta, _, wkb, columns = pyogrio.raw.read(path)
    order = [list(meta["fields"]).index(name) for name in ("class_id", "class_name", "area")]
    return list(zip(shapely.from_wkb(wkb), *(columns[i].tolist() for i in order), strict=True))


def canonical(path: Path) -> Counter[tuple[str, int, str, float]]:
    """What is in a file, whatever the order of polygons and corners."""
    return Counter((shapely.normalize(shape).wkt, *rest) for shape, *rest in load(path))


def polygons_of(labels: Any, tmp_path: Path, **options: Any) -> list[tuple[Any, int, str, float]]:
    count = write_polygons(save(tmp_path / "a.tif", labels), tmp_path / "a.gpkg", **options)
    found = load(tmp_path / "a.gpkg")
    assert len(found) == count
    return found


def regions(labels: np.ndarray) -> Counter[tuple[int, int]]:
    """(class, pixels) of each 4-connected area, by flooding: what the polygons must be."""
    left = {(int(r), int(c)) for r, c in np.argwhere(labels != N)}
    found: Counter[tuple[int, int]] = Counter()
    while left:
        front = [left.pop()]
        value, size = int(labels[front[0]]), 0
        while front:
            row, col = front.pop()
            size += 1
            for place in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
                if place in left and labels[place] == value:
                    left.remove(place)
                    front.append(place)
        found[value, size] += 1
    return found


def painted(found: list[tuple[Any, int, str, float]], shape: tuple[int, int], place: Any) -> np.ndarray:
    """The polygons turned back into pixels by asking which holds each pixel's centre; 9 where none does."""
    labels = np.full(shape, N)
    grid = Grid(None, place, *shape)
    rows, cols = np.indices(shape).reshape(2, -1)
    x, y = grid.point(rows + 0.5, cols + 0.5)  # type: ignore[arg-type]
    for polygon, class_id, *_ in found:
        inside = shapely.contains_xy(polygon, x, y).reshape(shape)
        assert (labels[inside] == N).all(), "polygons overlap"
        labels[inside] = class_id
    return labels


@st.composite
def label_maps(draw: st.DrawFn) -> np.ndarray:
    """Noise of coarse or single pixels with holes of nodata: many areas that wind over many rows."""
    height, width, cell = draw(st.integers(1, 30)), draw(st.integers(1, 14)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from([(0, 1), (0, 1, 1, 1), (0, 1, 2, N), (1, N), (0, 2, 300)]))
    cells = random.choice(values, (height // cell + 1, width // cell + 1))
    return np.kron(cells, np.ones((cell, cell), dtype=np.int64))[:height, :width]


# --- which polygons -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(label_maps(), st.sampled_from([UTM, TURN]))
@example(np.array(RING), UTM)
@example(np.array(PINCHED), UTM)
@example(np.array(PINCHED)[::-1], TURN)
@example(spiral(), UTM)
@example(comb(), UTM)
def test_polygons_are_the_4_connected_areas_whatever_the_bands(labels: np.ndarray, place: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = save(folder / "a.tif", labels, place)
        files = {rows: folder / f"{rows}.gpkg" for rows in (10**6, 1, 7, 64)}
        counts = {write_polygons(path, target, rows=rows) for rows, target in files.items()}
        found = load(files[1])
        assert counts == {len(found)}
        assert all(canonical(target) == canonical(files[10**6]) for target in files.values())
    pixel = abs(place[0] * place[4] - place[1] * place[3])
    assert Counter((i, round(area / pixel)) for _, i, _, area in found) == regions(labels)
    np.testing.assert_array_equal(painted(found, labels.shape, place), labels)
    for polygon, class_id, class_name, area in found:
        assert polygon.geom_type == "Polygon"
        assert polygon.is_valid
        assert class_name == NAMES[class_id]
        assert area == pytest.approx(polygon.area, rel=1e-6)


def test_a_band_of_many_polygons_is_written_in_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.indices((40, 30)).sum(axis=0) % 2
    whole = {place: area for place, *_, area in polygons_of(labels, tmp_path)}
    for name in ("polygons", "tracing"):
        monkeypatch.setattr(f"vfmseg.vector.{name}._BATCH", 7)
    pieces = polygons_of(labels, tmp_path, rows=16)
    assert {place: area for place, *_, area in pieces} == whole
    assert len(pieces) == 1200


def test_what_is_complete_is_handed_on_before_the_next_band_is_read() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (60, 8)).astype(np.uint8)
    labels[20:50, 3] = 3
    tops: list[int] = []

    def bands() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for top in range(0, 60, 5):
            tops.append(top)
            yield labels[top : top + 5], np.ones((5, 8), dtype=bool)

    count = 0
    for polygons, _ in trace(bands(), 8):
        count += len(polygons)
        assert (shapely.bounds(polygons)[:, 3] >= tops[-1]).all()  # none that ended before this band waits until now
    assert count == regions(labels).total()
    assert tops == list(range(0, 60, 5))


@pytest.mark.parametrize("rows", [1, 2, 3, 1024])
def test_holes_survive(tmp_path: Path, rows: int) -> None:
    found = {i: (polygon, area) for polygon, i, _, area in polygons_of(RING, tmp_path, rows=rows)}
    assert {i: (len(polygon.interiors), area) for i, (polygon, area) in found.items()} == {
        1: (1, 1600.0),
        0: (1, 800.0),
        2: (0, 100.0),
    }
    # corners only where the outline turns: none is left where bands met
    assert {i: shapely.get_num_coordinates(polygon) for i, (polygon, _) in found.items()} == {1: 10, 0: 10, 2: 5}


@pytest.mark.parametrize("rows", range(1, 10))
def test_an_object_on_a_seam_counts_once(tmp_path: Path, rows: int) -> None:
    labels = np.full((9, 6), N)
    labels[2:7, 2:4] = 1
    ((polygon, *_, area),) = polygons_of(labels, tmp_path, rows=rows)
    assert area == 1000
    assert polygon.equals(shapely.box(500020, 4999930, 500040, 4999980))


@pytest.mark.parametrize("rows", [1, 4, 5, 1024])
@pytest.mark.parametrize("labels", [spiral(), comb(), comb()[::-1], spiral()[:, ::-1]], ids=["@", "m", "w", "@'"])
def test_what_crosses_seams_many_times_is_one_polygon(tmp_path: Path, labels: np.ndarray, rows: int) -> None:
    areas = [area for _, i, _, area in polygons_of(labels, tmp_path, rows=rows) if i == 1]
    assert areas == [100.0 * (labels == 1).sum()]


@pytest.mark.parametrize("rows", [1, 1024])
def test_pixels_that_share_a_corner_only_stay_apart(tmp_path: Path, rows: int) -> None:
    assert len(polygons_of(STEPS, tmp_path, rows=rows)) == 6


@pytest.mark.parametrize("rows", [1, 1024])
def test_nodata_gives_no_polygon(tmp_path: Path, rows: int) -> None:
    assert polygons_of(np.full((5, 4), N), tmp_path, rows=rows) == []
    labels = np.array([[N, 1, N], [N, N, N], [0, N, 1]])
    assert sorted(i for _, i, *_ in polygons_of(labels, tmp_path, rows=rows)) == [0, 1, 1]


def test_only_the_classes_asked_for(tmp_path: Path) -> None:
    assert [i for _, i, *_ in polygons_of(RING, tmp_path, classes=[2, 0])] in ([0, 2], [2, 0])
    with pytest.raises(DataError, match=r"a.tif: has no class 5, 7; choose among 0 \(ground\), 1 \(water, deep\)"):
        polygons_of(RING, tmp_path, classes=[5, 1, 7])


@pytest.mark.parametrize(("least", "left"), [(0.0, 3), (100.0, 3), (100.1, 2), (801.0, 1), (1601.0, 0)])
def test_min_area_is_in_square_units_of_whole_objects(tmp_path: Path, least: float, left: int) -> None:
    found = polygons_of(RING, tmp_path, min_area=least, rows=1)
    assert len(found) == left
    assert all(area >= least for *_, area in found)


def test_simplify_straightens_steps_and_keeps_the_area_of_the_pixels(tmp_path: Path) -> None:
    labels = np.tril(np.ones((20, 20), dtype=np.int64))
    labels[labels == 0] = N
    ((exact, *_, area),) = polygons_of(labels, tmp_path)
    ((slightly, *_),) = polygons_of(labels, tmp_path, simplify=3.0)
    ((simple, *_, same),) = polygons_of(labels, tmp_path, simplify=7.2, rows=3)  # a step is 10 / sqrt 2 = 7.07 high
    assert shapely.get_num_coordinates(exact) == shapely.get_num_coordinates(slightly) == 43
    assert shapely.get_num_coordinates(simple) <= 6
    assert area == same == exact.area
    assert shapely.hausdorff_distance(exact, simple) <= 7.2


@settings(max_examples=15, deadline=None)
@given(label_maps(), st.sampled_from([0.5, 1.2, 5.0, 100.0]))
def test_simplified_polygons_are_valid_and_as_many(labels: np.ndarray, tolerance: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = save(Path(name, "a.tif"), labels, IDENTITY, None)
        count = write_polygons(path, Path(name, "a.gpkg"), simplify=tolerance)
        found = load(Path(name, "a.gpkg"))
    assert count == len(found) == regions(labels).total()
    assert all(polygon.is_valid and not polygon.is_empty for polygon, *_ in found)


def test_broken_simplification_leaves_the_outline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bow = shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
    monkeypatch.setattr(shapely, "simplify", lambda shapes, *_, **__: np.full(len(shapes), bow))
    assert all(polygon.is_valid for polygon, *_ in polygons_of(RING, tmp_path, simplify=1.0))


# --- the file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gpkg", ".fgb", ".GPKG"])
@pytest.mark.parametrize(("place", "crs"), [(UTM, "EPSG:32633"), (TURN, "EPSG:3035"), (TURN, None), (IDENTITY, None)])
def test_the_file_carries_place_names_and_count(tmp_path: Path, suffix: str, place: Any, crs: str | None) -> None:
    target = tmp_path / "new" / "folder" / f"a{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        assert write_polygons(save(tmp_path / "a.tif", RING, place, crs), target) == 3
    info = pyogrio.read_info(target)
    assert info["features"] == 3
    assert info["geometry_type"] == "Polygon"
    assert [str(dtype) for dtype in info["dtypes"]] == ["int32", "object", "float64"]
    assert (None if info["crs"] is None else CRS.from_user_input(info["crs"])) == (crs and CRS.from_user_input(crs))
    assert {i: name for _, i, name, _ in load(target)} == {i: NAMES[i] for i in (0, 1, 2)}
    np.testing.assert_array_equal(painted(load(target), (5, 5), place), RING)
    assert [path.name for path in target.parent.iterdir()] == [f"a{suffix}"]


def test_crs_without_a_code_and_ids_without_names(tmp_path: Path) -> None:
    odd = CRS.from_string("+proj=laea +lat_0=47.3 +lon_0=8.5 +x_0=100 +y_0=200 +ellps=bessel +units=m")
    layer = Layer("int16", -32768)
    with MapWriter(tmp_path / "a.tif", Grid(odd.to_wkt(version="WKT2_2019"), UTM, 2, 2), layer) as writer:
        writer.write(0, np.array([[[-5, -5], [7, -32768]]], dtype=np.int16))
    assert write_polygons(tmp_path / "a.tif", tmp_path / "a.gpkg", classes=[-5, 7, 8]) == 2
    assert CRS.from_user_input(pyogrio.read_info(tmp_path / "a.gpkg")["crs"]) == odd
    assert {(i, name, area) for _, i, name, area in load(tmp_path / "a.gpkg")} == {(-5, "-5", 200.0), (7, "7", 100.0)}


def test_names_of_negative_and_long_ids(tmp_path: Path) -> None:
    layer = label_layer((-5, 30000), ("sea", "far"), [(0, 0, 0)] * 2)
    with MapWriter(tmp_path / "a.tif", Grid(None, IDENTITY, 1, 2), layer) as writer:
        writer.write(0, np.array([[[-5, 30000]]], dtype=layer.dtype))
    write_polygons(tmp_path / "a.tif", tmp_path / "a.gpkg")
    assert {i: name for _, i, name, _ in load(tmp_path / "a.gpkg")} == {-5: "sea", 30000: "far"}


@pytest.mark.parametrize("suffix", [".gpkg", ".fgb", ".geojson"])
def test_a_map_without_areas_gives_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / "a.tif", np.full((3, 3), N))
    assert write_polygons(path, tmp_path / f"a{suffix}") == 0
    assert pyogrio.read_info(tmp_path / f"a{suffix}", force_feature_count=True)["features"] == 0


@pytest.mark.parametrize(("place", "crs"), [(UTM, "EPSG:32633"), ((1e-4, 0, 12.0, 0, -1e-4, 47.0), "EPSG:4326")])
def test_geojson_is_in_longitude_and_latitude(tmp_path: Path, place: Any, crs: str) -> None:
    labels = np.array(RING).repeat(120, axis=0).repeat(120, axis=1)
    grid = Grid(crs, place, *labels.shape)
    assert write_polygons(save(tmp_path / "a.tif", labels, place, crs), tmp_path / "a.geojson", rows=100) == 3
    content = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))
    assert "crs" not in content or "CRS84" in json.dumps(content["crs"])
    shapes = {f["properties"]["class_id"]: shapely.from_geojson(json.dumps(f["geometry"])) for f in content["features"]}
    rows, cols = np.random.default_rng(0).integers(0, 600, (2, 4000))
    rows[:600], cols[:600] = 479, np.arange(600)  # beside a long straight edge
    x, y = transform(crs, "OGC:CRS84", *grid.point(rows + 0.5, cols + 0.5))  # type: ignore[arg-type]
    for class_id, shape in shapes.items():
        assert shape.exterior.is_ccw
        np.testing.assert_array_equal(shapely.contains_xy(shape, x, y), labels[rows, cols] == class_id)
    areas = {f["properties"]["class_id"]: f["properties"]["area"] for f in content["features"]}
    assert areas[2] == pytest.approx(120 * 120 * abs(place[0] * place[4]))  # in the map's units


def test_long_edges_follow_the_curve_that_they_are_in_degrees(tmp_path: Path) -> None:
    place = (100.0, 0.0, 300000.0, 0.0, -100.0, 7000000.0)
    write_polygons(save(tmp_path / "a.tif", np.zeros((4, 3000), dtype=int), place), tmp_path / "a.geojson")
    (feature,) = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))["features"]
    x, y = transform("EPSG:32633", "OGC:CRS84", np.linspace(300050, 599950, 3000), np.full(3000, 6999980.0))
    assert shapely.contains_xy(shapely.from_geojson(json.dumps(feature["geometry"])), x, y).all()


def test_geojson_holds_small_pixels(tmp_path: Path) -> None:
    place = (0.05, 0.0, 500000.0, 0.0, -0.05, 5000000.0)
    write_polygons(save(tmp_path / "a.tif", [[1]], place), tmp_path / "a.geojson")
    (feature,) = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))["features"]
    x, y = transform("OGC:CRS84", "EPSG:32633", *zip(*feature["geometry"]["coordinates"][0], strict=True))
    corners = {(round(a - 500000, 3), round(b - 5000000, 3)) for a, b in zip(x, y, strict=True)}
    assert {(round(20 * a, 1), round(20 * b, 1)) for a, b in corners} == {(0, 0), (1, 0), (1, -1), (0, -1)}


def test_geojson_is_cut_at_the_antimeridian(tmp_path: Path) -> None:
    place = (1000.0, 0.0, 800000.0, 0.0, -1000.0, 100000.0)
    write_polygons(save(tmp_path / "a.tif", np.ones((5, 100), dtype=int), place, "EPSG:32660"), tmp_path / "a.geojson")
    (feature,) = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))["features"]
    parts = shapely.from_geojson(json.dumps(feature["geometry"]))
    assert sorted(round(bound) for part in parts.geoms for bound in part.bounds[::2]) == [-180, -179, 180, 180]


@pytest.mark.parametrize(
    ("crs", "message"),
    [(None, "has no coordinate reference system"), ('LOCAL_CS["site",UNIT["metre",1]]', "has no way to degrees")],
)
def test_geojson_of_a_place_unknown_is_refused(tmp_path: Path, crs: str | None, message: str) -> None:
    path = save(tmp_path / "a.tif", RING, UTM, crs)
    with pytest.raises(DataError, match=rf"a\.tif: .*{message}.*write a\.gpkg instead"):
        write_polygons(path, tmp_path / "a.geojson")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A target that exists; it and nothing else is there after the failure."""
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "a.gpkg"
    target.write_bytes(b"old")
    yield target
    assert [path.name for path in target.parent.iterdir()] == ["a.gpkg"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), MemoryError()])
def test_an_error_midway_leaves_no_file(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write, calls = pyogrio.raw.write, []

    def fail(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error
        write(*args, **options)

    path = save(tmp_path / "a.tif", RING)
    monkeypatch.setattr(module, "_BATCH", 1)
    monkeypatch.setattr(pyogrio.raw, "write", fail)
    with pytest.raises(type(error)):
        write_polygons(path, old, rows=2)
    assert len(calls) == 3
    assert pyogrio.get_gdal_config_option("OGR_SQLITE_SYNCHRONOUS") is None


@pytest.mark.parametrize("where", ["write", "count", "sync"])
def test_errors_of_the_disk_are_ours(tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise pyogrio.errors.DataSourceError("disk is full") if where == "write" else OSError("disk is full")

    path, expected = save(tmp_path / "a.tif", RING), "disk is full"
    if where == "write":
        monkeypatch.setattr(pyogrio.raw, "write", fail)
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(pyogrio, "read_info", lambda *_, **__: {"features": 2})
        expected = "2 of 3 polygons arrived"
    with pytest.raises(MachineError, match=rf"a\.gpkg: could not be written \({expected}\); nothing was left"):
        write_polygons(path, old)


FULL = """
import resource, signal, sys
from pathlib import Path
from vfmseg.errors import MachineError
from vfmseg.vector.polygons import write_polygons
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    print(write_polygons(Path(sys.argv[1]), Path(sys.argv[2]), rows=32))
except MachineError as error:
    print("machine", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of the file size")
@pytest.mark.parametrize(("suffix", "share"), [(".gpkg", 0.5), (".fgb", 0.5), (".geojson", 0.5), (".geojson", 0.99)])
def test_a_full_disk_leaves_no_file(tmp_path: Path, suffix: str, share: float) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (100, 100))
    path, target = save(tmp_path / "a.tif", labels), tmp_path / "out" / f"a{suffix}"
    command = [sys.executable, "-c", FULL, str(path), str(target)]
    free = subprocess.run([*command, str(2**40)], capture_output=True, text=True, check=True)
    size = target.stat().st_size
    target.unlink()
    assert int(free.stdout) > 1000
    full = subprocess.run([*command, str(int(share * size))], capture_output=True, text=True, check=True)
    assert full.stdout.startswith(f"machine {target}: could not be written"), full.stdout + full.stderr
    assert list(target.parent.iterdir()) == []


def test_a_damaged_map_is_our_error_and_leaves_no_file(tmp_path: Path, old: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (600, 300))
    path = save(tmp_path / "a.tif", labels)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"a\.tif: .*damaged or cut short"):
        write_polygons(path, old, rows=64)


def test_journals_of_an_overwritten_package_go(tmp_path: Path) -> None:
    for suffix in ("-wal", "-shm", "-journal"):
        (tmp_path / f"a.gpkg{suffix}").write_bytes(b"of the old file")
    assert len(polygons_of(RING, tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gpkg", "a.tif"]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("a.shp", {}, r"a\.shp: polygons cannot be written as '\.shp'; expected \.gpkg, \.fgb, \.geojson"),
        ("a.gpkg", {"min_area": -1.0}, "min_area -1.0"),
        ("a.gpkg", {"min_area": float("nan")}, "min_area nan"),
        ("a.gpkg", {"simplify": -0.1}, "simplify -0.1"),
        ("a.gpkg", {"rows": 0}, "rows 0"),
        ("folder.gpkg", {}, "is a folder"),
        ("a.tif/a.gpkg", {}, "cannot be created"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, target: str, options: dict[str, Any], message: str) -> None:
    save(tmp_path / "a.tif", RING)
    (tmp_path / "folder.gpkg").mkdir()
    with pytest.raises(DataError, match=message):
        write_polygons(tmp_path / "a.tif", tmp_path / target, **options)


@pytest.mark.parametrize(
    ("dtype", "bands", "scale"), [("float32", 1, 1.0), ("uint32", 1, 1.0), ("uint8", 3, 1.0), ("uint8", 1, 1 / 254)]
)
def test_what_is_no_label_map_is_refused(tmp_path: Path, dtype: str, bands: int, scale: float) -> None:
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=3, height=3, count=bands, dtype=dtype, crs="EPSG:32633",
        transform=rasterio.Affine(*UTM),
    ) as target:  # fmt: skip
        target.scales = (scale,) * bands
        target.write(np.ones((bands, 3, 3), dtype=dtype))
    with pytest.raises(DataError, match=rf"holds {bands} band\(s\) of {dtype} .*expected a label map"):
        write_polygons(tmp_path / "a.tif", tmp_path / "a.gpkg")


@pytest.mark.parametrize("missing", ["pyogrio", "shapely"])
def test_a_missing_extra_is_named(tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return real(name, *args, **options)

    path = save(tmp_path / "a.tif", RING)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MachineError, match=r"a\.gpkg: .*pip install 'vfmseg\[vector\]'"):
        write_polygons(path, old)


@pytest.mark.parametrize(
    "lost",
    [
        "UPDATE gpkg_contents SET min_x = NULL",
        "UPDATE gpkg_ogr_contents SET feature_count = NULL",
        "DROP TRIGGER trigger_insert_feature_count_polygons",
    ],
)
@pytest.mark.pitfall("P37")
def test_a_geopackage_that_was_not_closed_is_never_published(tmp_path: Path, lost: str) -> None:
    """On a full disk GDAL may write all polygons, and fail in silence at what it writes when it closes the file."""
    target = tmp_path / "labels.gpkg"
    count = write_polygons(save(tmp_path / "labels.tif", RING), target)
    finished = target.rename(tmp_path / "finished ?#%.gpkg")
    publish_polygons(finished, target, count)  # as it is, it is whole
    target.rename(finished)
    with contextlib.closing(sqlite3.connect(finished)) as stored:
        stored.execute(lost)
        stored.commit()
    with pytest.raises(MachineError, match=r"its table of contents is not complete.*make room"):
        publish_polygons(finished, target, count)
    assert not target.exists()
