from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.training.losses import (
    IGNORE,
    LOSSES,
    Loss,
    counts,
    cross_entropy,
    dice,
    exact,
    focal,
    lovasz,
)

EVERY = sorted(LOSSES)
PIXEL_LOSSES = {"cross_entropy", "focal"}
CLASS_WEIGHTS = (0.5, 2.0, 3.0)


def make_batch(
    samples: int = 4, classes: int = 3, size: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits and labels; about a quarter is ignored, and the samples hold different classes."""
    logits = 2 * torch.randn(samples, classes, size, size + 1, dtype=dtype)
    labels = torch.randint(0, classes, (samples, size, size + 1))
    labels[0][labels[0] == 2] = 1  # one class is absent from the first sample
    labels[torch.rand(labels.shape) < 0.25] = IGNORE
    return logits, labels


def made(name: str, weights: tuple[float, ...] | None = CLASS_WEIGHTS) -> Loss:
    return LOSSES[name](class_weights=weights) if name in PIXEL_LOSSES else LOSSES[name]()


def loss_sum(name: str, logits: Tensor, labels: Tensor, weights: tuple[float, ...] | None = CLASS_WEIGHTS) -> Tensor:
    return made(name, weights).sum(logits, labels)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("poison", [1e4, float("inf"), float("nan")])
@pytest.mark.pitfall("P39")
def test_ignored_pixels_change_neither_loss_nor_gradient(name: str, poison: float) -> None:
    logits, labels = make_batch()
    ignored = (labels == IGNORE)[:, None].expand_as(logits)
    clean = logits.clone().requires_grad_()
    dirty = torch.where(ignored, torch.full_like(logits, poison), logits).requires_grad_()
    a, b = loss_sum(name, clean, labels), loss_sum(name, dirty, labels)
    a.backward()
    b.backward()
    assert a.item() == b.item()
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad[ignored] == 0).all()
    assert (dirty.grad[~ignored] != 0).any()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P39")
def test_ignored_pixels_are_worth_as_much_as_pixels_cut_away(name: str) -> None:
    logits, labels = make_batch(size=6)
    labels[:, :, 4:] = IGNORE
    assert torch.allclose(loss_sum(name, logits, labels), loss_sum(name, logits[..., :4], labels[..., :4]), rtol=1e-12)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P41", "C46")
def test_nothing_labelled_gives_zero_and_a_finite_zero_gradient(name: str) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.full((2, 4, 4), IGNORE)
    loss = loss_sum(name, logits, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    divisors = counts(labels, CLASS_WEIGHTS)
    assert divisors["pixels"] == 0
    assert divisors["samples"] == 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("C46")
def test_one_empty_tile_adds_nothing_to_its_batch(name: str) -> None:
    logits, labels = make_batch()
    alone = loss_sum(name, logits[:3], labels[:3])
    labels[3] = IGNORE
    assert torch.allclose(loss_sum(name, logits, labels), alone, rtol=1e-12)
    assert counts(labels)["samples"] == 3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P49")
def test_two_halves_add_up_to_the_whole_batch(name: str) -> None:
    logits, labels = make_batch()
    labels[1, :5] = IGNORE  # the halves differ much in labelled pixels
    whole = loss_sum(name, logits, labels)
    first, second = (loss_sum(name, logits[part], labels[part]) for part in (slice(0, 2), slice(2, 4)))
    assert torch.allclose(whole, first + second, rtol=1e-12)
    total = counts(labels, CLASS_WEIGHTS)
    parts = [counts(labels[part], CLASS_WEIGHTS) for part in (slice(0, 2), slice(2, 4))]
    assert all(total[kind] == parts[0][kind] + parts[1][kind] for kind in ("pixels", "samples"))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.pitfall("P60")
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits, labels = make_batch(size=80, dtype=torch.float32)
    half = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_sum(name, half, labels)
    assert got.dtype == torch.float32
    # 4 x 80 x 81 pixels: a sum of that many terms in half precision is off by far more
    assert torch.allclose(got, loss_sum(name, half.float(), labels), rtol=1e-6)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P60")
def test_large_half_precision_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([6e4, -6e4, 0.0], dtype=torch.float16).reshape(1, 3, 1, 1).repeat(1, 1, 4, 4)
    logits.requires_grad_()
    loss = loss_sum(name, logits, torch.tensor([0, 1, 2, 0]).repeat(1, 4, 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P60")
def test_float64_is_kept(name: str) -> None:
    logits, labels = make_batch()
    assert loss_sum(name, logits, labels).dtype == torch.float64


@pytest.mark.parametrize(
    "loss", [*map(made, EVERY), LOSSES["focal"](class_weights=CLASS_WEIGHTS, gamma=0.5)], ids=[*EVERY, "focal, 0.5"]
)
def test_gradients_match_finite_differences(loss: Loss) -> None:
    logits, labels = make_batch(samples=2, size=3)
    assert torch.autograd.gradcheck(lambda z: loss.sum(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P58")
def test_a_batch_of_one_is_one_term_of_a_larger_batch(name: str) -> None:
    logits, labels = make_batch()
    ones = sum(loss_sum(name, logits[i : i + 1], labels[i : i + 1]) for i in range(4))
    assert torch.allclose(loss_sum(name, logits, labels), torch.as_tensor(ones), rtol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_a_right_answer_costs_nothing_and_a_wrong_one_much(name: str) -> None:
    labels = torch.randint(0, 3, (2, 8, 8))
    right = 50 * F.one_hot(labels, 3).permute(0, 3, 1, 2).double()
    divisor = float(counts(labels)[made(name).count])
    assert loss_sum(name, right, labels, None) / divisor < 1e-9
    assert loss_sum(name, right.roll(1, dims=1), labels, None) / divisor > 0.99


def test_apples_gpus_count_in_a_type_that_they_know() -> None:
    assert exact(torch.device("mps")) == torch.float32
    assert exact(torch.device("cpu")) == torch.float64
    assert {count.dtype for count in counts(torch.zeros(1, 2, 2, dtype=torch.int64), (1.0, 2.0)).values()} == {
        torch.float64
    }


def test_each_loss_is_a_pixel_or_a_region_loss() -> None:
    assert {name: made(name).count for name in LOSSES} == {
        "cross_entropy": "pixels", "dice": "samples", "focal": "pixels", "lovasz": "samples",
    }  # fmt: skip
    # what the count of a kind means: doubling the pixels of a sample doubles a pixel loss, not a region loss
    logits, labels = make_batch()
    for name in EVERY:
        ratio = loss_sum(name, torch.cat([logits] * 2, 2), torch.cat([labels] * 2, 1)) / loss_sum(name, logits, labels)
        assert torch.allclose(ratio, torch.tensor(2.0 if name in PIXEL_LOSSES else 1.0).double(), rtol=0.03), name


def test_a_loss_takes_its_own_settings_and_no_others() -> None:
    logits, labels = make_batch()
    sharp = LOSSES["focal"](class_weights=CLASS_WEIGHTS, gamma=4.0)
    assert torch.equal(sharp.sum(logits, labels), focal(logits, labels, CLASS_WEIGHTS, 4.0))
    for name, settings in (("dice", {"class_weights": CLASS_WEIGHTS}), ("cross_entropy", {"gamma": 2.0})):
        with pytest.raises(TypeError):
            LOSSES[name](**settings)


def test_cross_entropy_divided_by_its_count_is_the_weighted_mean() -> None:
    logits, labels = make_batch()
    mean = F.cross_entropy(logits, labels, torch.tensor(CLASS_WEIGHTS).double(), ignore_index=IGNORE)
    divisor = counts(labels, CLASS_WEIGHTS)["pixels"]
    assert torch.allclose(cross_entropy(logits, labels, CLASS_WEIGHTS) / divisor, mean, rtol=1e-12)
    assert counts(labels)["pixels"] == (labels != IGNORE).sum()


def test_focal_follows_its_formula_and_is_cross_entropy_at_gamma_zero() -> None:
    logits, labels = make_batch()
    assert torch.allclose(
        focal(logits, labels, CLASS_WEIGHTS, 0.0), cross_entropy(logits, labels, CLASS_WEIGHTS), rtol=1e-12
    )
    # one pixel with probabilities (0.8, 0.2), truth 0, weight 3: 3 * 0.2 ** 2 * -ln 0.8
    one = torch.tensor([0.8, 0.2], dtype=torch.float64).log().reshape(1, 2, 1, 1)
    got = focal(one, torch.zeros(1, 1, 1, dtype=torch.int64), (3.0, 1.0), 2.0)
    assert math.isclose(got.item(), 3 * 0.2**2 * -math.log(0.8), rel_tol=1e-9)


def test_focal_gradient_is_finite_for_a_certain_pixel_and_a_small_gamma() -> None:
    logits = torch.tensor([200.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()  # p = 1 exactly in float32
    focal(logits, torch.zeros(1, 1, 1, dtype=torch.int64), None, 0.5).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_dice_equals_a_hand_computation() -> None:
    # two samples of 1 x 3 pixels; p(class 1) and truth:
    # a) 0.9 0.6 0.2 / 1 1 0: class 1: 2 * 1.5 / (1.7 + 2); class 0: 2 * 0.8 / (1.3 + 1)
    # b) 0.3 0.4 0.5 / 0 0 ignored: only class 0 occurs: 2 * 1.3 / (1.3 + 2)
    p = torch.tensor([[0.9, 0.6, 0.2], [0.3, 0.4, 0.5]], dtype=torch.float64)
    logits = torch.stack([1 - p, p], dim=1).log()[:, :, None]  # (2, 2, 1, 3)
    labels = torch.tensor([[[1, 1, 0]], [[0, 0, IGNORE]]])
    by_hand = (1 - (3.0 / 3.7 + 1.6 / 2.3) / 2) + (1 - 2.6 / 3.3)
    assert math.isclose(dice(logits, labels).item(), by_hand, rel_tol=1e-9)


def slow_lovasz(logits: Tensor, labels: Tensor) -> float:
    """The definition pixel by pixel: walk down the errors, each weighted by the IoU loss that it adds."""
    total = 0.0
    for sample_logits, sample_labels in zip(logits.softmax(1), labels, strict=True):
        pixels = [(r, c) for r, c in (sample_labels != IGNORE).nonzero().tolist()]
        present = sorted({int(sample_labels[r, c]) for r, c in pixels})
        for cls in present:
            truth = {(r, c) for r, c in pixels if sample_labels[r, c] == cls}
            error = {(r, c): abs(float((r, c) in truth) - float(sample_logits[cls, r, c])) for r, c in pixels}
            wrong: set[tuple[int, int]] = set()
            before = 0.0
            for pixel in sorted(pixels, key=lambda p: -error[p]):
                wrong.add(pixel)  # these pixels have the wrong answer: the set function is 1 - IoU
                after = len(wrong) / len(truth | wrong)
                total += error[pixel] * (after - before) / len(present)
                before = after
    return total


def test_lovasz_equals_a_slow_reference() -> None:
    logits, labels = make_batch(samples=3, size=5)
    labels[2] = IGNORE
    assert math.isclose(lovasz(logits, labels).item(), slow_lovasz(logits, labels), rel_tol=1e-9)


@pytest.mark.parametrize("times", [1, 37])  # also with more pixels than half precision can count
def test_lovasz_of_hard_answers_is_the_mean_iou_loss(times: int) -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, IGNORE]]]).repeat(1, times, times)
    answer = torch.tensor([[[0, 1, 1, 1], [0, 0, 0, 0]]]).repeat(1, times, times)
    logits = 1e3 * F.one_hot(answer, 2).permute(0, 3, 1, 2).double()
    # class 0: 3 shared of 5; class 1: 2 shared of 4
    assert math.isclose(lovasz(logits, truth).item(), 1 - (3 / 5 + 2 / 4) / 2, rel_tol=1e-9)


@pytest.mark.pitfall("P40")
def test_dice_charges_an_absent_class_only_through_the_others() -> None:
    """Documents a property: half a tile of false positives of an absent class costs 1/3, not 1/2 or more."""
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[1] = 1
    answer = labels.clone()
    answer[0, :2] = 1  # class 1 does not occur in sample 0
    logits = 1e3 * F.one_hot(answer, 2).permute(0, 3, 1, 2).double()
    per_sample = dice(logits, labels)
    assert math.isclose(per_sample.item(), 1 - 2 * 8 / (8 + 16), rel_tol=1e-9)  # sample 1 is right: 0
    # pooled over the batch both classes occur, and the same mistake counts in both
    pooled = dice(logits.permute(1, 0, 2, 3).reshape(1, 2, 8, 4), labels.reshape(1, 8, 4))
    assert math.isclose(pooled.item(), 1 - (2 * 8 / 24 + 2 * 16 / 40) / 2, rel_tol=1e-9)
    # cross entropy does charge it, pixel by pixel
    assert cross_entropy(logits, labels) / 32 > 100


@pytest.mark.parametrize("name", sorted(PIXEL_LOSSES))
def test_class_weights_scale_the_pixels_of_their_class(name: str) -> None:
    logits, labels = make_batch()
    plain = loss_sum(name, logits, torch.where(labels == 1, labels, IGNORE), None)
    rest = loss_sum(name, logits, torch.where(labels == 1, IGNORE, labels), None)
    assert torch.allclose(loss_sum(name, logits, labels, (1.0, 5.0, 1.0)), rest + 5 * plain, rtol=1e-12)
    assert counts(labels, (1.0, 5.0, 1.0))["pixels"] == (labels != IGNORE).sum() + 4 * (labels == 1).sum()


@pytest.mark.parametrize("name", EVERY)
def test_labels_outside_the_classes_are_refused_not_clamped(name: str) -> None:
    logits, labels = make_batch()
    labels[0, 0, 0] = 3
    with pytest.raises((IndexError, RuntimeError)):
        loss_sum(name, logits, labels)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, labels = make_batch()
    with pytest.raises(ValueError, match=r"labels \(4, 3, 7\) do not fit"):
        cross_entropy(logits, labels[:, :3])
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        focal(logits, labels, (1.0, 2.0))
