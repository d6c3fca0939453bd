"""Supervised segmentation: what one training step minimises, and the scores by which epochs are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.dataset import CoverWindows
from vfmseg.data.image import Images, Known
from vfmseg.data.sample import Batch, collate
from vfmseg.geo.classes import IGNORE
from vfmseg.metrics import Confusion, comparable, mean_text
from vfmseg.training.loop import Score, global_sum
from vfmseg.training.losses import Loss, counts
from vfmseg.training.step import Term


class Answers(Protocol):
    """What the objective asks of a model, beside being an `nn.Module`."""

    def answer(self, images: Images, frames: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K, H, W), and {name: (B,) losses of each image} that the model adds; `frames` as in `Batch`."""
        ...


class Segmentation(nn.Module):
    """Weighted sum of pixel and region losses over the valid, labelled pixels of the stream `source`."""

    def __init__(
        self,
        losses: Mapping[str, Loss],
        weights: Mapping[str, float],
        rule: Known,
        class_weights: tuple[float, ...] | None = None,
        source: str = "train",
        fusion_weight: float = 0.0,
        distill: float = 0.0,
    ) -> None:
        """`weights` {loss: its factor}; `rule`: where several modalities have an answer, other pixels count nowhere.

        `class_weights`: those that the pixel losses were made with, as they weigh the count of pixels too.
        `fusion_weight`: of what the model's fusion adds.
        `distill`: of the distance between what it says with hidden modalities and what it says with all.
        """
        super().__init__()
        self.losses = dict(losses)
        self.weights = dict(weights)
        self.rule = rule
        self.class_weights = class_weights
        self.source = source
        self.fusion_weight = fusion_weight
        self.distill = distill

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`pixels`: weighted number of valid labelled pixels; `samples`: number of samples that have any."""
        return counts(batch.targets(self.rule), self.class_weights)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """Run the model once and return the sum of each loss."""
        # where any modality is an answer, those that the whole batch lacks need not be run
        shown = batch.present() if self.rule == "any" else batch.shown()
        logits, added = cast(Answers, model).answer(shown, batch.frames)
        # half precision ends here, once, so that the gradients of several losses are added up in float32
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = batch.targets(self.rule)
        found = {
            name: Term(loss.sum(logits, targets), self.weights[name], loss.count) for name, loss in self.losses.items()
        }
        for name, values in added.items():
            counted = (targets != IGNORE).flatten(1).any(dim=1)  # a filler counts nowhere
            found[name] = Term((values.float() * counted).sum(), self.fusion_weight, "samples")
        if self.distill:
            with torch.no_grad():
                full = cast(Answers, model).answer(batch.images, batch.frames)[0] if batch.hidden else logits
            found["distill"] = Term(_distances(logits, full.float(), targets).sum(), self.distill, "samples")
        return found

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing: this objective keeps no averages."""


def _distances(logits: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    """(B,): mean over the labelled pixels of KL(full || logits), both (B, K, H, W); 0 for an image without any."""
    counted = targets != IGNORE
    each = F.kl_div(logits.log_softmax(dim=1), full.log_softmax(dim=1), reduction="none", log_target=True).sum(dim=1)
    return (each * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)


def class_weight_tuple(weights: Mapping[int, float] | None, ids: tuple[int, ...]) -> tuple[float, ...] | None:
    """Weights by class id as a tuple in index order; classes that are not named weigh 1."""
    return None if weights is None else tuple(float(weights.get(i, 1.0)) for i in ids)


@dataclass(frozen=True)
class Validation:
    """Scores of a model on windows that it does not learn from; without windows there is nothing to choose by."""

    model: nn.Module
    windows: CoverWindows | None
    names: Sequence[str]  # of the classes, in index order
    batch_size: int
    rule: Known
    outside: Collection[str] = ()  # names of classes that do not count in the mean IoU

    def __call__(self, accelerator: Accelerator) -> Score:
        """`values` as `Confusion.scores` gives them, `best` the mean IoU of the classes that have labels."""
        if self.windows is None:
            return Score(None, {})
        confusion = score_windows(accelerator, self.model, self.windows, len(self.names), self.batch_size, self.rule)
        found = confusion.scores(self.names, self.outside)
        return Score(comparable(found), found)


def in_words(values: Mapping[str, Any]) -> str:
    """Scores as a person reads them while a run lasts: `val mIoU 0.897`."""
    return f"val mIoU {mean_text(values)}"


def as_curves(values: Mapping[str, Any]) -> dict[str, float | None]:
    """{curve: value} of scores: `miou`, `overall_accuracy`, `kappa`, and `iou/NAME` of each class."""
    found: dict[str, float | None] = {name: values[name] for name in ("miou", "overall_accuracy", "kappa")}
    return found | {f"iou/{name}": one["iou"] for name, one in values["classes"].items()}


@torch.no_grad()
def score_windows(
    accelerator: Accelerator, model: nn.Module, data: CoverWindows, classes: int, batch_size: int, rule: Known
) -> Confusion:
    """One confusion matrix over all windows, each on exactly one process, the same on every process afterwards.

    The plain module is run, not the wrapped one: nothing has to be synchronised, so uneven shares cannot hang.
    """
    was_training = model.training
    model.eval()
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    confusion = Confusion(classes)
    for first in range(0, len(mine), batch_size):
        batch = collate([data[i] for i in mine[first : first + batch_size]]).to(accelerator.device)
        with accelerator.autocast():
            logits = model(batch.images)
        confusion.update(logits.argmax(dim=1), batch.targets(rule))
    confusion.matrix = global_sum(confusion.matrix.to(accelerator.device)).cpu()
    model.train(was_training)
    return confusion
