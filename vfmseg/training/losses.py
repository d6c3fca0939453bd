"""Losses for dense labels, as sums that the caller divides by a global count.

Every loss takes logits (B, K, H, W) of any float type and labels (B, H, W), int64 class indexes with -1
where nothing is known, and returns one scalar that still hangs on the graph. The sums over two halves of a
batch add up to the sum over the batch, so accumulation and several processes change nothing: add up first,
divide once by the count of that kind (`counts`). Half precision is computed in float32; float32 and float64
stay what they are.

Ignored pixels get exactly zero gradient, whatever their logits are, NaN included. A batch without any
labelled pixel has loss 0 and zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.geo.classes import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Sequence[float] | None = None) -> Tensor:
    """Sum over labelled pixels of weight[label] * -log p(label); divide by the count of pixels.

    `class_weights`: one non-negative number a class, in index order; None means 1 everywhere.
    """
    scores, _ = _prepare(logits, labels)
    weights = _weights(class_weights, scores)
    return F.cross_entropy(scores, labels, weights, ignore_index=IGNORE, reduction="sum")


def focal(logits: Tensor, labels: Tensor, class_weights: Sequence[float] | None = None, gamma: float = 2.0) -> Tensor:
    """Sum over labelled pixels of their cross entropy times (1 - p(label)) ** gamma; divide by the pixels.

    gamma >= 0; 0 is the cross entropy. Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    scores, valid = _prepare(logits, labels)
    log_p = F.log_softmax(scores, dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0]  # (B, H, W)
    # 1 - p without cancellation; kept off zero, where the slope of a power below 1 is infinite
    miss = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    loss = -(miss**gamma) * log_p
    weights = _weights(class_weights, scores)
    if weights is not None:
        loss = loss * weights[labels.clamp(min=0)]
    return torch.where(valid, loss, 0.0).sum()


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over samples of 1 - mean Dice of the classes that occur in the sample; divide by the samples.

    Dice of a class = 2 * sum(p * t) / (sum(p) + sum(t)) over the labelled pixels of one sample, p the softmax
    probability and t the truth. It needs no smoothing: a class that occurs has sum(t) >= 1.

    A class that does not occur in a sample has no term of its own. Its false positives cost only what they
    take away from the classes that are there: where they cover half of a tile of one class, 1/3. So a region
    loss alone is slow to remove them; combine it with cross entropy.
    """
    scores, valid = _prepare(logits, labels)
    probabilities = torch.where(valid[:, None], scores.softmax(dim=1), 0.0).flatten(2)  # (B, K, N)
    truth = _one_hot(labels, valid, scores).flatten(2)  # (B, K, N)
    size = truth.sum(dim=2)  # (B, K) pixels of each class
    overlap = (probabilities * truth).sum(dim=2)
    present = size > 0
    # the clamp touches absent classes only
    share = 2 * overlap / (probabilities.sum(dim=2) + size).clamp(min=1.0)
    missing = torch.where(present, 1.0 - share, 0.0).sum(dim=1)
    return (missing / present.sum(dim=1).clamp(min=1)).sum()


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over samples of the mean Lovasz-softmax loss of their classes; divide by the count of samples.

    The convex extension of 1 - IoU, over the classes that occur in each sample and its labelled pixels.
    As with `dice`, absent classes have no term of their own.
    Source: Berman et al., The Lovasz-Softmax loss, 2018.
    """
    scores, valid = _prepare(logits, labels)
    probabilities = scores.softmax(dim=1).flatten(2)  # (B, K, N)
    truth = _one_hot(labels, valid, scores).flatten(2)
    size = truth.sum(dim=2)  # (B, K)
    sample, cls = (size > 0).nonzero(as_tuple=True)  # P pairs of a sample and a class that occurs in it
    errors = torch.where(valid.flatten(1)[sample], (truth - probabilities).abs()[sample, cls], 0.0)  # (P, N)
    # An ignored pixel has error 0: it is sorted behind every mistake, so it changes no step before and weighs nothing.
    order = errors.detach().argsort(dim=1, descending=True, stable=True)
    hits = truth[sample, cls].gather(1, order)
    loss = (errors.gather(1, order) * _jaccard_steps(hits)).sum(dim=1)  # (P,)
    classes = (size > 0).sum(dim=1)[sample]
    return (loss / classes).sum()


