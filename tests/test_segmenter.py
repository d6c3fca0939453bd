"""The Segmenter and its folder: complete, strict, the same in another place; label maps that keep their ground."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import recipe_dict, save_encoder, sign, toy_folder, toy_scene, write_raster, write_recipe
from safetensors.torch import load_file, save_file

from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.data.image import Image
from vfmseg.disk.lock import LOCK, held
from vfmseg.errors import BusyError, CheckpointError, DataError, MachineError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.metrics import Confusion
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, encoder/ and a finished LoRA run in run/, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("place")
    toy_folder(folder / "data")
    save_encoder(folder / "encoder", "dinov2")
    content = recipe_dict(folder / "data", folder / "encoder", folder / "run")
    content["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(folder / "recipe.yaml", content)))
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "run" / "best", tmp_path / "best")
    return tmp_path / "best"


@pytest.mark.pitfall("P36")
def test_labels_keep_crs_transform_classes_and_colours(place: Path, tmp_path: Path) -> None:
    image, _ = toy_scene(7, 50, 83)
    scene = write_raster(tmp_path / "scene.tif", image)
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    out = segmenter.predict(scene, output=tmp_path / "out" / "labels.tif")
    with rasterio.open(scene) as source, rasterio.open(out) as labels:
        assert (labels.crs, labels.transform, labels.shape) == (source.crs, source.transform, source.shape)
        assert labels.nodata == segmenter.nodata == 255
        assert labels.tags()["CLASS_1"] == "disc"
        assert len({labels.colormap(1)[i] for i in (0, 1)}) == 2
        written = labels.read(1)
    np.testing.assert_array_equal(written, segmenter.predict(image))


@pytest.mark.pitfall("P26")
def test_nodata_of_a_file_comes_out_as_nodata(place: Path, tmp_path: Path) -> None:
    image, _ = toy_scene(7)
    image[:, :20, :30] = 0
    scene = write_raster(tmp_path / "scene.tif", image, nodata=0)
    labels = Segmenter.from_pretrained(place / "run" / "best").predict(str(scene))
    assert isinstance(labels, np.ndarray)
    assert (labels[:20, :30] == 255).all()
    assert (labels == 255).sum() == 600


@pytest.mark.pitfall("P25")
def test_a_ground_pixel_is_normalised_alike_in_every_tile(place: Path) -> None:
    """No statistics of tiles: what the encoder sees of a pixel is the same number in every tile that holds it."""
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    stem = segmenter.model.stem("rgb")
    assert stem.upscale == 1
    height, width = 83, 110
    rows, cols = np.mgrid[:height, :width]
    image = np.stack([rows, cols, np.random.default_rng(0).uniform(0, 255, (height, width))]).astype(np.float32)
    image[:, 20:31, 40:47] = np.nan
    mean, std = (t.numpy()[:, None, None] for t in (stem.mean, stem.std))
    expected = (image - mean) / std
    seen = np.zeros((height, width), int)

    def look(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        for tile in inputs[0].numpy():  # (C, t, t); what is invalid or beyond the scene is 0, the mean
            known = np.abs(tile).any(axis=0)
            row, col = (np.rint(tile[:2] * std[:2] + mean[:2])).astype(int)[:, known]
            np.testing.assert_array_equal(tile[:, known], expected[:, row, col])
            np.add.at(seen, (row, col), 1)

    stem.mix.register_forward_pre_hook(look)
    segmenter.predict(image, tile=32, overlap=0.5)
    assert seen[np.isfinite(image[0])].min() >= 1
    assert seen.max() >= 4
    assert (seen[np.isnan(image[0])] == 0).all()


@pytest.mark.pitfall("P13")
def test_the_folder_is_all_that_is_needed(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    segmenter.save_pretrained(tmp_path / "mine")
    image, _ = toy_scene(9)
    np.testing.assert_array_equal(
        Segmenter.from_pretrained(tmp_path / "mine").probabilities(image), segmenter.probabilities(image)
    )
    record = json.loads((tmp_path / "mine" / "segmenter.json").read_text())
    assert record["encoder"]["sha256"]
    assert record["versions"]["torch"]
    assert not (tmp_path / "mine" / "encoder.safetensors").exists()  # the base encoder is not copied


@pytest.mark.pitfall("C13")
def test_merged_and_separate_adapter_are_one_function(place: Path) -> None:
    image, _ = toy_scene(3)
    x = {"rgb": Image(torch.from_numpy(image[None].astype(np.float32)), torch.ones(1, 64, 64, dtype=torch.bool))}
    outputs = [load_segmenter(place / "run" / "best", merge=merge).model(x) for merge in (True, False)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.pitfall("P13")
def test_a_copy_of_a_segmenter_answers_by_its_own_model(place: Path) -> None:
    """Also one that has gone to another process."""
    segmenter, image = Segmenter.from_pretrained(place / "run" / "best"), toy_scene(7)[0]
    expected = segmenter.probabilities(image)
    for twin in (copy.deepcopy(segmenter), pickle.loads(pickle.dumps(segmenter))):
        np.testing.assert_array_equal(twin.probabilities(image), expected)
        with torch.no_grad():
            for parameter in twin.model.decoder.parameters():
                parameter.zero_()
        np.testing.assert_array_equal(twin.probabilities(image), 0.5)
        np.testing.assert_array_equal(segmenter.probabilities(image), expected)


def test_another_base_encoder_is_refused(place: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "other", "dinov2", seed=1)
    with pytest.raises(CheckpointError, match="SHA-256"):
        Segmenter.from_pretrained(place / "run" / "best", encoder=str(tmp_path / "other"))


def test_a_moved_base_encoder_is_found_by_its_new_place(place: Path, copied: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "encoder", tmp_path / "moved")
    recipe = (copied / "recipe.yaml").read_text().replace(str(place / "encoder"), str(tmp_path / "gone"))
    (copied / "recipe.yaml").write_text(recipe)
    sign(copied)
    with pytest.raises(CheckpointError, match="--encoder"):
        Segmenter.from_pretrained(copied)
    assert Segmenter.from_pretrained(copied, encoder=str(tmp_path / "moved")).classes == {0: "ground", 1: "disc"}


@pytest.mark.parametrize("file", ["head.safetensors", "adapters/rgb/adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["drop", "add", "reshape"])
@pytest.mark.pitfall("C14")
def test_loading_is_strict(copied: Path, file: str, change: str) -> None:
    tensors = load_file(copied / file)
    name = sorted(tensors)[0]
    if change == "drop":
        del tensors[name]
    elif change == "add":
        tensors["surplus"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3, 5, 7)
    save_file(tensors, copied / file)
    with pytest.raises(CheckpointError, match=Path(file).name):
        Segmenter.from_pretrained(copied)


@pytest.mark.parametrize("file", ["head.safetensors", "segmenter.json", "recipe.yaml"])
@pytest.mark.pitfall("C14")
def test_missing_or_cut_files_are_named(copied: Path, file: str) -> None:
    whole = (copied / file).read_bytes()
    (copied / file).write_bytes(whole[: len(whole) // 3])
    with pytest.raises((CheckpointError, RecipeError), match=file):
        Segmenter.from_pretrained(copied)
    (copied / file).unlink()
    with pytest.raises((CheckpointError, RecipeError), match=r"segmenter|head|recipe"):
        Segmenter.from_pretrained(copied)


def test_checkpoint_of_another_architecture_is_refused(copied: Path) -> None:
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace("name: linear", "name: fpn"))
    with pytest.raises(CheckpointError, match="another architecture"):
        Segmenter.from_pretrained(copied)


def test_a_trained_encoder_travels_with_the_segmenter(place: Path, tmp_path: Path) -> None:
    content = recipe_dict(place / "data", None, tmp_path / "run")
    content["train"] |= {"epochs": 1}
    content["data"]["samples_per_epoch"] = 4
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    segmenter = Segmenter.from_pretrained(tmp_path / "run" / "best")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["tensors"]
    loaded = dict(segmenter.model.named_parameters())
    assert all(torch.equal(loaded[name.removeprefix("model.")], tensor) for name, tensor in state.items())


@pytest.mark.pitfall("P42")
def test_evaluate_equals_the_scores_of_the_written_maps(place: Path, tmp_path: Path) -> None:
    from sklearn.metrics import jaccard_score

    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    scores = segmenter.evaluate(place / "recipe.yaml", "val")
    truth, predicted = [], []
    for i in range(2):
        with rasterio.open(place / "data" / "val" / "labels" / f"s{i}_val.tif") as file:
            truth.append(file.read(1).ravel())
        predicted.append(segmenter.predict(place / "data" / "val" / "images" / f"s{i}_val.tif").ravel())  # type: ignore[union-attr]
    expected = jaccard_score(np.concatenate(truth), np.concatenate(predicted), average=None, labels=[0, 1])
    assert scores["miou"] == pytest.approx(expected.mean())
    assert scores["pixels"] == 2 * 64 * 64


@pytest.mark.pitfall("P26")
def test_nodata_never_reaches_the_scores(place: Path, tmp_path: Path) -> None:
    """The labels go on where the image has none; those pixels are not counted."""
    image, labels = toy_scene(7)
    image[:, :20, :30] = 0
    write_raster(tmp_path / "i" / "a.tif", image, nodata=0)
    write_raster(tmp_path / "l" / "a.tif", labels)
    content = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    content["data"]["val"] = {"rgb": f"{tmp_path}/i/*.tif", "labels": f"{tmp_path}/l/*.tif"}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    scores = Segmenter.from_pretrained(place / "run" / "best").evaluate(recipe, "val")
    assert scores["pixels"] == 64 * 64 - 600


@pytest.mark.pitfall("F2")
def test_nothing_is_saved_into_a_run_that_trains(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    shutil.copytree(place / "run", tmp_path / "run")
    with held(tmp_path / "run" / LOCK, tmp_path / "run", "training"), pytest.raises(BusyError, match="training"):
        segmenter.save_pretrained(tmp_path / "run" / "best")
    segmenter.save_pretrained(tmp_path / "run" / "best")


def test_evaluate_asks_for_the_same_task_and_tells_another_reading(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    content = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    scores = segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", content)), "val")
    assert "instead of" not in capsys.readouterr().err
    content["data"]["modalities"]["rgb"] |= {"bands": [3, 2, 1], "offset": 40.0}
    other = segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", content)), "val")
    assert other["miou"] != scores["miou"]
    told = capsys.readouterr().err
    both = "bands = (3, 2, 1) instead of the files' own, offset = 40.0 instead of the files' own"
    assert f"data.modalities.rgb: read with {both}" in told
    renamed = json.loads(json.dumps(content).replace('"rgb"', '"pan"'))
    renamed["data"]["classes"] = content["data"]["classes"]
    with pytest.raises(RecipeError, match=r"data\.modalities are pan, but the segmenter needs rgb"):
        segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", renamed)), "val")
    content["data"]["classes"] |= {1: "water"}
    with pytest.raises(RecipeError, match=r"data\.classes are .*water.* knows"):
        segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", content)), "val")


@pytest.mark.pitfall("P42")
def test_evaluate_labels_as_its_recipe_says(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    content = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    content["predict"] = {"tta": "d4", "scales": [0.5], "tile": 16}
    scores = segmenter.evaluate(load_recipe(write_recipe(tmp_path / "r.yaml", content)), "val")
    how = {"tile": 16, "tta": "d4", "scales": (0.5,)}
    confusion = Confusion(2)
    for i in range(2):
        with rasterio.open(place / "data" / "val" / "labels" / f"s{i}_val.tif") as file:
            truth = file.read(1).astype(np.int64)
        probabilities = segmenter.probabilities(str(place / "data" / "val" / "images" / f"s{i}_val.tif"), how)
        confusion.update(probabilities.argmax(axis=0), truth)
    assert scores["miou"] == pytest.approx(confusion.scores(["ground", "disc"])["miou"])
    assert scores["miou"] != segmenter.evaluate(place / "recipe.yaml", "val")["miou"]


@pytest.mark.pitfall("P21")
def test_evaluate_tells_another_stored_type(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfmseg.terminal._said", set())
    image, labels = toy_scene(7)
    write_raster(tmp_path / "i" / "a.tif", image.astype(np.uint16) * 40)
    write_raster(tmp_path / "l" / "a.tif", labels)
    content = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    content["data"]["val"] = {"rgb": f"{tmp_path}/i/*.tif", "labels": f"{tmp_path}/l/*.tif"}
    Segmenter.from_pretrained(place / "run" / "best").evaluate(
        load_recipe(write_recipe(tmp_path / "r.yaml", content)), "val"
    )
    assert "rgb: this scene holds uint16, the training scenes uint8" in capsys.readouterr().err


@pytest.mark.pitfall("P30")
def test_an_array_with_its_bands_last_is_refused(place: Path) -> None:
    """With bands = [1, 2, 3] the first three rows would be taken for bands."""
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    image = toy_scene(7, 70, 71)[0]
    with pytest.raises(DataError, match=r"\(70, 71, 3\), which looks like \(height, width, bands\)"):
        segmenter.predict(image.transpose(1, 2, 0))
    assert segmenter.predict(image[:, :, :3]).shape == (70, 3)


@pytest.mark.pitfall("P13")
def test_others_may_read_a_checkpoint(place: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    files = [path for path in (place / "run" / "best").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_wrong_input_is_named(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    with pytest.raises(DataError, match="modalities"):
        segmenter.predict({"dem": np.zeros((1, 4, 4))})
    with pytest.raises(DataError, match="bands"):
        segmenter.predict(np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(DataError, match="shape"):
        segmenter.predict(np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"none\.tif"):
        segmenter.predict(str(tmp_path / "none.tif"), output=tmp_path / "out.tif")
    with pytest.raises(RecipeError, match="overlap"):
        segmenter.predict(np.zeros((3, 8, 8), np.uint8), overlap=1.0)
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.pitfall("P37")
def test_a_failed_prediction_leaves_no_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = toy_scene(7)
    scene = write_raster(tmp_path / "scene.tif", image)
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    calls = 0
    honest = segmenter.model.forward

    def breaks_late(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("broken")
        return honest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(segmenter.model, "forward", breaks_late)
    with pytest.raises(RuntimeError, match="broken"):
        segmenter.predict(scene, output=tmp_path / "labels.tif", batch_size=1)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.pitfall("P63")
def test_labels_never_replace_the_scene(place: Path, tmp_path: Path) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(7)[0])
    before = scene.read_bytes()
    (tmp_path / "link.tif").symlink_to(scene)
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    for output in (scene, tmp_path / "link.tif"):
        with pytest.raises(DataError, match="is the scene itself"):
            segmenter.predict(scene, output=output)
    with pytest.raises(DataError, match=r"name it labels\.tif"):
        segmenter.predict(scene, output=tmp_path / "labels.png")
    assert scene.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"scene.tif", "link.tif"}


@pytest.mark.pitfall("P63")
def test_save_pretrained_replaces_nothing_but_a_segmenter(place: Path, copied: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(copied)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for taken in (tmp_path / "mine", tmp_path / "file", tmp_path, copied / "inside"):
        with pytest.raises(CheckpointError, match="choose"):
            segmenter.save_pretrained(taken)
    assert (tmp_path / "mine" / "photo.jpg").read_text() == (tmp_path / "file").read_text() == "keep me"
    assert not (copied / "inside").exists()
    for _ in range(2):  # onto nothing, then onto an older segmenter
        segmenter.save_pretrained(tmp_path / "saved")
    assert Segmenter.from_pretrained(tmp_path / "saved").classes == segmenter.classes


def test_save_pretrained_into_the_current_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    monkeypatch.chdir(tmp_path)
    segmenter.save_pretrained(".")
    assert (tmp_path / "segmenter.json").is_file()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: {name: record[name] for name in record if name != "input"},
        lambda record: {name: record[name] for name in record if name != "encoder"},
        lambda record: record | {"input": {"dem": record["input"]["rgb"]}},
        lambda record: record | {"input": {"rgb": record["input"]["rgb"] | {"bands": 4}}},
        lambda record: record | {"input": {"rgb": record["input"]["rgb"] | {"dtype": "uint16"}}},
        lambda record: record | {"encoder": record["encoder"] | {"stored": True}},
        lambda record: record | {"encoder": None},
        lambda record: record | {"encoder": []},
        lambda record: record | {"encoder": record["encoder"] | {"stored": True, "config": None}},
        lambda record: (
            record
            | {"encoder": record["encoder"] | {"stored": True, "config": {"model_type": "dinov2", "hidden_size": "x"}}}
        ),
    ],
    ids=[
        "list",
        "no input",
        "no encoder",
        "modality",
        "bands",
        "normalisation",
        "no encoder config",
        "null",
        "list 2",
        "null config",
        "wrong config",
    ],
)
@pytest.mark.pitfall("P13")
def test_a_record_of_another_segmenter_is_refused(copied: Path, change: Any) -> None:
    record = json.loads((copied / "segmenter.json").read_text())
    (copied / "segmenter.json").write_text(json.dumps(change(record)))
    with pytest.raises(CheckpointError, match=r"segmenter\.json.*copy"):
        Segmenter.from_pretrained(copied)


@pytest.mark.pitfall("P21")
def test_another_stored_type_and_a_missing_crs_are_said_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfmseg.terminal._said", set())
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    image, _ = toy_scene(7)
    segmenter.predict(image)
    segmenter.predict(write_raster(tmp_path / "same.tif", image))
    assert capsys.readouterr().err == ""
    other = write_raster(tmp_path / "other.tif", image.astype(np.float32) / 255, crs=None)
    for _ in range(2):
        segmenter.predict(other)
    said = capsys.readouterr().err
    assert said.count("holds float32, the training scenes uint8") == 1
    assert said.count("no CRS") == 1
    assert said.count("does not say which of its bands are red, green, blue") == 1
    assert len(said.splitlines()) == 3


@pytest.mark.pitfall("P62")
def test_settings_out_of_range_are_named(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    image, _ = toy_scene(7)
    with pytest.raises(RecipeError, match="did you mean 'hann'"):
        segmenter.predict(image, blend="hanm")
    with pytest.raises(RecipeError, match="tile = 0"):
        segmenter.predict(image, tile=0)
    for scales in ((), (0.0,), (float("nan"),), (float("inf"),), (1.0, 1e9)):
        with pytest.raises(RecipeError, match=r"predict: scales.* must "):
            segmenter.probabilities(image, {"scales": scales})
    for tile, shown in ((True, "true"), (32.0, "32.0"), ("32", "'32'"), (np.float64(32), "32.0")):
        with pytest.raises(RecipeError, match=f"predict: tile = {shown} must be a whole number"):
            segmenter.predict(image, tile=tile)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="batch_size = 0"):
        segmenter.predict(image, batch_size=0)
    with pytest.raises(RecipeError, match="split = 'tests'"):
        segmenter.evaluate(place / "recipe.yaml", split="tests")
    with pytest.raises(DataError, match="is a Tensor"):
        segmenter.predict(torch.zeros(3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the array for 'rgb': 8 bands"):
        segmenter.predict(np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(RecipeError, match="device = 'gpu'"):
        Segmenter.from_pretrained(place / "run" / "best", device="gpu")
    with pytest.raises(MachineError, match=r"cuda:99.*cpu"):
        Segmenter.from_pretrained(place / "run" / "best", device="cuda:99")


def test_numbers_of_numpy_are_numbers(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    how = {"tile": np.int64(32), "overlap": np.float32(0.25), "scales": (np.float32(1),)}  # type: ignore[arg-type]
    segmenter.label(toy_scene(7)[0], tmp_path / "labels.tif", how)
    assert segmenter.predict(toy_scene(7)[0], tile=np.uint8(32)).shape == toy_scene(7)[0].shape[1:]


@pytest.mark.pitfall("P26")
def test_a_masked_array_does_not_lose_its_mask(place: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    with pytest.raises(DataError, match=r"filled\(numpy\.nan\)"):
        segmenter.predict(np.ma.masked_equal(toy_scene(7)[0], 70))


@pytest.mark.pitfall("P42")
def test_classes_in_another_order_are_not_compared(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml", ["data.classes={0: disc, 1: ground}"])
    with pytest.raises(RecipeError, match=r"0: 'disc'.*0: 'ground'"):
        Segmenter.from_pretrained(place / "run" / "best").evaluate(recipe, "val")


def test_cuda_without_a_number_is_the_device_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all processes of a machine would share its first accelerator, and the others idle."""
    from vfmseg.inference.ranks import usable_device

    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(size))
    assert [str(usable_device(name)) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:1", "cpu"]
