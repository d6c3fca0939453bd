"""Co-registration: how far a modality lies beside the labels is found in training, and it is moved back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import fusion_scenes
from vfmseg.data.augment import Augment
from vfmseg.data.image import Image
from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.finetune import finetune
from vfmseg.fusion.coregister import Coregister, moved_by
from vfmseg.geo.classes import IGNORE
from vfmseg.inference.contracts import Tiles
from vfmseg.inference.views import averaged
from vfmseg.inference.votes import voter
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.training.objectives.coregistration import Coregistration, fits, in_scene


def image(seed: int = 0, height: int = 9, width: int = 12) -> Image:
    draws = torch.Generator().manual_seed(seed)
    return Image(torch.randn(2, height, width, generator=draws), torch.rand(height, width, generator=draws) > 0.2)


def test_a_move_by_whole_pixels_is_a_change_of_place() -> None:
    one = image()
    moved = moved_by(one, torch.tensor([2.0, -3.0]))
    assert torch.equal(moved.valid[:7, 3:], one.valid[2:, :9])
    assert torch.equal(moved.pixels[:, :7, 3:], torch.where(one.valid[2:, :9], one.pixels[:, 2:, :9], 0.0))
    assert not moved.valid[7:].any()
    assert not moved.valid[:, :3].any()
    assert (moved.pixels[:, ~moved.valid] == 0).all()
    still = moved_by(one, torch.zeros(2))
    assert torch.equal(still.valid, one.valid)
    assert torch.equal(still.pixels, torch.where(one.valid, one.pixels, 0.0))


@pytest.mark.pitfall("P26", "C44")
def test_a_move_by_parts_of_a_pixel_is_bilinear_and_spreads_no_nodata() -> None:
    rows, cols = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    plane = Image((3 * rows + cols)[None], torch.ones(9, 12, dtype=torch.bool))
    plane.valid[4, 4] = False
    plane.pixels[:, 4, 4] = torch.nan
    moved = moved_by(plane, torch.tensor([0.25, 1.5]))
    expected = plane.pixels[0].nan_to_num(0) * 0 + 3 * (rows + 0.25) + cols + 1.5
    torch.testing.assert_close(moved.pixels[0][moved.valid], expected[moved.valid])
    assert moved.valid.sum() == 8 * 10 - 4
    assert not moved.valid[3:5, 2:4].any()


@pytest.mark.pitfall("C43")
@pytest.mark.parametrize("seed", range(12))
def test_a_turned_window_is_moved_in_its_own_directions(seed: int) -> None:
    """Augmented and then moved is moved and then augmented: quarter turns, mirrors, turns and zooms."""
    rows, cols = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    smooth = torch.sin(rows / 6) + torch.cos(cols / 5) + torch.sin((rows + 2 * cols) / 11)
    valid = torch.ones(64, 64, dtype=torch.bool)
    shift = torch.tensor([3.0, -2.0])
    resampled = seed % 2 == 1
    augment = Augment(scale=(0.8, 1.25), rotate=25.0) if resampled else Augment()
    labels = torch.zeros(64, 64, dtype=torch.int64)
    plain = augment(Sample({"dem": Image(smooth[None], valid)}, labels), seed)
    before = augment(Sample({"dem": moved_by(Image(smooth[None], valid), shift)}, labels), seed)
    coregister = Coregister(("dem",), 8.0)
    with torch.no_grad():
        coregister.wanted["of_dem"].copy_(torch.atanh(shift / 8) / 10)
        batch = collate([plain])
        after = coregister(batch.images, batch.frames)["dem"]
    both = after.valid[0] & before.images["dem"].valid
    assert both.float().mean() > 0.4
    difference = (after.pixels[0] - before.images["dem"].pixels).abs()[0][both]
    # interpolated twice in another order: at the edge of what is valid values are off, on average hardly
    assert difference.mean() < (0.02 if resampled else 1e-6)
    assert (plain.images["dem"].pixels - before.images["dem"].pixels).abs()[0][both].max() > 0.3


@pytest.mark.pitfall("C43")
@pytest.mark.parametrize(("tta", "scales"), [("flips", (1.0,)), ("d4", (1.0,)), ("none", (2.0,)), ("d4", (1.0, 2.0))])
def test_views_of_a_tile_are_moved_in_their_own_directions(tta: str, scales: tuple[float, ...]) -> None:
    """A view turned or enlarged is moved as the tile that it shows, so the mean of the views is what was moved."""
    coregister = Coregister(("dem",), 8.0)
    with torch.no_grad():
        coregister.wanted["of_dem"].copy_(torch.atanh(torch.tensor([3.0, -2.0]) / 8) / 10)
    rows, cols = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    smooth = torch.stack([torch.sin(rows / 6) + torch.cos(cols / 5), torch.sin((rows + 2 * cols) / 11)])
    one = Image(smooth[None], torch.ones(1, 32, 32, dtype=torch.bool))

    def pixels(images: Mapping[str, Image], frames: torch.Tensor | None) -> torch.Tensor:
        return coregister(images, frames)["dem"].pixels

    vote = averaged(voter(pixels, torch.device("cpu"), torch.float32), tta, scales)
    answer = vote(Tiles({"dem": one}, (None,)))
    expected = moved_by(one, torch.tensor([3.0, -2.0])).pixels
    inside = (..., slice(0, 26), slice(4, 32))
    assert (answer - expected)[inside].abs().max() < (1e-5 if scales == (1.0,) else 0.15)
    assert (answer - smooth)[inside].abs().max() > 0.5


def test_half_precision_rounds_no_shift() -> None:
    coregister = Coregister(("dem",), 256.0)
    with torch.no_grad():
        coregister.wanted["of_dem"].copy_(torch.atanh(torch.tensor([200.7, -101.0]) / 256) / 10)
    ramp = Image(torch.arange(400.0).expand(1, 1, 400, 400).clone(), torch.ones(1, 400, 400, dtype=torch.bool))
    quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = coregister({"dem": ramp}, quarter)["dem"]
    assert (moved.pixels - ramp.pixels - 200.7)[0, 0][moved.valid[0]].abs().max() < 0.01


def test_the_fit_of_each_shift_is_the_mean_over_pixels_that_have_a_partner() -> None:
    draws = torch.Generator().manual_seed(0)
    logs = torch.randn(2, 3, 7, 9, generator=draws).log_softmax(dim=1)
    valid = torch.rand(2, 7, 9, generator=draws) > 0.3
    labels = torch.randint(-1, 3, (2, 7, 9), generator=draws)
    assert (labels == IGNORE).any()
    sums, partners = fits(torch.where(valid[:, None], logs, torch.nan), valid, labels, 3)
    found = sums / partners
    for b in range(2):
        for down in range(-3, 4):
            for right in range(-3, 4):
                values = [
                    logs[b, labels[b, r, c], r + down, c + right]
                    for r in range(7)
                    for c in range(9)
                    if labels[b, r, c] >= 0
                    and 0 <= r + down < 7
                    and 0 <= c + right < 9
                    and valid[b, r + down, c + right]
                ]
                expected = torch.stack(values).mean()
                torch.testing.assert_close(found[b, 3 + down, 3 + right], expected, atol=1e-4, rtol=1e-4)


def test_the_fit_of_a_turned_window_is_told_in_the_directions_of_the_scene() -> None:
    fit = torch.zeros(1, 7, 7)
    fit[0, 3 + 2, 3 + 1] = 1.0  # in the window: two down, one to the right
    quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])  # a way (r, c) of the scene is (-c, r) in the window
    turned = in_scene(fit, quarter)
    assert turned.argmax().item() == (3 + 1) * 7 + (3 - 2)
    assert turned.max().item() == pytest.approx(1.0)


def _searched(shift: int, noise: bool = False, labelled: int = 0) -> torch.Tensor:
    """The shift that the objective alone finds on constructed scenes, in augmented windows.

    labelled: how many columns have labels, from the right; 0: all.
    """
    torch.manual_seed(0)
    objective = Coregistration({"dem": 1}, 4, 9.0).train()
    coregister = Coregister(("dem",), 9.0)
    network = _Heights(coregister)
    optimizer = torch.optim.AdamW([*objective.parameters(), *coregister.parameters()], lr=0.005)
    augment = Augment()
    scenes = [fusion_scenes.scene(i, 96, shift=shift) for i in range(8)]
    for step in range(60):
        samples = []
        for i in range(4):
            _, dem, labels = scenes[(4 * step + i) % 8]
            heights = torch.from_numpy((dem - 306) / 13)[None]
            if noise:
                heights = torch.randn(heights.shape)
            valid = torch.ones(96, 96, dtype=torch.bool)
            truth = torch.from_numpy(labels.astype(np.int64))
            truth[:, : -labelled or 0] = IGNORE
            sample = Sample({"dem": Image(heights, valid)}, truth)
            samples.append(augment(sample, 100 * step + i))
        terms = objective.terms(network, collate(samples))
        optimizer.zero_grad()
        torch.stack([term.sum / 4 for term in terms.values()]).sum().backward()
        optimizer.step()
    return coregister.shift("dem").detach()


class _Heights(torch.nn.Module):
    """As much of a network as the objective asks for."""

    def __init__(self, coregister: Coregister) -> None:
        super().__init__()
        self.coregister = coregister

    def stem(self, name: str) -> Any:
        return self

    def normalised(self, images: dict[str, Image]) -> torch.Tensor:
        return images["dem"].pixels


def test_a_planted_shift_is_found_within_a_pixel_and_none_stays_none() -> None:
    assert (_searched(5) - 5).abs().max() < 1
    assert _searched(0).abs().max() < 0.5


def test_nothing_is_moved_off_the_labels() -> None:
    """Of a shift that leaves no labelled pixel a partner nothing is known: it is no perfect one."""
    assert _searched(0, labelled=6).abs().max() < 1


def test_a_modality_that_says_nothing_of_the_classes_is_not_moved() -> None:
    assert _searched(5, noise=True).abs().max() < 1


def test_a_batch_without_labels_moves_nothing_and_leaves_no_parameter_without_a_gradient() -> None:
    objective, coregister = Coregistration({"dem": 1}, 4, 9.0).train(), Coregister(("dem",), 9.0)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    batch = Batch({"dem": Image(torch.randn(2, 1, 32, 32), valid)}, torch.full((2, 32, 32), IGNORE))
    assert objective.counts(batch)["samples"] == 0
    terms = objective.terms(_Heights(coregister), batch)
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    for parameter in (*objective.parameters(), *coregister.parameters()):
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


@pytest.mark.slow
def test_a_score_that_a_shift_had_spoilt_is_restored(tmp_path: Path) -> None:
    """From a recipe: 5 px beside its place the elevation helps less; found again, it helps as before."""
    fusion_scenes.save_encoder(tmp_path / "encoder")
    scores = {}
    for name, shift, moved in (("straight", 0, False), ("shifted", 5, False), ("found", 5, True)):
        folder = fusion_scenes.write_scenes(tmp_path / name, {"train": 24, "val": 6, "test": 8}, shift=shift)
        recipe: Any = fusion_scenes.recipe(folder, tmp_path / "encoder", tmp_path / f"run_{name}")
        recipe["model"]["fusion"] = {"name": "linear", "op": "concat"}
        if moved:
            recipe["model"]["fusion"]["coregister"] = {"max_shift": 8}
        recipe["train"]["epochs"] = 12
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        finetune(load_recipe(tmp_path / f"{name}.yaml"))
        segmenter = Segmenter.from_pretrained(tmp_path / f"run_{name}" / "best")
        scores[name] = segmenter.evaluate(segmenter.recipe, "test")["miou"]
        if moved:
            coregister = segmenter.model.coregister
            assert coregister is not None
            assert (coregister.shift("dem") - 5).abs().max() < 1
    assert scores["shifted"] < scores["straight"] - 0.1
    assert scores["found"] > scores["straight"] - 0.06
