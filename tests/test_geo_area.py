"""Areas of interest: a pixel is inside if its centre is, whoever asks, and a file that cannot say so is refused."""

from __future__ import annotations

import builtins
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterio.features import geometry_mask
from rasterio.transform import Affine
from rasterio.warp import transform

import vfmseg.vector.inside as inside_module
from vfmseg.errors import DataError, MachineError
from vfmseg.geo.grid import IDENTITY, Affine6, Grid, Window
from vfmseg.vector.area import read_area
from vfmseg.vector.inside import Polygons

UTM = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 300, 400)
TURNED = Grid("EPSG:32633", (6.0, 5.0, 500000.0, 8.0, -7.0, 5000000.0), 300, 400)
SOUTH_UP = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, 10.0, 4997000.0), 300, 400)
NOWHERE = Grid(None, IDENTITY, 300, 400)

Points = Sequence[tuple[float, float]]

OUTLINE: Points = [(40.3, 20.2), (350.7, 60.1), (250.2, 150.4), (380.9, 290.6), (30.4, 270.8)]
HOLE: Points = [(90.1, 80.3), (200.6, 100.2), (120.9, 210.7)]
ISLAND: Points = [(110.2, 110.4), (140.7, 115.3), (125.1, 140.2)]


def whole(grid: Grid) -> Window:
    return Window(0, 0, grid.height, grid.width)


def on(grid: Grid, ring: Points) -> list[list[float]]:
    """A closed ring of (column, row) in pixels as x, y of the grid."""
    return [list(grid.point(row, col)) for col, row in [*ring, ring[0]]]


def in_degrees(grid: Grid, ring: Points) -> list[list[float]]:
    xs, ys = zip(*on(grid, ring), strict=True)
    return [list(point) for point in zip(*transform(grid.crs, "OGC:CRS84", xs, ys), strict=True)]


