"""A masked autoencoder learns what can be told from visible patches, and nothing where nothing can."""

from __future__ import annotations

import math

import numpy as np
import torch
from encoder_models import Encoder
from masked_models import as_fresh, batch_of, loss_of, objective_of, tiny
from torch import Tensor

from vfmseg.data.masks import random_mask
from vfmseg.data.sample import Batch
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.objectives.patches import to_patches

STEPS = 240


def textures(count: int) -> Tensor:
    """(count, 1, 32, 32): two rough fields, each added or taken away: four images, seen in any patch of 8 pixels."""
    fields = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
    return 100 + 50 * torch.einsum("nk,khw->nhw", torch.randn(count, 2).sign(), fields)[:, None] / math.sqrt(2)


def masked(images: Tensor, draws: np.random.Generator) -> Batch:
    return batch_of(images, torch.from_numpy(np.stack([random_mask(4, 4, 8, draws) for _ in images])))


def learned(draws: np.random.Generator) -> tuple[Encoder, MaskedAutoencoder]:
    model = tiny("dinov2", bands=1, image_size=32, patch_size=8, hidden_size=64, num_attention_heads=4).train()
    as_fresh(model)
    objective = objective_of(model, normalise=None, width=64, depth=1, heads=4)
    optimizer = torch.optim.AdamW([*model.backbone.parameters(), *objective.parameters()], weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss_of(objective, model, masked(textures(16), draws)).backward()
        optimizer.step()
    return model, objective


def simple_guesses(batch: Batch) -> dict[str, float]:
    """{guess: mean squared error on hidden patches}, of normalised pixels."""
    assert batch.mask is not None
    cut = to_patches((batch.images["b0"].pixels - 100) / 50, 8)[..., 0].unflatten(1, (4, 4)).numpy()
    errors: dict[str, list[float]] = {"mean of all": [], "mean of visible": [], "nearest visible": []}
    for patches, hidden in zip(cut, batch.mask.numpy(), strict=True):
        visible = np.argwhere(~hidden)
        for place in np.argwhere(hidden):
            nearest = visible[((visible - place) ** 2).sum(axis=1).argmin()]
            guesses = (0.0, patches[~hidden].mean(), patches[tuple(nearest)])
            for name, guess in zip(errors, guesses, strict=True):
                errors[name].append(float(((patches[tuple(place)] - guess) ** 2).mean()))
    return {name: float(np.mean(values)) for name, values in errors.items()}


def test_it_beats_simple_guesses_where_there_is_something_to_see_and_not_on_noise() -> None:
    draws = np.random.default_rng(0)
    model, objective = learned(draws)
    batch = masked(textures(64), draws)
    with torch.no_grad():
        error = loss_of(objective, model, batch).item()
        noise = loss_of(objective, model, masked(100 + 50 * torch.randn(64, 1, 32, 32), draws)).item()
    assert error < 0.6 * min(simple_guesses(batch).values())
    assert noise > 0.95  # of a variance of 1
