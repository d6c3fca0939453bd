"""Scenes that lack a modality: which files they are made of, and all that looks at them before a training."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import sensor_content, sensor_recipe, two_sensors, write_raster, write_recipe

from vfmseg import terminal
from vfmseg.build.data import inputs_of, open_training
from vfmseg.data.checks import require_labels
from vfmseg.data.from_files import scenes_from_files
from vfmseg.data.from_table import scenes_from_table
from vfmseg.data.statistics import stream_statistics
from vfmseg.data.survey import survey
from vfmseg.data.traces import Traces
from vfmseg.errors import DataError, RecipeError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.grid import Window
from vfmseg.recipe import dump_recipe, load_recipe
from vfmseg.recipe.data import DataSection

LABELS = LabelMap((0, 1), 255)
BANDS = {"rgb": Bands(), "sar": Bands()}
BOTH = ("rgb", "sar")
TRAIN = {"a": "rgb sar", "b": "rgb", "c": "sar", "d": "rgb sar"}


def scenes_in(place: Path, split: str = "train", optional: tuple[str, ...] = BOTH) -> list[Any]:
    sources = {name: f"{place}/{split}/{name}/*.tif" for name in BOTH}
    return scenes_from_files(sources, f"{place}/{split}/labels/*.tif", BANDS, LABELS, f"data.{split}", optional)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    two_sensors(tmp_path, "train", TRAIN)
    two_sensors(tmp_path, "val", {"v": "rgb sar", "w": "sar"})
    two_sensors(tmp_path, "test", {"t": "rgb sar", "u": "rgb", "x": "sar"})
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------------ recipe


def test_an_optional_modality_may_be_left_out_of_a_split(place: Path) -> None:
    recipe = sensor_recipe(place, data__val={"labels": "v/*.tif", "sar": "s/*.tif"})
    assert recipe.data.val is not None
    assert list(recipe.data.val.images) == ["sar"]
    assert load_recipe(write(place / "again.yaml", dump_recipe(recipe))) == recipe
    strict = {"rgb": {"optional": True}, "sar": {}}
    with pytest.raises(RecipeError, match=r"data\.val\.sar is missing; say where the images"):
        sensor_recipe(place, data__modalities=strict, data__val={"labels": "v/*.tif", "rgb": "s/*.tif"})
    with pytest.raises(RecipeError, match="names no images"):
        sensor_recipe(place, data__val={"labels": "v/*.tif"})


def test_the_order_inside_a_split_that_leaves_one_out_means_nothing() -> None:
    split = {"labels": "l/*.tif", "dem": "d/*.tif", "rgb": "r/*.tif"}
    modalities = {"rgb": {}, "sar": {"optional": True}, "dem": {}}
    data = DataSection.model_validate({"classes": {0: "a", 1: "b"}, "modalities": modalities, "train": split})
    assert list(data.train.images) == ["rgb", "dem"]


@pytest.mark.parametrize("fusion", [None, {"name": "stack"}])
@pytest.mark.pitfall("P62")
def test_a_fusion_that_needs_all_modalities_refuses_optional_ones(place: Path, fusion: dict[str, str] | None) -> None:
    with pytest.raises(RecipeError, match=r"data\.modalities\.sar\.optional = true: model\.fusion = stack puts all"):
        sensor_recipe(place, data__modalities={"rgb": {}, "sar": {"optional": True}}, model__fusion=fusion)
    strict: dict[str, Any] = {"rgb": {}, "sar": {}}
    with pytest.raises(RecipeError, match=r"train\.modality_dropout = 0\.2: model\.fusion = stack puts all"):
        sensor_recipe(place, data__modalities=strict, model__fusion=fusion, train__modality_dropout=0.2)


def test_one_modality_alone_can_neither_be_optional_nor_hidden(place: Path) -> None:
    alone = sensor_content(place, data__modalities={"rgb": {"optional": True}}, train__modality_dropout=0.5)
    alone["model"].pop("fusion")
    for split in ("train", "val", "test"):
        alone["data"][split].pop("sar")
    with pytest.raises(RecipeError, match="there is only one modality, and no answer without it") as caught:
        load_recipe(write_recipe(place / "one.yaml", alone))
    assert "data.modalities.rgb.optional" in str(caught.value)
    assert "train.modality_dropout" in str(caught.value)


@pytest.mark.parametrize("value", [1.0, -0.1, True, "much", [], {}, {"sar": 1}, float("nan")])
@pytest.mark.pitfall("P62")
def test_a_dropout_that_is_no_chance_is_one_line(place: Path, value: Any) -> None:
    with pytest.raises(RecipeError, match=r"train\.modality_dropout .*at least 0 and below 1") as caught:
        sensor_recipe(place, train__modality_dropout=value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_dropout_of_one_modality(place: Path) -> None:
    recipe = sensor_recipe(place, train__modality_dropout={"sar": 0.25})
    assert recipe.train.dropout_of(recipe.data.modalities) == {"sar": 0.25}
    assert sensor_recipe(place, train__modality_dropout=0).train.dropout_of(BOTH) == {}
    assert sensor_recipe(place, train__modality_dropout=0.1).train.dropout_of(BOTH) == {"rgb": 0.1, "sar": 0.1}
    assert load_recipe(write(place / "again.yaml", dump_recipe(recipe))) == recipe
    with pytest.raises(RecipeError, match=r"train\.modality_dropout\.saar is not one .* did you mean 'sar'"):
        sensor_recipe(place, train__modality_dropout={"saar": 0.25})


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.pitfall("P31")
def test_files_without_a_partner_are_scenes_without_that_modality(place: Path) -> None:
    scenes = scenes_in(place)
    assert {scene.name: " ".join(scene.bands()) for scene in scenes} == TRAIN
    for scene in scenes:
        chips = scene.read(Window(0, 0, 8, 8))
        assert list(chips) == list(scene.bands()) == list(scene.dtypes()) == list(scene.said())
        assert all(chip.valid.all() for chip in chips.values())
        path = Path(scene.traces()["labels"][0])
        assert path.stem == scene.name
        assert all(Path(place_).stem == scene.name for place_, _ in scene.traces().values())


@pytest.mark.pitfall("P31")
def test_a_modality_that_is_not_optional_is_as_strict_as_ever(place: Path) -> None:
    with pytest.raises(DataError, match=r"1 of labels without a file of the same name in rgb: .*c\.tif"):
        scenes_in(place, optional=("sar",))
    with pytest.raises(DataError, match=r"1 of labels without a file of the same name in sar: .*b\.tif"):
        scenes_in(place, optional=("rgb",))


@pytest.mark.pitfall("P31")
def test_a_file_without_labels_is_told_also_of_an_optional_modality(place: Path) -> None:
    write_raster(place / "train" / "sar" / "e.tif", np.zeros((1, 48, 56), np.float32))
    with pytest.raises(DataError, match=r"1 of sar without a file of the same name in labels: .*e\.tif") as caught:
        scenes_in(place)
    assert "of rgb without" not in str(caught.value)  # a scene may lack either
    assert "in sar" not in str(caught.value)


def test_a_pattern_of_an_optional_modality_that_finds_nothing_is_told(place: Path) -> None:
    sources = {"rgb": f"{place}/train/rgb/*.tif", "sar": f"{place}/train/saar/*.tif"}
    with pytest.raises(DataError, match=r"data\.train\.sar: the pattern .* matches no file"):
        scenes_from_files(sources, f"{place}/train/labels/*.tif", BANDS, LABELS, "data.train", BOTH)


@pytest.mark.pitfall("P31")
def test_what_the_stars_stand_for_pairs_optional_files_too(tmp_path: Path) -> None:
    two_sensors(tmp_path, "train", TRAIN)
    for path in (tmp_path / "train" / "sar").iterdir():
        path.rename(path.with_name(f"{path.stem}_sar.tif"))
    sources = {"rgb": f"{tmp_path}/train/rgb/*.tif", "sar": f"{tmp_path}/train/sar/*_sar.tif"}
    scenes = scenes_from_files(sources, f"{tmp_path}/train/labels/*.tif", BANDS, LABELS, "data.train", BOTH)
    assert {scene.name: " ".join(scene.bands()) for scene in scenes} == TRAIN


@pytest.mark.pitfall("P62")
def test_labels_without_any_image_are_told(place: Path) -> None:
    write_raster(place / "train" / "labels" / "z.tif", np.zeros((48, 56), np.uint8))
    with pytest.raises(DataError, match=r"1 of labels without a file of the same name in any of rgb, sar: .*z\.tif"):
        scenes_in(place)


def table_of(place: Path, rows: list[dict[str, str]], **sources: str) -> list[Any]:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["split", "name", "rgb", "sar", "label"])
    writer.writeheader()
    writer.writerows({"split": "train", **row} for row in rows)
    (place / "table.csv").write_text(text.getvalue())
    images = {"rgb": "rgb", "sar": "sar"} | sources
    optional = ("sar", "rgb")
    return scenes_from_table(place / "table.csv", "train", "split", images, "label", BANDS, LABELS, optional)


def test_an_empty_cell_of_a_table_is_a_scene_without_that_modality(place: Path) -> None:
    rows = [
        {"name": name}
        | {m: f"train/{m}/{name}.tif" for m in modalities.split()}
        | {"label": f"train/labels/{name}.tif"}
        for name, modalities in TRAIN.items()
    ]
    scenes = table_of(place, rows)
    assert {scene.name: " ".join(scene.bands()) for scene in scenes} == TRAIN
    with pytest.raises(DataError, match=r"line 3: the cells of all modalities \(rgb, sar\) are empty"):
        table_of(place, [rows[0], {"name": "b", "label": "train/labels/b.tif"}])
    with pytest.raises(DataError, match=r"names .*nowhere\.tif', which does not exist"):
        table_of(place, [rows[0] | {"sar": "train/sar/nowhere.tif"}])
    with pytest.raises(DataError, match="the cell for 'label' is empty"):
        table_of(place, [rows[0] | {"label": ""}])


def test_a_template_over_an_empty_cell_names_no_file(place: Path) -> None:
    rows = [
        {"name": name, "rgb": f"train/rgb/{name}.tif", "label": f"train/labels/{name}.tif", "sar": sar}
        for name, sar in (("a", "a"), ("b", ""))
    ]
    scenes = table_of(place, rows, sar="{split}/sar/{sar}.tif")
    assert [list(scene.bands()) for scene in scenes] == [["rgb", "sar"], ["rgb"]]


def test_a_modality_that_is_not_optional_may_have_no_empty_cell(place: Path) -> None:
    (place / "t.csv").write_text("split,rgb,sar,label\ntrain,train/rgb/a.tif,,train/labels/a.tif\n")
    arguments: tuple[Any, ...] = (place / "t.csv", "train", "split", {"rgb": "rgb", "sar": "sar"}, "label", BANDS)
    with pytest.raises(DataError, match="the cell for 'sar' is empty"):
        scenes_from_table(*arguments, LABELS, ("rgb",))


# ------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.pitfall("P27", "C25", "C44")
def test_statistics_are_those_of_the_scenes_that_have_it(place: Path) -> None:
    scenes = scenes_in(place)
    found = stream_statistics(scenes)
    for name in BOTH:
        having = [scene for scene in scenes if name in scene.bands()]
        values = np.concatenate(
            [s.read(Window(0, 0, 48, 56))[name].pixels.reshape(len(found[name][0]), -1) for s in having], 1
        )
        np.testing.assert_allclose(found[name][0], values.mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(found[name][1], values.std(axis=1), rtol=1e-6)


def test_all_who_look_at_scenes_cope_with_missing_modalities(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_said", set())  # by other tests
    recipe, traces = sensor_recipe(place), Traces()
    scenes = open_training(recipe, traces)
    told = said(capsys)
    assert "data.train: 3 of 4 scenes have rgb, which is optional" in told
    assert "data.val: 2 of 2 scenes have sar, which is optional" in told
    assert len([what for what in traces.found if "sar of data.train" in what]) == 3
    inputs = inputs_of(recipe, scenes["train"])
    assert [(one.name, one.count, one.dtype, one.optional) for one in inputs] == [
        ("rgb", 3, "uint8", True),
        ("sar", 1, "float32", True),
    ]
    assert inputs[1].mean == pytest.approx(stream_statistics(scenes["train"])["sar"][0])
    found = survey(scenes["train"], 2, "any")
    np.testing.assert_array_equal(found.labelled, found.visible)
    assert require_labels(scenes["train"], "train", 2, "any") == found.labelled.tolist()


def test_the_first_scene_may_lack_a_modality(tmp_path: Path) -> None:
    two_sensors(tmp_path, "train", {"a": "sar", "b": "rgb", "c": "rgb sar"})
    two_sensors(tmp_path, "val", {"v": "rgb"})
    val = {name: f"{tmp_path}/val/{name}/*.tif" for name in ("rgb", "labels")}
    recipe = sensor_recipe(tmp_path, data__test=None, data__val=val)
    scenes = open_training(recipe)
    assert [one.name for one in inputs_of(recipe, scenes["train"])] == ["rgb", "sar"]  # in the order of the recipe


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_that_differ_are_told_by_the_first_that_has_the_modality(place: Path, split: str) -> None:
    name = {"train": "d", "val": "w"}[split]
    write_raster(place / split / "sar" / f"{name}.tif", np.ones((2, 48, 56), np.float32))
    recipe = sensor_recipe(place)
    with pytest.raises(DataError, match=rf"data\.{split}: {name} has bands .*'sar': 2.*, but \w has .*'sar': 1"):
        open_training(recipe)


@pytest.mark.pitfall("P62")
def test_a_modality_that_no_training_scene_has_is_told_before_training(place: Path) -> None:
    recipe = sensor_recipe(place, data__train={n: f"{place}/train/{n}/*.tif" for n in ("rgb", "labels")})
    for path in (place / "train" / "labels").glob("c.tif"):
        path.unlink()
    with pytest.raises(DataError, match=r"data\.modalities\.sar: no scene of data\.train has it"):
        open_training(recipe)


def test_the_first_modality_that_is_there_is_the_grid(tmp_path: Path) -> None:
    write_raster(tmp_path / "rgb" / "a.tif", np.ones((3, 20, 30), np.uint8))
    for name in "ab":
        write_raster(tmp_path / "sar" / f"{name}.tif", np.ones((1, 10, 15), np.float32), pixel=20)
    write_raster(tmp_path / "labels" / "a.tif", np.zeros((20, 30), np.uint8))
    write_raster(tmp_path / "labels" / "b.tif", np.zeros((10, 15), np.uint8), pixel=20)
    sources = {name: f"{tmp_path}/{name}/*.tif" for name in BOTH}
    one, two = scenes_from_files(sources, f"{tmp_path}/labels/*.tif", BANDS, LABELS, "data.train", ("rgb",))
    assert (one.grid.height, two.grid.height) == (20, 10)
    assert one.read(Window(0, 0, 20, 30))["sar"].pixels.shape == (1, 20, 30)  # moved onto the image's grid
