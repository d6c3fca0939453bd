"""A recipe's sources opened together: what must be alike, what must be apart."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import rasterio
from makers import recipe_dict, toy_folder, write_raster

from vfmseg import terminal
from vfmseg.build.data import bands_of, label_map_of, open_split, open_training
from vfmseg.build.model import normalized_by
from vfmseg.data.given import open_scene
from vfmseg.errors import DataError
from vfmseg.geo.grid import Window
from vfmseg.recipe import Recipe, parse_recipe


def toy_recipe(folder: Path) -> Recipe:
    return parse_recipe(recipe_dict(folder, None, folder / "run"), folder, "toy.yaml")


def replace_images(folder: Path, split: str, image: np.ndarray) -> None:
    for path in (folder / split / "images").glob("*.tif"):
        write_raster(path, image)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.pitfall("P24")
def test_splits_of_another_type_or_number_of_bands_than_training_are_refused(tmp_path: Path, split: str) -> None:
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


@pytest.mark.parametrize("which", ["s0_train", "s3_train"])
@pytest.mark.pitfall("F16")
def test_one_image_of_fewer_bands_is_refused_and_takes_none_away_from_the_others(tmp_path: Path, which: str) -> None:
    """Read as it is, all others would give their red alone, without a word."""
    recipe = toy_recipe(toy_folder(tmp_path))
    write_raster(tmp_path / "train" / "images" / f"{which}.tif", np.ones((1, 64, 64), dtype=np.uint8))
    with pytest.raises(DataError, match=r"data\.train: s\d_train has bands .*but s0_train has .*leave out those"):
        open_split(recipe, "train")


@pytest.mark.pitfall("P48")
def test_one_file_in_two_splits_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    toy_folder(tmp_path)
    link = tmp_path / "test" / "labels" / "s0_test.tif"
    link.unlink()
    link.symlink_to(tmp_path / "train" / "labels" / "s1_train.tif")
    with pytest.raises(DataError, match=r"s1_train\.tif is in data\.train and in data\.test"):
        open_training(toy_recipe(tmp_path))


@pytest.mark.pitfall("P48")
def test_one_elevation_model_may_lie_under_all_splits(tmp_path: Path) -> None:
    toy_folder(tmp_path)
    write_raster(tmp_path / "dem.tif", np.ones((1, 64, 64), np.float32))
    rows = ["split,rgb,dem,labels"]
    for split in ("train", "val"):
        rows += [f"{split},{split}/images/s0_{split}.tif,dem.tif,{split}/labels/s0_{split}.tif"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    content = recipe_dict(tmp_path, None, tmp_path / "run")
    content["data"]["modalities"]["dem"] = {}
    for split in ("train", "val"):
        columns = {"rgb": "rgb", "dem": "dem", "labels": "labels"}
        content["data"][split] = {"table": "table.csv", "split": split, **columns}
    del content["data"]["test"]
    opened = open_training(parse_recipe(content, tmp_path, "toy.yaml"))
    assert {name: len(scenes) for name, scenes in opened.items()} == {"train": 1, "val": 1}


@pytest.mark.pitfall("P29")
def test_a_palette_image_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_said", set())
    toy_folder(tmp_path)
    for split in ("train", "val", "test"):
        replace_images(tmp_path, split, np.ones((1, 64, 64), dtype=np.uint8))
    open_training(toy_recipe(tmp_path))
    assert "colour table" not in capsys.readouterr().err
    for path in (tmp_path / "train" / "images").iterdir():
        with rasterio.open(path, "r+") as image:
            image.write_colormap(1, {1: (255, 0, 0)})
    open_training(toy_recipe(tmp_path))
    assert capsys.readouterr().err.count("holds a colour table") == 1


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.pitfall("P30")
def test_ids_outside_the_classes_end_the_run_before_it_begins(tmp_path: Path, split: str) -> None:
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


def two_grids(folder: Path) -> Path:
    """Optical scenes of 64 x 64 px at 10 m, heights at 4 m in another UTM zone that end within the scene."""
    toy_folder(folder)
    heights = np.random.default_rng(0).normal(300, 20, (1, 90, 130)).astype(np.float32)
    for split, count in {"train": 4, "val": 2, "test": 1}.items():
        for i in range(count):
            name = folder / split / "heights" / f"s{i}_{split}.tif"
            write_raster(name, heights + i, crs="EPSG:32634", origin=(28650, 5017400), pixel=4)
    return folder


def two_grid_recipe(folder: Path) -> Recipe:
    content = recipe_dict(folder, None, folder / "run")
    content["data"]["modalities"]["heights"] = {}
    for split in ("train", "val", "test"):
        content["data"][split]["heights"] = f"{folder}/{split}/heights/*.tif"
    return parse_recipe(content, folder, "toy.yaml")


@pytest.mark.pitfall("P34")
def test_a_modality_on_another_grid_is_seen_in_training_as_in_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_said", set())
    recipe = two_grid_recipe(two_grids(tmp_path))
    scene = open_training(recipe)["train"][1]
    assert capsys.readouterr().err.count("heights: lies on another grid than rgb") == 1
    files = {m: str(tmp_path / "train" / folder / "s1_train.tif") for m, folder in
             {"rgb": "images", "heights": "heights"}.items()}  # fmt: skip
    predicted = open_scene(files, bands_of(recipe))
    assert scene.grid == predicted.grid
    for window in (Window(0, 0, 64, 64), Window(-5, 11, 40, 60)):
        ours, theirs = pickle.loads(pickle.dumps(scene)).read(window), predicted.read(window)
        for name in ("rgb", "heights"):
            np.testing.assert_array_equal(ours[name].pixels, theirs[name].pixels)
            np.testing.assert_array_equal(ours[name].valid, theirs[name].valid)
    covered = scene.read(Window(0, 0, 64, 64))["heights"]
    assert 0.1 < covered.valid.mean() < 0.9
    assert covered.pixels[:, covered.valid].min() > 200


@pytest.mark.pitfall("P34")
def test_heights_of_another_place_are_refused(tmp_path: Path) -> None:
    folder = two_grids(tmp_path)
    far = np.zeros((1, 90, 130), np.float32)
    write_raster(folder / "train" / "heights" / "s1_train.tif", far, crs="EPSG:32634", origin=(400000, 5000000))
    with pytest.raises(DataError, match=r"s1_train\.tif: covers nothing of the scene's first modality"):
        open_training(two_grid_recipe(folder))


@pytest.mark.pitfall("P48")
def test_ground_of_another_split_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy_recipe(toy_folder(tmp_path))
    east = {"train": 0, "val": 1000, "test": 630}  # metres; scenes are 640 m wide: neighbours share 10 m
    for split, count in {"train": 4, "val": 2, "test": 1}.items():
        for i in range(count):
            place = (500000 + east[split], 5000000 + 2000 * i)
            for kind, shape in (("images", (3, 64, 64)), ("labels", (64, 64))):
                path = tmp_path / split / kind / f"s{i}_{split}.tif"
                write_raster(path, np.arange(64, dtype=np.uint8) % 2 + np.zeros(shape, np.uint8), origin=place)
    monkeypatch.setattr(terminal, "_said", set())
    open_training(recipe)
    said = capsys.readouterr().err
    # test lies 270 m in val and 10 m in train
    assert "data.test: 1 of 1 scenes lie on ground of data.val (most of all s0_test: 42% is in s0_val)" in said
    assert "on ground of data.train" not in said


@pytest.mark.pitfall("P30")
def test_a_class_that_no_label_holds_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of 0 and 255 with the usual ignore_index 255: all that is wanted is ignored."""
    content = recipe_dict(toy_folder(tmp_path), None, tmp_path / "run")
    for path in tmp_path.glob("*/labels/*.tif"):
        with rasterio.open(path, "r+") as file:
            labels = file.read()
            labels[:, :5] = 2
            file.write(labels)
    content["data"]["classes"] = {0: "ground", 1: "disc", 2: "road"}
    recipe = parse_recipe(content, tmp_path, "toy.yaml")
    monkeypatch.setattr(terminal, "_said", set())
    open_training(recipe)
    assert "no pixel of class" not in capsys.readouterr().err
    for path in (tmp_path / "train" / "labels").iterdir():
        with rasterio.open(path, "r+") as file:
            labels = file.read()
            file.write(np.where(labels == 1, 255, labels).astype(labels.dtype))
    open_training(recipe)
    said = capsys.readouterr().err
    assert "data.train: no pixel of class 1 (disc), which so cannot be learned" in said
    assert "data.ignore_index = 255" in said


@pytest.mark.pitfall("P21")
def test_the_encoders_statistics_for_other_types_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(toy_folder(tmp_path), None, tmp_path / "run")
    content["data"]["modalities"]["rgb"] = {"normalize": "encoder"}
    recipe = parse_recipe(content, tmp_path, "toy.yaml")
    monkeypatch.setattr(terminal, "_said", set())
    assert normalized_by(recipe, "rgb", 3, "uint8", plain=True) == "encoder"
    assert capsys.readouterr().err == ""
    assert normalized_by(recipe, "rgb", 3, "uint16", plain=True) == "encoder"
    assert "rgb.normalize = encoder takes values as 0 to 255, but the files hold uint16" in capsys.readouterr().err
