"""Hidden bands instead of hidden patches: told from the visible ones of all patches, each band in its place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import DEPTH, Encoder, family, upstream
from masked_models import Oracle, as_fresh, loss_of, objective_of, seen_by_blocks
from torch import Tensor, nn

from vfmseg.adapters.attach import attach_full
from vfmseg.data.image import Image
from vfmseg.data.masks import Masking
from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.encoders.backbone import Backbone, BaseRecord
from vfmseg.encoders.build import ENCODERS, build_stem
from vfmseg.errors import DataError
from vfmseg.training.objectives.hidden import hidden_in
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.objectives.patches import to_patches

BANDS, STEPS = 10, 200


def cube_model(kind: str, **changes: Any) -> Encoder:
    backbone = Backbone(ENCODERS[family(kind)], upstream(kind, **changes), [DEPTH], False, BaseRecord(kind, None, ""))
    stem = build_stem(backbone, {"cube": BANDS}, [100.0] * BANDS, [50.0] * BANDS)
    torch.nn.init.normal_(stem.mix.extra.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    return Encoder(backbone, {"image": stem}, attach_full(backbone, ("image",)), None, nn.Identity(), 2).train()


def cubes(count: int, side: int) -> Tensor:
    """(count, BANDS, side, side): of each pixel a spectrum with two bends, of two components that vary in space."""
    band = torch.linspace(0, 2 * math.pi, BANDS)
    curves = torch.stack([(1.5 * band).sin(), (2.5 * band + 1).cos()])
    amounts = torch.randn(count, 2, 1, 1) + 0.3 * torch.randn(count, 2, side, side)
    return 100 + 50 * torch.einsum("nkhw,kc->nchw", amounts, curves)


def masked(images: Tensor, patch: int, draws: np.random.Generator, ratio: float = 0.5) -> Batch:
    valid = torch.ones(images.shape[2:], dtype=torch.bool)
    masking = Masking("spectral", ratio, patch)
    return collate([masking(Sample({"cube": Image(image, valid)}, None), draws) for image in images])


@pytest.mark.parametrize("kind", ["dinov2", "sam-vision"])
@pytest.mark.pitfall("P64", "C32", "K2", "K5", "K6")
def test_hidden_bands_are_unseen_and_alone_in_the_loss(kind: str) -> None:
    model = cube_model(kind)
    patch = model.backbone.patch
    batch = masked(cubes(2, 3 * patch - 4), patch, np.random.default_rng(0))
    image, hidden = batch.images["cube"], batch.band_mask["cube"][..., None, None]
    other = Batch({"cube": Image(torch.where(hidden, 7.0, image.pixels), image.valid)}, None, band_mask=batch.band_mask)
    objective = objective_of(model, normalise=None, hides="bands")
    one, two = (seen_by_blocks(model, lambda b=b: objective.rebuilt(model, b)) for b in (batch, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    told = [objective.rebuilt(model, b)["image"] for b in (batch, other)]
    assert torch.equal(*told)
    assert torch.equal(told[0][~hidden.expand_as(told[0])], ((image.pixels - 100) / 50)[~hidden.expand_as(told[0])])
    assert objective.counts(batch) == {"patches": 2 * 4}  # of 3 x 3 those that do not reach beyond the image
    true = to_patches((image.pixels - 100) / 50, patch)
    for where, costs in ((~hidden, False), (hidden, True)):
        answers = true + 7.0 * where.flatten(2).transpose(1, 2)[:, None]
        objective.decoder = Oracle(answers.flatten(2))  # type: ignore[assignment]
        cost = loss_of(objective, model, batch).item()
        assert cost == pytest.approx(49.0 if costs else 0.0, abs=1e-4)
    with pytest.raises(DataError, match="no masks of hidden bands"):
        objective.counts(Batch(batch.images, None))


@pytest.mark.pitfall("K12")
def test_what_is_hidden_is_exactly_zero_and_all_else_as_the_stem_normalises_it() -> None:
    stem, draws = cube_model("dinov2").image_stem, np.random.default_rng(0)
    images = cubes(2, 50)
    normal = stem.normalised({"cube": Image(images, torch.ones(2, 50, 50, dtype=torch.bool))})
    for kind, hides in (("random", "patches"), ("incomplete", "pixels"), ("spectral", "bands")):
        masking = Masking(kind, 0.5, 14)  # type: ignore[arg-type]
        valid = torch.ones(50, 50, dtype=torch.bool)
        batch = collate([masking(Sample({"cube": Image(image, valid)}, None), draws) for image in images])
        found = hidden_in(batch, hides, 14)  # type: ignore[arg-type]
        covered = found.covered(batch.images, stem)
        given = stem.normalised(covered)
        if hides == "bands":
            hidden = batch.band_mask["cube"][..., None, None]
        elif hides == "pixels":
            hidden = batch.pixel_mask[:, None]  # type: ignore[index]
        else:
            assert batch.mask is not None
            hidden = batch.mask.repeat_interleave(14, 1).repeat_interleave(14, 2)[:, None, :50, :50]
        assert 0 < hidden.float().mean() < 1
        assert torch.equal(given, torch.where(hidden, 0.0, normal))
        # the same from what the stem has made of whole images
        again = found.covered_in(stem, normal, stem.valid(batch.images))
        assert all(torch.equal(a, b) for a, b in zip(again, (given, stem.valid(covered)), strict=True))


@pytest.mark.pitfall("P53", "C8", "K22")
def test_all_that_learns_gets_a_gradient() -> None:
    model = cube_model("dinov2")
    objective = objective_of(model, hides="bands")
    loss_of(objective, model, masked(cubes(2, 28), 14, np.random.default_rng(0))).backward()
    learning = [*model.named_parameters(), *objective.named_parameters()]
    assert [name for name, p in learning if p.grad is None or not p.grad.abs().sum() > 0] == []


def learned(draws: np.random.Generator) -> tuple[Encoder, MaskedAutoencoder]:
    model = cube_model("dinov2", image_size=8, patch_size=4, hidden_size=64, num_attention_heads=4)
    as_fresh(model)
    objective = objective_of(model, normalise=None, width=64, depth=1, heads=4, hides="bands")
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss_of(objective, model, masked(cubes(32, 8), 4, draws)).backward()
        optimizer.step()
    return model, objective


@pytest.mark.pitfall("C33", "K18")
def test_bands_are_told_better_than_by_lines_between_their_neighbours_and_only_in_their_order() -> None:
    draws = np.random.default_rng(0)
    model, objective = learned(draws)
    images = cubes(64, 8)
    batch, mixed = masked(images, 4, draws), masked(images[:, torch.randperm(BANDS)], 4, draws)
    with torch.no_grad():
        error, in_disorder = (loss_of(objective, model, one).item() for one in (batch, mixed))
    means, lines = [], []
    for cube, hidden in zip(
        (batch.images["cube"].pixels.numpy() - 100) / 50, batch.band_mask["cube"].numpy(), strict=True
    ):
        visible = np.flatnonzero(~hidden)
        for r, c in np.ndindex(8, 8):
            line = np.interp(np.flatnonzero(hidden), visible, cube[visible, r, c])
            lines.append(((line - cube[hidden, r, c]) ** 2).mean())
            means.append((cube[hidden, r, c] ** 2).mean())
    assert error < 0.6 * min(np.mean(means), np.mean(lines))
    assert in_disorder > 2 * error
