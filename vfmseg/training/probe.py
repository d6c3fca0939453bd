"""How good an encoder's features are while it is pretrained: scores on small labelled sets, the encoder frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from vfmseg.data.labelled_cells import Cells
from vfmseg.data.sample import collate
from vfmseg.metrics import Confusion, comparable
from vfmseg.model import Encoder
from vfmseg.training.loop import Score
from vfmseg.training.readout import effective_rank, linear, nearest_neighbours


@dataclass(frozen=True)
class LabelledSet:
    """Cells to fit on and cells to score on. names of the classes in index order; outside: of those not in the mean."""

    train: Cells
    val: Cells
    names: Sequence[str]
    outside: Collection[str] = ()


@dataclass(frozen=True)
class Probe:
    """Scores an encoder after some epochs of a run; the run is not changed by it."""

    model: Encoder
    sets: Mapping[str, LabelledSet]
    every: int
    epochs: int
    neighbours: int
    batch_size: int

    def __call__(self, accelerator: Accelerator, epoch: int) -> Score:
        """After epoch `epoch` (1 is the first): `best` is the linear score in the mean of the sets.

        `values`: `linear` and `knn`, mean IoU over cells, in the mean of the sets and of each; the `rank` of the
        features, and the IoU of each class by the linear classifier. An epoch that is not scored is never the best.
        The first process works and tells the others, so that all choose the same epoch.
        """
        if not due(epoch, self.every, self.epochs):
            return Score(-math.inf, {})
        told: list[dict[str, Any] | None] = [None]
        if accelerator.is_main_process:
            each = {name: self._scores(accelerator, one) for name, one in self.sets.items()}
            means = {kind: fmean(one[kind] for one in each.values()) for kind in ("linear", "knn")}
            told = [{**means, "sets": each}]
        values = broadcast_object_list(told)[0]
        return Score(values["linear"], values)

    def _scores(self, accelerator: Accelerator, one: LabelledSet) -> dict[str, Any]:
        train, val = (features_of(accelerator, self.model, cells, self.batch_size) for cells in (one.train, one.val))
        labels, classes = one.train.labels, len(one.names)
        found: dict[str, Any] = {}
        for kind, guess in (
            ("linear", linear(train, labels, val, classes)),
            ("knn", nearest_neighbours(train, labels, val, classes, self.neighbours)),
        ):
            confusion = Confusion(classes)
            confusion.update(guess, one.val.labels)
            scores = confusion.scores(one.names, one.outside)
            found[kind] = comparable(scores)
            if kind == "linear":
                found["classes"] = {name: row["iou"] for name, row in scores["classes"].items()}
        return found | {"rank": effective_rank(train)}


def validation_of(probe: Probe | None, epoch: Callable[[], int]) -> Callable[[Accelerator], Score]:
    """What a loop calls after each epoch; without a probe there is nothing to choose by.

    `epoch`: the number of the epoch that has just been trained.
    """
    return lambda accelerator: Score(None, {}) if probe is None else probe(accelerator, epoch())


def due(epoch: int, every: int, epochs: int) -> bool:
    """Whether epoch `epoch` of `epochs` is scored. The first one always is, so that there is a best one."""
    return epoch in (1, epochs) or epoch % every == 0


@torch.no_grad()
def features_of(accelerator: Accelerator, model: Encoder, cells: Cells, batch_size: int) -> Tensor:
    """Float32 (N, C): the last map of the encoder at these cells, of several streams one after the other.

    The last, as it is the one that every decoder takes; maps of other layers have other scales, so that a mean would be
    of the loudest.
    """
    was_training = model.training
    model.eval()
    tiles, found = list(cells.numbers), []
    for first in range(0, len(tiles), batch_size):
        mine = tiles[first : first + batch_size]
        batch = collate([cells.windows[tile] for tile in mine]).to(accelerator.device)
        with accelerator.autocast():
            streams = model.encode(batch.images)
        maps = torch.cat([one.maps[-1].float() for one in streams.values()], dim=1).flatten(2).transpose(1, 2).cpu()
        found += [values[cells.numbers[tile]] for tile, values in zip(mine, maps, strict=True)]
    model.train(was_training)
    return torch.cat(found)


def in_words(values: Mapping[str, Any]) -> str:
    """Scores as a person reads them while a run lasts: `probe towns 0.612 linear, 0.583 kNN, rank 45`."""
    each = [
        f"{name} {one['linear']:.3f} linear, {one['knn']:.3f} kNN, rank {one['rank']:.0f}"
        for name, one in values["sets"].items()
    ]
    return f"probe {'; '.join(each)}"


def as_curves(values: Mapping[str, Any]) -> dict[str, float | None]:
    """{curve: value} of scores: `linear` and `knn` in the mean, and `NAME/linear`, `NAME/knn`, `NAME/rank` of a set."""
    found: dict[str, float | None] = {kind: values[kind] for kind in ("linear", "knn")}
    return found | {
        f"{name}/{kind}": one[kind] for name, one in values["sets"].items() for kind in ("linear", "knn", "rank")
    }
