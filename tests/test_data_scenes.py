"""A recipe's sources opened together: what must be alike, what must be apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from makers import recipe_dict, toy_folder, write_raster

from vfmseg import terminal
from vfmseg.errors import DataError
from vfmseg.geo.grid import Window
from vfmseg.recipe import Recipe, parse_recipe
from vfmseg.scenes import bands_of, label_map_of, open_split, open_training


def toy_recipe(folder: Path) -> Recipe:
    return parse_recipe(recipe_dict(folder, None, folder / "run"), folder, "toy.yaml")


def replace_images(folder: Path, split: str, image: np.ndarray) -> None:
    for path in (folder / split / "images").glob("*.tif"):
        write_raster(path, image)


@pytest.mark.parametrize("split", ["val", "test"])
def test_p24_splits_of_another_type_or_number_of_bands_than_training_are_refused(tmp_path: Path, split: str) -> None:
    """Statistics and value range come from the training split: 16 bits scored as if they were 8 mean nothing."""
    recipe = toy_recipe(toy_folder(tmp_path))
    assert set(open_training(recipe)) == {"train", "val"}
    replace_images(tmp_path, split, np.full((3, 64, 64), 3000, dtype=np.uint16))
    open_split(recipe, split)  # alike in itself
    with pytest.raises(
        DataError, match=rf"data\.{split}: s0_{split} has stored types .*uint16.*but s0_train has .*uint8"
    ):
        open_training(recipe)
    replace_images(tmp_path, split, np.ones((1, 64, 64), dtype=np.uint8))
    with pytest.raises(DataError, match=rf"data\.{split}: s0_{split} has bands .*1.*but s0_train has .*3"):
        open_training(recipe)


def test_p48_one_file_in_two_splits_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    toy_folder(tmp_path)
    link = tmp_path / "test" / "labels" / "s0_test.tif"
    link.unlink()
    link.symlink_to(tmp_path / "train" / "labels" / "s1_train.tif")
    with pytest.raises(DataError, match=r"s1_train\.tif is in data\.train and in data\.test"):
        open_training(toy_recipe(tmp_path))


@pytest.mark.parametrize("split", ["train", "val"])
def test_p30_ids_outside_the_classes_end_the_run_before_it_begins(tmp_path: Path, split: str) -> None:
    toy_folder(tmp_path)
    write_raster(tmp_path / split / "labels" / f"s1_{split}.tif", np.full((64, 64), 7, dtype=np.uint8))
    with pytest.raises(DataError, match=rf"s1_{split}\.tif .*unknown label ids 7 \(4096 pixels\)"):
        open_training(toy_recipe(tmp_path))


def test_no_crs_is_said_once_and_only_where_no_scene_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_said", set())
    recipe = toy_recipe(toy_folder(tmp_path))
    open_split(recipe, "train")
    assert capsys.readouterr().err == ""
    for kind in ("images", "labels"):
        array = np.ones((3, 64, 64) if kind == "images" else (64, 64), dtype=np.uint8)
        write_raster(tmp_path / "test" / kind / "s0_test.tif", array, crs=None)
    for _ in range(2):
        open_split(recipe, "test")
    assert capsys.readouterr().err.count("the scenes carry no CRS") == 1


def test_what_the_recipe_says_of_values_and_classes_reaches_the_scenes(tmp_path: Path) -> None:
    content = recipe_dict(toy_folder(tmp_path), None, tmp_path / "run")
    content["data"]["classes"] = {9: "disc", 0: "ground", 1: "other"}
    content["data"]["modalities"]["rgb"] = {"bands": [3, 1], "scale": 0.5, "offset": 2.0, "nodata": 8}
    replace_images(tmp_path, "test", np.stack([np.full((64, 64), value, dtype=np.uint8) for value in (10, 8, 20)]))
    recipe = parse_recipe(content, tmp_path, "toy.yaml")
    assert label_map_of(recipe).ids == (0, 1, 9)
    assert bands_of(recipe)["rgb"].nodata == 8
    (scene,) = open_split(recipe, "test")
    chip = scene.read(Window(0, 0, 1, 1))["rgb"]
    assert (chip.pixels.ravel().tolist(), chip.valid.all()) == ([12, 7], True)
