"""Names of files as people have them: long, with brackets, with a line break, not UTF-8."""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from makers import finished_run, toy_scene, write_raster

from vfmseg.data.from_table import scenes_from_table
from vfmseg.data.pairing import find, pair
from vfmseg.disk.files import unfit_name
from vfmseg.disk.paths import readings
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.grid import Grid
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.inference.output import Output
from vfmseg.inference.worklist import scenes_of
from vfmseg.predict import predict
from vfmseg.segmenter import Segmenter
from vfmseg.terminal import guarded
from vfmseg.vector.area import read_area
from vfmseg.vector.polygons import write_polygons

pytestmark = pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX systems only")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return Segmenter.from_pretrained(finished_run(tmp_path_factory.mktemp("names")) / "run" / "best")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# --- long names, and names that are no text -----------------------------------------------------------------


@pytest.mark.pitfall("F19")
def test_the_longest_name_that_is_taken_can_be_written(segmenter: Segmenter, tmp_path: Path) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - 30
    scene = str(write_raster(tmp_path / "s.tif", toy_scene(1, 40, 40)[0]))
    name = "n" * (most - len("_confidence.tif")) + ".tif"
    predict(segmenter, scene, Output(tmp_path / "out" / name, extras=("confidence",), cog=True))
    assert max(map(len, os.listdir(tmp_path / "out"))) == most
    with pytest.raises(DataError, match=f"has {most + 1} bytes.*expected at most {most}.*name the output shorter"):
        predict(segmenter, scene, Output(tmp_path / "new" / ("n" * (most - 3) + ".tif")))
    with pytest.raises(DataError, match="name the output shorter"):  # GeoJSON's ending is longer
        predict(segmenter, scene, Output(tmp_path / "new" / ("n" * (most - 4) + ".tif"), polygons=".geojson"))
    assert not (tmp_path / "new").exists()


@pytest.mark.pitfall("F19")
def test_a_long_name_ends_no_list(segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b" * 246, "c"):
        write_raster(tmp_path / "in" / f"{name}.tif", toy_scene(1, 40, 40)[0])
    scenes = scenes_of(str(tmp_path / "in"))
    assert scenes is not None
    records = predict(segmenter, scenes, Output(tmp_path / "out", polygons=".gpkg"))
    assert ["error" in record for record in records] == [False, True, False]
    assert "name has 250 bytes" in records[1]["error"]
    assert "not labelled: " in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["a.gpkg", "a.tif", "c.gpkg", "c.tif"]


@pytest.mark.pitfall("F19")
def test_other_long_names_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: (tmp_path / ("x" * 300)).mkdir()) == 2
    assert "File name too long; choose a shorter name" in capsys.readouterr().err
    assert unfit_name(Path("labels.tif")) is None
    assert "name has 226 bytes" in str(unfit_name(tmp_path / "nowhere" / ("é" * 111 + ".tif")))


@pytest.mark.pitfall("F19")
def test_a_name_that_is_not_utf_8_is_one_message(segmenter: Segmenter, tmp_path: Path) -> None:
    scene = os.fsencode(write_raster(tmp_path / "s.tif", toy_scene(1, 40, 40)[0]))
    name = os.fsdecode(scene.replace(b"s.tif", b"caf\xe9.tif"))
    try:
        os.rename(scene, name)
    except OSError:
        pytest.skip("this disk holds no such names")
    with pytest.raises(DataError, match=r"is not UTF-8.*rename it"):
        RasterFile(name).info  # noqa: B018
    with pytest.raises(DataError, match=r"is not UTF-8.*choose another name"):
        predict(segmenter, "s.tif", Output(name))


