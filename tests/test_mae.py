"""Masked pretraining: equal to transformers' MAE, blind to what is hidden, learning from nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import DEPTH, SETTINGS, family, upstream
from masked_models import Oracle, loss_of, objective_of, random_batch, require_close_in_half, seen_by_blocks, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.data.image import Image
from vfmseg.data.sample import Batch
from vfmseg.encoders.backbone import Backbone, BaseRecord, sha256_of
from vfmseg.encoders.build import ENCODERS, build_stem
from vfmseg.errors import DataError, RecipeError
from vfmseg.training.objectives import pixels
from vfmseg.training.objectives.hidden import hidden_in
from vfmseg.training.objectives.patches import moments, to_patches
from vfmseg.training.step import Step, total

TOWERS = ("dinov2", "registers", "clip-vision", "sam-vision")


def hidden_pixels(batch: Batch, patch: int) -> Tensor:
    """Bool (B, h, w)."""
    if batch.pixel_mask is not None:
        return batch.pixel_mask
    assert batch.mask is not None
    height, width = next(iter(batch.images.values())).valid.shape[-2:]
    return batch.mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]


def changed(batch: Batch, where: Tensor, pixels: float | None = None) -> Batch:
    """The batch with other pixels (random, or all of one value) at bool (B, h, w)."""
    images = {}
    for name, image in batch.images.items():
        other = 255 * torch.rand_like(image.pixels) if pixels is None else torch.full_like(image.pixels, pixels)
        images[name] = Image(torch.where(where[:, None], other, image.pixels), image.valid)
    return replace(batch, images=images)


WAYS = [(kind, False) for kind in TOWERS] + [("dinov2", True), ("sam-vision", True)]
"""Encoders, and whether some pixels of a hidden patch stay visible."""


@pytest.mark.parametrize("bands", [3, 5])
@pytest.mark.parametrize(("kind", "incomplete"), WAYS)
@pytest.mark.pitfall("P64", "K2")
def test_hidden_pixels_reach_neither_encoder_nor_prediction(kind: str, incomplete: bool, bands: int) -> None:
    model = tiny(kind, bands)
    objective = objective_of(model, normalise=None, hides="pixels" if incomplete else "patches")
    one = random_batch(model, incomplete=incomplete)
    hidden = hidden_pixels(one, model.backbone.patch)
    two, three = changed(one, hidden), changed(one, ~hidden)
    given = [seen_by_blocks(model, partial(objective.rebuilt, model, batch)) for batch in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
    where = hidden[:, None].expand(-1, bands, -1, -1)
    told = [objective.rebuilt(model, batch)["image"][where] for batch in (one, two, three)]
    assert torch.equal(told[0], told[1])
    # and what is predicted comes from what is visible
    assert not torch.allclose(told[0], told[2], atol=1e-4)


@pytest.mark.parametrize(("kind", "incomplete"), WAYS)
@pytest.mark.pitfall("P64", "K2", "K3")
def test_a_prediction_is_of_all_that_is_visible_of_its_own_image_and_of_nothing_else(
    kind: str, incomplete: bool
) -> None:
    """By the gradient of what is predicted for hidden patches of the first image, to each pixel of both images."""
    model = tiny(kind)
    objective = objective_of(model, normalise=None, hides="pixels" if incomplete else "patches")
    batch = random_batch(model, incomplete=incomplete)
    for image in batch.images.values():
        image.pixels.requires_grad_(True)
    hidden = hidden_in(batch, objective.hides, model.backbone.patch)
    pixels = objective._pixels(model, batch.images)  # type: ignore[arg-type]
    ((told,),) = objective._predicted(model, batch.images, pixels, hidden).values()  # type: ignore[arg-type]
    (told[0] * torch.randn(told.shape[1:])).sum().backward()
    grown = torch.stack([image.pixels.grad.abs()[:, 0] for image in batch.images.values()]).sum(dim=0)  # type: ignore[union-attr]
    unseen = hidden_pixels(batch, model.backbone.patch)
    assert grown[0][unseen[0]].max() == 0
    assert grown[0][~unseen[0]].min() > 0
    assert grown[1].max() == 0


@pytest.mark.parametrize(("kind", "incomplete"), WAYS)
@pytest.mark.pitfall("K8")
def test_only_visible_patches_go_through_blocks_that_take_any(kind: str, incomplete: bool) -> None:
    model = tiny(kind)
    objective, batch = (
        objective_of(model, hides="pixels" if incomplete else "patches"),
        random_batch(model, incomplete=incomplete, ratio=0.7),
    )
    rows, columns = batch.mask.shape[1:]  # type: ignore[union-attr]
    given = seen_by_blocks(model, lambda: objective.terms(model, batch))
    assert len(given) == DEPTH
    if kind == "sam-vision":
        assert {one.shape[1:3] for one in given} == {(rows, columns)}
    else:
        patches = rows * columns if incomplete else rows * columns - round(0.7 * rows * columns)
        assert {one.shape[1] for one in given} == {model.backbone.prefix + patches}


@pytest.mark.pitfall("K8")
def test_an_encoder_of_a_quarter_of_the_patches_costs_about_a_quarter() -> None:
    """In floating-point operations of all but the decoder and the embedding, which is of all patches."""
    model = tiny("dinov2", image_size=112, hidden_size=64)
    objective, costs = objective_of(model), []
    objective.decoder = Oracle(torch.zeros(2, 64, 3 * 14 * 14))  # type: ignore[assignment]
    for ratio in (0.02, 0.75):
        batch = random_batch(model, 112, 112, ratio=ratio)
        with FlopCounterMode(display=False) as embedding:
            model.backbone.embed(*model.image_stem(batch.images))
        with FlopCounterMode(display=False) as whole:
            objective.terms(model, batch)
        costs.append(whole.get_total_flops() - embedding.get_total_flops())
    assert 0.2 < costs[1] / costs[0] < 0.3


@pytest.mark.parametrize("kind", ["dinov2", "clip-vision"])
@pytest.mark.pitfall("C33", "K4")
def test_a_prediction_is_of_its_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask tokens differ by their places alone: without these all hidden patches would be predicted alike."""
    model = tiny(kind)
    objective, batch = objective_of(model, normalise=None), random_batch(model)
    count = batch.mask[0].numel()  # type: ignore[union-attr]

    def told(positions: Tensor) -> Tensor:
        """(N, numbers of a patch), the first image's."""
        monkeypatch.setattr(pixels, "sine_cosine", lambda rows, columns, width: positions)
        return to_patches(objective.rebuilt(model, batch)["image"][:1], model.backbone.patch)[0].flatten(1)

    places = pixels.sine_cosine(*batch.mask.shape[1:], 16)  # type: ignore[union-attr]
    whole = torch.arange(count).unflatten(0, batch.mask.shape[1:])[:-1, :-1]  # type: ignore[union-attr]
    first, second = [int(i) for i in whole[batch.mask[0, :-1, :-1]][:2]]  # type: ignore[index]
    usual, nowhere = told(places), told(torch.zeros_like(places))
    assert (usual[first] - usual[second]).abs().max() > 1e-3
    torch.testing.assert_close(nowhere[first], nowhere[second])
    swapped = places.clone()
    swapped[[first, second]] = places[[second, first]]
    torch.testing.assert_close(told(swapped)[[first, second]], usual[[second, first]])


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.pitfall("C33", "K4", "K22")
def test_the_encoder_tells_places_apart(kind: str) -> None:
    """Other positions in the encoder, another loss: a mask token in the decoder alone would not need them."""
    model = tiny(kind)
    objective, batch = objective_of(model), random_batch(model)
    before = loss_of(objective, model, batch).item()
    table = next(p for name, p in model.named_parameters() if "pos_embed" in name or "position_embedding" in name)
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    assert abs(loss_of(objective, model, batch).item() - before) > 1e-4