def _jaccard_steps(hits: Tensor) -> Tensor:
    """How much each pixel, taken in this order, adds to 1 - IoU: (P, N) of 0 and 1 -> (P, N)."""
    total = hits.sum(dim=1, keepdim=True)
    # whole numbers are added up as such: exact at any size, and the same on every device
    seen = hits.long().cumsum(dim=1)
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    union = total + (rank - seen)
    loss = 1.0 - (total - seen) / union
    return torch.cat([loss[:, :1], loss[:, 1:] - loss[:, :-1]], dim=1)


@dataclass(frozen=True)
class Loss:
    """One loss with its settings: `sum(logits, labels)` is a scalar, `count` the kind of count that divides it."""

    sum: Callable[[Tensor, Tensor], Tensor]
    count: Literal["pixels", "samples"]


def cross_entropy_loss(class_weights: Sequence[float] | None = None) -> Loss:
    """`cross_entropy` with its class weights."""
    return Loss(partial(cross_entropy, class_weights=class_weights), "pixels")


def focal_loss(class_weights: Sequence[float] | None = None, gamma: float = 2.0) -> Loss:
    """`focal` with its class weights and exponent."""
    return Loss(partial(focal, class_weights=class_weights, gamma=gamma), "pixels")


def dice_loss() -> Loss:
    """`dice`, which has no settings."""
    return Loss(dice, "samples")


def lovasz_loss() -> Loss:
    """`lovasz`, which has no settings."""
    return Loss(lovasz, "samples")


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy_loss,
    "dice": dice_loss,
    "focal": focal_loss,
    "lovasz": lovasz_loss,
}
"""Each name takes the settings of its own loss and no others: `LOSSES["focal"](gamma=1.5)`, `LOSSES["dice"]()`."""


def counts(labels: Tensor, class_weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """What divides the sums of labels (B, H, W): scalars of type `exact`, to be added over batches and processes.

    `pixels`: labelled pixels, each counted with its class weight. `samples`: samples with any labelled pixel.
    """
    valid = labels != IGNORE
    kind = exact(labels.device)
    samples = valid.flatten(1).any(dim=1).sum().to(kind)
    if class_weights is None:
        return {"pixels": valid.sum().to(kind), "samples": samples}
    weights = torch.tensor(class_weights, dtype=kind, device=labels.device)
    pixels = torch.bincount(labels[valid], minlength=len(weights)).to(kind)  # by class
    return {"pixels": (pixels * weights).sum(), "samples": samples}


def exact(device: torch.device) -> torch.dtype:
    """The type for counts on a device: float64, but Apple's GPUs know none; float32 counts 2**24 pixels exactly."""
    return torch.float32 if device.type == "mps" else torch.float64


def _prepare(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in at least float32, harmless where ignored, and the mask (B, H, W) of labelled pixels."""
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit; "
            "expected (B, K, H, W) and (B, H, W)"
        )
    valid = labels != IGNORE
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # selected away, not multiplied by zero: 0 * NaN would be NaN again on the way back
    return torch.where(valid[:, None], scores, 0.0), valid


def _one_hot(labels: Tensor, valid: Tensor, scores: Tensor) -> Tensor:
    """Truth as (B, K, H, W) of 0 and 1 in the type of the scores; all 0 where ignored."""
    hot = torch.zeros_like(scores, requires_grad=False)
    return hot.scatter_(1, labels.clamp(min=0)[:, None], valid[:, None].to(scores.dtype))


def _weights(class_weights: Sequence[float] | None, scores: Tensor) -> Tensor | None:
    if class_weights is None:
        return None
    if len(class_weights) != scores.shape[1]:
        raise ValueError(f"{len(class_weights)} class weights for {scores.shape[1]} classes; expected as many")
    return torch.tensor(class_weights, dtype=scores.dtype, device=scores.device)
