"""A masked autoencoder learns what can be told from what is visible, and nothing where nothing can; it is of use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import Encoder
from masked_models import as_fresh, batch_of, loss_of, objective_of, tiny
from scipy.interpolate import griddata
from torch import Tensor
from torch.nn import functional as F

from vfmseg.data.masks import incomplete_mask, random_mask
from vfmseg.data.sample import Batch
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.objectives.patches import to_patches
from vfmseg.training.readout import effective_rank, linear

Images = Callable[[int], Tensor]
"""(a number of images) -> (so many, 1, 32, 32) pixels."""


def rough() -> Tensor:
    """(2, 32, 32): two fields in which a pixel says nothing of the next one."""
    return torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))


def smooth() -> Tensor:
    """(2, 32, 32): two fields that change over two or three pixels."""
    blurred = F.avg_pool2d(F.pad(rough()[None], (1, 1, 1, 1), "circular"), 3, 1)[0]
    return blurred / blurred.std(dim=(1, 2), keepdim=True)


def textures(count: int, fields: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """(count, 1, 32, 32) and which of four (count): two fields, each added or taken away, seen in any patch of 8."""
    signs = torch.randn(count, 2).sign()
    images = torch.einsum("nk,khw->nhw", signs, fields)[:, None] / math.sqrt(2)
    return 100 + 50 * (images + noise * torch.randn_like(images)), 2 * (signs[:, 0] > 0) + 1 * (signs[:, 1] > 0)


def pure_noise(count: int) -> Tensor:
    return 100 + 50 * torch.randn(count, 1, 32, 32)


def masked(images: Tensor, draws: np.random.Generator, incomplete: bool = False) -> Batch:
    masks = [random_mask(4, 4, 8, draws) for _ in images]
    batch = batch_of(images, torch.from_numpy(np.stack(masks)))
    if incomplete:
        pixels = [incomplete_mask(mask, 8, 0.6, draws) for mask in masks]
        batch.pixel_mask = torch.from_numpy(np.stack(pixels))
    return batch


def learned(
    images: Images, draws: np.random.Generator, steps: int, width: int = 64, incomplete: bool = False,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[Encoder, MaskedAutoencoder]:  # fmt: skip
    """After `steps` of 16 images, each batch changed by `change`."""
    model = tiny("dinov2", bands=1, image_size=32, patch_size=8, hidden_size=width, num_attention_heads=4).train()
    as_fresh(model)
    hides: Any = "pixels" if incomplete else "patches"
    objective = objective_of(model, normalise=None, width=width, depth=1, heads=4, hides=hides)
    optimizer = torch.optim.AdamW([*model.backbone.parameters(), *objective.parameters()], weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_of(objective, model, change(masked(images(16), draws, incomplete))).backward()
        optimizer.step()
    return model, objective


def simple_guesses(batch: Batch) -> dict[str, float]:
    """{guess: mean squared error on hidden patches}, of normalised pixels."""
    assert batch.mask is not None
    whole = ((batch.images["b0"].pixels - 100) / 50)[:, 0]
    cut = to_patches(whole[:, None], 8)[..., 0].unflatten(1, (4, 4)).numpy()
    errors: dict[str, list[float]] = {"mean of all": [], "mean of visible": [], "nearest visible": []}
    for patches, hidden in zip(cut, batch.mask.numpy(), strict=True):
        visible = np.argwhere(~hidden)
        for place in np.argwhere(hidden):
            nearest = visible[((visible - place) ** 2).sum(axis=1).argmin()]
            guesses = (0.0, patches[~hidden].mean(), patches[tuple(nearest)])
            for name, guess in zip(errors, guesses, strict=True):
                errors[name].append(float(((patches[tuple(place)] - guess) ** 2).mean()))
    pixels = batch.mask.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    filled = {way: [filling(*one, way) for one in zip(whole.numpy(), pixels, strict=True)] for way in FILLINGS}
    return {name: float(np.mean(values)) for name, values in {**errors, **filled}.items()}


FILLINGS = ("nearest", "linear")
"""By the nearest visible pixel, and linearly between those around."""


def filling(image: np.ndarray, hidden: np.ndarray, way: str) -> float:
    """Mean squared error of hidden pixels that are filled from visible ones, outside of all by the nearest."""
    known, asked = np.argwhere(~hidden), np.argwhere(hidden)
    guess = griddata(known, image[~hidden], asked, way)
    if np.isnan(guess).any():
        guess = np.where(np.isnan(guess), griddata(known, image[~hidden], asked, "nearest"), guess)
    return float(((guess - image[hidden]) ** 2).mean())


@pytest.mark.pitfall("K7")
def test_it_beats_simple_guesses_where_there_is_something_to_see() -> None:
    draws = np.random.default_rng(0)
    model, objective = learned(lambda count: textures(count, rough())[0], draws, 240)
    batch = masked(textures(64, rough())[0], draws)
    with torch.no_grad():
        error = loss_of(objective, model, batch).item()
        noise = loss_of(objective, model, masked(pure_noise(64), draws)).item()
    assert error < 0.6 * min(simple_guesses(batch).values())
    assert noise > 0.95  # of a variance of 1


@pytest.mark.parametrize("incomplete", [False, True])
@pytest.mark.pitfall("K7", "K12", "P64")
def test_of_pure_noise_nothing_is_learned(incomplete: bool) -> None:
    """What sees its target learns to copy it: 0.4 with all patches shown, after as many steps."""
    draws = np.random.default_rng(0)
    model, objective = learned(pure_noise, draws, 150, incomplete=incomplete)
    batch = masked(pure_noise(64), draws, incomplete)
    with torch.no_grad():
        error = loss_of(objective, model, batch).item()
    hidden = batch.mask.repeat_interleave(8, 1).repeat_interleave(8, 2)  # type: ignore[union-attr]
    hidden = hidden if batch.pixel_mask is None else batch.pixel_mask
    assert error > 0.99 * float((((batch.images["b0"].pixels[:, 0] - 100) / 50)[hidden] ** 2).mean())


@pytest.mark.pitfall("K12")
def test_hidden_pixels_among_visible_ones_are_told_better_than_by_filling_them() -> None:
    """Where neighbours tell a lot, so that filling is a rival: better than by the nearest, and than between them."""
    draws = np.random.default_rng(0)
    model, objective = learned(lambda count: textures(count, smooth())[0], draws, 240, incomplete=True)
    batch = masked(textures(64, smooth())[0], draws, incomplete=True)
    with torch.no_grad():
        error = loss_of(objective, model, batch).item()
    assert batch.pixel_mask is not None
    pixels = ((batch.images["b0"].pixels - 100) / 50)[:, 0].numpy()
    rivals = [
        np.mean([filling(*one, way) for one in zip(pixels, batch.pixel_mask.numpy(), strict=True)]) for way in FILLINGS
    ]
    assert max(rivals) < 0.8  # of a variance of 1
    assert error < 0.8 * min(rivals)
    assert objective.mask_token is None
    assert objective.decoder.mask_token is None


def of_another(batch: Batch) -> Batch:
    """What is hidden is of the next image: its targets are shuffled, and what is visible stays."""
    assert batch.mask is not None
    image = batch.images["b0"]
    hidden = batch.mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    pixels = torch.where(hidden, image.pixels.roll(1, 0), image.pixels)
    return replace(batch, images={"b0": replace(image, pixels=pixels)})


def features_of(model: Encoder, images: Tensor) -> Tensor:
    """(N, width): the mean of the last map of each."""
    with torch.no_grad():
        return model.eval().encode(batch_of(images, torch.zeros(0)).images)["image"].maps[-1].mean(dim=(2, 3))


@pytest.mark.pitfall("K19", "K20")
def test_what_was_pretrained_reads_few_labels_better_than_random_weights_and_not_with_shuffled_targets() -> None:
    """Four textures under much noise, 120 labels; means of three encoders each, whose spread is known."""

    def noisy(count: int) -> tuple[Tensor, Tensor]:
        return textures(count, rough(), noise=2.5)

    (few, labels), (many, truth) = noisy(120), noisy(400)
    found: dict[str, list[float]] = {}
    for kind, steps in (("random", 0), ("shuffled", 150), ("pretrained", 150)):
        for seed in range(3):
            torch.manual_seed(seed)
            change = of_another if kind == "shuffled" else lambda batch: batch
            model, _ = learned(lambda n: noisy(n)[0], np.random.default_rng(seed), steps, width=32, change=change)
            train, val = features_of(model, few), features_of(model, many)
            found.setdefault(kind, []).append(float((linear(train, labels, val, 4) == truth).float().mean()))
            assert effective_rank(val) > 8, "the features have collapsed"
            assert val.var(dim=0).mean() > 1e-3
    spread = max(np.std(found[kind], ddof=1) for kind in ("random", "pretrained"))
    gain = np.mean(found["pretrained"]) - np.mean(found["random"])
    assert gain > 3 * spread
    assert np.mean(found["shuffled"]) - np.mean(found["random"]) < 0.25 * gain
