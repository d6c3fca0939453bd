"""A class that never occurs: the mean leaves it out and says so, and nothing is chosen by a score that cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import recipe_dict, toy_folder, toy_scene, write_raster

from vfmseg import terminal
from vfmseg.build.data import open_training
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.errors import DataError
from vfmseg.finetune import finetune
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.grid import Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.metrics import Confusion, comparable, mean_text, scores_text
from vfmseg.progress import TrainingProgress
from vfmseg.recipe import Recipe, parse_recipe
from vfmseg.training.objectives import segmentation

NAMES = ("ground", "disc", "tree")


def scores_of(truth: list[int], answer: list[int], classes: int = 3) -> dict[str, Any]:
    confusion = Confusion(classes)
    confusion.update(np.array(answer), np.array(truth))
    return confusion.scores(NAMES[:classes])


def toy(folder: Path, train: Any = None, val: Any = None, **data: Any) -> Recipe:
    """A recipe of two classes whose labels are changed by a function of the true ones."""
    toy_folder(folder)
    for split, change in (("train", train), ("val", val)):
        for path in sorted((folder / split / "labels").iterdir()) if change else ():
            _, labels = toy_scene(int(path.name[1]))
            write_raster(path, change(labels).astype(np.uint8))
    content = recipe_dict(folder, None, folder / "run")
    content["data"] |= data
    return parse_recipe(content, folder, "toy.yaml")


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_said", set())


def ground_only(labels: np.ndarray) -> np.ndarray:
    return labels * 0


def as_255(labels: np.ndarray) -> np.ndarray:
    return labels * 255


# --- the number ---------------------------------------------------------------------------------------------


@pytest.mark.pitfall("F18")
def test_a_mean_over_fewer_classes_says_so() -> None:
    whole = scores_of([0, 1, 2], [0, 1, 1])
    assert (mean_text(whole), whole["classes_in_mean"]) == ("0.500", 3)
    part = scores_of([0, 0, 1, 1], [0, 0, 1, 0])
    assert (mean_text(part), part["classes_in_mean"]) == ("0.583 over 2 of 3 classes (no tree)", 2)
    assert mean_text(scores_of([0, 0], [0, 0]), 4) == "1.0000 over 1 of 3 classes (no disc, tree)"
    assert mean_text(scores_of([-1], [0])) == "none over 0 of 3 classes (no ground, disc, tree)"
    json.dumps(part)


@pytest.mark.pitfall("F18")
def test_epochs_are_compared_by_the_classes_that_have_labels() -> None:
    truth = [0] * 10 + [1] * 10
    better, worse = scores_of(truth, [0] * 10 + [1] * 9 + [2]), scores_of(truth, [0] * 10 + [1] * 8 + [0] * 2)
    assert better["miou"] < worse["miou"]  # for one stray pixel of a class without labels
    assert comparable(better) == pytest.approx((1 + 0.9) / 2)
    assert comparable(worse) == worse["miou"]
    full = scores_of([0, 1, 2, 2], [0, 1, 1, 2])
    assert comparable(full) == full["miou"]  # to the last bit
    assert comparable(scores_of([0, 0], [0, 0])) is None
    assert comparable(scores_of([-1], [0])) is None
    assert comparable(scores_of([0, 0], [0, 0], classes=1)) == 1.0


# --- where it is shown --------------------------------------------------------------------------------------


@pytest.mark.pitfall("F18")
def test_progress_table_and_card_are_marked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = scores_of([0, 0], [0, 0], classes=2)
    marked = "1.000 over 1 of 2 classes (no disc)"
    TrainingProgress(2, 1).epoch(1, 1, segmentation.in_words(scores))
    assert f"val mIoU {marked}" in capsys.readouterr().err
    assert marked in scores_text(scores)
    assert json.loads(json.dumps(scores))["classes_in_mean"] == 1


@pytest.mark.pitfall("F18")
def test_a_validation_of_one_class_chooses_no_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy(tmp_path, val=ground_only)

    def all_ground(*_: Any) -> Confusion:
        confusion = Confusion(2)
        confusion.update(torch.zeros(9), torch.zeros(9))
        return confusion

    monkeypatch.setattr(segmentation, "score_windows", all_ground)
    result = finetune(recipe)
    told = capsys.readouterr().err
    assert result["best_epoch"] == 2  # not the first, whose 1.000 no other can exceed
    assert (result["validation"]["miou"], result["validation"]["classes_in_mean"]) == (1.0, 1)
    (line,) = [line for line in told.splitlines() if line.startswith("data.val: no pixel")]
    assert "all labels are 0 (ground)" in line
    assert "the last epoch is kept as the best" in line
    assert told.count("mIoU 1.000 over 1 of 2 classes (no disc)") == 3  # two epochs, and the end
    card = (tmp_path / "run" / "best" / "README.md").read_text(encoding="utf-8")
    assert "Validation mIoU: 1.0000 over 1 of 2 classes (no disc) (epoch 2)" in card
    load_segmenter(tmp_path / "run" / "best")


# --- what is told before the run ----------------------------------------------------------------------------


@pytest.mark.pitfall("F18")
def test_one_class_alone_teaches_nothing_and_the_reason_is_named(tmp_path: Path) -> None:
    """Masks of 0 and 255, and 255 is the default of data.ignore_index."""
    with pytest.raises(
        DataError,
        match=r"data\.train: every labelled pixel is of class 0 \(ground\), none of 1 \(disc\).*nothing to learn; "
        r"\d+\.\d\d% of its label pixels count as unlabelled \(data\.ignore_index = 255.*if 255 is a class",
    ):
        open_training(toy(tmp_path, train=as_255, val=as_255))
    with pytest.raises(DataError, match=r"nothing to learn; check data\.classes against the label files"):
        open_training(toy(tmp_path, train=ground_only))


@pytest.mark.pitfall("F18")
def test_the_remedy_of_the_message_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = {0: "ground", 255: "disc"}
    open_training(toy(tmp_path, train=as_255, val=as_255, classes=classes, ignore_index=254))
    assert "no pixel of class" not in capsys.readouterr().err


@pytest.mark.pitfall("F18")
def test_a_class_without_labels_in_validation_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_training(toy(tmp_path, classes={0: "ground", 1: "disc", 2: "tree"}))
    told = [line for line in capsys.readouterr().err.splitlines() if "no pixel of class 2 (tree)" in line]
    assert [line.split(":")[0] for line in told] == ["data.train", "data.val"]
    assert "the best epoch is chosen by the mean IoU of the other classes" in told[1]


@pytest.mark.pitfall("F18")
def test_all_classes_there_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_training(toy(tmp_path))
    assert "no pixel of class" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.stack([np.ones((4, 4)), np.zeros((4, 4))]).astype(np.uint8), "one band a class.*whose band is largest"),
        (np.full((4, 4), 0.97, np.float32), "are these probabilities.*write the id of a class to each pixel"),
    ],
)
@pytest.mark.pitfall("F18")
def test_masks_of_other_kinds_are_told_with_a_remedy(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = write_raster(tmp_path / "labels.tif", array)
    with pytest.raises(DataError, match=message):
        LabelRaster(path, LabelMap((0, 1), 255)).read(Window(0, 0, 4, 4))
