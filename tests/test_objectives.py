"""Supervised segmentation: sums and counts of what is labelled and valid, weighted and divided as the recipe says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from makers import images_of
from torch import Tensor, nn

from vfmseg.data.image import Images
from vfmseg.data.sample import Batch
from vfmseg.training.losses import IGNORE, LOSSES, counts, cross_entropy, dice, focal, lovasz
from vfmseg.training.objectives.segmentation import Segmentation, class_weight_tuple
from vfmseg.training.step import Term, total

CLASS_WEIGHTS = (0.5, 2.0, 3.0)


class Bands(nn.Module):
    """The bands are the logits, scaled by one weight; pixels without validity are set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.calls = 0

    def answer(self, images: Images, frames: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        return self.gain * torch.where(images["rgb"].valid[:, None], images["rgb"].pixels, 0.0), {}


def make_batch(samples: int = 4) -> Batch:
    """Three classes; some pixels have no label, and some no validity in one of two modalities."""
    labels = torch.randint(0, 3, (samples, 6, 7))
    labels[:, 0] = IGNORE
    valid = {name: torch.rand(samples, 6, 7) > 0.2 for name in ("rgb", "ir")}
    images = {"rgb": torch.randn(samples, 3, 6, 7), "ir": torch.randn(samples, 1, 6, 7)}
    return Batch(images_of(images, valid), labels)


def segmentation(
    weights: dict[str, float], class_weights: tuple[float, ...] | None = None, gamma: float = 2.0
) -> Segmentation:
    settings: dict[str, dict[str, Any]] = {
        "cross_entropy": {"class_weights": class_weights},
        "focal": {"class_weights": class_weights, "gamma": gamma},
    }
    losses = {name: LOSSES[name](**settings.get(name, {})) for name in weights}
    return Segmentation(losses, weights, "all", class_weights)


def part(batch: Batch, samples: slice) -> Batch:
    return Batch(
        {name: image.each(lambda tensor: tensor[samples]) for name, image in batch.images.items()},
        batch.labels[samples],
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.pitfall("P38")
def test_every_loss_runs_alone_with_default_settings(name: str) -> None:
    model, batch, objective = Bands(), make_batch(), segmentation({name: 1.0})
    value = total(objective.terms(model, batch), objective.counts(batch))
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert model.gain.grad is not None
    assert model.gain.grad != 0


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_terms_are_the_losses_of_the_targets_and_the_model_runs_once(weights: tuple[float, ...] | None) -> None:
    model, batch = Bands(), make_batch()
    found = segmentation({name: i + 1.0 for i, name in enumerate(LOSSES)}, weights, gamma=1.5).terms(model, batch)
    assert model.calls == 1
    logits, targets = model.answer(batch.images)[0], batch.targets("all")
    expected = {
        "cross_entropy": (cross_entropy(logits, targets, weights), "pixels"),
        "dice": (dice(logits, targets), "samples"),
        "focal": (focal(logits, targets, weights, 1.5), "pixels"),
        "lovasz": (lovasz(logits, targets), "samples"),
    }
    assert list(found) == list(LOSSES)
    for i, (name, term) in enumerate(found.items()):
        value, count = expected[name]
        assert torch.equal(term.sum, value)
        assert (term.weight, term.count) == (i + 1.0, count)
    assert not torch.equal(found["focal"].sum, focal(logits, targets, weights, 2.0))


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
@pytest.mark.pitfall("P26")
def test_nodata_of_any_modality_is_no_target(weights: tuple[float, ...] | None) -> None:
    batch, objective = make_batch(), segmentation(dict.fromkeys(LOSSES, 1.0), weights)
    seen = batch.images["rgb"].valid & batch.images["ir"].valid
    unlabelled = Batch(batch.images, torch.where(seen, batch.labels, IGNORE))
    assert not torch.equal(unlabelled.labels, batch.labels)
    counted = objective.counts(batch)
    assert counted == objective.counts(unlabelled) == counts(unlabelled.labels, weights)
    before, after = objective.terms(Bands(), batch), objective.terms(Bands(), unlabelled)
    assert all(torch.equal(before[name].sum, after[name].sum) for name in LOSSES)


@pytest.mark.pitfall("P49")
def test_parts_of_a_batch_divided_by_the_counts_of_all_add_up_to_the_whole() -> None:
    batch, objective = make_batch(), segmentation(dict.fromkeys(LOSSES, 0.7), CLASS_WEIGHTS)
    batch.labels[1, :5] = IGNORE
    divisors = objective.counts(batch)
    pieces = [part(batch, slice(0, 2)), part(batch, slice(2, 3)), part(batch, slice(3, 4))]
    summed = sum(total(objective.terms(Bands(), piece), divisors) for piece in pieces)
    torch.testing.assert_close(total(objective.terms(Bands(), batch), divisors), summed)


def test_total_divides_each_sum_by_its_own_count_and_weighs_it() -> None:
    terms = {"a": Term(torch.tensor(6.0), 0.5, "pixels"), "b": Term(torch.tensor(4.0), 3.0, "samples")}
    divisors = {"pixels": torch.tensor(12.0), "samples": torch.tensor(2.0)}
    assert float(total(terms, divisors)) == 0.5 * 6 / 12 + 3 * 4 / 2


@pytest.mark.pitfall("P41")
def test_nothing_valid_gives_zero_and_a_zero_gradient() -> None:
    model, batch, objective = Bands(), make_batch(), segmentation(dict.fromkeys(LOSSES, 1.0))
    batch.images["ir"].valid[:] = False
    value = total(objective.terms(model, batch), objective.counts(batch))
    value.backward()
    assert value == 0
    assert model.gain.grad == 0


def test_class_weights_go_by_id_and_are_one_where_none_is_named() -> None:
    assert class_weight_tuple(None, (0, 1)) is None
    assert class_weight_tuple({40: 5.0, 10: 2.0}, (10, 20, 40)) == (2.0, 1.0, 5.0)
    assert class_weight_tuple({1: 0.0}, (0, 1)) == (1.0, 0.0)


class Adding(Bands):
    """A model whose fusion adds a loss: the number of the image, from 1."""

    def answer(self, images: Images, frames: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = super().answer(images, frames)
        return logits, {"alignment": torch.arange(1.0, len(logits) + 1)}


def test_what_a_fusion_adds_counts_for_images_with_labels_alone() -> None:
    batch = make_batch(3)
    assert batch.labels is not None
    batch.labels[1] = IGNORE  # a filler
    objective = Segmentation({"dice": LOSSES["dice"]()}, {"dice": 1.0}, "all", fusion_weight=0.5)
    term = objective.terms(Adding(), batch)["alignment"]
    assert (term.sum.item(), term.weight, term.count) == (1.0 + 3.0, 0.5, "samples")
    assert objective.counts(batch)["samples"] == 2