def polygon(*rings: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def feature(geometry: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": {"name": "a"}, "geometry": geometry}


def collection(*geometries: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": [feature(geometry) for geometry in geometries]}


def utm(content: dict[str, Any], name: str = "urn:ogc:def:crs:EPSG::32633") -> dict[str, Any]:
    """The same with the `crs` member of 2008."""
    return {**content, "crs": {"type": "name", "properties": {"name": name}}}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def winding(ring: Points, cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Bool: whether points lie in a ring, by the angle that it turns around each of them."""
    corners = np.array(ring)[:, :, None, None] - np.stack([cols, rows])
    x, y = corners[:, 0], corners[:, 1]
    u, v = np.roll(x, -1, axis=0), np.roll(y, -1, axis=0)
    return np.abs(np.arctan2(x * v - y * u, x * u + y * v).sum(axis=0)) > np.pi


def centres_in(rings: Sequence[Points], height: int = 300, width: int = 400) -> np.ndarray:
    """Bool (height, width): pixels whose centre lies in the first ring and in none of the others."""
    rows, cols = np.indices((height, width)) + 0.5
    outline, *holes = (winding(ring, cols, rows) for ring in rings)
    return outline & ~np.any([np.zeros_like(outline), *holes], axis=0)


def mask_of(content: Any, tmp_path: Path, grid: Grid = UTM) -> np.ndarray:
    return read_area(write(tmp_path / "a.geojson", content), grid).mask(whole(grid))


# --- which pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [UTM, TURNED, SOUTH_UP, NOWHERE], ids=["north up", "turned", "south up", "nowhere"])
def test_a_pixel_is_inside_if_its_centre_is(tmp_path: Path, grid: Grid) -> None:
    expected = centres_in([OUTLINE, HOLE])
    assert 0.2 < expected.mean() < 0.8
    content = utm(polygon(on(grid, OUTLINE), on(grid, HOLE)))
    np.testing.assert_array_equal(mask_of(content, tmp_path, grid), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 29), st.floats(-9, 29)), min_size=3, max_size=3))
def test_any_triangle_agrees_with_shapely(ring: list[tuple[float, float]]) -> None:
    shapely = pytest.importorskip("shapely")
    grid = Grid(None, IDENTITY, 20, 20)
    rows, cols = np.indices((20, 20)) + 0.5
    shape = shapely.Polygon(ring)
    with np.errstate(divide="ignore"):  # two corners in one place
        clear = shapely.distance(shape.boundary, shapely.points(cols, rows)) > 1e-6  # on the edge both are right
    expected = shapely.contains_xy(shape, cols, rows)
    try:
        found = Polygons([[np.array(ring, dtype=np.float64)]], grid, "triangle").mask(whole(grid))
    except DataError:
        found = np.zeros((20, 20), dtype=bool)
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_a_rectangle_takes_centres_not_pixels_that_it_touches(tmp_path: Path) -> None:
    expected = np.zeros((300, 400), dtype=bool)
    expected[10:20, 5:9] = True
    for west, north in ((50.0, 100.0), (54.9, 104.9), (45.1, 95.1)):
        area = (500000 + west, 5000000 - north - 100, 500000 + west + 40, 5000000 - north)
        np.testing.assert_array_equal(read_area(area, UTM).mask(whole(UTM)), expected)


STRAIGHT = st.tuples(st.integers(0, 1200), st.integers(0, 1200))


@settings(max_examples=60, deadline=None)
@given(
    ring=st.lists(STRAIGHT, min_size=3, max_size=7),
    unit=st.sampled_from([1.0, 0.5, 1 / 3]),
    place=st.sampled_from([IDENTITY, (0.1, 0.0, 500000.3, 0.0, -0.1, 5000000.7), (1 / 3, 0.0, 0.0, 0.0, -1 / 3, 0.0)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_window_gets_the_answer_of_the_whole(
    ring: list[tuple[int, int]], unit: float, place: Affine6, seed: int
) -> None:
    # corners and edges on centres of pixels, where the answer hangs on rounding
    grid = Grid(None, place, 600, 700)
    points = np.array([grid.point(row * unit + 0.5, col * unit + 0.5) for col, row in ring])
    try:
        area = Polygons([[points]], grid, "ring")
    except DataError:
        return
    mask = area.mask(whole(grid))
    assert mask.any()
    random = np.random.default_rng(seed)
    padded = np.pad(mask, 300)
    for _ in range(8):
        (row, col), (height, width) = random.integers(-150, 600, 2).tolist(), random.integers(1, 290, 2).tolist()
        window = Window(row, col, height, width)
        expected = padded[row + 300 : row + 300 + height, col + 300 : col + 300 + width]
        np.testing.assert_array_equal(area.mask(window), expected)
        assert area.touches(window) == expected.any()


def test_an_edge_through_a_centre_has_no_flaw_at_any_seam() -> None:
    # burnt window by window, GDAL answers differently for one pixel in some of these windows
    ring = np.array([(271.0, 129.0), (29.0, 205 + 2 / 3), (112 + 2 / 3, 90 + 2 / 3)])
    grid = Grid(None, IDENTITY, 300, 300)
    area = Polygons([[ring[:, ::-1]]], grid, "ring")
    mask = area.mask(whole(grid))
    for row in range(150, 250, 4):
        for col in range(50, 200, 4):
            np.testing.assert_array_equal(area.mask(Window(row, col, 50, 50)), mask[row : row + 50, col : col + 50])


def test_beyond_the_scene_nothing_is_inside() -> None:
    area = read_area((490000.0, 4990000.0, 510000.0, 5010000.0), UTM)
    mask = area.mask(Window(-5, -7, 320, 420))
    assert mask[5:305, 7:407].all()
    assert mask.sum() == 300 * 400
    assert not area.mask(Window(-600, 3, 10, 10)).any()
    assert not area.touches(Window(0, 400, 10, 10))


def test_touches_asks_for_pixels_not_for_boxes(tmp_path: Path) -> None:
    corner: Points = [(0.0, 0.0), (399.0, 0.0), (0.0, 299.0)]
    area = read_area(write(tmp_path / "a.geojson", utm(polygon(on(UTM, corner)))), UTM)
    assert area.touches(Window(0, 0, 50, 50))
    assert not area.touches(Window(250, 350, 50, 50))


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("holed", [False, True])
def test_areas_that_share_an_edge_share_no_pixel(step: int, holed: bool) -> None:
    """Edges along and through centres, either way round: each pixel is in one of two areas, on the side it should."""
    grid = Grid(None, IDENTITY, 12, 12)
    inner = np.array([(3.5, 2.5), (3.5, 8.5), (6.5, 8.5), (8.5, 6.5), (8.5, 2.5)])[::step]
    outer = np.array([(0.0, 0.0), (0.0, 12.0), (12.0, 12.0), (12.0, 0.0)])
    inner = np.roll(inner, (1 - step) // 2, axis=0)  # starts with the same point either way round
    if holed:
        around = [[outer, inner]]
    else:  # one ring that goes in along the second row and comes back along it
        way = np.array([(2.0, 0.0), (3.5, 2.5)])
        around = [[np.concatenate([outer, outer[:1], way, inner[1:], inner[:1], way[::-1]])]]
    one = Polygons([[inner[:, ::-1]]], grid, "inner").mask(whole(grid))
    other = Polygons([[ring[:, ::-1] for ring in rings] for rings in around], grid, "outer").mask(whole(grid))
    np.testing.assert_array_equal(one, ~other)
    assert one[3, 3:9].all()
    assert not one[3, 2]
    assert not one[8].any()


# --- many points --------------------------------------------------------------------------------------------


def off_the_edges(rings: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Bool (height, width): pixels whose centre is farther than a millionth of a pixel from every edge."""
    rows, cols = np.indices((height, width), dtype=np.float64) + 0.5
    clear = np.ones((height, width), dtype=bool)
    for ring in rings:
        for (y, x), (v, u) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            length = np.hypot(u - x, v - y) or np.inf  # two points in one place are no edge
            along = ((cols - x) * (u - x) + (rows - y) * (v - y)) / length
            across = ((cols - x) * (v - y) - (rows - y) * (u - x)) / length
            clear &= (length == np.inf) | (np.abs(across) > 1e-6) | (along < -1e-6) | (along > length + 1e-6)
    return clear


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    polygons=st.integers(1, 3),
    rings=st.integers(1, 3),
    points=st.integers(4, 20),
    spread=st.sampled_from([3, 30, 300]),
    unit=st.sampled_from([0.0, 0.5, 1.0]),
    turned=st.booleans(),
)
@example(seed=4060791, polygons=1, rings=2, points=15, spread=3, unit=0.5, turned=False)
def test_what_is_left_out_of_a_polygon_changes_no_pixel(
    seed: int, polygons: int, rings: int, points: int, spread: int, unit: float, turned: bool
) -> None:
    """Against the whole polygon: in each square to the last bit, in one piece where no edge meets a centre.

    Rings lie around a corner of squares, cross themselves and each other, and reach beyond the scene.
    """
    random = np.random.default_rng(seed)
    grid = Grid("EPSG:32633", TURNED.transform if turned else UTM.transform, 300, 560)
    area_of = [[random.normal(256, spread, (points, 2)) for _ in range(rings)] for _ in range(polygons)]
    for outline, *holes in area_of:
        for hole in holes:
            np.clip(hole, outline.min(axis=0), outline.max(axis=0), out=hole)  # beyond, they are none
    if unit:  # centres on edges
        area_of = [[np.round(ring / unit) * unit for ring in one] for one in area_of]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside_module, "_FEW", 0)
        try:
            area = Polygons([[np.stack(grid.point(*ring.T), axis=1) for ring in one] for one in area_of], grid, "a")
        except DataError:
            return
        mask = area.mask(whole(grid))
    placed = [[np.stack(grid.pixel(*grid.point(*ring.T)), axis=1) for ring in one] for one in area_of]
    for ring in (ring for one in placed for ring in one):
        ring[ring[:, 0] % 1 == 0.5, 0] -= 2.0**-20  # an edge along centres says nothing in a ring that crosses itself
    shapes = [polygon(*[np.concatenate([r, r[:1]])[:, ::-1].tolist() for r in one]) for one in placed]
    for row in range(0, 300, 256):
        for col in range(0, 560, 256):
            one = geometry_mask(shapes, (256, 256), Affine(1, 0, col, 0, 1, row), invert=True)
            found = mask[row : row + 256, col : col + 256]
            np.testing.assert_array_equal(found, one[: found.shape[0], : found.shape[1]])
    at_once = geometry_mask(shapes, (300, 560), Affine.identity(), invert=True)
    clear = off_the_edges([ring for one in placed for ring in one], 300, 560)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(mask[clear], at_once[clear])


def test_a_square_costs_its_own_part_of_an_outline_only(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []
    searched: list[int] = []
    burn, thin = inside_module.geometry_mask, inside_module._thinned

    def burnt(shapes: Any, *args: Any, **options: Any) -> np.ndarray:
        handed.append(sum(len(ring) for shape in shapes for ring in shape["coordinates"]))
        mask: np.ndarray = burn(shapes, *args, **options)
        return mask

    def thinned(rings: Any, box: np.ndarray) -> Any:
        searched.append(sum(map(len, rings)))
        return thin(rings, box)

    monkeypatch.setattr(inside_module, "geometry_mask", burnt)
    monkeypatch.setattr(inside_module, "_thinned", thinned)
    angle = np.linspace(0, 2 * np.pi, 50000, endpoint=False)
    radius = 1000 * np.random.default_rng(0).uniform(0.99, 1, 50000)
    ring = 1024 + radius[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    grid = Grid(None, IDENTITY, 2048, 2048)
    area = Polygons([[np.stack(grid.point(*ring.T), axis=1)]], grid, "ring")
    assert area.mask(whole(grid)).mean() == pytest.approx(np.pi / 4, abs=0.05)
    assert max(handed) < 50000 / 8  # a square holds a 16th of the outline or less, and edges that jump around it
    assert sum(handed) < 2 * 50000
    assert searched.count(50000) == 8  # once for each row of squares


# --- coordinate reference systems ---------------------------------------------------------------------------


def test_geojson_is_longitude_and_latitude(tmp_path: Path) -> None:
    content = polygon(in_degrees(UTM, OUTLINE), in_degrees(UTM, HOLE))
    # edges are straight in degrees, hardly so in metres
    wrong = mask_of(content, tmp_path) != centres_in([OUTLINE, HOLE])
    assert wrong.mean() < 1e-3


def test_long_edges_are_straight_in_the_system_of_the_file(tmp_path: Path) -> None:
    shapely = pytest.importorskip("shapely")
    grid = Grid("EPSG:32633", (100.0, 0.0, 300000.0, 0.0, -100.0, 7000000.0), 2000, 3000)
    ring = in_degrees(grid, [(40.2, 300.4), (2900.6, 290.3), (2800.1, 1900.7), (100.9, 1800.2)])
    rows, cols = np.random.default_rng(0).integers(0, (2000, 3000), (20000, 2)).T
    rows[:6000] = np.repeat([298, 280, 260, 240], 1500)  # the upper edge rises by tens of pixels in between
    x, y = transform(grid.crs, "OGC:CRS84", *grid.point(rows + 0.5, cols + 0.5))  # type: ignore[arg-type]
    expected = shapely.contains_xy(shapely.Polygon(ring), x, y)
    assert (expected != mask_of(polygon(ring), tmp_path, grid)[rows, cols]).mean() < 1e-3


def test_a_country_around_the_scene_covers_it(tmp_path: Path) -> None:
    world = polygon([[-180, -90], [180, -90], [180, 90], [-180, 90], [-180, -90]])
    assert mask_of(world, tmp_path).all()
    assert mask_of(polygon([[-60, -80], [120, -80], [120, 85], [-60, 85], [-60, -80]]), tmp_path).all()
    west_of_15_degrees = polygon([[-170, -80], [15, -80], [15, 85], [-170, 85], [-170, -80]])
    middle = Grid("EPSG:32633", (10.0, 0.0, 498000.0, 0.0, -10.0, 5000000.0), 300, 400)  # x = 500000 is 15 degrees
    mask = mask_of(west_of_15_degrees, tmp_path, middle)
    assert mask[:, :200].all()
    assert not mask[:, 200:].any()


def test_scene_across_the_antimeridian(tmp_path: Path) -> None:
    grid = Grid("EPSG:32660", (1000.0, 0.0, 800000.0, 0.0, -1000.0, 100000.0), 50, 100)
    parts = [polygon([[w, -5], [e, -5], [e, 5], [w, 5], [w, -5]]) for w, e in ((170, 180), (-180, -170))]
    assert mask_of(collection(*parts), tmp_path, grid).mean() > 0.99
    assert 0.2 < mask_of(parts[0], tmp_path, grid).mean() < 0.5


@pytest.mark.parametrize("name", ["urn:ogc:def:crs:EPSG::32633", "EPSG:32633", "urn:ogc:def:crs:OGC:1.3:CRS84"])
def test_the_old_crs_member_counts(tmp_path: Path, name: str) -> None:
    ring = in_degrees(UTM, OUTLINE) if "CRS84" in name else on(UTM, OUTLINE)
    expected = centres_in([OUTLINE])
    assert (mask_of(utm(collection(polygon(ring)), name), tmp_path) != expected).mean() < (
        1e-3 if "84" in name else 1e-9
    )


@pytest.mark.parametrize(
    ("crs", "message"),
    [
        ({"type": "name", "properties": {"name": "no such"}}, "cannot be brought from no such to the scene's EPSG"),
        ({"type": "link", "properties": {"href": "x"}}, "is not GeoJSON .*'name'.*a `crs`, if any, with a name"),
        ("EPSG:32633", "is not GeoJSON"),
    ],
)
def test_a_crs_that_says_nothing_is_refused(tmp_path: Path, crs: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.geojson: {message}"):
        mask_of({**polygon(on(UTM, OUTLINE)), "crs": crs}, tmp_path)


def test_metres_without_a_crs_are_refused_and_the_message_says_how_they_were_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.geojson \(taken as longitude and latitude\): none of its polygons"):
        mask_of(polygon(on(UTM, OUTLINE)), tmp_path)


# --- what a file may hold -----------------------------------------------------------------------------------


def test_geometry_feature_and_collection_are_the_same(tmp_path: Path) -> None:
    shape = polygon(on(UTM, OUTLINE), on(UTM, HOLE))
    expected = centres_in([OUTLINE, HOLE])
    deep = {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [0, 0]}, shape]}
    for content in (shape, feature(shape), collection(shape), deep, feature(deep), collection(None, deep)):
        np.testing.assert_array_equal(mask_of(utm(content), tmp_path), expected)


def test_multipolygon_with_a_hole_and_an_island_in_it(tmp_path: Path) -> None:
    content = {"type": "MultiPolygon", "coordinates": [[on(UTM, OUTLINE), on(UTM, HOLE)], [on(UTM, ISLAND)]]}
    expected = centres_in([OUTLINE, HOLE]) | centres_in([ISLAND])
    assert expected.sum() > centres_in([OUTLINE, HOLE]).sum()
    np.testing.assert_array_equal(mask_of(utm(content), tmp_path), expected)


def test_null_empty_and_other_geometries_are_passed_over(tmp_path: Path) -> None:
    line = {"type": "LineString", "coordinates": on(UTM, HOLE)}
    empty = [polygon(), polygon([]), {"type": "MultiPolygon", "coordinates": []}]
    shape = polygon(on(UTM, OUTLINE))
    mask = mask_of(utm(collection(None, line, *empty, shape, polygon(on(UTM, ISLAND)))), tmp_path)
    np.testing.assert_array_equal(mask, centres_in([OUTLINE]))


def test_heights_open_rings_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    ring = [[*point, 123.4] for point in on(UTM, OUTLINE)][:-1]
    path = write(tmp_path / "a.json", "\ufeff" + json.dumps(utm(polygon(ring))))
    np.testing.assert_array_equal(read_area(path, UTM).mask(whole(UTM)), centres_in([OUTLINE]))


def save_layer(path: Path, shapes: list[Any], crs: str | None = "EPSG:32633", **options: Any) -> Path:
    """Shapes of shapely as a layer of a GeoPackage."""
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no CRS
        pyogrio.raw.write(
            path, shapely.to_wkb(shapes), [np.arange(len(shapes))], ["n"], crs=crs, geometry_type="Unknown", **options
        )
    return path


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", None])
def test_geopackage(tmp_path: Path, crs: str | None) -> None:
    shapely = pytest.importorskip("shapely")
    place = in_degrees if crs == "EPSG:4326" else on
    shapes = [shapely.Polygon(place(UTM, OUTLINE), [place(UTM, HOLE)]), None, shapely.Polygon(place(UTM, ISLAND))]
    mask = read_area(save_layer(tmp_path / "a.gpkg", shapes, crs), UTM).mask(whole(UTM))
    wrong = mask != centres_in([OUTLINE, HOLE]) | centres_in([ISLAND])
    assert wrong.mean() < (1e-3 if crs == "EPSG:4326" else 1e-9)


def test_geopackage_with_a_table_of_styles_beside_the_layer(tmp_path: Path) -> None:
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    path = tmp_path / "a.gpkg"
    pyogrio.raw.write(path, None, [np.arange(2)], ["n"], layer="layer_styles")
    save_layer(path, [shapely.Polygon(on(UTM, OUTLINE))], layer="area", append=True)
    np.testing.assert_array_equal(read_area(path, UTM).mask(whole(UTM)), centres_in([OUTLINE]))
    save_layer(path, [shapely.Polygon(on(UTM, ISLAND))], layer="more", append=True)
    with pytest.raises(DataError, match=r"a\.gpkg: has 2 layers with geometries \(area, more\); expected one; export"):
        read_area(path, UTM)


def test_geopackage_of_lines_or_tables_only(tmp_path: Path) -> None:
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    with pytest.raises(DataError, match=r"lines\.gpkg: holds no polygon among its 1 features"):
        read_area(save_layer(tmp_path / "lines.gpkg", [shapely.LineString(on(UTM, HOLE))]), UTM)
    pyogrio.raw.write(tmp_path / "table.gpkg", None, [np.arange(2)], ["n"])
    with pytest.raises(DataError, match=r"table\.gpkg: has 0 layers"):
        read_area(tmp_path / "table.gpkg", UTM)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not GeoJSON"),
        ('{"type": "FeatureColl', "is not GeoJSON"),
        ("[1, 2]", "is not GeoJSON"),
        ('"text"', "is not GeoJSON"),
        ("{}", "is not GeoJSON .*'type'.*expected a FeatureCollection, Feature or geometry"),
        ({"type": "FeatureCollection"}, "is not GeoJSON .*'features'"),
        ({"type": "FeatureCollection", "features": None}, "is not GeoJSON"),
        ({"type": "FeatureCollection", "features": [None]}, "is not GeoJSON"),
        ({"type": "Feature"}, "is not GeoJSON .*'geometry'"),
        ({"type": "FeatureCollection", "features": []}, "holds no polygon among its 0 features"),
        (collection(None), "holds no polygon among its 1 features"),
        ({"type": "LineString", "coordinates": [[15, 45], [16, 45]]}, "holds no polygon"),
        (collection(None, {"type": "Polygon"}), r"feature 2: is no GeoJSON geometry \(KeyError.*repair"),
        (collection("Polygon"), "feature 1: is no GeoJSON geometry"),
        (polygon([["a", 1], [1, 2], [2, 3], ["a", 1]]), "feature 1: is no GeoJSON geometry"),
        (polygon([[1, 2], [3], [4, 5]]), "feature 1: is no GeoJSON geometry"),
        ({"type": "Polygon", "coordinates": 7}, "feature 1: is no GeoJSON geometry"),
        ({"type": "MultiPolygon", "coordinates": [[[1, 2], [3, 4], [5, 6]]]}, "feature 1: is no GeoJSON geometry"),
        (polygon([[1, 2], [3, 4]]), r"feature 1: a ring of 2 points is no polygon; expected 3 or more"),
        (polygon([[1], [2], [3]]), "feature 1: a ring of 3 points is no polygon"),
        (
            '{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 3], [4, 5]]]}',
            "feature 1: a ring of 3 points is no polygon",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "a.geojson", content)
    with pytest.raises(DataError, match=rf"{path}: {message}"):
        read_area(path, UTM)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    pytest.importorskip("pyogrio")
    with pytest.raises(DataError, match=r"none\.gpkg: there is no such file; expected polygons"):
        read_area(str(tmp_path / "none.gpkg"), UTM)
    for content in ("", "text"):
        with pytest.raises(DataError, match=r"a\.gpkg: cannot be read as a vector file"):
            read_area(write(tmp_path / "a.gpkg", content), UTM)
    (tmp_path / "b.geojson").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"b\.geojson: is not GeoJSON"):
        read_area(tmp_path / "b.geojson", UTM)


@pytest.mark.parametrize(
    "bounds",
    [
        (500100, 4999000, 500000, 5000000),
        (500000, 5000000, 500100, 4999000),
        (0, 0, 0, 1),
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        (float("nan"), 0, 1, 1),
        (0, 0, float("inf"), 1),
    ],
)
def test_bounds_that_bound_nothing(bounds: Any) -> None:
    with pytest.raises(DataError, match="expected west, south, east, north with west < east and south < north"):
        read_area(bounds, UTM)


@pytest.mark.parametrize(
    "bounds",
    [
        (600000, 4990000, 600100, 4990100),  # beside the scene
        (500001, 4999991, 500004, 4999994),  # within one pixel, off its centre
        (490000, 4999000, 500004, 5000000),  # less than half a pixel of the first column
    ],
)
def test_an_area_without_a_pixel_is_refused(bounds: Any) -> None:
    with pytest.raises(
        DataError, match=r"bounds \[.*none of its polygons holds the centre of a pixel of the scene; check"
    ):
        read_area(bounds, UTM)


def test_an_area_whose_box_only_meets_the_scene_is_refused(tmp_path: Path) -> None:
    around: Points = [(-50, -50), (450, -50), (450, 350), (440, 350), (440, -40), (-50, -40)]
    with pytest.raises(DataError, match="none of its polygons"):
        mask_of(utm(polygon(on(UTM, around))), tmp_path)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] in ("pyogrio", "shapely"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    mask_of(utm(polygon(on(UTM, OUTLINE))), tmp_path)  # GeoJSON needs neither
    with pytest.raises(MachineError, match=r"a\.gpkg: .*pip install 'vfmseg\[vector\]'; GeoJSON needs neither"):
        read_area(write(tmp_path / "a.gpkg", "x"), UTM)
