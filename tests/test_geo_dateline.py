"""Around 180 degrees: an area, a second modality, shared ground and outlines are where they would be anywhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from vfmseg.errors import DataError
from vfmseg.geo.dateline import period
from vfmseg.geo.footprints import ground_shared
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.warp import Warp
from vfmseg.vector.area import read_area
from vfmseg.vector.polygons import write_polygons

Box = tuple[float, float, float, float]

PIXEL = 2.0**-9  # degrees: sums are exact, so that moving by whole turns changes no bit
WORLD = 40075016.68557848  # metres round the equator in EPSG:3857


def degrees(west: float, crs: str = "EPSG:4326", size: int = 128) -> Grid:
    return Grid(crs, (PIXEL, 0.0, west, 0.0, -PIXEL, -17.0), size, size)


def box(west: float, south: float, east: float, north: float) -> list[list[list[float]]]:
    return [[[west, south], [east, south], [east, north], [west, north], [west, south]]]


def area(path: Path, *boxes: Sequence[list[list[float]]], name: str | None = None) -> Path:
    content: dict[str, object] = {"type": "MultiPolygon", "coordinates": list(boxes)}
    if name is not None:
        content["crs"] = {"type": "name", "properties": {"name": name}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def mask(where: Path | Box, grid: Grid) -> np.ndarray:
    return read_area(where, grid).mask(Window(0, 0, grid.height, grid.width))


AREAS = {  # around 180, and the same as seen from a place where nothing comes round: 10 to the west
    "cut as RFC 7946 asks": ([box(179.95, -17.15, 180, -17.05), box(-180, -17.15, -179.95, -17.05)], (169.95, 170.05)),
    "east only": ([box(-179.99, -17.15, -179.95, -17.05)], (170.01, 170.05)),
    "running on": ([box(179.95, -17.15, 180.05, -17.05)], (169.95, 170.05)),
    "running on in the west": ([box(-180.05, -17.15, -179.95, -17.05)], (169.95, 170.05)),
    "jumping": ([box(179.95, -17.15, -179.95, -17.05)], (169.95, 170.05)),
    "a world": ([box(-180, -17.15, 180, -17.05)], (160.0, 180.0)),
}
SCENES = {
    "past 180": degrees(179.875),
    "past -180": degrees(-180.125),
    "in NAD83": degrees(179.875, "EPSG:4269"),
    "a turn on": degrees(539.875),
}


@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("kind", list(AREAS))
@pytest.mark.pitfall("F15")
def test_an_area_across_180_degrees_is_what_it_is_elsewhere(tmp_path: Path, kind: str, scene: str) -> None:
    around, (west, east) = AREAS[kind]
    expected = mask((west, -17.15, east, -17.05), degrees(169.875))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(mask(area(tmp_path / "a.geojson", *around), SCENES[scene]), expected)


@pytest.mark.parametrize("kind", list(AREAS))
@pytest.mark.pitfall("F15")
def test_so_is_it_in_a_projection_that_runs_past_180(tmp_path: Path, kind: str) -> None:
    around, _ = AREAS[kind]
    there = Grid("EPSG:32760", (100.0, 0.0, 809000.0, 0.0, -100.0, 8120000.0), 128, 128)
    here = Grid("EPSG:32758", there.transform, 128, 128)  # 12 degrees to the west
    wests = {"east only": (168.01, 168.05), "a world": (160.0, 176.0)}
    west, east = wests.get(kind, (167.95, 168.05))
    expected = mask(area(tmp_path / "b.geojson", box(west, -17.15, east, -17.05)), here)
    assert 0 < expected.mean() < 1
    found = mask(area(tmp_path / "a.geojson", *around), there)
    assert (found != expected).sum() <= 0.01 * expected.sum()  # long edges of a world are split elsewhere


@pytest.mark.pitfall("F15")
def test_longitudes_from_0_to_360_and_areas_from_minus_180(tmp_path: Path) -> None:
    grid = degrees(250.0)
    expected = mask((250.05, -17.15, 250.15, -17.05), grid)
    for where in (box(-109.95, -17.15, -109.85, -17.05), box(250.05, -17.15, 250.15, -17.05)):
        np.testing.assert_array_equal(mask(area(tmp_path / "a.geojson", where), grid), expected)
    np.testing.assert_array_equal(mask((-109.95, -17.15, -109.85, -17.05), grid), expected)


@pytest.mark.pitfall("F15")
def test_bounds_are_periodic_too() -> None:
    grid = degrees(179.875)
    expected = mask((179.95, -17.15, 180.05, -17.05), grid)
    np.testing.assert_array_equal(mask((-180.05, -17.15, -179.95, -17.05), grid), expected)
    np.testing.assert_array_equal(mask((179.95, -17.15, -179.95, -17.05), grid), expected)
    with pytest.raises(DataError, match="west < east"):
        mask((15.2, -17.15, 15.1, -17.05), grid)  # interchanged, not round the Earth


@pytest.mark.pitfall("F15")
def test_a_cylindrical_world_comes_round_as_well(tmp_path: Path) -> None:
    grid = Grid("EPSG:3857", (100.0, 0.0, WORLD / 2 - 5000.0, 0.0, -100.0, -1.9e6), 100, 100)
    here = Grid("EPSG:3857", (100.0, 0.0, -5000.0, 0.0, -100.0, -1.9e6), 100, 100)
    expected = mask(area(tmp_path / "b.geojson", box(-0.03, -17, 0.03, -16.85)), here)
    assert 0 < expected.mean() < 1
    cut = area(tmp_path / "a.geojson", box(179.97, -17, 180, -16.85), box(-180, -17, -179.97, -16.85))
    np.testing.assert_array_equal(mask(cut, grid), expected)
    mercator = box(-WORLD / 2 - 3000, -1.907e6, -WORLD / 2 + 3000, -1.903e6)
    found = mask(area(tmp_path / "m.geojson", mercator, name="EPSG:3857"), grid)
    np.testing.assert_array_equal(found, mask((-3000.0, -1.907e6, 3000.0, -1.903e6), here))


@pytest.mark.pitfall("F15")
def test_an_area_in_metres_lands_on_a_scene_in_degrees(tmp_path: Path) -> None:
    """PROJ gives 179.95 and then -179.95: the ring must not run round the Earth between them."""
    from rasterio.warp import transform

    xs, ys = transform("OGC:CRS84", "EPSG:32760", [179.95, 180.05, 180.05, 179.95], [-17.15, -17.15, -17.05, -17.05])
    ring = [list(point) for point in zip(xs, ys, strict=True)]
    expected = mask((179.95, -17.15, 180.05, -17.05), degrees(179.875))
    found = mask(area(tmp_path / "a.geojson", [[*ring, ring[0]]], name="EPSG:32760"), degrees(179.875))
    assert (found != expected).sum() <= 0.03 * expected.sum()  # its edges are straight in metres


@pytest.mark.pitfall("F15")
def test_holes_come_along(tmp_path: Path) -> None:
    ring, hole = box(179.95, -17.15, -179.95, -17.05)[0], box(-179.99, -17.12, -179.97, -17.08)[0]
    expected = mask((179.95, -17.15, 180.05, -17.05), degrees(179.875))
    expected &= ~mask((180.01, -17.12, 180.03, -17.08), degrees(179.875))
    np.testing.assert_array_equal(mask(area(tmp_path / "a.geojson", [ring, hole]), degrees(179.875)), expected)


@pytest.mark.pitfall("F15")
def test_wide_areas_stay_wide_and_metres_do_not_become_degrees(tmp_path: Path) -> None:
    middle = degrees(14.875)
    assert mask(area(tmp_path / "a.geojson", box(-170, -80, 100, 80)), middle).all()  # 270 degrees
    assert mask(area(tmp_path / "a.geojson", box(-180, -80, 180, 80)), middle).all()
    with pytest.raises(DataError, match="lead across the date line"):
        mask(area(tmp_path / "a.geojson", box(-179.9, -80, 179.9, 80)), middle)
    with pytest.raises(DataError, match="none of its polygons holds"):
        mask(area(tmp_path / "a.geojson", box(500, -80, 1500, 80)), middle)


@pytest.mark.pitfall("F15")
def test_an_area_round_a_pole_is_refused_where_it_has_no_outline(tmp_path: Path) -> None:
    polar = area(tmp_path / "a.geojson", box(-1e6, -1e6, 1e6, 1e6), name="EPSG:3031")
    with pytest.raises(DataError, match="goes round a pole"):
        mask(polar, Grid("EPSG:4326", (1.0, 0.0, -180.0, 0.0, -1.0, -60.0), 30, 360))


@pytest.mark.parametrize(
    ("crs", "turn"),
    [("EPSG:4326", 360.0), ("EPSG:4807", 400.0), ("EPSG:9518", 360.0), ("EPSG:3857", WORLD), ("EPSG:32660", None),
     ("EPSG:3035", None), ("EPSG:3031", None), ("ESRI:54009", None), (None, None)],
)  # fmt: skip
@pytest.mark.pitfall("F15")
def test_what_comes_round_after_how_much(crs: str | None, turn: float | None) -> None:
    assert period(crs) == (turn if turn is None else pytest.approx(turn, rel=1e-12))


@pytest.mark.pitfall("F15")
def test_shared_ground_is_found_across_180_degrees() -> None:
    here = degrees(179.875)
    for other in (degrees(-180.125), degrees(179.875, "EPSG:4269"), degrees(-180.125, "EPSG:4269")):
        assert ground_shared([here], [other])[0] == pytest.approx([1.0])
    beside = degrees(-180.0)  # covers the eastern half
    assert ground_shared([here], [beside])[0] == pytest.approx([0.5])
    utm = Grid("EPSG:32760", (100.0, 0.0, 800000.0, 0.0, -100.0, 8130000.0), 500, 500)
    assert ground_shared([degrees(179.875)], [utm])[0] > 0.9
    assert ground_shared([degrees(170.0)], [here])[0] == [0.0]


def warped(source: Grid, target: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes, as distance in degrees from 180, of a source seen on a target; and where it is valid."""
    lons = np.array([source.point(0, col + 0.5)[0] for col in range(source.width)])
    values = np.broadcast_to((lons % 360 - 180).astype(np.float32), (1, source.height, source.width))
    whole = Window(0, 0, target.height, target.width)
    found, valid = Warp("dsm.tif", source, target).read(
        whole, 1, lambda w: (values[:, w.rows, w.cols], np.ones(w.shape, dtype=bool))
    )
    return found[0], valid


