"""Groups of bands (SatMAE): a token for each group of a patch, hidden by itself, told in the order of the bands."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import Encoder
from grouped_models import GROUPS, group_of, grouped, hidden_values, masked, pictures
from masked_models import as_fresh, loss_of, objective_of, require_close_in_half, seen_by_blocks
from torch import Tensor

from vfmseg.adapters.attach import attach_full
from vfmseg.data.image import Image
from vfmseg.data.masks import Masking
from vfmseg.data.sample import Batch, Sample
from vfmseg.encoders.build import build_stem
from vfmseg.errors import DataError, RecipeError
from vfmseg.model import Encoder as Plain
from vfmseg.training.objectives.hidden import hidden_patches
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.objectives.patches import to_patches

KINDS = ("dinov2", "registers", "clip-vision")
STEPS = 400


@pytest.mark.pitfall("K13")
def test_masks_of_groups_are_of_their_own_or_one() -> None:
    sample = Sample({"cube": Image(torch.zeros(6, 64, 64), torch.ones(64, 64, dtype=torch.bool))}, None)
    draws = np.random.default_rng(0)
    for kind in ("random", "block"):
        own = torch.stack([Masking(kind, 0.75, 8, groups=3)(sample, draws).mask for _ in range(400)])  # type: ignore
        assert own.shape == (400, 3, 8, 8)
        assert (own.sum(dim=(2, 3)) == 48).all()
        share = own.all(dim=1).float().mean(dim=(1, 2))
        assert abs(share.mean() - 0.75**3) < 4 * share.std() / 20
    same = Masking("random", 0.75, 8)(sample, draws).mask
    assert same is not None
    batch = Batch({"cube": Image(torch.zeros(1, 6, 64, 64), torch.ones(1, 64, 64))}, None, mask=same[None])
    of_groups = hidden_patches(batch, "patches", 8, 3).unflatten(1, (3, 64))
    assert (of_groups == of_groups[:, :1]).all()
    assert (of_groups.sum(dim=2) == 48).all()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("P64")
def test_hidden_values_reach_neither_encoder_nor_prediction(kind: str, own: bool) -> None:
    model = grouped(kind)
    patch, objective = model.backbone.patch, objective_of(model, normalise=None)
    one = masked(pictures(), patch, np.random.default_rng(0), 3 if own else None)
    hidden = hidden_values(one, patch)
    image = one.images["cube"]

    def changed(where: Tensor) -> Batch:
        other = torch.where(where, 255 * torch.rand_like(image.pixels), image.pixels)
        return Batch({"cube": Image(other, image.valid)}, None, mask=one.mask)

    two, three = changed(hidden), changed(~hidden)
    given = [seen_by_blocks(model, lambda b=batch: objective.rebuilt(model, b)) for batch in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
    rows, columns = one.mask.shape[-2:]  # type: ignore[union-attr]
    kept = rows * columns - round(0.5 * rows * columns)
    assert given[0][0].shape[1] == model.backbone.prefix + 3 * kept
    told = [objective.rebuilt(model, batch)["image"] for batch in (one, two, three)]
    assert torch.equal(told[0][hidden], told[1][hidden])
    assert not torch.allclose(told[0][hidden], told[2][hidden], atol=1e-3)
    assert torch.equal(told[0][~hidden], ((image.pixels - 100) / 50)[~hidden])
    if own:  # what one group shows at a place is used for the others there
        first = torch.zeros_like(hidden)
        first[:, [band - 1 for band in GROUPS[0]]] = ~hidden[:, [band - 1 for band in GROUPS[0]]]
        fourth = objective.rebuilt(model, changed(first))["image"]
        others = hidden & torch.tensor([group != 0 for group in group_of(GROUPS)])[:, None, None]
        assert not torch.allclose(told[0][others], fourth[others], atol=1e-3)


@pytest.mark.parametrize("normalise", ["patch", "band", None])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.pitfall("C32", "P64")
def test_a_perfect_prediction_costs_nothing_and_in_another_order_of_bands_it_does(own: bool, normalise: Any) -> None:
    """The real decoder, whose last layer answers one patch of all bands: every patch of the images is that one."""
    model = grouped("dinov2")
    patch, objective = model.backbone.patch, objective_of(model, normalise=normalise)
    template = torch.randn(6, patch, patch)
    images = 100 + 50 * template.repeat(1, 3, 4)[None, :, :40].expand(2, -1, -1, -1)
    batch = masked(images, patch, np.random.default_rng(0), 3 if own else None)
    target = template.clone()
    for group in GROUPS:
        of_group = [band - 1 for band in group]
        over = (0, 1, 2) if normalise == "patch" else (1, 2)
        variance, mean = torch.var_mean(template[of_group], dim=over, keepdim=True)
        if normalise:
            target[of_group] = (template[of_group] - mean) / (variance + 1e-6).sqrt()

    def cost(answer: Tensor) -> float:
        head = objective.decoder.heads["of_image"]
        with torch.no_grad():
            head.weight.zero_()  # type: ignore[operator, union-attr]
            head.bias.copy_(answer.permute(1, 2, 0).flatten())  # type: ignore[operator, union-attr]
        return loss_of(objective, model, batch).item()

    assert cost(target) < 1e-9
    in_order_of_groups = [band - 1 for group in GROUPS for band in group]
    assert cost(target[in_order_of_groups]) > 0.1
    assert cost(target.transpose(1, 2)) > 0.1
    whole = 2 * 4  # of 3 x 4 patches the last row reaches beyond the images
    assert batch.mask is not None
    mask = batch.mask if own else batch.mask[:, None].expand(-1, 3, -1, -1)
    assert objective.counts(batch) == {"patches": int(mask[:, :, :2].sum())}
    assert whole * 2 * 3 > int(mask[:, :, :2].sum()) > 0


@pytest.mark.pitfall("C32")
def test_bands_in_another_order_cost_the_same_with_the_weights_in_that_order() -> None:
    """Groups that lie side by side, and the same bands of the same groups scattered over the file."""
    side_by_side, scattered = ((1, 2, 3), (4, 5), (6,)), ((5, 1, 3), (2, 6), (4,))
    order = [band - 1 for group in scattered for band in group]  # band i of the first is band order[i] of the second
    torch.manual_seed(0)
    one = grouped("dinov2", side_by_side)
    two = grouped("dinov2", scattered)
    two.load_state_dict(one.state_dict())
    objectives = [objective_of(model, normalise="patch") for model in (one, two)]
    state = objectives[0].state_dict()
    for name in ("decoder.heads.of_image.weight", "decoder.heads.of_image.bias"):
        rows = state[name].unflatten(0, (-1, 6))
        moved = torch.empty_like(rows)
        moved[:, order] = rows
        state[name] = moved.flatten(0, 1)
    objectives[1].load_state_dict(state)
    images = pictures()
    moved = torch.empty_like(images)
    moved[:, order] = images
    losses = []
    for model, objective, pixels in zip((one, two), objectives, (images, moved), strict=True):
        losses.append(loss_of(objective, model, masked(pixels, 14, np.random.default_rng(0), 3)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert loss_of(objectives[1], two, masked(images, 14, np.random.default_rng(0), 3)).item() != pytest.approx(
        losses[0], rel=1e-3
    )


def tokens_of(model: Encoder, images: Tensor) -> Tensor:
    """(B, G, N, D) as they leave the last block."""
    found: list[Tensor] = []
    block = model.backbone.blocks[-1][1]
    handle = block.register_forward_hook(lambda _, given, out: found.append(out))
    model.encode({"cube": Image(images, torch.ones(len(images), *images.shape[2:], dtype=torch.bool))})
    handle.remove()
    groups = len(model.image_stem.groups)
    return found[0][:, model.backbone.prefix :].unflatten(1, (groups, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("K16")
def test_what_stands_for_a_group_tells_it_apart(kind: str) -> None:
    model = grouped(kind, ((1, 2), (3, 4), (5, 6)))
    kernels, codes = model.image_stem.mix.kernels, model.image_stem.mix.codes
    images = pictures()
    with torch.no_grad():
        usual = tokens_of(model, images)
        start = codes.clone()
        codes[[0, 1]] = start[[1, 0]]
        swapped = tokens_of(model, images)
        assert (usual - swapped).abs().max() > 1e-3
        for kernel in kernels:
            kernel.weight.copy_(kernels[0].weight)
        alike = pictures(bands=2).repeat(1, 3, 1, 1)
        codes.copy_(start)
        apart = tokens_of(model, alike)
        assert (apart[:, 0] - apart[:, 1]).abs().max() > 1e-3
        codes[1] = codes[0]
        equal = tokens_of(model, alike)
    torch.testing.assert_close(equal[:, 0], equal[:, 1], rtol=1e-4, atol=1e-5)
    assert (equal[:, 0] - equal[:, 2]).abs().max() > 1e-3


@pytest.mark.pitfall("C33", "K16")
def test_a_prediction_is_of_its_place_and_of_its_group() -> None:
    model = grouped("dinov2")
    objective, batch = objective_of(model), masked(pictures(), 14, np.random.default_rng(0), None)
    hidden = int(batch.mask[0].sum())  # type: ignore[index]
    told: list[Tensor] = []
    objective.decoder.norm.register_forward_hook(lambda _, given, out: told.append(out))
    codes = objective.decoder.codes
    assert codes is not None

    def found() -> Tensor:
        """(G, H, width): of the first image what the last layer is given."""
        objective.terms(model, batch)
        return told.pop()[0].unflatten(0, (3, hidden))

    with torch.no_grad():
        usual, start = found(), codes.clone()
        codes[[0, 2]] = start[[2, 0]]
        swapped = found()
        codes.zero_()
        nameless = found()
    assert (usual[:, 0] - usual[:, 1]).abs().max() > 1e-2  # places
    assert (usual[0] - usual[1]).abs().max() > 1e-2  # groups
    torch.testing.assert_close(nameless[0], nameless[1])
    assert (swapped[0] - usual[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("P53", "C8", "C33", "K22")
def test_all_that_learns_gets_a_gradient_and_nothing_stays_that_only_decays(kind: str) -> None:
    model = grouped(kind)
    objective, batch = objective_of(model), masked(pictures(), model.backbone.patch, np.random.default_rng(0), 3)
    loss_of(objective, model, batch).backward()
    learning = {**model.trainable(), **dict(objective.named_parameters())}
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"backbone.network.{model.backbone.family.patch_kernel}.weight"]
    before = loss_of(objective, model, batch).item()
    for name, tensor in model.trainable().items():
        if name.startswith("stems.") or "position" in name:
            start = tensor.detach().clone()
            with torch.no_grad():
                tensor.copy_(torch.randn_like(tensor))
                assert abs(loss_of(objective, model, batch).item() - before) > 1e-6, name
                tensor.copy_(start)


@pytest.mark.pitfall("P64", "P26")
def test_patches_with_nodata_count_for_no_group() -> None:
    model = grouped("dinov2")
    batch = masked(pictures(), 14, np.random.default_rng(0), 3)
    valid = torch.ones(2, 50, 70, dtype=torch.bool)
    valid[0, 16:20, 30:33] = valid[1, :, :20] = False
    image = batch.images["cube"]
    objective = objective_of(model, normalise=None)
    told = []
    for pixels in (image.pixels, torch.where(valid[:, None], image.pixels, 7.0)):
        one = Batch({"cube": Image(pixels, valid)}, None, mask=batch.mask)
        told.append(loss_of(objective, model, one).item())
    whole = to_patches(valid[:, None], 14).all(dim=3).all(dim=2).unflatten(1, (4, 5))
    assert objective.counts(Batch({"cube": Image(image.pixels, valid)}, None, mask=batch.mask)) == {
        "patches": int((batch.mask & whole[:, None]).sum())  # type: ignore[operator]
    }
    assert told[0] == told[1]
    one = Batch({"cube": Image(image.pixels, valid)}, None, mask=batch.mask)
    seen = torch.where(valid[:, None], (image.pixels - 100) / 50, 0.0)
    away = to_patches((objective.rebuilt(model, one)["image"] - seen).square(), 14).mean(dim=2).unflatten(1, (4, 5))
    errors = [
        float(away[b, r, c, [band - 1 for band in GROUPS[g]]].mean())
        for b, g, r, c in np.ndindex(2, 3, 4, 5)
        if batch.mask[b, g, r, c] and whole[b, r, c]  # type: ignore[index]
    ]
    assert told[0] == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.pitfall("C32", "P15")
def test_two_sensors_of_as_many_groups_learn_as_each_alone() -> None:
    """Of six bands and of three: in one batch the losses of both add up, and the masks hide the same of both."""
    one, groups = grouped("dinov2"), ((2,), (3,), (1,))
    stem = build_stem(one.backbone, {"other": 3}, [100.0] * 3, [50.0] * 3, groups=groups)
    model = Plain(one.backbone, {"image": one.image_stem, "other": stem}, attach_full(one.backbone, ()))
    objective, both = objective_of(model), masked(pictures(), 14, np.random.default_rng(0), 3)
    both.images["other"] = Image(pictures(bands=3), torch.ones(2, 50, 70, dtype=torch.bool))
    each = [Batch({name: image}, None, mask=both.mask) for name, image in both.images.items()]
    sums = [objective.terms(model, batch)["pixels"].sum.item() for batch in (*each, both)]
    assert sums[2] == pytest.approx(sums[0] + sums[1], rel=1e-5)
    counts = [objective.counts(batch)["patches"] for batch in (*each, both)]
    assert counts[2] == 2 * counts[0] == 2 * counts[1]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.pitfall("P60")
def test_half_precision_gives_nearly_the_same_loss(precision: torch.dtype) -> None:
    model = grouped("dinov2")
    objective, batch = objective_of(model), masked(pictures(), 14, np.random.default_rng(0), 3)
    require_close_in_half(objective, model, batch, precision)


def test_masks_that_do_not_fit_are_refused() -> None:
    model = grouped("dinov2")
    objective, batch = objective_of(model), masked(pictures(), 14, np.random.default_rng(0), 2)
    with pytest.raises(DataError, match="masks of 2 groups of bands for 3"):
        objective.counts(batch)
    uneven = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
    uneven[:, 0, 0, :4] = uneven[:, 1, 0, 0] = uneven[:, 2, 0, 0] = True
    with pytest.raises(ValueError, match=r"hide \[1, 4\] patches"):
        objective.counts(Batch(batch.images, None, mask=uneven))
    with pytest.raises(RecipeError, match="mask: random or block for groups"):
        objective_of(model, hides="bands")


def two_bands(count: int) -> Tensor:
    """(count, 2, 8, 8): each patch of 4 pixels is drawn by itself; the second band is a function of the first."""
    fields = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    first = torch.einsum("nkrc,khw->nrhcw", torch.randn(count, 2, 2, 2).sign(), fields)
    first = first.reshape(count, 1, 8, 8) / math.sqrt(2)
    return 100 + 50 * torch.cat([first, 1.5 * first.sin()], dim=1)


def learned(own: bool, draws: np.random.Generator) -> tuple[Encoder, MaskedAutoencoder]:
    torch.manual_seed(0)
    model = grouped("dinov2", ((1,), (2,)), image_size=8, patch_size=4, hidden_size=64, num_attention_heads=4)
    as_fresh(model)
    objective = objective_of(model, normalise=None, width=64, depth=1, heads=4)
    learning = [*model.trainable().values(), *objective.parameters()]
    optimizer = torch.optim.AdamW(learning, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss_of(objective, model, masked(two_bands(32), 4, draws, 2 if own else None)).backward()
        optimizer.step()
    return model, objective


@pytest.mark.pitfall("K15")
def test_with_masks_of_their_own_a_group_is_told_from_another() -> None:
    """The second band of a patch follows from its first and from nothing else."""
    draws = np.random.default_rng(0)
    images = two_bands(64)
    batch = masked(images, 4, draws, 2)
    assert batch.mask is not None
    only_second = (batch.mask[:, 1] & ~batch.mask[:, 0]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    true = ((images - 100) / 50)[:, 1][only_second]
    errors = {}
    for own in (True, False):
        model, objective = learned(own, draws)
        told = objective.rebuilt(model, batch)["image"][:, 1][only_second]
        errors[own] = float((told - true).square().mean() / true.square().mean())
    assert errors[True] < 0.1 < 0.8 < errors[False]