# --- line breaks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\rb", "folder\n/a"])
@pytest.mark.pitfall("F19")
def test_a_line_break_is_no_full_disk(segmenter: Segmenter, tmp_path: Path, name: str) -> None:
    scene = str(write_raster(tmp_path / f"{name}.tif", toy_scene(1, 40, 40)[0]))
    target = tmp_path / "out" / f"{name}.tif"
    with pytest.raises(DataError, match=r"holds a line break or a tab, which pyogrio takes out.*without"):
        predict(segmenter, scene, Output(target, polygons=".gpkg"))
    assert not target.exists()
    predict(segmenter, scene, Output(target))
    assert target.is_file()
    with pytest.raises(DataError, match="holds a line break"):
        write_polygons(target, target.with_suffix(".gpkg"))
    with pytest.raises(DataError, match="holds a line break"):
        read_area(tmp_path / f"{name}.gpkg", Grid("EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), 4, 4))


# --- brackets -------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("F19")
def test_a_folder_with_brackets_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(
        tmp_path, "data[1]/img/a.tif", "data[1]/img/b.tif", "data[1]/lab/a.png", "data[1]/lab/b.png", "data1/img/c.tif"
    )
    place = tmp_path / "data[1]"
    images, labels = (find(str(place / pattern), "data.train") for pattern in ("img/*.tif", "*/[ab].png"))
    assert [file.stem for file in images] == ["a", "b"]
    assert [p.name for p in pair({"rgb": images}, labels, "data.train")] == ["a", "b"]
    assert scenes_of(str(place / "img" / "*.tif")) == [str(place / "img" / name) for name in ("a.tif", "b.tif")]
    monkeypatch.chdir(tmp_path)
    assert scenes_of("data[1]/img/?.tif") == ["data[1]/img/a.tif", "data[1]/img/b.tif"]
    assert scenes_of("data[12]/img/*.tif") == ["data1/img/c.tif"]  # no such folder: a pattern
    with pytest.raises(DataError, match=r"matches no file; data\[1\]/img holds a\.tif, b\.tif"):
        find("data[1]/img/*.jp2", "data.train")


@pytest.mark.pitfall("F19")
def test_brackets_that_match_nothing_are_letters(tmp_path: Path) -> None:
    touch(tmp_path, "x/s[1]_a.tif", "x/s[1]_b.tif", "y/s[1]_a.tif", "y/s1_a.tif")
    assert [file.wild for file in find(str(tmp_path / "x" / "s[1]_*.tif"), "t")] == ["a", "b"]
    assert scenes_of(str(tmp_path / "x" / "s[1]_*.tif")) == [str(tmp_path / "x" / f"s[1]_{n}.tif") for n in "ab"]
    assert [Path(file.path).name for file in find(str(tmp_path / "y" / "s[1]_*.tif"), "t")] == ["s1_a.tif"]


@pytest.mark.pitfall("F19")
def test_patterns_without_brackets_have_one_reading() -> None:
    for pattern in ("a/*.tif", "*.tif", "/nowhere/**/x?.tif", "a.tif"):
        assert readings(pattern) == [pattern]
    assert np.all([one.count("[") for one in readings("q/[ab].tif")])


# --- what is no area, and no list -----------------------------------------------------------------------------

GRID = Grid("EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), 20, 20)


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
@pytest.mark.pitfall("F19")
def test_areas_that_are_folders_or_name_no_system_are_called_so(tmp_path: Path) -> None:
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: is a folder; expected a file"):
        read_area(tmp_path / "folder", GRID)
    (tmp_path / "a.txt").write_text("POLYGON ((0 0, 1 0, 1 1, 0 0))")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as a vector file") as error:
        read_area(tmp_path / "a.txt", GRID)
    assert "DRIVER" not in str(error.value)
    shapes = shapely.to_wkb([shapely.box(14.9, 45.1, 15.1, 45.2)])
    pyogrio.raw.write(tmp_path / "a.shp", shapes, [], [], driver="ESRI Shapefile", geometry_type="Polygon", crs=None)
    with pytest.raises(
        DataError, match=r"names no coordinate reference system: taken to be in the scene's, EPSG:32633"
    ):
        read_area(tmp_path / "a.shp", GRID)


@pytest.mark.pitfall("F19")
def test_a_list_in_another_encoding_is_told_which(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.tif\n")
    with pytest.raises(DataError, match="expected one path a line, in UTF-8"):
        scenes_of(str(tmp_path / "list.txt"))


# --- what is no raster ----------------------------------------------------------------------------------------


@pytest.mark.pitfall("F19")
def test_archives_and_vectors_are_told_from_damaged_rasters(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(write_raster(tmp_path / "a.tif", np.ones((4, 4), np.uint8)), "a.tif")
    with pytest.raises(DataError, match=r"a\.zip: is an archive; name the raster in it as /vsizip/.*") as error:
        RasterFile(tmp_path / "a.zip").info  # noqa: B018
    named = str(error.value).partition("name the raster in it as ")[2].partition(",")[0]
    assert RasterFile(named.replace("FILE.tif", "a.tif")).info.count == 1  # the advice, followed
    (tmp_path / "b.tif.gz").write_bytes(gzip.compress((tmp_path / "a.tif").read_bytes()))
    with pytest.raises(DataError, match=r"is an archive; name the raster in it as /vsigzip/.*b\.tif\.gz, or"):
        RasterFile(tmp_path / "b.tif.gz").info  # noqa: B018
    assert RasterFile(f"/vsigzip/{tmp_path / 'b.tif.gz'}").info.count == 1
    (tmp_path / "roofs.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(DataError, match=r"holds vectors, and a raster is expected.*gdal_rasterize"):
        RasterFile(tmp_path / "roofs.geojson").info  # noqa: B018


@pytest.mark.pitfall("F19")
def test_a_folder_of_folders_is_told_how_to_be_named(tmp_path: Path) -> None:
    touch(tmp_path, "all/one/a.tif", "all/two/b.tif")
    with pytest.raises(DataError, match=r"holds no image.*\*\*.*for folders below; .*all holds one, two") as error:
        find(str(tmp_path / "all"), "data.train")
    pattern = str(error.value).partition("a pattern such as ")[2].partition(" for folders")[0]
    assert [file.stem for file in find(pattern, "data.train")] == ["a", "b"]
    with pytest.raises(DataError, match="in folders below are found by") as error:
        scenes_of(str(tmp_path / "all"))
    assert len(scenes_of(str(error.value).rpartition("found by '")[2].rstrip("'")) or ()) == 2


@pytest.mark.pitfall("F19")
def test_an_empty_cell_of_a_table_is_called_empty(tmp_path: Path) -> None:
    image = write_raster(tmp_path / "a.tif", np.ones((3, 4, 4), np.uint8))
    (tmp_path / "t.csv").write_text(f"split,img,lab\ntrain,{image.name},\n")
    with pytest.raises(DataError, match=r"t\.csv line 2: the cell for 'lab' is empty.*remove the row"):
        scenes_from_table(
            tmp_path / "t.csv", "train", "split", {"rgb": "img"}, "lab", {"rgb": Bands()}, LabelMap((0, 1), 255)
        )
