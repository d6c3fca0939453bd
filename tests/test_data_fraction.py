"""`data.fraction`: some of the labelled tiles, as if no others had been labelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from makers import recipe_dict, toy_folder

from vfmseg.build.data import open_split, open_training
from vfmseg.data.dataset import TrainingWindows
from vfmseg.data.fraction import PartOfScene, some_of, tiles_of
from vfmseg.data.scene import Scenes
from vfmseg.data.windows import Draw
from vfmseg.errors import RecipeError
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Window
from vfmseg.recipe import Recipe, parse_recipe


def fraction_recipe(folder: Path, fraction: float, seed: int = 0, tile: int = 32) -> Recipe:
    content = recipe_dict(folder, None, folder / "run")
    content["data"] |= {"fraction": fraction, "tile": tile}
    return parse_recipe(content | {"seed": seed}, folder, "toy.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 100 x 70 px: with tiles of 32 px three rows and two columns each."""
    return toy_folder(tmp_path_factory.mktemp("fraction"), {"train": 4, "val": 1, "test": 1}, 100, 70)


def drawn(place: Path, fraction: float, seed: int = 0) -> set[str]:
    return {scene.name for scene in open_split(fraction_recipe(place, fraction, seed), "train")}


def test_tiles_cover_each_pixel_once_and_are_no_smaller_than_a_tile(place: Path) -> None:
    (scene, *_) = open_split(fraction_recipe(place, 1.0), "train")
    covered = np.zeros((100, 70), dtype=int)
    for window in tiles_of(scene.grid, 32):
        assert min(window.shape) >= 32
        covered[window.rows, window.cols] += 1
    assert (covered == 1).all()
    assert tiles_of(scene.grid, 80) == [Window(0, 0, 100, 70)]  # of 70 columns no two tiles can be made


def test_so_many_tiles_are_drawn_by_the_seed_and_more_of_them_hold_the_fewer(place: Path) -> None:
    few, more = drawn(place, 0.25), drawn(place, 0.5)
    assert (len(few), len(more), len(drawn(place, 0.001))) == (6, 12, 1)  # of 24
    assert few < more
    assert drawn(place, 0.25) == few
    assert drawn(place, 0.25, seed=1) != few
    assert len(open_split(fraction_recipe(place, 1.0), "train")) == 4  # all of them: whole scenes, as they were


def test_a_tile_shows_its_part_of_the_scene_and_nothing_beyond(place: Path) -> None:
    (scene, *_) = open_split(fraction_recipe(place, 1.0), "train")
    part = PartOfScene(scene, Window(33, 35, 34, 35))
    reach = Window(-4, 3, 40, 36)  # four rows above it, and beyond its 35 columns
    found, labels = part.read(reach)["rgb"], part.read_labels(reach)
    whole, truth = scene.read(Window(29, 38, 40, 36))["rgb"], scene.read_labels(Window(29, 38, 40, 36))
    inside = np.zeros((40, 36), dtype=bool)
    inside[4:38, :32] = True
    assert whole.valid.sum() > inside.sum()  # there is something beyond, or this test says nothing
    assert (found.valid == inside).all()
    assert (found.pixels[:, ~inside] == 0).all()
    assert (found.pixels[:, inside] == whole.pixels[:, inside]).all()
    assert (labels[inside] == truth[inside]).all()
    assert (labels[~inside] == IGNORE).all()
    assert part.grid.point(0, 0) == scene.grid.point(33, 35)


def test_windows_to_learn_from_stay_inside_the_drawn_tiles(place: Path) -> None:
    recipe = fraction_recipe(place, 0.1)
    parts = open_split(recipe, "train")
    assert len(parts) == 2
    seen = [part.read(Window(0, 0, part.grid.height, part.grid.width))["rgb"].pixels for part in parts]
    windows = TrainingWindows(parts, 32, 0, None, "all", samples_per_epoch=8)
    for index in range(8):
        pixels = windows[Draw(3, index)].images["rgb"].pixels.numpy()
        assert any(_within(pixels, one) for one in seen)


def _within(pixels: np.ndarray, whole: np.ndarray) -> bool:
    rows, columns = whole.shape[1] - 31, whole.shape[2] - 31
    return any((whole[:, r : r + 32, c : c + 32] == pixels).all() for r in range(rows) for c in range(columns))


def test_each_source_gives_its_share_and_one_tile_at_least(place: Path) -> None:
    scenes = open_split(fraction_recipe(place, 1.0), "train")
    found, count, total = some_of(Scenes([scenes[:3], scenes[3:]]), 0.1, 32, 0)
    assert (found.per_source, count, total) == ((2, 1), 3, 24)
    assert found[2].name.startswith(scenes[3].name)


def test_only_training_has_fewer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = open_training(fraction_recipe(place, 0.45))
    assert (len(found["train"]), len(found["val"])) == (11, 1)
    assert "data.fraction: 11 of 24 tiles of data.train, drawn by the seed 0" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(place: Path, fraction: float) -> None:
    with pytest.raises(RecipeError, match=r"data\.fraction"):
        fraction_recipe(place, fraction)