@pytest.mark.parametrize("start", [-180.0, 0.0])
@pytest.mark.pitfall("F15")
def test_a_second_modality_lies_below_all_of_a_scene(start: float) -> None:
    source = Grid("EPSG:4326", (0.25, 0.0, start, 0.0, -0.25, 90.0), 720, 1440)
    for target in (degrees(179.875), degrees(-180.125), degrees(179.875, "EPSG:4269")):
        found, valid = warped(source, target)
        assert valid.all()
        truth = np.arange(target.width) * PIXEL + PIXEL / 2 - 0.125
        assert np.abs(found - truth).max() < 0.13  # the last half pixel of a file has no neighbour to go to
    utm = Grid("EPSG:32760", (100.0, 0.0, 809000.0, 0.0, -100.0, 8120000.0), 128, 128)
    found, valid = warped(source, utm)
    assert valid.all()
    assert found.min() < -0.05
    assert found.max() < 0.13


@pytest.mark.pitfall("F15")
def test_a_second_modality_from_0_to_360_lies_below_a_scene_from_minus_180() -> None:
    source = Grid("EPSG:4326", (PIXEL, 0.0, 249.875, 0.0, -PIXEL, -16.875), 256, 256)
    for crs in ("EPSG:4326", "EPSG:4269"):
        found, valid = warped(source, degrees(-110.0, crs))
        assert valid.all()
        np.testing.assert_allclose(found[0], 70 + (np.arange(128) + 0.5) * PIXEL, atol=1e-4)
    with pytest.raises(DataError, match="covers nothing"):
        warped(source, degrees(-111.0))


@pytest.mark.parametrize("west", [350.0, 530.0, -370.0, 179.0, -181.0, 250.0, 10.0])
@pytest.mark.pitfall("F15")
def test_outlines_in_geojson_lie_between_minus_180_and_180(tmp_path: Path, west: float) -> None:
    """Longitudes beyond 360 too, which GDAL loses."""
    shapely = pytest.importorskip("shapely")
    labels = np.full((1, 4, 20), 255, np.uint8)
    labels[0, 1:3, 1:19] = 1
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=1, height=4, width=20, dtype="uint8", nodata=255,
        crs="EPSG:4326", transform=Affine(1, 0, west, 0, -1, 10),
    ) as file:  # fmt: skip
        file.write(labels)
    assert write_polygons(tmp_path / "a.tif", tmp_path / "a.geojson") == 1
    (feature,) = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))["features"]
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    assert shape.is_valid
    assert -180 <= shape.bounds[0] < shape.bounds[2] <= 180
    assert shape.area == pytest.approx(36)
    lons = (np.arange(20) + 0.5 + west + 180) % 360 - 180
    np.testing.assert_array_equal(shapely.contains_xy(shape, lons, np.full(20, 8.5)), labels[0, 1] == 1)
