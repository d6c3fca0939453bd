"""A few bands of a cube, drawn for each sample: which, when, as what values, and what is learned from it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import Encoder, encoder_of
from makers import in_two_sittings, pretrain_recipe, write_raster
from masked_models import as_fresh, batch_of, loss_of, objective_of, tiny
from torch import Tensor

from vfmseg.build.pretraining import masking_of, statistics_of
from vfmseg.build.unlabelled import band_draw_of, open_unlabelled, windows_of
from vfmseg.data.masks import random_mask
from vfmseg.data.sample import Batch
from vfmseg.data.unlabelled import UnlabelledWindows
from vfmseg.data.windows import Draw
from vfmseg.errors import RecipeError
from vfmseg.pretrain import pretrain
from vfmseg.training.objectives.mae import MaskedAutoencoder

BANDS, STEPS = 9, 300


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cubes whose band b holds 1000 b and something in -50 to 50, and some nodata in the middle."""
    folder, draws = tmp_path_factory.mktemp("draw"), np.random.default_rng(0)
    for number in range(2):
        cube = 1000 * np.arange(1, BANDS + 1)[:, None, None] + draws.uniform(-50, 50, (BANDS, 48, 48))
        cube[:, 20:24, 20:24] = -1
        write_raster(
            folder / "cube" / f"{number}.tif", cube.astype(np.float32), origin=(5e5 + 5e3 * number, 5e6), nodata=-1
        )
    return folder


def recipe_of(place: Path, output: Path, count: int = 3, seed: int = 0, **changes: Any) -> Any:
    data = {
        "modalities": {"cube": {}},
        "scenes": {"cube": f"{place}/cube/*.tif"},
        "tile": 32,
        "scale": [1.0, 1.0],
        "draw": {"cube": count},
        "samples_per_epoch": 8,
    }
    recipe = pretrain_recipe(place, output, **{"data": data, **changes})
    return recipe.model_copy(update={"seed": seed})


def windows(place: Path, tmp_path: Path, seed: int = 0) -> UnlabelledWindows:
    recipe = recipe_of(place, tmp_path / "run", seed=seed)
    opened = open_unlabelled(recipe.data, statistics_of(recipe))
    drawn = band_draw_of(recipe.data, opened.inputs)
    encoder = encoder_of(tiny("dinov2").backbone, 3)
    masking = masking_of(recipe.objectives.mae, encoder, recipe.data.tile, drawn.shown() if drawn else opened.inputs)
    return windows_of(recipe.data, opened, seed, None, masking, drawn)


@pytest.mark.pitfall("C26", "K17")
def test_bands_are_others_for_each_sample_and_epoch_and_the_same_again(place: Path, tmp_path: Path) -> None:
    source = windows(place, tmp_path)
    draws = [Draw(epoch, index) for epoch in range(40) for index in range(8)]
    found = [tuple(source.bands_of(draw)["cube"]) for draw in draws]
    assert all(len(set(bands)) == 3 and list(bands) == sorted(bands) for bands in found)
    assert len(set(found)) > 0.9 * math.comb(BANDS, 3)
    by_index = [{found[8 * epoch + index] for epoch in range(40)} for index in range(8)]
    by_epoch = [set(found[8 * epoch : 8 * epoch + 8]) for epoch in range(40)]
    assert min(map(len, by_index)) > 20
    assert min(map(len, by_epoch)) > 4
    often = Counter(band for bands in found for band in bands)
    expected, spread = len(draws) / 3, math.sqrt(len(draws) * 2 / 9)
    assert max(abs(often[band] - expected) for band in range(BANDS)) < 4 * spread
    again = windows(place, tmp_path)
    assert [again.bands_of(draw) for draw in draws] == [source.bands_of(draw) for draw in draws]
    other = windows(place, tmp_path, seed=1)
    assert [other.bands_of(draw) for draw in draws] != [source.bands_of(draw) for draw in draws]


@pytest.mark.pitfall("P57", "C5", "K17")
def test_a_sample_shows_the_bands_that_were_drawn_each_by_its_own_mean_and_std(place: Path, tmp_path: Path) -> None:
    source = windows(place, tmp_path)
    assert source.bands_drawn is not None
    (cube,) = source.bands_drawn.inputs
    assert cube.count == BANDS
    (taken,) = source.bands_drawn.shown()
    assert (taken.count, taken.mean, taken.std) == (3, (0.0,) * 3, (1.0,) * 3)
    invalid = 0
    for index in range(8):
        image = source[Draw(1, index)].images["cube"]
        assert image.pixels.shape == (3, 32, 32)
        assert (image.pixels[:, ~image.valid] == 0).all()
        invalid += int((~image.valid).sum())
        for pixels, band in zip(image.pixels, source.bands_of(Draw(1, index))["cube"], strict=True):
            stored = pixels[image.valid] * cube.std[band] + cube.mean[band]
            assert (stored - 1000 * (band + 1)).abs().max() < 51
        assert image.pixels[:, image.valid].std(dim=1).sub(1).abs().max() < 0.1
    assert invalid > 0
    filler = source[Draw(1, 0, filler=True)].images["cube"]
    assert filler.pixels.shape == (3, 32, 32)
    assert not filler.valid.any()


