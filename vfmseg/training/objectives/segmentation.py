"""Supervised segmentation: what one training step minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vfmseg.data.image import Known
from vfmseg.data.sample import Batch
from vfmseg.training.losses import LOSSES, counts


@dataclass(frozen=True)
class Term:
    """One summed loss: `sum` over pixels or samples, to be divided by the global count of that kind and weighted."""

    sum: Tensor
    weight: float
    count: str  # "pixels" or "samples"


class Segmentation:
    """Weighted sum of pixel and region losses over the valid, labelled pixels.

    The counts depend on the batch alone, so the caller can add them up over ranks and accumulated batches before
    the first backward pass and divide each sum once; the result then does not depend on how a batch was cut.
    """

    def __init__(
        self,
        losses: Mapping[str, float],
        rule: Known,
        class_weights: tuple[float, ...] | None = None,
        focal_gamma: float = 2.0,
    ) -> None:
        """`rule`: where several modalities have an answer; pixels without one count nowhere."""
        self.rule = rule
        self.losses = dict(losses)
        self.class_weights = class_weights
        self.focal_gamma = focal_gamma

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted number of valid labelled pixels, and number of samples that have any."""
        return counts(batch.targets(self.rule), self.class_weights)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """Run the model once and return the sum of each loss."""
        logits = model(batch.images)  # (B, K, H, W)
        targets = batch.targets(self.rule)
        out: dict[str, Term] = {}
        for name, weight in self.losses.items():
            loss = LOSSES[name]
            out[name] = Term(loss.sum(logits, targets, self.class_weights, self.focal_gamma), weight, loss.count)
        return out


def class_weight_tuple(weights: Mapping[int, float] | None, ids: tuple[int, ...]) -> tuple[float, ...] | None:
    """Weights by class id as a tuple in index order; classes that are not named weigh 1."""
    return None if weights is None else tuple(float(weights.get(i, 1.0)) for i in ids)


def total(terms: Mapping[str, Term], divisors: Mapping[str, Tensor], scale: float = 1.0) -> Tensor:
    """Sum of weight * sum / count over the terms, times `scale`; a count of zero gives zero."""
    parts = [term.weight * term.sum / divisors[term.count].clamp(min=1e-12) for term in terms.values()]
    return torch.stack(parts).sum() * scale
