"""Scores of a label map, all from one confusion matrix of whole numbers.

Tiles, batches and processes add up their matrices; scores are computed once at the end, so a score never is
a mean of tile scores. Pixels drop out by their label alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE


class Confusion:
    """Counts of (truth, prediction) pairs. `matrix` is int64 (K, K) on the CPU, rows are the truth."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.matrix = torch.zeros((classes, classes), dtype=torch.int64)

    def update(self, prediction: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Count one map or batch: two arrays of class indexes of one shape, labels -1 where ignored.

        Raises DataError, before anything is counted, if the shapes differ or an index is outside the classes.
        """
        predicted, truth = torch.as_tensor(prediction), torch.as_tensor(labels)
        if predicted.shape != truth.shape:
            raise DataError(
                f"metrics: prediction {tuple(predicted.shape)} and labels {tuple(truth.shape)} differ in "
                "shape; expected the same; predict on the grid of the labels"
            )
        counted = truth != IGNORE
        predicted, truth = predicted[counted].long(), truth[counted].long()
        self._check("labels", truth)
        self._check("prediction", predicted)
        pairs = torch.bincount(truth * self.classes + predicted, minlength=self.classes**2)
        self.matrix += pairs.reshape(self.classes, self.classes).to(self.matrix.device)

    def merge(self, other: Confusion) -> None:
        """Add the counts of another part of the same evaluation."""
        if other.classes != self.classes:
            raise DataError(
                f"metrics: a matrix of {other.classes} classes cannot be added to one of {self.classes}; "
                "expected the same classes"
            )
        self.matrix += other.matrix.to(self.matrix.device)

    def scores(self, names: Sequence[str], outside: Collection[str] = ()) -> dict[str, Any]:
        """All scores as plain numbers, ready for JSON: shares in 0..1, None where a score is undefined.

        `names` in index order. `miou`: mean over the classes that occur in labels or predictions; `absent`
        names the others, whose scores are None, `classes_in_mean` counts those that took part. `outside`: classes that
        count in the matrix, so in `overall_accuracy` and as errors of the others, but not in the mean; `outside_mean`
        names them, if there are any. `precision` is
        undefined for a class that is never predicted, `recall` for one without labels, `kappa` if chance alone
        would agree everywhere. `support` and `pixels` count labelled pixels.
        """
        if len(set(names)) != self.classes or len(names) != self.classes:
            raise DataError(
                f"metrics: class names {list(names)} for {self.classes} classes; expected one name a class, "
                "no two alike"
            )
        # Python integers from here on: products of counts go past 2**63 on large scenes
        rows: list[list[int]] = self.matrix.tolist()
        truth = [sum(row) for row in rows]
        predicted = [sum(column) for column in zip(*rows, strict=True)]
        hits = [rows[i][i] for i in range(self.classes)]
        per_class = {
            name: {
                "iou": _share(hits[i], truth[i] + predicted[i] - hits[i]),
                "f1": _share(2 * hits[i], truth[i] + predicted[i]),
                "precision": _share(hits[i], predicted[i]),
                "recall": _share(hits[i], truth[i]),
                "support": truth[i],
            }
            for i, name in enumerate(names)
        }
        ious = [row["iou"] for name, row in per_class.items() if row["iou"] is not None and name not in outside]
        pixels = sum(truth)
        return {
            "miou": sum(ious) / len(ious) if ious else None,
            "classes_in_mean": len(ious),
            "overall_accuracy": _share(sum(hits), pixels),
            "kappa": _kappa(sum(hits), pixels, sum(t * p for t, p in zip(truth, predicted, strict=True))),
            "classes": per_class,
            "absent": [name for name, row in per_class.items() if row["iou"] is None],
            "pixels": pixels,
        } | ({"outside_mean": [name for name in names if name in outside]} if outside else {})

    def _check(self, what: str, values: Tensor) -> None:
        """Refuse indexes that have no row or column: counted anyway they would land in another class."""
        if values.numel() == 0:
            return
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.classes:
            raise DataError(
                f"metrics: {what} hold class indexes {low}..{high} on labelled pixels; expected 0..{self.classes - 1}"
            )


def mean_text(scores: Mapping[str, Any], digits: int = 3) -> str:
    """The mean IoU for people: `0.897`, `1.000 over 1 of 2 classes (no disc)` or `none`.

    With a class outside of the mean `0.832 over 5 of 6 classes (clutter outside)`.
    """
    value = "none" if scores["miou"] is None else f"{scores['miou']:.{digits}f}"
    outside = scores.get("outside_mean", [])
    absent = [name for name in scores.get("absent") or [] if name not in outside]
    if not absent and not outside:
        return value
    why = [f"no {', '.join(absent)}"] * bool(absent) + [f"{', '.join(outside)} outside"] * bool(outside)
    of = len(scores["classes"])
    return f"{value} over {of - len(absent) - len(outside)} of {of} classes ({'; '.join(why)})"


def comparable(scores: Mapping[str, Any]) -> float | None:
    """What epochs are compared by: the mean IoU of the classes that have labels. None if that is one of several.

    With labels of all classes it is `miou`. A class without labels would enter the mean of only those epochs that
    predict it; and where one class alone has labels, who predicts nothing else is perfect.
    """
    inside = {name: row for name, row in scores["classes"].items() if name not in scores.get("outside_mean", [])}
    labelled = [row["iou"] for row in inside.values() if row["support"]]
    return sum(labelled) / len(labelled) if len(labelled) >= min(2, len(inside)) else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _kappa(hits: int, pixels: int, chance: int) -> float | None:
    """Cohen's kappa (po - pe) / (1 - pe), pe = chance / pixels**2; whole numbers up to the last division."""
    return _share(hits * pixels - chance, pixels * pixels - chance)


def scores_text(result: dict[str, Any]) -> str:
    """Scores for people to read."""
    lines = [f"{'class':<20}{'IoU':>8}{'F1':>8}{'precision':>11}{'recall':>8}{'pixels':>12}"]
    for name, scores in result["classes"].items():
        cells = [scores[key] for key in ("iou", "f1", "precision", "recall")]
        iou, f1, precision, recall = ["   -  " if c is None else f"{c:.3f}" for c in cells]
        lines.append(f"{name:<20}{iou:>8}{f1:>8}{precision:>11}{recall:>8}{scores['support']:>12,}")
    lines.append(f"{'mean IoU':<20}   {mean_text(result)}")
    for key, title in (("overall_accuracy", "overall accuracy"), ("kappa", "kappa")):
        value = result[key]
        lines.append(f"{title:<20}{'-' if value is None else f'{value:.3f}':>8}")
    if result["absent"]:
        lines.append(f"in neither labels nor predictions, left out of the mean: {', '.join(result['absent'])}")
    if "modalities" in result:
        lines.append(f"with {' + '.join(result['modalities'])} alone, on {result['pixels']:,} pixels where it answers")
    return "\n".join(lines)


def subsets_text(results: Mapping[str, dict[str, Any]]) -> str:
    """A line for each subset of the modalities."""
    wide = max(len("modalities"), *map(len, results)) + 2
    lines = [f"{'modalities':<{wide}}{'scenes':>7}{'pixels':>14}   mean IoU"]
    for name, result in results.items():
        lines.append(f"{name:<{wide}}{result['scenes']:>7}{result['pixels']:>14,}   {mean_text(result)}")
    return "\n".join(lines)