@pytest.mark.pitfall("P55", "K17")
def test_a_run_on_drawn_bands_goes_on_with_the_same_ones(place: Path, tmp_path: Path) -> None:
    """And what it makes is an encoder of three bands."""
    recipe = recipe_of(place, tmp_path / "one")
    pretrain(recipe)
    other = recipe.model_copy(update={"output_dir": tmp_path / "two"})
    in_two_sittings(other, run=pretrain)
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True)["tensors"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    record = json.loads((tmp_path / "one" / "best" / "encoder.json").read_text())
    assert record["input"]["cube"]["bands"] == BANDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draw": {"cub": 3}}, "data.draw.cub is not one of data.modalities; did you mean 'cube'?"),
        ({"draw": {"cube": 9}}, "data.draw.cube = 9 of the 9 bands of cube; expected fewer"),
        ({"modalities": {"cube": {"bands": [1, 2, 3]}}}, "data.draw.cube = 3 must be below the 3 bands"),
        (
            {"modalities": {"cube": {"groups": [[1, 2, 3, 4], [5, 6, 7, 8, 9]]}}},
            "modalities.cube.groups divides them; drop one",
        ),
        ({"modalities": {"cube": {"normalize": "encoder"}}}, "drop modalities.cube.normalize"),
    ],
)
def test_what_does_not_fit_is_told(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = {
        "modalities": {"cube": {}},
        "scenes": {"cube": f"{place}/cube/*.tif"},
        "tile": 32,
        "draw": {"cube": 3},
        **changes,
    }
    with pytest.raises(RecipeError) as caught:
        pretrain(pretrain_recipe(place, tmp_path / "run", data=data))
    assert message in str(caught.value)


def test_a_probe_has_no_drawn_bands(place: Path, tmp_path: Path) -> None:
    split = {"cube": f"{place}/cube/0.tif", "labels": f"{place}/cube/0.tif"}
    other = {"cube": f"{place}/cube/1.tif", "labels": f"{place}/cube/1.tif"}
    probe = {"sets": {"some": {"classes": {0: "a", 1: "b"}, "train": split, "val": other}}}
    with pytest.raises(RecipeError, match=r"probe\.sets\.some has cube, of which the encoder takes 3 drawn bands"):
        recipe_of(place, tmp_path / "run", probe=probe)


def test_a_teacher_is_not_shown_drawn_bands(place: Path, tmp_path: Path) -> None:
    distill = {"teacher": {"name": "dinov2", "checkpoint": str(tmp_path)}}
    with pytest.raises(RecipeError, match=r"objectives\.distill has a teacher .* any bands of cube; name three"):
        recipe_of(place, tmp_path / "run", objectives={"distill": distill})


def scenes(count: int) -> Tensor:
    """(count, BANDS, 16, 16): two rough fields, added or taken away, which the bands show more and less of."""
    fields = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    shares = torch.linspace(0, math.pi / 2, BANDS)
    mixed = torch.stack([shares.cos(), shares.sin()])
    return torch.einsum("nk,kb,khw->nbhw", torch.randn(count, 2).sign(), mixed, fields)


def batch_of_bands(images: Tensor, bands: np.ndarray, draws: np.random.Generator) -> Batch:
    """`bands` (B, 3) of each image, half of its patches hidden."""
    chosen = 100 + 50 * images[torch.arange(len(images))[:, None], torch.from_numpy(bands)]
    return batch_of(chosen, torch.from_numpy(np.stack([random_mask(4, 4, 8, draws) for _ in images])))


def learned(drawn: bool) -> tuple[Encoder, MaskedAutoencoder]:
    """Trained with three of the bands 1 to 5 and 9 of each sample, or always with the first three."""
    draws = np.random.default_rng(0)
    torch.manual_seed(0)
    model = tiny("dinov2", image_size=16, patch_size=4, hidden_size=64, num_attention_heads=4).train()
    as_fresh(model)
    objective = objective_of(model, normalise=None, width=64, depth=1, heads=4)
    optimizer = torch.optim.AdamW([*model.backbone.parameters(), *objective.parameters()], weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        bands = np.stack(
            [np.sort(draws.permutation([0, 1, 2, 3, 4, 8])[:3]) if drawn else np.arange(3) for _ in range(16)]
        )
        optimizer.zero_grad()
        loss_of(objective, model, batch_of_bands(scenes(16), bands, draws)).backward()
        optimizer.step()
    return model, objective


@pytest.mark.pitfall("K17")
def test_what_was_learned_of_drawn_bands_holds_for_others_better_than_of_fixed_ones() -> None:
    """Bands 6 to 8 were never seen by either."""
    draws = np.random.default_rng(1)
    batch = batch_of_bands(scenes(64), np.tile([5, 6, 7], (64, 1)), draws)
    with torch.no_grad():
        errors = {}
        for drawn in (True, False):
            with torch.enable_grad():
                model, objective = learned(drawn)
            errors[drawn] = loss_of(objective, model, batch).item()
    assert errors[True] < 0.6 * errors[False]
    assert errors[True] < 0.8  # of a variance of 1
