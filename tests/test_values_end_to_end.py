"""What files say of their numbers, from training to the map: one ground, one map, however it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from makers import recipe_dict, save_encoder, toy_scene, write_raster, write_recipe
from rasterio.enums import ColorInterp
from typer.testing import CliRunner

from vfmseg.cli import app
from vfmseg.errors import DataError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.inference.output import Output
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter

COLORS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


def stored(path: Path, image: np.ndarray, scale: float, order: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Reflectances of an 8-bit picture as whole numbers of this scale, bands in this order and named by colour."""
    write_raster(path, np.round(image[list(order)] / 255 * 0.4 / scale).astype(np.uint16))
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.colorinterp = (scale,) * len(order), [COLORS[i] for i in order]
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training files say their scale and their colours; blue tells the classes, red the reverse."""
    folder = tmp_path_factory.mktemp("place")
    for number, split in enumerate(("train", "train", "val", "test")):
        image, labels = toy_scene(number)
        image[0] = 240 - image[2]
        stored(folder / "data" / split / "images" / f"s{number}.tif", image, 1e-4)
        write_raster(folder / "data" / split / "labels" / f"s{number}.tif", labels)
    save_encoder(folder / "encoder", "dinov2")
    content = recipe_dict(folder / "data", folder / "encoder", folder / "run")
    content["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(folder / "recipe.yaml", content)))
    return folder


@pytest.fixture(scope="module")
def segmenter(place: Path) -> Segmenter:
    return Segmenter.from_pretrained(place / "run" / "best")


def picture() -> np.ndarray:
    """A scene like those of the training."""
    image, _ = toy_scene(9, 50, 70)
    image[0] = 240 - image[2]
    return image


@pytest.mark.pitfall("F16")
def test_a_segmenter_knows_what_its_training_files_said(segmenter: Segmenter, place: Path) -> None:
    written = json.loads((place / "run" / "best" / "segmenter.json").read_text())["input"]["rgb"]["said"]
    assert [(band["color"], band["scale"]) for band in written] == [("red", 1e-4), ("green", 1e-4), ("blue", 1e-4)]
    assert [band.meaning for band in segmenter.inputs[0].said] == ["red", "green", "blue"]
    assert segmenter.inputs[0].mean[1] < 0.4  # of values, not of stored numbers


@pytest.mark.pitfall("F16")
def test_one_ground_gives_one_map_however_it_is_stored(segmenter: Segmenter, tmp_path: Path) -> None:
    image = picture()
    first = segmenter.predict(stored(tmp_path / "a.tif", image, 1e-4))
    assert len(np.unique(first)) == 2
    for number, (scale, order) in enumerate([(1e-5, (0, 1, 2)), (1e-4, (2, 1, 0)), (2e-5, (1, 2, 0))]):
        again = segmenter.predict(stored(tmp_path / f"{number}.tif", image, scale, order))
        assert (again == first).mean() > 0.999  # scales round differently
    whole = np.round(image / 255 * 0.4 / 1e-4)
    assert (segmenter.predict(whole.astype(np.uint16)) == first).all()
    assert (segmenter.predict((whole * 1e-4).astype(np.float32)) == first).mean() > 0.999


@pytest.mark.pitfall("F16")
def test_evaluation_finds_bands_by_name_as_prediction_does(segmenter: Segmenter, place: Path) -> None:
    file = place / "data" / "test" / "images" / "s3.tif"
    before, score = file.read_bytes(), segmenter.evaluate(place / "recipe.yaml", "test")["miou"]
    with rasterio.open(file) as dataset:
        image = dataset.read()
    write_raster(file, image[::-1])
    with rasterio.open(file, "r+") as dataset:
        dataset.scales, dataset.colorinterp = (1e-4,) * 3, COLORS[::-1]
    try:
        assert segmenter.evaluate(place / "recipe.yaml", "test")["miou"] == score
    finally:
        file.write_bytes(before)


@pytest.mark.pitfall("F19")
def test_bands_are_chosen_for_one_scene(segmenter: Segmenter, place: Path, tmp_path: Path) -> None:
    image = picture()
    write_raster(tmp_path / "four.tif", np.concatenate([image, image[:1]]).astype(np.uint16) * 6)
    with pytest.raises(
        DataError, match=r"trained on 3 bands \(red, green, blue\) for 'rgb'; name .* --bands rgb=1,2,3"
    ):
        segmenter.predict(tmp_path / "four.tif")
    write_raster(tmp_path / "two.tif", image[:2].astype(np.uint16))
    with pytest.raises(DataError, match="it holds 2 in all: choose a scene that has them"):
        segmenter.predict(tmp_path / "two.tif")
    three = segmenter.predict(write_raster(tmp_path / "three.tif", image[::-1].astype(np.uint16) * 6))
    chosen = segmenter.predict(tmp_path / "four.tif", bands={"rgb": (3, 2, 1)})
    np.testing.assert_array_equal(chosen, three)
    with pytest.raises(RecipeError, match=r"bands of rgb = \[1, 1, 2\]; expected .*, each once"):
        segmenter.label(tmp_path / "four.tif", tmp_path / "m.tif", bands={"rgb": (1, 1, 2)})
    with pytest.raises(RecipeError, match=r"'rbg' is no modality of this segmenter; did you mean 'rgb'"):
        segmenter.label(tmp_path / "four.tif", tmp_path / "m.tif", bands={"rbg": (1, 2, 3)})
    arguments = [str(place / "run" / "best"), str(tmp_path / "four.tif"), "-o", str(tmp_path / "m.tif")]
    assert CliRunner().invoke(app, ["predict", *arguments, "--bands", "3,2,1"]).exit_code == 0
    with rasterio.open(tmp_path / "m.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), three)
    # other bands are other work
    output = Output(tmp_path / "m.tif", resume=True)
    with pytest.raises(DataError, match="exists already"):
        segmenter.label(tmp_path / "four.tif", output, bands={"rgb": (1, 2, 3)})


@pytest.mark.pitfall("F13")
def test_what_was_hidden_is_told_and_recorded(segmenter: Segmenter, place: Path, tmp_path: Path) -> None:
    image = picture().astype(np.uint16) * 6
    image[:, :10] = 65535
    write_raster(tmp_path / "a.tif", image, nodata=65535)
    arguments = [str(place / "run" / "best"), str(tmp_path / "a.tif"), "-o", str(tmp_path / "m.tif"), "--json"]
    result = CliRunner().invoke(app, ["predict", *arguments])
    assert "of the pixels read of rgb, hidden were 20.0% by nodata 65535" in result.stderr
    assert json.loads(result.stdout)["hidden"] == {"rgb": {"nodata 65535": 0.2}}


@pytest.mark.pitfall("F16")
def test_a_recipe_that_names_a_scale_is_read_as_before(place: Path, tmp_path: Path) -> None:
    content = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    content["data"]["modalities"]["rgb"] = {"scale": 1.0, "offset": 0.0}
    content["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(tmp_path / "recipe.yaml", content)))
    folder = tmp_path / "run" / "best"
    record = json.loads((folder / "segmenter.json").read_text())
    now = Segmenter.from_pretrained(folder)
    assert now.inputs[0].plain
    assert now.inputs[0].mean[1] > 100
    scene = stored(tmp_path / "a.tif", picture(), 1e-4)
    labels = now.predict(scene)
    del record["input"]["rgb"]["said"], record["files"], record["sha256"]  # a segmenter of before
    (folder / "segmenter.json").write_text(json.dumps(record))
    np.testing.assert_array_equal(Segmenter.from_pretrained(folder).predict(scene), labels)


@pytest.mark.pitfall("F16")
def test_a_recipe_that_names_other_bands_than_the_training_overrules_what_files_say(
    segmenter: Segmenter, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = segmenter.evaluate(place / "recipe.yaml", "test")["miou"]
    for file in (place / "data" / "test" / "images").iterdir():  # in the order of the training, and mistaken about it
        image = rasterio.open(file).read()
        with rasterio.open(stored(tmp_path / "test" / "images" / file.name, toy_scene(0)[0], 1e-4), "r+") as dataset:
            dataset.write(image)
            dataset.colorinterp = COLORS[::-1]
        labels = place / "data" / "test" / "labels" / file.name
        write_raster(tmp_path / "test" / "labels" / file.name, rasterio.open(labels).read())
    content = recipe_dict(tmp_path, place / "encoder", place / "run")
    content["data"]["test"] = {key: text.replace("train", "test") for key, text in content["data"]["train"].items()}
    assert segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", content)), "test")["miou"] != right
    content["data"]["modalities"]["rgb"] = {"bands": [1, 2, 3], "scale": 1e-4}
    capsys.readouterr()
    assert segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", content)), "test")["miou"] == right
    assert "bands = (1, 2, 3) instead of" in capsys.readouterr().err
