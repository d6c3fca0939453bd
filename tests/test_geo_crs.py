"""A height system beside a place changes no place: compound systems are compared by their horizontal part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from makers import write_raster
from rasterio.crs import CRS

from vfmseg.data.raster_scene import RasterScene
from vfmseg.errors import DataError
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.crs import same_ground, short_name
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.reader import Raster
from vfmseg.geo.warp import Warp
from vfmseg.vector.area import read_area
from vfmseg.vector.polygons import write_polygons

WITH_HEIGHTS = "EPSG:32633+5773"
LABELS = LabelMap((0, 1), 255)


def page_of(crs: str) -> str:
    return CRS.from_user_input(crs).to_wkt(version="WKT2_2019")


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [("EPSG:32633+5773", "EPSG:32633", True), ("EPSG:9518", "EPSG:4326", True), ("EPSG:4979", "EPSG:4326", True),
     ("EPSG:7415", "EPSG:28992", True), ("EPSG:32633+5773", "EPSG:32633+3855", True),
     ("EPSG:32633+5773", "EPSG:32634", False), ("EPSG:9518", "EPSG:4258", False)],
)  # fmt: skip
@pytest.mark.pitfall("F19")
def test_heights_are_not_compared(one: str, two: str, same: bool) -> None:
    for a, b in ((one, two), (two, one), (page_of(one), page_of(two))):
        assert same_ground(a, b) == same
        transform = (10.0, 0.0, 5.0, 0.0, -10.0, 45.0)
        assert Grid(a, transform, 4, 4).same_place(Grid(b, transform, 4, 4)) == same


@pytest.mark.pitfall("F19")
def test_an_image_with_heights_and_labels_without_are_one_scene(tmp_path: Path) -> None:
    image = write_raster(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8), crs=WITH_HEIGHTS)
    labels = write_raster(tmp_path / "b.tif", np.ones((8, 8), np.uint8))
    other = write_raster(tmp_path / "c.tif", np.ones((8, 8), np.uint8), crs="EPSG:32634+5773")
    kept = RasterFile(image).info.grid.crs
    assert kept is not None
    assert kept.startswith("COMP")  # a map of this scene keeps its system
    RasterScene("s", {"rgb": Raster(image)}, LabelRaster(labels, LABELS)).read(Window(0, 0, 8, 8))
    with pytest.raises(DataError, match=r"zone 33N \+ EGM96 height at .*zone 34N \+ EGM96 height at") as error:
        RasterScene("s", {"rgb": Raster(image)}, LabelRaster(other, LABELS))
    assert len(str(error.value).replace(str(tmp_path), "")) < 400
    with pytest.raises(DataError, match=r"in EPSG:32633 does not lie .* in WGS 84 / UTM zone 33N \+ EGM96 height"):
        Raster([image, write_raster(tmp_path / "d.tif", np.ones((8, 8), np.uint8), origin=(0, 0))]).read(
            Window(0, 0, 8, 8)
        )


@pytest.mark.pitfall("F19")
def test_an_area_and_outlines_of_a_scene_with_heights(tmp_path: Path) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    grid = Grid(page_of(WITH_HEIGHTS), (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 20, 20)
    ring = [[500050, 4999850], [500150, 4999850], [500150, 4999950], [500050, 4999950], [500050, 4999850]]
    crs = {"type": "name", "properties": {"name": "EPSG:32633"}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring], "crs": crs}))
    mask = read_area(tmp_path / "a.geojson", grid).mask(Window(0, 0, 20, 20))
    expected = np.zeros((20, 20), bool)
    expected[5:15, 5:15] = True
    np.testing.assert_array_equal(mask, expected)
    write_raster(tmp_path / "m.tif", mask.astype(np.uint8), crs=WITH_HEIGHTS)
    for suffix in (".gpkg", ".geojson"):
        assert write_polygons(tmp_path / "m.tif", tmp_path / f"m{suffix}") == 2
        assert pyogrio.read_info(tmp_path / f"m{suffix}")["features"] == 2


@pytest.mark.pitfall("F19")
def test_a_second_modality_without_heights_needs_no_projection() -> None:
    transform = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
    warp = Warp("b.tif", Grid("EPSG:32633", transform, 8, 8), Grid(page_of(WITH_HEIGHTS), transform, 6, 8))
    values = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    found, valid = warp.read(Window(0, 0, 6, 8), 1, lambda w: (values[:, w.rows, w.cols], np.ones(w.shape, dtype=bool)))
    assert valid.all()
    np.testing.assert_array_equal(found, values[:, :6])


@pytest.mark.pitfall("F19")
def test_names_in_messages_are_short() -> None:
    assert short_name(page_of(WITH_HEIGHTS)) == "WGS 84 / UTM zone 33N + EGM96 height"
    assert short_name("EPSG:32633") == "EPSG:32633"
    assert short_name(None) == "no CRS"