def targets_of(batch: Batch, patch: int, normalise: str | None) -> np.ndarray:
    """(B, rows, columns, patch, patch, C), cut and normalised one by one."""
    images = np.concatenate([((image.pixels - 100) / 50).numpy() for image in batch.images.values()], axis=1)
    height, width = images.shape[2:]
    images = np.pad(images, ((0, 0), (0, 0), (0, -height % patch), (0, -width % patch)))
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    found = np.zeros((len(images), rows, columns, patch, patch, images.shape[1]))
    for b, r, c in np.ndindex(len(images), rows, columns):
        one = images[b, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].transpose(1, 2, 0)
        if normalise == "patch":
            one = (one - one.mean()) / np.sqrt(one.var(ddof=1) + 1e-6)
        elif normalise == "band":
            one = (one - one.mean(axis=(0, 1))) / np.sqrt(one.var(axis=(0, 1), ddof=1) + 1e-6)
        found[b, r, c] = one
    return found


@pytest.mark.parametrize("normalise", ["patch", "band", None])
@pytest.mark.parametrize(("kind", "incomplete"), [("dinov2", False), ("sam-vision", False), ("dinov2", True)])
@pytest.mark.pitfall("C32", "P64", "K5", "K6", "K9")
def test_a_perfect_prediction_costs_nothing_and_one_in_another_order_does(
    kind: str, incomplete: bool, normalise: Any
) -> None:
    model = tiny(kind, bands=5)
    objective, batch = (
        objective_of(model, normalise=normalise, hides="pixels" if incomplete else "patches"),
        random_batch(model, incomplete=incomplete),
    )
    true = torch.from_numpy(targets_of(batch, model.backbone.patch, normalise)).float()

    def cost(answers: Tensor) -> float:
        objective.decoder = Oracle(answers.flatten(1, 2).flatten(2))  # type: ignore[assignment]
        return float(loss_of(objective, model, batch))

    assert cost(true) < 1e-9
    assert cost(true.flip(5)) > 0.1  # bands
    assert cost(true.transpose(3, 4)) > 0.1  # rows and columns of the pixels of a patch
    assert cost(true.flip(2)) > 0.1  # patches
    wrong = true + torch.where(hidden_of(batch), 0.0, 7.0)
    assert cost(wrong) < 1e-9, "visible patches are in the loss"
    if incomplete:
        wrong = true + torch.where(inside(batch, model.backbone.patch), 0.0, 7.0)
        assert cost(wrong) < 1e-9, "visible pixels of hidden patches are in the loss"


