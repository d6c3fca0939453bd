"""The ground that fusions are compared on: what one modality can reach there, and that both together reach more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import fusion_cost, fusion_scenes
from benchmarks.fusion import ADAPTERS, FUSED, LINEAR_SUM
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter


def test_the_two_properties_of_a_constructed_scene_are_halves_that_know_nothing_of_each_other() -> None:
    labels = np.stack([fusion_scenes.scene(i, 224)[2] for i in range(40)])
    a, b = labels // 2, labels % 2
    assert abs(a.mean() - 0.5) < 1e-3
    assert abs(b.mean() - 0.5) < 1e-3
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06
    image, dem, one = fusion_scenes.scene(3)
    assert abs(image[:, one >= 2].mean() - image[:, one < 2].mean() - fusion_scenes.STEP) < 1
    assert abs(dem[one % 2 == 1].mean() - dem[one % 2 == 0].mean() - fusion_scenes.STEP) < 1
    assert abs(image[:, one % 2 == 1].mean() - image[:, one % 2 == 0].mean()) < 2  # the image shows no height


def test_a_shift_of_the_heights_is_the_one_that_was_asked_for() -> None:
    _, dem, labels = fusion_scenes.scene(0, shift=5)
    high = labels[:-5, :-5] % 2 == 1
    moved, still = dem[5:, 5:], dem[:-5, :-5]
    assert moved[high].mean() - moved[~high].mean() > still[high].mean() - still[~high].mean() + 1


def test_no_guess_of_the_unseen_property_reaches_more_than_the_ceiling() -> None:
    """The mean IoU of who knows a, and says b of a share q of the pixels: largest at one half, where it is 1/3."""
    shares = np.linspace(0, 1, 101)
    found = (shares / (1 + shares) + (1 - shares) / (2 - shares)) / 2
    assert found.max() == pytest.approx(fusion_scenes.CEILING)
    assert shares[found.argmax()] == pytest.approx(0.5)
    draws = np.random.default_rng(0)
    a, b, guess = draws.integers(0, 2, (3, 400_000))
    truth, said = 2 * a + b, 2 * a + guess
    ious = [((truth == k) & (said == k)).sum() / ((truth == k) | (said == k)).sum() for k in range(4)]
    assert np.mean(ious) == pytest.approx(fusion_scenes.CEILING, abs=0.005)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constructed")
    fusion_scenes.save_encoder(folder / "encoder")
    return fusion_scenes.write_scenes(folder, {"train": 24, "val": 6, "test": 8})


def reached(place: Path, run: Path, names: tuple[str, ...], change: dict[str, Any]) -> float:
    """Test mIoU of a recipe on the constructed scenes."""
    recipe: Any = fusion_scenes.recipe(place, place / "encoder", run)
    for name in {"image", "dem"} - set(names):
        del recipe["data"]["modalities"][name]
        for split in ("train", "val", "test"):
            del recipe["data"][split][name]
    recipe["model"] |= change
    run.parent.mkdir(parents=True, exist_ok=True)
    (run.parent / f"{run.name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    finetune(load_recipe(run.parent / f"{run.name}.yaml"))
    segmenter = Segmenter.from_pretrained(run / "best")
    return float(segmenter.evaluate(segmenter.recipe, "test")["miou"])


def test_with_one_modality_the_ceiling_holds_and_with_both_it_is_passed(place: Path, tmp_path: Path) -> None:
    alone = reached(place, tmp_path / "alone", ("image",), {})
    assert 0.2 < alone < fusion_scenes.CEILING + 0.03
    both = reached(place, tmp_path / "both", ("image", "dem"), {"fusion": FUSED["linear, concat"]})
    assert both > fusion_scenes.CEILING + 0.2


EXCEEDING: dict[str, dict[str, Any]] = {
    row: {"fusion": section}
    for row, section in FUSED.items()
    if section["name"] in ("linear", "decision", "attention", "se", "gated", "stack")
} | {one["name"]: {"adapter": one, "fusion": LINEAR_SUM} for one in ADAPTERS if one["name"] != "lora"}


@pytest.mark.slow
@pytest.mark.parametrize("row", EXCEEDING)
def test_every_form_passes_the_ceiling(place: Path, tmp_path: Path, row: str) -> None:
    assert reached(place, tmp_path / "run", ("image", "dem"), EXCEEDING[row]) > fusion_scenes.CEILING + 0.05


@pytest.mark.parametrize("row", [row for row in FUSED if row != "stack"])
def test_two_modalities_cost_at_most_2_05_times_one(row: str) -> None:
    """Operations of a ViT-S/14 with an fpn decoder; the encoder's weights are there once."""
    one, two = fusion_cost.counted({}, 1), fusion_cost.counted({"fusion": FUSED[row]}, 2)
    assert two["gflop"] <= 2.05 * one["gflop"]
    assert two["gflop"] > 1.8 * one["gflop"]
    assert two["encoder"] == one["encoder"]
    assert two["fusion"] < 0.06 * one["encoder"]
