"""Names that GDAL takes, and the files of this disk behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfmseg.data.pairing import find, pair
from vfmseg.disk.paths import files_behind, made_absolute

NAMES = [
    ("{}", "a.gpkg"),
    ("GPKG:{}:ortho", "a.gpkg"),
    ('NETCDF:"{}":temperature', "a.nc"),
    ('HDF5:"{}"://group/band', "a.h5"),
    ("GTIFF_DIR:2:{}", "a.tif"),
    ("vrt://{}?bands=2,1", "a.tif"),
    ("/vsizip/{}/inner/b.tif", "a.zip"),
    ("/vsizip/{{{}}}/b.tif", "a.zip"),
    ("/vsizip//vsizip/{}/c.zip/b.tif", "a.zip"),
    ("/vsisubfile/0_100,{}", "a.tif"),
    ("zip://{}!b.tif", "a.zip"),
    ("file://{}", "a.tif"),
    ("vrt://GPKG:{}:ortho?bands=1", "a.gpkg"),
]


@pytest.mark.parametrize(("form", "file"), NAMES)
@pytest.mark.pitfall("F12")
def test_the_file_behind_a_name_is_found(tmp_path: Path, form: str, file: str) -> None:
    path = tmp_path / file
    path.touch()
    assert files_behind(form.format(path)) == [str(path)]
    assert files_behind(form.format("other_" + file)) == []


@pytest.mark.parametrize(("form", "file"), NAMES)
@pytest.mark.pitfall("F19")
def test_a_relative_name_is_made_absolute_whatever_it_is_wrapped_in(tmp_path: Path, form: str, file: str) -> None:
    (tmp_path / file).touch()
    absolute = form.format(tmp_path / file)
    assert made_absolute(form.format(file), str(tmp_path)) == absolute
    assert made_absolute(absolute, "elsewhere") == absolute
    assert made_absolute("https://host/b.tif", str(tmp_path)) == "https://host/b.tif"


@pytest.mark.pitfall("F19")
def test_data_sets_inside_files_are_found_and_paired(tmp_path: Path) -> None:
    for name in ("s0", "s1", "all"):
        (tmp_path / f"{name}.gpkg").touch()
    tables = {role: [f"GPKG:{tmp_path}/s{k}.gpkg:{role}" for k in (1, 0)] for role in ("img", "lab")}
    pairs = pair({"rgb": find(tables["img"], "data.train.rgb")}, find(tables["lab"], "data.train.labels"), "data.train")
    assert [(p.images["rgb"], p.labels) for p in pairs] == list(zip(tables["img"], tables["lab"], strict=True))[::-1]
    one_file = [f"GPKG:{tmp_path}/all.gpkg:{name}" for name in ("x", "y")]
    assert [file.wild for file in find(one_file, "data.train.rgb")] == ["x", "y"]