def inside(batch: Batch, patch: int) -> Tensor:
    """Bool (B, rows, columns, patch, patch, 1): pixels that are hidden."""
    assert batch.mask is not None
    assert batch.pixel_mask is not None
    return to_patches(batch.pixel_mask[:, None], patch).unflatten(1, batch.mask.shape[1:]).unflatten(3, (patch, patch))


def hidden_of(batch: Batch) -> Tensor:
    """Bool (B, rows, columns, 1, 1, 1)."""
    assert batch.mask is not None
    return batch.mask[..., None, None, None]


@pytest.mark.parametrize("normalise", ["patch", None])
@pytest.mark.pitfall("P64", "P26")
def test_the_loss_is_the_mean_over_hidden_patches_without_nodata(normalise: Any) -> None:
    model = tiny("dinov2")
    patch, batch = model.backbone.patch, random_batch(model)
    valid = torch.ones(2, 50, 70, dtype=torch.bool)
    valid[0, 20:24, 30:33] = valid[1, :, :20] = False
    batch = replace(batch, images={name: Image(image.pixels, valid) for name, image in batch.images.items()})
    true = targets_of(batch, patch, normalise)
    answers = torch.randn(2, *true.shape[1:])
    objective = objective_of(model, normalise=normalise)
    objective.decoder = Oracle(answers.flatten(1, 2).flatten(2))  # type: ignore[assignment]
    errors = []
    for b, r, c in np.ndindex(true.shape[:3]):
        inside = valid[b, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        if batch.mask[b, r, c] and inside.shape == (patch, patch) and inside.all():  # type: ignore[index]
            errors.append(float(((answers[b, r, c].numpy() - true[b, r, c]) ** 2).mean()))
    assert 0 < len(errors) < int(batch.mask.sum())  # type: ignore[union-attr]
    assert objective.counts(batch) == {"patches": len(errors)}
    assert loss_of(objective, model, batch).item() == pytest.approx(np.mean(errors), rel=1e-5)
    # what lies under nodata changes nothing
    assert loss_of(objective, model, changed(batch, ~valid)) == loss_of(objective, model, batch)


@pytest.mark.parametrize("normalise", ["patch", "band"])
@pytest.mark.pitfall("K9")
def test_gain_and_offset_of_a_patch_do_not_change_normalised_targets(normalise: Any) -> None:
    cut = torch.randn(2, 3, 16, 4)
    gain = torch.tensor([2.0, 0.5, 3.0, 1.5]) if normalise == "band" else torch.tensor(3.0)
    one, two = ((x - moments(x, normalise)[0]) / moments(x, normalise)[1] for x in (cut, gain * cut + 5))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    other = torch.tensor([2.0, 0.5, 3.0, 1.5]) * cut
    same = torch.allclose(one, (other - moments(other, normalise)[0]) / moments(other, normalise)[1], atol=1e-4)
    assert same is (normalise == "band")


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.pitfall("P53", "C8", "C33", "K22")
def test_all_that_learns_gets_a_gradient(kind: str) -> None:
    model = tiny(kind, bands=5).train()
    objective, batch = objective_of(model), random_batch(model)
    loss_of(objective, model, batch).backward()
    learning = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    without = [name for name, p in learning.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("adapter", ["lora", "mm_adapter"])
@pytest.mark.pitfall("C6", "P10", "K21")
def test_with_an_adapter_the_published_weights_stay_and_the_rest_learns(kind: str, adapter: str) -> None:
    model = tiny(kind, bands=4, adapter=adapter).train()
    objective, batch = objective_of(model), random_batch(model)
    step = Step(model, {"mae": objective})
    added = {id(p) for p in model.attached.added}
    published = {n: p for n, p in model.backbone.network.named_parameters() if id(p) not in added}
    before, start = sha256_of(published), {n: t.clone() for n, t in step.kept().items()}
    assert set(step.parts()) == {"adapter", "stem", "objectives.mae"}
    optimizer = torch.optim.AdamW([t for part in step.parts().values() for t in part.values()], lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = total(step({"unlabelled": batch}), step.counts({"unlabelled": batch}))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sha256_of(published) == before
    assert [name for name, tensor in step.kept().items() if torch.equal(tensor, start[name])] == []
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("adapter", ["lora", "mm_adapter"])
@pytest.mark.pitfall("K21")
def test_an_adapter_alone_makes_the_loss_fall(kind: str, adapter: str) -> None:
    """And not the decoder, which learns beside it: with the adapter as it began, which is as without it, it is back."""
    model = tiny(kind, bands=4, adapter=adapter).eval()
    objective, batch = objective_of(model), random_batch(model)
    without = loss_of(objective, model, batch).item()
    optimizer = torch.optim.Adam(model.attached.added, lr=0.05)
    start = [one.detach().clone() for one in model.attached.added]
    for _ in range(15):
        optimizer.zero_grad()
        loss_of(objective, model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_of(objective, model, batch).item() < without - 0.003
        for one, before in zip(model.attached.added, start, strict=True):
            one.copy_(before)
        assert loss_of(objective, model, batch).item() == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize("kind", ["dinov2", "sam-vision"])
@pytest.mark.pitfall("P49", "K25")
def test_parts_of_a_batch_divided_by_the_counts_of_all_add_up_to_the_whole(kind: str) -> None:
    model = tiny(kind)
    objective, batch = objective_of(model), random_batch(model, samples=4)
    batch.images["b0"].valid[1, :, 20:] = False
    divisors = objective.counts(batch)
    pieces = [part(batch, slice(0, 1)), part(batch, slice(1, 4))]
    sums = [total(objective.terms(model, piece), divisors) for piece in pieces]
    torch.testing.assert_close(sum(sums), total(objective.terms(model, batch), divisors))
    assert objective.counts(pieces[0])["patches"] != objective.counts(pieces[1])["patches"] / 3
    assert sum(objective.counts(piece)["patches"] for piece in pieces) == divisors["patches"]


def part(batch: Batch, samples: slice) -> Batch:
    images = {name: Image(image.pixels[samples], image.valid[samples]) for name, image in batch.images.items()}
    return Batch(images, None, mask=None if batch.mask is None else batch.mask[samples])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalise", ["patch", "band"])
@pytest.mark.pitfall("P60", "K26")
def test_images_of_one_value_give_numbers_and_disturb_no_others(normalise: Any, precision: torch.dtype) -> None:
    model = tiny("dinov2").train()
    objective, batch = objective_of(model, normalise=normalise), random_batch(model, 56, 70)
    first = torch.tensor([True, False])[:, None, None].expand(2, 56, 70)
    alone = loss_of(objective, model, part(batch, slice(1, 2)))
    for value in (0.0, 100.0, 255.0, 65535.0):
        one = changed(batch, first, value)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = loss_of(objective, model, one)
            flat = loss_of(objective, model, part(one, slice(0, 1)))
        loss.backward()
        assert torch.isfinite(loss)
        # both images hide as many patches, so what is told of both is the mean of what is told of each
        assert (loss - flat / 2).item() == pytest.approx(alone.item() / 2, rel=0.02)
    learning = [*model.parameters(), *objective.parameters()]
    assert all(torch.isfinite(p.grad).all() for p in learning if p.grad is not None)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.pitfall("P60", "K26")
def test_half_precision_gives_nearly_the_same_loss(kind: str, precision: torch.dtype) -> None:
    model = tiny(kind, bands=5)
    objective, batch = objective_of(model), random_batch(model)
    require_close_in_half(objective, model, batch, precision)


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("empty", ["nothing valid", "nothing hidden"])
@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.pitfall("P41", "P53")
def test_nothing_to_learn_from_gives_zero_and_a_gradient_of_zero(kind: str, empty: str) -> None:
    model = tiny(kind).train()
    objective, batch = objective_of(model), random_batch(model, samples=1)
    if empty == "nothing valid":
        batch = replace(batch, images={name: Image.nothing(1, (1, 50, 70)) for name in batch.images})
        batch = replace(batch, images={n: Image(i.pixels.transpose(0, 1), i.valid) for n, i in batch.images.items()})
    else:
        batch = replace(batch, mask=torch.zeros_like(batch.mask))  # type: ignore[arg-type]
    loss = loss_of(objective, model, batch)
    loss.backward()
    assert objective.counts(batch) == {"patches": 0}
    assert loss == 0
    learning = [*model.named_parameters(), *objective.named_parameters()]
    assert [name for name, p in learning if p.grad is None or p.grad.abs().max() != 0] == []


@pytest.mark.parametrize("adapter", ["full", "mm_adapter"])
def test_blocks_that_are_run_again_give_the_same_gradients(adapter: str) -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = tiny("dinov2", adapter=adapter).train()
        model.backbone.gradient_checkpointing = again
        objective = objective_of(model)
        loss_of(objective, model, random_batch(model)).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Streams(nn.Module):
    """What the objective asks of a model, with two streams of other bands."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.streams = ("rgb", "dem")
        self.backbone = Backbone(ENCODERS[family(kind)], upstream(kind), [DEPTH], False, BaseRecord(kind, None, ""))
        self.attached = ADAPTERS["mm_lora"].attach(self.backbone, self.streams, **SETTINGS["mm_lora"])
        self.of_rgb = build_stem(self.backbone, {"rgb": 3}, [100.0] * 3, [50.0] * 3)
        self.of_dem = build_stem(self.backbone, {"dem": 1}, [100.0], [50.0])

    def stem(self, stream: str) -> nn.Module:
        return self.of_rgb if stream == "rgb" else self.of_dem

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"encoder": dict(self.named_parameters())}


@pytest.mark.parametrize("kind", ["dinov2", "sam-vision"])
def test_each_stream_is_told_from_its_own_and_absent_ones_are_not_run(kind: str) -> None:
    model = Streams(kind).train()
    mask, size = torch.zeros(2, 3, 3, dtype=torch.bool), 3 * model.backbone.patch
    mask[:, 0, :] = True
    rgb, dem = (Image(255 * torch.rand(2, n, size, size), torch.ones(2, size, size).bool()) for n in (3, 1))
    gone = Image(torch.zeros_like(dem.pixels), torch.zeros_like(dem.valid))
    both = Batch({"rgb": rgb, "dem": dem}, None, mask=mask)
    absent = Batch({"rgb": rgb, "dem": gone}, None, mask=mask, absent=frozenset({"dem"}))
    objective = objective_of(model)
    step = Step(model, {"mae": objective})  # type: ignore[arg-type]
    assert objective.counts(both) == {"patches": 12}
    assert objective.counts(absent) == {"patches": 6}
    told = objective.rebuilt(model, both)
    assert {name: one.shape[1] for name, one in told.items()} == {"rgb": 3, "dem": 1}
    lengths = {}
    for name, batch in (("both", both), ("absent", absent)):
        found: list[int] = []
        hook = model.backbone.blocks[0][1].register_forward_pre_hook(
            lambda _, given, to=found: to.append(len(given[0]))
        )
        loss = total(step({"unlabelled": batch}), step.counts({"unlabelled": batch}))
        hook.remove()
        loss.backward()
        lengths[name] = found
    assert lengths == {"both": [4], "absent": [2]}
    without = [name for part in step.parts().values() for name, tensor in part.items() if tensor.grad is None]
    assert without == []
    only_rgb = objective.rebuilt(model, Batch({"rgb": rgb}, None, mask=mask))
    torch.testing.assert_close(only_rgb["rgb"], objective.rebuilt(model, absent)["rgb"])


def test_what_cannot_be_is_said_in_one_sentence() -> None:
    model = tiny("dinov2")
    objective, batch = objective_of(model), random_batch(model)
    with pytest.raises(DataError, match="no masks of hidden patches"):
        objective.counts(replace(batch, mask=None))
    with pytest.raises(DataError, match="masks of 2 x 5 patches for images of 50 x 70 pixels; expected 4 x 5"):
        objective.terms(model, replace(batch, mask=batch.mask[:, :2]))  # type: ignore[index]
    uneven = torch.zeros(2, 4, 5, dtype=torch.bool)
    uneven[0, 0, 0] = True
    with pytest.raises(ValueError, match=r"hide \[1, 0\] patches"):
        objective.terms(model, replace(batch, mask=uneven))
    with pytest.raises(DataError, match="no masks of hidden pixels"):
        objective_of(model, hides="pixels").terms(model, batch)
    with pytest.raises(DataError, match=r"expected those of b0 \+ b1 \+ b2"):
        objective.terms(model, replace(batch, images={"b0": batch.images["b0"]}))
    model.image_stem.upscale = 2.0
    with pytest.raises(RecipeError, match="upscale = 1"):
        objective_of(model)


@pytest.mark.parametrize("kind", ["dinov2", "sam-vision"])
def test_tokens_without_some_patches_are_no_map_and_no_grid(kind: str) -> None:
    model = tiny(kind)
    batch = random_batch(model)
    tokens = model.backbone.embed(*model.image_stem(batch.images))
    some = tokens.only(torch.tensor([[3, 1, 7], [0, 2, 5]]))
    start = tokens.prefix
    assert torch.equal(some.values[1, start:], tokens.values[1, [start, start + 2, start + 5]])
    assert torch.equal(some.values[:, :start], tokens.values[:, :start])
    assert torch.equal(some.seen[0], tokens.seen[0, [3, 1, 7]])
    with pytest.raises(ValueError, match="to make a map"):
        model.backbone.tap(some)
    with pytest.raises(ValueError, match="have been left out"):
        some.only(torch.tensor([[0], [0]]))
    if kind == "sam-vision":
        with pytest.raises(ValueError, match="need the whole grid"):
            model.backbone.step(1, some)
