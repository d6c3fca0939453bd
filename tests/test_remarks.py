"""What is told of the data before a run: in one line each, once, and nothing where nothing is to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from makers import recipe_dict, toy_scene, write_raster
from rasterio.enums import ColorInterp

from vfmseg import terminal
from vfmseg.build.data import inputs_of, open_training, said_by
from vfmseg.build.remarks import tell_implausible
from vfmseg.geo.grid import Window
from vfmseg.recipe.load import parse_recipe


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_said", set())


def scenes(folder: Path, image: Any, nodata: float | None = None) -> None:
    """Two scenes in train, one in val; `image` makes the pixels of one from a picture and its labels."""
    for number, split in enumerate(("train", "train", "val")):
        picture, labels = toy_scene(number)
        place = (500000 + 2000 * number, 5000000)
        write_raster(folder / split / "images" / f"s{number}.tif", image(picture, labels), nodata=nodata, origin=place)
        write_raster(folder / split / "labels" / f"s{number}.tif", labels, origin=place)


def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What opening the training scenes of a folder says."""
    content = recipe_dict(folder, None, folder / "run")
    del content["data"]["test"]
    recipe = parse_recipe(content, folder, "toy.yaml")
    inputs_of(recipe, open_training(recipe)["train"])
    return capsys.readouterr().err


@pytest.mark.pitfall("F13")
def test_ordinary_scenes_are_not_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes(tmp_path, lambda picture, labels: picture)
    assert told(tmp_path, capsys).splitlines() == ["rgb: 3 bands (uint8), normalised by the encoder's own mean and std"]


@pytest.mark.pitfall("F13")
def test_hidden_shares_are_told_once_for_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def framed(picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        picture[:, :16] = 255
        return picture

    scenes(tmp_path, framed, nodata=255)
    lines = told(tmp_path, capsys).splitlines()
    for split in ("train", "val"):
        text = f"data.{split}: of the pixels of rgb, hidden are 25.0% by nodata 255 in all bands"
        assert lines.count(text) == 1


@pytest.mark.pitfall("F13")
def test_a_class_that_validity_hides_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes(tmp_path, lambda picture, labels: np.where(labels, np.int16(-9999), picture), nodata=-9999)
    text = told(tmp_path, capsys)
    assert "data.train: 100% of the pixels labelled disc are hidden by nodata -9999" in text
    assert "labelled ground are hidden" not in text


@pytest.mark.pitfall("F13")
def test_a_filling_without_a_tag_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def filled(picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        stored = picture.astype(np.int16)
        stored[1, :4] = -9999
        return stored

    scenes(tmp_path, filled)
    text = told(tmp_path, capsys)
    assert "of the pixels of rgb hold -9999 in band 2, far from all others" in text
    assert "in band 1" not in text


@pytest.mark.pitfall("F13")
def test_implausible_statistics_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    tell_implausible({"dem": ((200.0, -7e30), (30.0, 1e31)), "rgb": ((2e9,), (1e9,))})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dem: band 2 has mean -7e+30 and std 1e+31, which no sensor measures")


@pytest.mark.pitfall("F16")
def test_the_first_scene_that_says_something_speaks_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first scene says nothing, the second is scaled and in another order: neither is passed over."""
    scenes(tmp_path, lambda picture, labels: picture.astype(np.uint16))
    for split, number, colors in (("train", 1, "blue green red"), ("val", 2, "red green blue")):
        with rasterio.open(tmp_path / split / "images" / f"s{number}.tif", "r+") as dataset:
            dataset.colorinterp = [ColorInterp[color] for color in colors.split()]
            dataset.scales = (0.5,) * 3
    content = recipe_dict(tmp_path, None, tmp_path / "run")
    del content["data"]["test"]
    opened = open_training(parse_recipe(content, tmp_path, "toy.yaml"))
    text = capsys.readouterr().err
    _, second = opened["train"]
    window = Window(0, 0, 64, 64)
    with rasterio.open(tmp_path / "train" / "images" / "s1.tif") as dataset:
        np.testing.assert_array_equal(second.read(window)["rgb"].pixels, dataset.read() * 0.5)
    with rasterio.open(tmp_path / "val" / "images" / "s2.tif") as dataset:
        np.testing.assert_array_equal(opened["val"][0].read(window)["rgb"].pixels, dataset.read()[::-1] * 0.5)
    assert "s0.tif does not say which of its bands are blue, green, red" in text
    assert "s0.tif carries no scale and offset, the training files do" in text
    assert [band.scale for band in said_by(opened["train"])["rgb"]] == [None] * 3


@pytest.mark.pitfall("F16")
def test_scenes_of_other_orders_are_told_with_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes(tmp_path, lambda picture, labels: picture)
    colors = (ColorInterp.blue, ColorInterp.green, ColorInterp.red)
    second = tmp_path / "train" / "images" / "s1.tif"
    picture, _ = toy_scene(1)
    write_raster(second, picture[::-1], origin=(502000, 5000000))
    with rasterio.open(second, "r+") as dataset:
        dataset.colorinterp = colors
    assert f"rgb: {second} has red, green, blue as its bands 3, 2, 1, and is read so" in told(tmp_path, capsys)
