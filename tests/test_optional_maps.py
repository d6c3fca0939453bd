"""Maps and scores of scenes that lack a modality, by a trained segmenter: every subset, however the work was cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from makers import an_input, save_encoder, sensor_recipe, toy_scene, two_sensors, write_raster
from typer.testing import CliRunner

from vfmseg.cli import app
from vfmseg.data.given import open_scenes
from vfmseg.errors import DataError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.geo.grid import Window
from vfmseg.inference.output import Output, Watch
from vfmseg.inference.shards import RunSink
from vfmseg.metrics import Confusion
from vfmseg.predict import modality_named
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter

STRIPS: list[int] = []  # of what was labelled, in order
SUBSETS = (("rgb",), ("sar",), ("rgb", "sar"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in run/, and a scene of 300 x 260 px of which each sensor has seen another part."""
    folder = tmp_path_factory.mktemp("sensors")
    save_encoder(folder / "encoder", "dinov2")
    two_sensors(folder, "train", {"a": "rgb sar", "b": "rgb", "c": "sar", "d": "rgb sar"})
    two_sensors(folder, "val", {"v": "rgb sar"})
    two_sensors(folder, "test", {"t": "rgb sar", "u": "rgb", "x": "sar"})
    finetune(sensor_recipe(folder, train__epochs=6, train__modality_dropout=0.2))
    image, _ = toy_scene(7, 300, 260)
    sar = (image[:1] / 255 * 20 - 25).astype(np.float32)
    image[:, 100:180, 60:150], sar[:, 150:260, 120:] = 0, np.nan
    write_raster(folder / "rgb.tif", image, nodata=0)
    write_raster(folder / "sar.tif", sar)
    return folder


@pytest.fixture(scope="module")
def segmenter(place: Path) -> Segmenter:
    return Segmenter.from_pretrained(place / "run" / "best", device="cpu")


def scene(place: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: str(place / f"{name}.tif") for name in names}


def label(segmenter: Segmenter, given: dict[str, str], target: Path, how: dict[str, Any], **wanted: Any) -> list[bytes]:
    """The bytes of the labels and of the confidence."""
    output = Output(target, extras=("confidence",), **wanted)
    segmenter.label(given, output, how, watch=Watch(lambda job, _: STRIPS.append(len(job.plan.strips))))
    return [file.read_bytes() for file in output.maps.values()]


def interrupted(segmenter: Segmenter, given: dict[str, str], target: Path, how: dict[str, Any], **wanted: Any) -> None:
    """Label until the first piece is finished."""

    def enough(self: RunSink, *rows: Any, honest: Any = RunSink.write) -> None:
        honest(self, *rows)
        if not self._writers:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSink, "write", enough)
        with pytest.raises(KeyboardInterrupt):
            label(segmenter, given, target, how, **wanted)


HOWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"tta": "flips", "scales": (0.5, 1.0), "blend": "none"}, {"skip_unreadable": True}),
    ({"batch_size": 3}, {"area": (500310.0, 4997610.0, 502000.0, 4999500.0)}),
]


@pytest.mark.parametrize(("how", "wanted"), HOWS)
@pytest.mark.parametrize("names", SUBSETS)
@pytest.mark.pitfall("P24", "P32", "C44")
def test_a_map_of_any_subset_does_not_depend_on_the_cut(
    place: Path,
    segmenter: Segmenter,
    tmp_path: Path,
    names: tuple[str, ...],
    how: dict[str, Any],
    wanted: dict[str, Any],
) -> None:
    given = scene(place, names)
    whole = label(segmenter, given, tmp_path / "whole.tif", how | {"readers": 1}, **wanted)
    assert STRIPS[-1] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfmseg.inference.job.WIDEST_STRIP", 80)
        strips = label(segmenter, given, tmp_path / "strips.tif", how | {"readers": 3}, **wanted)
        assert STRIPS[-1] > 3
        interrupted(segmenter, given, tmp_path / "again.tif", how, **wanted)
        again = label(segmenter, given, tmp_path / "again.tif", how, resume=True, **wanted)
    assert whole == strips == again
    with rasterio.open(tmp_path / "whole.tif") as stored:
        labels = stored.read(1)
    seen = np.zeros((300, 260), dtype=bool)
    for name in names:
        hole = {"rgb": (slice(100, 180), slice(60, 150)), "sar": (slice(150, 260), slice(120, None))}[name]
        valid = np.ones_like(seen)
        valid[hole] = False
        seen |= valid
    if "area" not in wanted:
        np.testing.assert_array_equal(labels != 255, seen)


