"""The tables of few labels: rows that differ in what they say alone, test measured once, nothing measured twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import save_encoder, toy_folder

from benchmarks import baselines, few_labels, pretraining, table
from benchmarks.pages import with_tables
from vfmseg.build.data import open_split
from vfmseg.encoders.build import build_backbone
from vfmseg.recipe import Recipe, load_recipe

SET = "oam_buildings"
VERSIONS = ("torch", "transformers", "peft")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Toy scenes as if they were a set, a small encoder as if it were the shipped one, and no results yet."""
    folder = toy_folder(tmp_path / "data" / SET, {"train": 8, "val": 2, "test": 1})
    lines = [
        {
            "split": image.parts[-3],
            "image": image.relative_to(folder),
            "label": f"{image.parts[-3]}/labels/{image.name}",
        }
        for image in sorted(folder.glob("*/images/*.tif"))
    ]
    with (folder / "split.csv").open("w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, ["split", "image", "label"])
        writer.writeheader()
        writer.writerows(lines)
    monkeypatch.setattr(few_labels, "BUILTIN", save_encoder(tmp_path / "builtin", "dinov2", seed=3))
    monkeypatch.setattr(few_labels, "RESULTS", tmp_path / "results")
    save_encoder(tmp_path / "vit", "dinov2", seed=1)
    return tmp_path


def run(place: Path, *more: str) -> None:
    where = ["--data", str(place / "data"), "--encoder", str(place / "vit"), "--work", str(place / "work")]
    few_labels.main(["run", SET, *where, *more])


def results(row: str) -> dict[tuple[str, str], Any]:
    return {(fraction, seed): one for fraction, of in few_labels.read(SET, row).items() for seed, one in of.items()}


def said_done(asked: list[tuple[str, ...]]) -> Callable[..., str]:
    """A command line that only says that it has done what it was asked, which is added to a list."""

    def answer(*arguments: str) -> str:
        asked.append(arguments)
        if arguments[0] != "finetune":
            return json.dumps({"miou": 0.5 + len(asked) / 1000})
        folder = Path(next(one for one in arguments if one.startswith("output_dir=")).partition("=")[2])
        folder.mkdir(parents=True)
        found = {"validation": {"miou": 0.6}, "best_epoch": 1, "trainable_parameters": 10}
        (folder / "metrics.json").write_text(json.dumps({**found, "versions": dict.fromkeys(VERSIONS, "1.0")}))
        return ""

    return answer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is asked of the command line, of which nothing is done."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(table, "vfmseg", said_done(asked))
    return asked


def recipe_for(place: Path, name: str, row: str, fraction: float, seed: int = 0) -> Recipe:
    folders = {key: str(place / key) for key in few_labels.SHOWN}
    changes = few_labels.changes_of(name, row, fraction, seed, folders)
    return load_recipe(table.recipe_of(name), [*changes, *table.places(name, place / "data")])


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("row", few_labels.ROWS)
@pytest.mark.parametrize("name", few_labels.SETS)
def test_rows_and_shares_of_labels_have_one_schedule(place: Path, name: str, row: str) -> None:
    first = recipe_for(place, name, "random-linear", 1.0)
    for fraction in few_labels.FRACTIONS:
        one = recipe_for(place, name, row, fraction)
        rate = {"optimizer": one.train.optimizer.model_copy(update={"lr": first.train.optimizer.lr})}
        assert one.train.model_copy(update=rate) == first.train
        assert one.data.model_copy(update={"fraction": 1.0}) == first.data
        assert one.data.fraction == fraction
        assert (one.data.samples_per_epoch, one.data.tile, one.train.precision) == (160, 256, "bf16")
        assert one.model.encoder.upscale == 1.0
        assert one.train.optimizer.lr == (2e-3 if row.endswith("linear") else 1e-3)


def test_the_forest_learns_from_the_tiles_that_the_other_rows_learn_from(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[baselines.Splits] = []

    def look(_: str, splits: baselines.Splits, seed: int, **how: Any) -> dict[str, Any]:
        seen.append(splits)
        return {"scores": {"miou": 0.5}}

    monkeypatch.setattr(baselines, "run", look)
    run(place, "--rows", "forest", "--fractions", "0.25", "--seeds", "0", "1")
    drawn = []
    for splits, seed in zip(seen, (0, 1), strict=True):
        scenes = open_split(recipe_for(place, SET, "random-lora", 0.25, seed), "train")
        expected = baselines.read_tiles(scenes, 256)
        assert len(expected) == len(splits.tiles["train"]) == 2
        for one, other in zip(expected, splits.tiles["train"], strict=True):
            assert np.array_equal(one.image, other.image)
        drawn.append({scene.name for scene in scenes})
    assert drawn[0] != drawn[1]


# ------------------------------------------------------------------------------------------------------------ measured


@pytest.mark.pitfall("C1")
def test_each_run_is_measured_once_on_test_and_what_is_there_is_not_run_again(
    place: Path, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ["--rows", "random-lora", "--fractions", "0.05", "1"]
    run(place, *row, "--seeds", "0")
    assert [call[0] for call in calls] == ["finetune", "evaluate"] * 2
    trained, measured = calls[:2]
    assert measured[1] == f"{trained[-1].partition('=')[2]}/best"
    assert not any(part.startswith("--split") for part in measured)  # which is test, left out
    first = results("random-lora")
    assert set(first) == {("0.05", "0"), ("1", "0")}
    assert all("test" in one and one["validation"] == 0.6 for one in first.values())

    calls.clear()
    run(place, *row, "--seeds", "1", "0")
    assert [call[0] for call in calls] == ["finetune", "evaluate"] * 2  # of the seed that was not there
    assert {key: results("random-lora")[key] for key in first} == first
    calls.clear()
    run(place, *row, "--seeds", "0", "1")
    assert calls == []
    monkeypatch.setattr(few_labels, "WINDOWS", 80)  # another schedule: these are other runs
    assert few_labels.current(SET, "random-lora") == {}
    run(place, *row, "--seeds", "0")
    assert len(calls) == 4


def test_a_run_that_is_stopped_keeps_what_was_measured_before(
    place: Path, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer: Callable[..., str] = table.vfmseg
    monkeypatch.setattr(table, "vfmseg", lambda *given: answer(*given) if len(calls) < 3 else pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        run(place, "--rows", "vit-linear", "--seeds", "0")
    assert set(results("vit-linear")) == {("0.05", "0")}
    monkeypatch.setattr(table, "vfmseg", answer)
    run(place, "--rows", "vit-linear", "--seeds", "0")
    assert set(results("vit-linear")) == {("0.05", "0"), ("0.25", "0"), ("1", "0")}


def test_results_of_other_weights_are_measured_again(place: Path, calls: list[tuple[str, ...]]) -> None:
    row = ["--rows", "vit-lora", "--fractions", "1", "--seeds", "0"]
    run(place, *row)
    save_encoder(place / "vit", "dinov2", seed=2)
    run(place, *row)
    assert [call[0] for call in calls] == ["finetune", "evaluate"] * 2


def test_random_encoders_are_of_the_builtin_layout_and_of_their_seed(place: Path) -> None:
    said = few_labels.BUILTIN / "config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"dtype": "float16"}))  # as it is shipped
    folders = [few_labels.random_vit(place / str(number), seed) for number, seed in enumerate((0, 0, 1))]
    first, again, other = (build_backbone("dinov2", str(folder)) for folder in folders)
    shipped = build_backbone("dinov2", str(few_labels.BUILTIN))
    assert first.base.sha256 == again.base.sha256
    assert len({first.base.sha256, other.base.sha256, shipped.base.sha256}) == 3
    shapes = [{key: one.shape for key, one in of.network.state_dict().items()} for of in (first, shipped)]
    assert shapes[0] == shapes[1]
    position = first.network.state_dict()["embeddings.position_embeddings"]
    assert (position.half().float() != position).any()  # drawn in float32


def test_continual_pretraining_is_done_once_and_fine_tuning_goes_on_from_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(few_labels, "WINDOWS", 4)
    short = {"tile": 56, "samples_per_epoch": 4, "epochs": 1, "batch": 2}
    monkeypatch.setattr(few_labels, "CONTINUAL", {**few_labels.CONTINUAL, **short})
    row = ["--rows", "continual-lora", "--seeds", "1"]
    run(place, *row, "--fractions", "0.25")
    said = capfd.readouterr().err
    assert (
        f"model.adapter starts as it was pretrained in {place / 'work' / f'continual.{SET}.1' / 'run' / 'best'}" in said
    )
    assert "data.fraction: 2 of 8 tiles of data.train, drawn by the seed 1" in said
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(table, "vfmseg", said_done(asked))
    run(place, *row, "--fractions", "0.25", "1")
    assert [call[0] for call in asked] == ["finetune", "evaluate"]  # with all labels, from the same pretraining
    one, two = results("continual-lora").values()
    assert one["pretraining_minutes"] == two["pretraining_minutes"] > 0
    assert one["minutes"] > 0
    assert one["trainable"] > 0
    assert 0 <= one["test"]["miou"] <= 1
    learned = json.loads((place / "work" / f"continual.{SET}.1" / "recipe.yaml").read_text())
    assert len(learned["data"]["scenes"]["rgb"]) == 8  # all training images, and none of val and test
    assert all("/train/images/" in image for image in learned["data"]["scenes"]["rgb"])
    assert str(place) not in few_labels.path_of(SET, "continual-lora").read_text()


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_table_has_mean_spread_and_seeds(place: Path, calls: list[tuple[str, ...]]) -> None:
    assert list(few_labels.lines_of(SET)) == []
    run(place, "--rows", "random-linear", "--fractions", "0.05")
    run(place, "--rows", "random-linear", "--fractions", "1", "--seeds", "2")
    last = list(few_labels.lines_of(SET))[-1]
    assert last == "| random weights, frozen, `linear` | 0.504 ± 0.002 | - | 0.508 (1 seed) | 10 | 0.0 |"


def test_two_scripts_write_into_one_page_and_leave_the_rest(place: Path, calls: list[tuple[str, ...]]) -> None:
    run(place, "--rows", "vit-linear", "--fractions", "1")
    written = few_labels.PAGE.read_text(encoding="utf-8")
    above, rest = (few_labels.page().split(few_labels.BELOW)[0], few_labels.page().partition("\n## Speed")[2])
    assert above == written.split(few_labels.BELOW)[0]
    assert rest == written.partition("\n## Speed")[2]
    assert pretraining.BELOW in rest
    assert "ViT-S/14, frozen, `linear`" in few_labels.page().removesuffix(rest)
    page = place / "page.md"
    page.write_text(few_labels.page(), encoding="utf-8")
    after = with_tables(page, pretraining.BELOW, "| speed |")
    assert few_labels.page().partition("\n## Speed")[0] == after.partition("\n## Speed")[0]
    assert after.endswith(written[written.index("\n## What is written") :])
    assert "| speed |" in after
    with pytest.raises(SystemExit, match=r"page\.md: has no line <!-- no -->"):
        with_tables(page, "<!-- no -->", "")
