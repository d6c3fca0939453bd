"""Distillation: the student follows a frozen teacher on whole cells alone, and nothing else is kept of it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from vfmseg.adapters.attach import attach_full, attach_none
from vfmseg.data.image import Image
from vfmseg.data.sample import Batch
from vfmseg.encoders.backbone import plain_norm
from vfmseg.encoders.build import build_new_backbone, build_stem
from vfmseg.errors import RecipeError
from vfmseg.model import Encoder
from vfmseg.training.objectives.distill import Distillation
from vfmseg.training.step import Step, total

SIDE, PATCH = 32, 8


def encoder(
    seed: int,
    width: int = 16,
    layers: tuple[int, ...] = (1, 2),
    learns: bool = True,
    patch: int = PATCH,
    upscale: float = 1.0,
) -> Encoder:
    backbone = build_new_backbone(patch, width, 2, 2, SIDE, layers, seed)
    attached = (attach_full if learns else attach_none)(backbone, ("rgb",))
    return Encoder(backbone, {"rgb": build_stem(backbone, {"rgb": 3}, [0.0] * 3, [1.0] * 3, upscale)}, attached)


def batch(seed: int = 0, count: int = 2) -> Batch:
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return Batch({"rgb": Image(pixels, torch.ones(count, SIDE, SIDE, dtype=torch.bool))}, None)


def loss_of(objective: Distillation, student: Encoder, *batches: Batch) -> torch.Tensor:
    """The loss of a step that is cut into these batches."""
    counts = [objective.counts(one) for one in batches]
    divisors = {"cells": torch.stack([one["cells"] for one in counts]).sum()}
    return torch.stack([total(objective.terms(student, one), divisors) for one in batches]).sum()


def identity(objective: Distillation) -> None:
    with torch.no_grad():
        for layer in objective.projections:
            layer.weight.copy_(torch.eye(len(layer.weight)))  # type: ignore[arg-type, operator]
            layer.bias.zero_()  # type: ignore[operator]


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = encoder(0)
    objective = Distillation(student, copy.deepcopy(student))
    identity(objective)
    assert loss_of(objective, student, batch()).item() == pytest.approx(0.0, abs=1e-5)
    assert loss_of(objective, encoder(1), batch()).item() > 0.1


def test_the_loss_is_that_of_the_page() -> None:
    """1 - cosine and half the smooth L1 distance of normed tokens, in the mean of whole cells and of both layers."""
    student, teacher, one = encoder(0), encoder(1, width=24), batch()
    one.images["rgb"].valid[1, -1, -1] = False
    with torch.no_grad():
        for of in (student, teacher):  # fresh ones give tokens that are normed already
            of.backbone.network.get_parameter("layernorm.weight").normal_(1.0, 0.5)
    objective = Distillation(student, teacher)
    objective.measure([batch(5)])
    with torch.no_grad():
        loss = loss_of(objective, student, one).item()
        shown = batch(5).images
        found, wanted, measured = (
            [map_.movedim(1, -1).flatten(0, 2).double().numpy() for map_ in of.encode(images)["rgb"].maps]
            for of, images in ((student, one.images), (teacher, one.images), (teacher, shown))
        )
    each = []
    for level, layer in enumerate(objective.projections):
        weight, bias = (tensor.detach().double().numpy() for tensor in layer.parameters())
        guess = _normed(found[level]) @ weight.T + bias
        mean, std = _normed(measured[level]).mean(axis=0), _normed(measured[level]).std(axis=0, ddof=1)
        target = (_normed(wanted[level]) - mean) / std
        cosine = (guess * target).sum(axis=1) / np.linalg.norm(guess, axis=1) / np.linalg.norm(target, axis=1)
        away = np.abs(guess - target)
        smooth = np.where(away < 1, away**2 / 2, away - 0.5).mean(axis=1)
        each.append((1 - cosine + 0.5 * smooth)[:-1].mean())
    assert loss == pytest.approx(np.mean(each), rel=1e-5)


def _normed(tokens: np.ndarray) -> np.ndarray:
    away: np.ndarray = tokens - tokens.mean(axis=1, keepdims=True)
    return away / np.sqrt(tokens.var(axis=1, keepdims=True) + 1e-6)


@pytest.mark.pitfall("K26")
def test_a_channel_that_says_the_same_of_all_is_not_blown_up() -> None:
    objective = Distillation(encoder(0), encoder(1))
    answer = objective.teacher.encode(batch().images)["rgb"]
    same = tuple(torch.arange(16.0)[:, None, None].expand_as(map_) for map_ in answer.maps)
    objective._teacher[0] = _Deaf(objective.teacher)  # type: ignore[assignment]
    objective.teacher.answer = {"rgb": replace(answer, maps=same)}  # type: ignore[assignment]
    objective.measure([batch()])
    torch.testing.assert_close(objective.get_buffer("std1"), torch.full((16,), 0.01))
    assert loss_of(objective, encoder(0), batch()).item() < 2


@pytest.mark.pitfall("C6", "K20")
def test_the_student_learns_and_the_teacher_stays() -> None:
    student, teacher = encoder(0), encoder(1, width=24)
    before = copy.deepcopy(teacher.state_dict())
    objective = Distillation(student, teacher)
    step = Step(student, {"distill": objective})
    optimizer = torch.optim.AdamW([one for part in step.parts().values() for one in part.values()], lr=3e-3)
    losses = []
    for number in range(60):
        loss = loss_of(objective, student, batch(number % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    # of other images, and each told from the others: a student that says the same of all would do as well with any
    unseen, others = batch(9), batch(10)
    with torch.no_grad():
        true = loss_of(objective, student, unseen).item()
        objective._teacher[0] = _Deaf(teacher, others)  # type: ignore[assignment]
        assert true < 0.9 * loss_of(objective, student, unseen).item()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    width = {24}
    ours = ("projections", "mean", "std")
    assert not [
        name for name, tensor in step.kept().items() if set(tensor.shape) == width and not any(o in name for o in ours)
    ]
    assert {"encoder", "objectives.distill"} == set(step.parts())


@pytest.mark.pitfall("P53", "C8", "K22")
def test_every_tensor_that_learns_gets_a_gradient() -> None:
    student = encoder(0)
    step = Step(student, {"distill": Distillation(student, encoder(1))})
    loss_of(step.objectives["distill"], student, batch()).backward()  # type: ignore[arg-type]
    learning = [(name, one) for part in step.parts().values() for name, one in part.items()]
    assert any("position_embeddings" in name for name, _ in learning)
    assert [name for name, one in learning if one.grad is None or not one.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.pitfall("P60", "K26")
def test_half_precision_gives_nearly_the_same_loss_and_numbers_for_an_image_of_one_value(
    precision: torch.dtype,
) -> None:
    student = encoder(0)
    objective = Distillation(student, encoder(1))
    one = batch()
    flat = torch.cat([one.images["rgb"].pixels[:1], torch.full((1, 3, SIDE, SIDE), 7.0)])
    for pixels in (one.images["rgb"].pixels, flat, torch.zeros_like(flat)):
        shown = Batch({"rgb": Image(pixels, one.images["rgb"].valid)}, None)
        exact = loss_of(objective, student, shown).item()
        with torch.autocast("cpu", precision):
            loss = loss_of(objective, student, shown)
        loss.backward()
        assert loss.item() == pytest.approx(exact, rel=0.01)
    learning = [*student.parameters(), *objective.parameters()]
    assert all(torch.isfinite(p.grad).all() for p in learning if p.grad is not None)


@pytest.mark.pitfall("P64")
def test_cells_with_nodata_are_not_learned() -> None:
    """A cell counts only if all of its pixels are valid; what lies under invalid ones reaches nothing."""
    student = encoder(0)
    objective = Distillation(student, encoder(1))
    one = batch()
    valid = one.images["rgb"].valid.clone()
    valid[0, :9, :3] = False  # touches cells (0, 0) and (1, 0) of the first image
    masked = Batch({"rgb": Image(one.images["rgb"].pixels, valid)}, None)
    cells = (SIDE // PATCH) ** 2
    assert objective.counts(one)["cells"] == 2 * cells
    assert objective.counts(masked)["cells"] == 2 * cells - 2
    garbage = torch.where(valid[:, None], one.images["rgb"].pixels, 1e6)
    other = Batch({"rgb": Image(garbage, valid)}, None)
    assert torch.equal(loss_of(objective, student, masked), loss_of(objective, student, other))
    nothing = Batch({"rgb": Image(garbage, torch.zeros_like(valid))}, None)
    assert loss_of(objective, student, nothing).item() == 0.0


@pytest.mark.pitfall("P49", "K25")
def test_a_step_in_parts_is_the_step_in_one() -> None:
    student = encoder(0)
    objective = Distillation(student, encoder(1))
    whole = batch(count=3)
    valid = whole.images["rgb"].valid.clone()
    valid[2, 8:] = False  # parts of other counts: a mean of means would differ
    pixels = whole.images["rgb"].pixels
    parts = [Batch({"rgb": Image(pixels[a:b], valid[a:b])}, None) for a, b in ((0, 2), (2, 3))]
    whole = Batch({"rgb": Image(pixels, valid)}, None)
    torch.testing.assert_close(loss_of(objective, student, *parts), loss_of(objective, student, whole))


@pytest.mark.pitfall("P64", "K2")
def test_the_student_does_not_see_what_is_hidden_and_learns_it() -> None:
    student = encoder(0)
    objective = Distillation(student, encoder(1), hides="patches")
    one = batch()
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = True
    pixels = one.images["rgb"].pixels.clone()
    pixels[:, :, 8:16, 16:24] += 3.0  # under the mask
    other = {"rgb": Image(pixels, one.images["rgb"].valid)}
    seen = [loss_of(objective, student, Batch(images, None, mask=mask)) for images in (one.images, other)]
    assert not torch.equal(*seen)  # the teacher sees it
    objective._teacher[0] = _Deaf(objective.teacher)  # type: ignore[assignment]
    seen = [loss_of(objective, student, Batch(images, None, mask=mask)) for images in (one.images, other)]
    assert torch.equal(*seen)
    objective.hides = None
    open_ = [loss_of(objective, student, Batch(images, None)) for images in (one.images, other)]
    assert not torch.equal(*open_)


class _Deaf:
    """A teacher that says the same whatever it is shown."""

    def __init__(self, teacher: Encoder, shown: Batch | None = None) -> None:
        self.teacher, self.answer = teacher, teacher.encode((shown or batch(9)).images)
        self.backbone = teacher.backbone
        self.streams, self.stem, self.strides, self.reference = (
            teacher.streams,
            teacher.stem,
            teacher.strides,
            teacher.reference,
        )

    def encode(self, images: object) -> object:
        return self.answer

    def to(self, device: object) -> None:
        pass


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(RecipeError, match=r"teacher.layers: 1 layers for 2 of the student \(\[1, 2\]\); name as many"):
        Distillation(encoder(0), encoder(1, layers=(2,)))
    with pytest.raises(RecipeError, match=r"4 px wide, those of the student 8 px; .*upscale = 0.5"):
        Distillation(encoder(0), encoder(1, patch=4))


@pytest.mark.parametrize("patches", [(14, 16), (16, 14), (14, 8), (12, 14)])
@pytest.mark.pitfall("F19")
def test_the_factor_that_is_told_to_a_teacher_of_other_patches_is_taken_as_it_is_written(
    patches: tuple[int, int],
) -> None:
    """16 / 14 has no end, and is written with six digits."""
    student, side = encoder(0, patch=patches[0]), 4 * patches[0]
    with pytest.raises(RecipeError) as caught:
        Distillation(student, encoder(1, patch=patches[1]))
    factor = float(str(caught.value).partition("upscale = ")[2].partition(",")[0])
    objective = Distillation(student, encoder(1, patch=patches[1], upscale=factor))
    valid = torch.ones(1, side, side, dtype=torch.bool)
    valid[0, -1, -1] = False
    one = Batch({"rgb": Image(torch.randn(1, 3, side, side), valid)}, None)
    assert objective.counts(one)["cells"] == 15
    assert torch.isfinite(loss_of(objective, student, one))


@pytest.mark.pitfall("C37", "P62")
def test_of_windows_that_fill_no_cells_the_cells_of_both_are_learned() -> None:
    """Of 33 px a student of patch 16 makes three cells, and a teacher that sees 8 of its own makes two of 16 px."""
    student, teacher = encoder(0, patch=16), encoder(1, patch=4, upscale=0.25)
    one = Batch({"rgb": Image(torch.randn(2, 3, 33, 33), torch.ones(2, 33, 33, dtype=torch.bool))}, None)
    with torch.no_grad():
        assert [each.encode(one.images)["rgb"].maps[0].shape[-1] for each in (student, teacher)] == [3, 2]
    objective = Distillation(student, teacher)
    assert objective.counts(one)["cells"] == 2 * 2 * 2
    assert 0.1 < loss_of(objective, student, one).item() < 10


def test_what_all_cells_have_in_common_is_not_learned() -> None:
    """A teacher most of whose tokens is one constant: the mean answer costs as much as it says nothing."""
    student, teacher = encoder(0), encoder(1)
    with torch.no_grad():
        teacher.backbone.network.get_parameter("layernorm.bias").copy_(3 * torch.randn(16))
    objective = Distillation(student, teacher)
    objective.measure([batch(number) for number in range(8)])
    with torch.no_grad():
        tokens = torch.cat(
            [plain_norm(teacher.encode(batch(n).images)["rgb"].maps[1].movedim(1, -1)).flatten(0, 2) for n in range(8)]
        )
        torch.testing.assert_close(objective.get_buffer("mean1"), tokens.mean(dim=0))
        torch.testing.assert_close(objective.get_buffer("std1"), tokens.std(dim=0))
        # the mean of the tokens as answer to all: near them as they are, off by a right angle once it is taken out
        for level, layer in enumerate(objective.projections):
            mean = objective.get_buffer(f"mean{level}") / objective.get_buffer(f"std{level}")
            layer.weight.zero_()  # type: ignore[operator]
            layer.bias.copy_(mean)  # type: ignore[arg-type, operator]
        assert loss_of(objective, student, batch(9)).item() > 1.0
    assert {name for name in objective.state_dict() if "mean" in name} == {"mean0", "mean1"}  # a run goes on with them


def test_windows_are_measured_one_after_another_and_none_is_kept() -> None:
    objective = Distillation(encoder(0), encoder(1))
    alive: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(6):
            one = batch(number)
            sizes = [tensor.numel() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
            alive.append(sum(sizes))
            yield one

    objective.measure(batches())
    assert max(alive[2:]) <= alive[1] + 100


@pytest.mark.pitfall("P64")
def test_nodata_is_not_measured() -> None:
    one, objectives = batch(), [Distillation(encoder(0), encoder(1)) for _ in range(2)]
    for objective, beneath in zip(objectives, (0.0, 50.0), strict=True):
        images = one.images["rgb"]
        valid = images.valid.clone()
        valid[:, :PATCH] = False
        pixels = torch.where(valid[:, None], images.pixels, beneath)
        objective.measure([Batch({"rgb": Image(pixels, valid)}, None)])
    assert torch.equal(objectives[0].get_buffer("std1"), objectives[1].get_buffer("std1"))
    with torch.no_grad():
        tokens = objectives[0].teacher.encode({"rgb": Image(pixels, valid)})["rgb"].maps[1].movedim(1, -1)
    torch.testing.assert_close(objectives[0].get_buffer("mean1"), plain_norm(tokens[:, 1:]).flatten(0, 2).mean(dim=0))
