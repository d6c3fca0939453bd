from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix, jaccard_score, precision_recall_fscore_support

from vfmseg.errors import DataError
from vfmseg.metrics import IGNORE, Confusion, comparable, mean_text

NAMES = ("land", "water", "road", "roof")


def make_maps(seed: int = 0, share: tuple[float, ...] = (0.5, 0.3, 0.15, 0.05)) -> tuple[np.ndarray, np.ndarray]:
    """A label map with ignored pixels, and a prediction that is right in three quarters of it."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, size=(37, 53), p=share)
    prediction = np.where(rng.random(labels.shape) < 0.75, labels, rng.integers(0, 4, labels.shape))
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    return prediction.astype(np.int64), labels.astype(np.int64)


def scored(*maps: tuple[np.ndarray, np.ndarray]) -> dict:
    confusion = Confusion(4)
    for prediction, labels in maps:
        confusion.update(prediction, labels)
    return confusion.scores(NAMES)


def from_matrix(matrix: list[list[int]]) -> Confusion:
    confusion = Confusion(len(matrix))
    confusion.matrix += torch.tensor(matrix, dtype=torch.int64)
    return confusion


@pytest.mark.pitfall("C24")
def test_every_score_equals_scikit_learn() -> None:
    prediction, labels = make_maps()
    seen = labels != IGNORE
    truth, answer = labels[seen], prediction[seen]
    confusion = Confusion(4)
    confusion.update(prediction, labels)
    assert np.array_equal(confusion.matrix.numpy(), confusion_matrix(truth, answer))
    scores = confusion.scores(NAMES)
    precision, recall, f1, support = precision_recall_fscore_support(truth, answer)
    iou = jaccard_score(truth, answer, average=None)
    for i, name in enumerate(NAMES):
        row = scores["classes"][name]
        want = {"iou": iou[i], "f1": f1[i], "precision": precision[i], "recall": recall[i], "support": support[i]}
        assert row == pytest.approx(want, rel=1e-12)
    assert scores["miou"] == pytest.approx(jaccard_score(truth, answer, average="macro"), rel=1e-12)
    assert scores["overall_accuracy"] == pytest.approx((truth == answer).mean(), rel=1e-12)
    assert scores["kappa"] == pytest.approx(cohen_kappa_score(truth, answer), rel=1e-12)
    assert scores["pixels"] == seen.sum()
    assert scores["absent"] == []


@pytest.mark.pitfall("P42")
def test_scores_are_pooled_not_averaged_over_images() -> None:
    easy = (np.zeros((10, 10), np.int64), np.zeros((10, 10), np.int64))
    labels = np.zeros((10, 10), np.int64)
    labels[:5] = 1
    hard = (np.zeros((10, 10), np.int64), labels)  # finds no water at all
    confusion = Confusion(2)
    confusion.update(*easy)
    confusion.update(*hard)
    scores = confusion.scores(("land", "water"))
    # by hand: land 150 shared of 200, water 0 of 50; the mean of image scores would be (1 + 0.25) / 2
    assert scores["classes"]["land"]["iou"] == 150 / 200
    assert scores["miou"] == (150 / 200 + 0) / 2


@pytest.mark.pitfall("P42")
def test_tiles_in_any_cut_and_order_score_like_the_whole() -> None:
    prediction, labels = make_maps()
    tiles = [(prediction[r : r + 10, c : c + 9], labels[r : r + 10, c : c + 9]) for r in range(0, 37, 10)
             for c in range(0, 53, 9)]  # fmt: skip
    assert scored(*reversed(tiles)) == scored((prediction, labels))


@pytest.mark.pitfall("P43")
def test_absent_classes_leave_the_mean_and_are_named() -> None:
    scores = from_matrix([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).scores(NAMES)
    assert scores["absent"] == ["road", "roof"]
    assert scores["miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert scores["classes"]["road"] == {
        "iou": None,
        "f1": None,
        "precision": None,
        "recall": None,
        "support": 0,
    }


@pytest.mark.pitfall("P43")
def test_a_class_predicted_but_never_true_counts_as_zero() -> None:
    scores = from_matrix([[6, 2], [0, 0]]).scores(("land", "water"))
    assert scores["classes"]["water"] == {"iou": 0.0, "f1": 0.0, "precision": 0.0, "recall": None, "support": 0}
    assert scores["miou"] == (6 / 8 + 0) / 2
    assert scores["absent"] == []


@pytest.mark.pitfall("P43")
def test_a_class_true_but_never_predicted_counts_as_zero() -> None:
    scores = from_matrix([[6, 0], [2, 0]]).scores(("land", "water"))
    assert scores["classes"]["water"] == {"iou": 0.0, "f1": 0.0, "precision": None, "recall": 0.0, "support": 2}
    assert scores["miou"] == (6 / 8 + 0) / 2


@pytest.mark.pitfall("C3")
def test_clutter_in_the_mean_outside_of_it_and_ignored_are_three_scores() -> None:
    """Outside of the mean it still is in the matrix: what is taken for clutter is an error of its class."""
    names, matrix = ("road", "roof", "clutter"), [[80, 10, 10], [0, 50, 0], [20, 0, 5]]
    inside = from_matrix(matrix).scores(names)
    outside = from_matrix(matrix).scores(names, outside=["clutter"])
    ignored = from_matrix([row[:2] for row in matrix[:2]]).scores(names[:2])
    road, roof, clutter = 80 / 120, 50 / 60, 5 / 35
    assert inside["miou"] == pytest.approx((road + roof + clutter) / 3)
    assert outside["miou"] == pytest.approx((road + roof) / 2)
    assert ignored["miou"] == pytest.approx((80 / 90 + roof) / 2)
    assert [round(one["overall_accuracy"], 4) for one in (inside, outside, ignored)] == [0.7714, 0.7714, 0.9286]
    assert (outside["classes_in_mean"], outside["outside_mean"]) == (2, ["clutter"])
    assert outside["classes"]["clutter"]["iou"] == clutter
    assert mean_text(outside) == "0.750 over 2 of 3 classes (clutter outside)"
    assert comparable(outside) == pytest.approx((road + roof) / 2)
    absent = from_matrix([[3, 0, 0], [0, 0, 0], [1, 0, 2]]).scores(names, outside=["clutter"])
    assert mean_text(absent) == "0.750 over 1 of 3 classes (no roof; clutter outside)"


@pytest.mark.pitfall("P44")
def test_counts_past_float32_stay_exact() -> None:
    confusion = from_matrix([[2**24, 0], [0, 2**24]])
    for _ in range(3):
        confusion.update(np.array([0, 1]), np.array([0, 0]))
    assert confusion.matrix.dtype == torch.int64
    assert confusion.matrix.tolist() == [[2**24 + 3, 3], [0, 2**24]]
    other = from_matrix([[2**24 + 1, 2**33], [1, 2**24]])
    confusion.merge(other)
    assert confusion.matrix.tolist() == [[2**25 + 4, 2**33 + 3], [1, 2**25]]


@pytest.mark.pitfall("P44")
def test_kappa_of_a_large_scene_does_not_overflow() -> None:
    small = [[50, 10, 3], [5, 80, 2], [1, 4, 45]]
    names = ("a", "b", "c")
    large = [[count * 2**32 for count in row] for row in small]  # products of these pass 2**63
    a, b = from_matrix(small).scores(names), from_matrix(large).scores(names)
    assert b["kappa"] == pytest.approx(a["kappa"], rel=1e-12)
    assert b["miou"] == pytest.approx(a["miou"], rel=1e-12)
    assert b["pixels"] == a["pixels"] * 2**32


@pytest.mark.pitfall("P45")
def test_ignored_pixels_drop_out_by_label_alone() -> None:
    prediction, labels = make_maps()
    elsewhere = prediction.copy()
    elsewhere[labels == IGNORE] = -7  # whatever is predicted there, even nothing
    assert scored((elsewhere, labels)) == scored((prediction, labels))
    labels[:] = IGNORE
    empty = scored((prediction, labels))
    assert empty["miou"] is None
    assert empty["pixels"] == 0
    assert empty["absent"] == list(NAMES)


@pytest.mark.pitfall("P47")
def test_reading_scores_changes_nothing_and_updates_add_up() -> None:
    confusion = Confusion(4)
    confusion.update(*make_maps(0))
    first = confusion.scores(NAMES)
    assert confusion.scores(NAMES) == first
    confusion.update(*make_maps(1))
    both = Confusion(4)
    for seed in (0, 1):
        part = Confusion(4)
        part.update(*make_maps(seed))
        both.merge(part)
    assert both.scores(NAMES) == confusion.scores(NAMES) == scored(make_maps(0), make_maps(1))
    assert confusion.scores(NAMES)["pixels"] > first["pixels"]


@pytest.mark.pitfall("P58")
def test_batch_of_one_short_batches_and_tensors_are_counted_alike() -> None:
    maps = [make_maps(seed) for seed in range(3)]
    predictions = torch.stack([torch.from_numpy(p) for p, _ in maps])
    labels = torch.stack([torch.from_numpy(y) for _, y in maps])
    confusion = Confusion(4)
    confusion.update(predictions[:2], labels[:2])
    confusion.update(predictions[2:], labels[2:])
    assert confusion.scores(NAMES) == scored(*maps)
    narrow = Confusion(4)
    for prediction, truth in maps:
        narrow.update(prediction.astype(np.uint8), truth.astype(np.int8))  # 3 * 4 + 3 fits, 16 classes would not
    assert narrow.scores(NAMES) == scored(*maps)


@pytest.mark.pitfall("P58")
def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(1, 4, 4\) and labels \(4, 4\) .*grid of the labels"):
        Confusion(2).update(np.zeros((1, 4, 4), np.int64), np.zeros((4, 4), np.int64))


@pytest.mark.pitfall("C24")
def test_small_integer_types_do_not_wrap() -> None:
    confusion = Confusion(40)
    confusion.update(np.full((2, 2), 39, np.uint8), np.full((2, 2), 39, np.int8))  # 39 * 40 + 39 > 255
    assert confusion.matrix[39, 39] == 4


@pytest.mark.parametrize(
    ("prediction", "label", "what"), [(4, 0, "prediction"), (-1, 0, "prediction"), (0, 5, "labels")]
)
def test_indexes_outside_the_classes_are_refused_and_nothing_is_counted(prediction: int, label: int, what: str) -> None:
    confusion = Confusion(4)
    with pytest.raises(DataError, match=rf"{what} .*expected 0\.\.3"):
        confusion.update(np.array([1, prediction]), np.array([1, label]))
    assert confusion.matrix.sum() == 0


def test_scores_are_json_without_nan() -> None:
    for matrix in ([[0, 0], [0, 0]], [[5, 0], [0, 0]], [[0, 5], [0, 0]], [[3, 1], [2, 4]]):
        text = json.dumps(from_matrix(matrix).scores(("land", "water")), allow_nan=False)
        assert json.loads(text)["pixels"] == sum(map(sum, matrix))


def test_kappa_is_undefined_where_chance_agrees_everywhere_and_zero_for_guessing() -> None:
    assert from_matrix([[9, 0], [0, 0]]).scores(("a", "b"))["kappa"] is None
    guessing = from_matrix([[9, 9], [9, 9]]).scores(("a", "b"))["kappa"]
    assert guessing is not None
    assert math.isclose(guessing, 0.0, abs_tol=1e-15)


def test_names_must_tell_the_classes_apart() -> None:
    with pytest.raises(DataError, match="no two alike"):
        Confusion(2).scores(("land", "land"))
    with pytest.raises(DataError, match="for 2 classes"):
        Confusion(2).scores(("land", "water", "road"))


def test_merging_other_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"3 classes .* 2;"):
        Confusion(2).merge(Confusion(3))