@pytest.mark.pitfall("P24")
def test_two_processes_make_the_bytes_of_one_of_a_subset(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    (whole, _) = label(segmenter, scene(place, ("sar",)), tmp_path / "one.tif", {})
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vfmseg.cli"),
        *("predict", str(place / "run" / "best"), f"sar={place / 'sar.tif'}", "-o", str(tmp_path / "two.tif")),
        *("--device", "cpu", "--confidence"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.tif").read_bytes() == whole


@pytest.mark.pitfall("C44", "P26")
def test_a_modality_full_of_nan_is_as_good_as_one_that_is_missing(place: Path, segmenter: Segmenter) -> None:
    image, _ = toy_scene(9, 48, 56)
    for absent in (np.full((1, 48, 56), np.nan, np.float32), None):
        given = {"rgb": image} if absent is None else {"rgb": image, "sar": absent}
        shares = segmenter.probabilities(given)
        assert np.isfinite(shares).all()
        if absent is not None:
            before = shares
    np.testing.assert_allclose(shares, before, atol=1e-5)
    there = segmenter.probabilities({"rgb": image, "sar": np.full((1, 48, 56), -15, np.float32)})
    assert not np.allclose(shares, there, atol=1e-3)  # what SAR sees does count


@pytest.mark.parametrize("names", SUBSETS)
def test_maps_say_which_modalities_there_were(
    place: Path, segmenter: Segmenter, tmp_path: Path, names: tuple[str, ...]
) -> None:
    given = dict(reversed(scene(place, names).items()))  # the order in which they are given means nothing
    label(segmenter, given, tmp_path / "m.tif", {})
    for file in ("m.tif", "m_confidence.tif"):
        with rasterio.open(tmp_path / file) as stored:
            assert stored.tags()["vfmseg_modalities"] == "+".join(names)


@pytest.mark.pitfall("P35", "F1")
def test_pieces_of_another_subset_are_other_work(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    target = tmp_path / "m.tif"
    interrupted(segmenter, scene(place, ("rgb", "sar")), target, {})
    with pytest.raises(DataError, match=r"pieces here are of other work .*vfmseg_modalities was rgb\+sar, is rgb"):
        label(segmenter, scene(place, ("rgb",)), target, {}, resume=True)
    label(segmenter, scene(place, ("rgb", "sar")), target, {}, resume=True)
    with pytest.raises(DataError, match="exists already"):
        label(segmenter, scene(place, ("rgb",)), target, {}, resume=True)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.pitfall("P62")
def test_what_is_missing_is_refused_or_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = (an_input(), an_input("sar", 1, "float32", -15.0, 5.0))
    with pytest.raises(
        DataError, match=r"needs the modalities rgb, sar, but got sar; it answers only where all of them"
    ):
        open_scenes(scene(place, ("sar",)), inputs, 1, "all")
    with pytest.raises(DataError, match="but got none; pass a path or array for one of them"):
        open_scenes({}, inputs, 1, "any")
    with pytest.raises(DataError, match="but got sar, dem; pass one path or array for each"):
        open_scenes(scene(place, ("sar",)) | {"dem": "d.tif"}, inputs, 1, "any")
    (opened,) = open_scenes(scene(place, ("sar",)), inputs, 1, "any")
    assert list(opened.read(Window(0, 0, 4, 4))) == ["sar"]
    assert "rgb is missing, and the segmenter was never trained without it" in said(capsys)


def test_what_training_has_met_is_not_told(
    place: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    segmenter.predict(scene(place, ("sar",)))
    assert "missing" not in said(capsys)


def test_bands_of_a_missing_modality_are_told(place: Path, segmenter: Segmenter) -> None:
    with pytest.raises(RecipeError, match="bands: 'rgb' is not among the modalities that are given"):
        segmenter.predict(scene(place, ("sar",)), bands={"rgb": [1, 2, 3]})


def test_the_grid_is_that_of_the_first_modality_that_is_there(segmenter: Segmenter, tmp_path: Path) -> None:
    image, _ = toy_scene(1, 60, 80)
    sar = np.full((1, 30, 40), -15, np.float32)
    paths = {
        "rgb": str(write_raster(tmp_path / "rgb.tif", image)),
        "sar": str(write_raster(tmp_path / "sar.tif", sar, pixel=20)),
    }
    assert np.shape(segmenter.predict(paths)) == (60, 80)
    assert np.shape(segmenter.predict({"sar": paths["sar"]})) == (30, 40)


# ------------------------------------------------------------------------------------------------- command line


def run(place: Path, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", str(place / "run" / "best"), *map(str, arguments), "--device", "cpu"])


def test_scene_may_be_named_as_a_modality(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    expected = segmenter.predict(scene(place, ("sar",)))
    done = run(place, f"sar={place / 'sar.tif'}", "-o", tmp_path / "m.tif", "--bands", "1")
    assert done.exit_code == 0, done.output
    with rasterio.open(tmp_path / "m.tif") as stored:
        np.testing.assert_array_equal(stored.read(1), expected)
        assert stored.tags()["vfmseg_modalities"] == "sar"
    both = run(place, f"sar={place / 'sar.tif'}", "-o", tmp_path / "b.tif", "--modality", f"rgb={place / 'rgb.tif'}")
    assert both.exit_code == 0, both.output
    with rasterio.open(tmp_path / "b.tif") as stored:
        assert stored.tags()["vfmseg_modalities"] == "rgb+sar"
    twice = run(place, f"sar={place / 'sar.tif'}", "-o", tmp_path / "c.tif", "--modality", "sar=x.tif")
    assert twice.exit_code == 2
    assert "'sar' is SCENE itself" in twice.stderr


def test_a_folder_of_scenes_may_be_named_as_a_modality(place: Path, tmp_path: Path) -> None:
    for name in "pq":
        write_raster(tmp_path / "in" / f"{name}.tif", np.full((1, 40, 50), -12, np.float32))
    done = run(place, f"sar={tmp_path / 'in'}", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["scenes"]) == 2
    with rasterio.open(tmp_path / "out" / "p.tif") as stored:
        assert stored.tags()["vfmseg_modalities"] == "sar"


def test_what_is_there_as_a_file_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (an_input(), an_input("sar", 1, "float32", -15.0, 5.0))
    monkeypatch.chdir(tmp_path)
    assert modality_named("sar=a.tif", inputs) == ("sar", "a.tif")
    assert modality_named("dem=a.tif", inputs) == ("rgb", "dem=a.tif")
    assert modality_named("a.tif", inputs) == ("rgb", "a.tif")
    assert modality_named("sar=https://h/a.tif?x=1", inputs) == ("sar", "https://h/a.tif?x=1")
    (tmp_path / "sar=a.tif").touch()
    assert modality_named("sar=a.tif", inputs) == ("rgb", "sar=a.tif")


# ------------------------------------------------------------------------------------------------------- scores


def counted(segmenter: Segmenter, place: Path, names: tuple[str, ...]) -> Confusion:
    """By hand: maps of the test scenes with these modalities, against their labels."""
    confusion = Confusion(2)
    for path in sorted((place / "test" / "labels").iterdir()):
        given = {n: str(place / "test" / n / path.name) for n in names if (place / "test" / n / path.name).exists()}
        if given:
            with rasterio.open(path) as stored:
                truth = stored.read(1).astype(np.int64)
            labels = np.asarray(segmenter.predict(given)).astype(np.int64)
            truth[labels == segmenter.nodata] = -1
            confusion.update(np.where(labels == segmenter.nodata, 0, labels), truth)
    return confusion


@pytest.mark.pitfall("C23", "C24", "P42", "C44")
def test_scores_of_each_subset_are_those_of_its_maps(place: Path, segmenter: Segmenter) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    found = segmenter.evaluate_subsets(recipe)
    assert list(found) == ["rgb", "sar", "rgb+sar"]
    for names in SUBSETS:
        expected = counted(segmenter, place, names).scores(["ground", "disc"])
        result = found["+".join(names)]
        assert {key: result[key] for key in expected} == expected
        assert result["modalities"] == list(names)
        assert result == segmenter.evaluate(recipe, only=tuple(reversed(names)))
    assert [found[key]["scenes"] for key in found] == [2, 2, 3]
    assert [found[key]["pixels"] for key in found] == [2 * 48 * 56, 2 * 48 * 56, 3 * 48 * 56]
    whole = segmenter.evaluate(recipe)
    assert "modalities" not in whole
    assert whole["miou"] == found["rgb+sar"]["miou"]
    assert found["rgb"]["miou"] != found["sar"]["miou"]


def test_a_split_without_a_modality_is_scored_without_it(place: Path, segmenter: Segmenter) -> None:
    split = f"{{rgb: {place}/test/rgb/*.tif, labels: [{place}/test/labels/t.tif, {place}/test/labels/u.tif]}}"
    recipe = load_recipe(place / "recipe.yaml", [f"data.test={split}"])
    expected = counted(segmenter, place, ("rgb",)).scores(["ground", "disc"])
    assert expected.items() <= segmenter.evaluate(recipe).items()


@pytest.mark.pitfall("P62")
def test_a_segmenter_that_needs_all_is_not_scored_on_scenes_that_lack_some(
    place: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenter.votes, "known", "all")
    with pytest.raises(DataError, match=r"u: has no sar, but the segmenter answers only where all"):
        segmenter.evaluate(load_recipe(place / "recipe.yaml"))


def test_a_string_names_one_modality(place: Path, segmenter: Segmenter) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    assert segmenter.evaluate(recipe, only="sar") == segmenter.evaluate(recipe, only=["sar"])


@pytest.mark.pitfall("P62")
def test_a_subset_that_there_is_not_is_one_message(place: Path, segmenter: Segmenter) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"only: 'saar' is no modality of this segmenter; did you mean 'sar'"):
        segmenter.evaluate(recipe, only=["saar"])
    with pytest.raises(RecipeError, match="needs one of them at least"):
        segmenter.evaluate(recipe, only=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter.votes, "known", "all")
        with pytest.raises(RecipeError, match="only = sar: this segmenter of rgb, sar answers only where all"):
            segmenter.evaluate(recipe, only=["sar"])
        with pytest.raises(RecipeError, match="answers only where all"):
            segmenter.evaluate_subsets(recipe)


def evaluated(place: Path, *options: str) -> Any:
    arguments = [str(place / "run" / "best"), str(place / "recipe.yaml"), *options, "--device", "cpu"]
    return CliRunner().invoke(app, ["evaluate", *arguments])


def test_scores_of_subsets_on_the_command_line(place: Path, segmenter: Segmenter) -> None:
    expected = segmenter.evaluate_subsets(load_recipe(place / "recipe.yaml"))
    done = evaluated(place, "--subsets", "--json")
    assert json.loads(done.stdout) == {"subsets": expected, "split": "test"}
    lines = evaluated(place, "--subsets").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["modalities", "rgb", "sar", "rgb+sar"]
    assert lines[2].split() == ["sar", "2", "5,376", f"{expected['sar']['miou']:.3f}"]
    alone = json.loads(evaluated(place, "--only", "sar", "--json").stdout)
    assert alone == expected["sar"]
    assert json.loads(evaluated(place, "--only", "sar,rgb", "--json").stdout) == expected["rgb+sar"]
    assert "with sar alone, on 5,376 pixels" in evaluated(place, "--only", "sar").stdout
    refused = evaluated(place, "--only", "sar", "--subsets")
    assert refused.exit_code == 2
    assert "exclude each other" in refused.stderr
