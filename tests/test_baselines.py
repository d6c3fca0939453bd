"""The comparisons of the benchmark table: what they draw, what they see, and that they can learn."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import recipe_dict, toy_folder, toy_scene, write_raster, write_recipe

from vfmseg.geo.labels import IGNORE as LABELS_IGNORE
from vfmseg.metrics import IGNORE
from vfmseg.training.losses import IGNORE as LOSSES_IGNORE

SOURCE = Path(__file__).resolve().parents[1] / "benchmarks" / "baselines.py"
_spec = importlib.util.spec_from_file_location("baselines", SOURCE)
assert _spec is not None
assert _spec.loader is not None
baselines = sys.modules["baselines"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(baselines)


def tile(seed: int = 0, height: int = 32, width: int = 32, nodata_rows: int = 0) -> baselines.Tile:
    """A toy scene; its first column has no label, its first rows may hold nothing."""
    image, labels = toy_scene(seed, height, width)
    valid = np.ones((height, width), dtype=bool)
    valid[:nodata_rows] = False
    truth = labels.astype(np.int64)
    truth[:, 0] = IGNORE
    return baselines.Tile(np.where(valid, image, 0).astype(np.float32), valid, truth)


def test_unlabelled_is_the_same_number_in_every_room() -> None:
    assert IGNORE == LOSSES_IGNORE == LABELS_IGNORE


@pytest.mark.pitfall("P26")
def test_targets_drop_unlabelled_and_invalid_pixels() -> None:
    one = tile(nodata_rows=3)
    assert (one.targets[:3] == IGNORE).all()
    assert (one.targets[:, 0] == IGNORE).all()
    assert np.array_equal(one.targets[3:, 1:], one.labels[3:, 1:])


@pytest.mark.pitfall("C1")
def test_majority_takes_the_training_labels_only() -> None:
    train, test = tile(0), tile(1)
    test.labels[:] = 1  # what the test has most of does not matter
    seen = train.labels[train.labels != IGNORE]
    assert (seen == 0).mean() > 0.5
    confusion = baselines.majority([train], [test], 2)
    assert confusion.matrix.tolist() == [[0, 0], [32 * 32, 0]]


def test_neighbourhoods_equal_a_loop_over_a_reflected_image() -> None:
    image = np.random.default_rng(0).normal(size=(2, 6, 7)).astype(np.float32)
    pixels = np.array([[0, 0], [5, 6], [2, 3], [0, 6]])
    got = baselines.neighbourhoods(image, pixels)

    def reflected(i: int, size: int) -> int:
        return -i if i < 0 else 2 * size - 2 - i if i >= size else i

    for (row, col), values in zip(pixels, got, strict=True):
        want = [
            image[band, reflected(row + dy, 6), reflected(col + dx, 7)]
            for band in range(2)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        ]
        assert values.tolist() == want


def test_the_forest_draws_labelled_pixels_only_and_each_once() -> None:
    one = tile(nodata_rows=20)
    pixels = baselines.draw(one, 200, np.random.default_rng(0))
    assert len(pixels) == len({tuple(p) for p in pixels.tolist()}) == 200
    assert (one.targets[pixels[:, 0], pixels[:, 1]] != IGNORE).all()
    everything = baselines.draw(one, None, np.random.default_rng(0))
    assert len(everything) == (one.targets != IGNORE).sum()
    assert len(baselines.draw(one, 10**6, np.random.default_rng(0))) == len(everything)


def test_the_forest_learns_and_its_seed_fixes_it() -> None:
    train, test = [tile(i) for i in range(3)], [tile(9)]
    first, again, other = (baselines.forest(train, test, 2, seed, trees=10) for seed in (0, 0, 1))
    assert baselines.mean_iou(first) > 0.8
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, other.matrix)
    assert first.matrix.sum() == 32 * 31


@pytest.mark.pitfall("C43")
def test_crops_move_image_valid_and_labels_together() -> None:
    rows, cols = np.mgrid[:12, :20]
    code = (100 * rows + cols).astype(np.float32)
    one = baselines.Tile(code[None] + 1, np.ones((12, 20), dtype=bool), code.astype(np.int64))
    rng = np.random.default_rng(0)
    crops = [baselines.random_crop(one, 16, rng) for _ in range(40)]
    for crop in crops:
        assert crop.image.shape == (1, 16, 16)
        inside = crop.valid
        assert inside.sum() == 12 * 16
        assert np.array_equal(crop.image[0][inside] - 1, crop.labels[inside])
        assert (crop.labels[~inside] == IGNORE).all()
        assert (crop.image[0][~inside] == 0).all()
    assert len({c.labels.tobytes() for c in crops}) > 20  # places, turns and mirrors differ


@pytest.mark.pitfall("P26")
def test_the_unet_does_not_see_what_lies_under_invalid_pixels() -> None:
    one = tile(nodata_rows=10)
    model = baselines.UNet(*baselines.band_statistics([one]), 2, width=8)
    image, valid, _ = baselines.stacked([one])
    changed = torch.where(valid[:, None], image, 1000.0)
    assert torch.equal(model(image, valid), model(changed, valid))
    assert model(image[..., :13, :21], valid[..., :13, :21]).shape == (1, 2, 13, 21)
    mean = image[0][:, valid[0]].double().mean(dim=1)
    torch.testing.assert_close(model.mean.flatten().double(), mean)


def test_the_unet_learns_and_its_seed_fixes_it() -> None:
    train, val, test = [tile(i) for i in range(8)], [tile(20)], [tile(30, 35, 32)]
    first, again = (baselines.unet(train, val, test, 2, 3, steps=40, width=8) for _ in range(2))
    assert baselines.mean_iou(first.confusion) > 0.85
    assert torch.equal(first.confusion.matrix, again.confusion.matrix)
    assert first.steps == 40
    assert len(first.validation) == 2  # after 25 steps and at the end
    assert first.confusion.matrix.sum() == (test[0].targets != IGNORE).sum()


@pytest.mark.pitfall("C1")
def test_the_unet_keeps_the_weights_that_were_best_on_validation() -> None:
    """Labels are the wrong way round in the scene that chooses, so that more training makes the score there worse."""
    chooses = tile(20)
    known = chooses.labels != IGNORE
    chooses.labels[known] = 1 - chooses.labels[known]
    run = baselines.unet([tile(i) for i in range(4)], [chooses], [chooses], 2, 0, steps=60, width=8)
    assert len(run.validation) == 3
    assert run.validation[-1] < max(run.validation)
    assert baselines.mean_iou(run.confusion) == max(run.validation)


def test_a_time_budget_ends_the_training() -> None:
    run = baselines.unet([tile(0)], [tile(1)], [tile(2)], 2, 0, seconds=1.0, width=8)
    assert run.steps >= 1
    assert run.seconds < 20
    assert run.validation


def test_the_standard_unet_is_small() -> None:
    model = baselines.UNet(torch.zeros(3), torch.ones(3), 5)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert list(dict(model.named_buffers())) == ["mean", "std"]  # no running statistics


@pytest.mark.parametrize("baseline", ["majority", "forest", "unet"])
def test_the_command_scores_the_test_split_of_a_recipe(
    baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_dict(toy_folder(tmp_path / "data"), None, tmp_path / "out"))
    assert baselines.main([str(recipe), "seed=1", "--baseline", baseline, "--seeds", "0", "1", "--seconds", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["split"] == "test"
    assert [one["seed"] for one in printed["runs"]] == ([0] if baseline == "majority" else [0, 1])
    assert printed["miou"] == pytest.approx(np.mean([one["scores"]["miou"] for one in printed["runs"]]))
    assert all(0 < one["scores"]["pixels"] <= 64 * 64 for one in printed["runs"])
    assert baselines.main([str(tmp_path / "none.yaml"), "--baseline", baseline]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_large_scenes_are_cut_into_tiles_that_cover_each_pixel_once(tmp_path: Path) -> None:
    from vfmseg.data.from_files import scenes_from_files
    from vfmseg.geo.bands import Bands
    from vfmseg.geo.classes import LabelMap

    labels = np.random.default_rng(0).integers(0, 2, (530, 70)).astype(np.uint8)
    write_raster(tmp_path / "images" / "a.tif", np.stack([labels, labels]))
    write_raster(tmp_path / "labels" / "a.tif", labels)
    scenes = scenes_from_files(
        {"x": str(tmp_path / "images")}, str(tmp_path / "labels"), {"x": Bands()}, LabelMap((0, 1), 255), "data.train"
    )
    tiles = baselines.read_tiles(scenes, 64)
    assert sum(t.labels.size for t in tiles) == labels.size
    assert max(max(t.labels.shape) for t in tiles) <= 64
    assert sum(int((t.targets == 1).sum()) for t in tiles) == labels.sum()


@pytest.mark.parametrize("script", ["table", "scene", "labels", "faults", "pretraining", "few_labels"])
def test_the_tables_of_the_documentation_are_those_of_the_results(script: str) -> None:
    module = importlib.import_module(f"benchmarks.{script}")
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


@pytest.mark.pitfall("P62")
def test_the_demo_goes_to_a_folder_of_any_name(tmp_path: Path) -> None:
    from vfmseg.demo import demo_recipe

    for name in ("\U0001f30d", 'a "b" [c]', "d: e #f"):
        assert demo_recipe(tmp_path / name).output_dir == tmp_path / name / "run"


def test_the_demo_with_an_encoder_is_the_row_of_the_table(tmp_path: Path) -> None:
    from benchmarks import table
    from vfmseg.demo import demo_recipe
    from vfmseg.recipe import load_recipe

    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    row = load_recipe(table.recipe_of("demo"), table.row_changes("demo", "lora-fpn", str(tmp_path)))
    demo = demo_recipe(tmp_path / "out", str(tmp_path))
    assert row.model == demo.model
    assert row.train == demo.train
    assert row.data == demo.data
