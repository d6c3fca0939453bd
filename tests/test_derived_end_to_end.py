"""Recipes with `derive`: trained, resumed, saved, loaded and labelled by, from files and arrays, whatever the cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import recipe_dict, save_encoder, sign, write_raster, write_recipe

from vfmseg.build.data import inputs_of, open_split
from vfmseg.errors import CheckpointError, DataError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.inference import job as jobs
from vfmseg.inference.output import Output
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter

DERIVE = ["slope", "height_above_local"]
SCENES = {"train": (300.0, 900.0, 100.0, 600.0), "val": (2000.0,), "test": (3000.0,)}
"""Metres above the sea of the scenes of each split: none of the others is near those of training."""


def ground(seed: int, metres: float, height: int = 64, width: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture of noise (3, H, W), elevation (H, W) of a tilted plane with mounds of 40 m, and where those are."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mounds = np.zeros((height, width), dtype=bool)
    for _ in range(max(1, height * width // 1024)):
        cy, cx = random.uniform(4, (height - 4, width - 4))
        mounds |= (y - cy) ** 2 + (x - cx) ** 2 < 7**2
    dem = metres + 0.5 * y - 0.4 * x + 40.0 * mounds + random.normal(0, 0.5, (height, width))
    return random.integers(90, 110, (3, height, width), dtype=np.uint8), dem.astype(np.float32), mounds.astype(np.uint8)


def content_of(folder: Path, run: Path, dem: dict[str, Any]) -> dict[str, Any]:
    content = recipe_dict(folder / "data", folder / "encoder", run)
    content["data"]["modalities"] = {"rgb": {}, "dem": dem}
    for split in SCENES:
        content["data"][split]["dem"] = f"{folder}/data/{split}/dem/*.tif"
    content["train"] |= {"epochs": 6, "batch_size": 4}
    content["data"]["samples_per_epoch"] = 48
    return content


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, encoder/ and a finished run in run/: elevation of 5 m pixels below pictures of 10 m."""
    folder = tmp_path_factory.mktemp("place")
    for number, (split, scenes) in enumerate(SCENES.items()):
        for i, metres in enumerate(scenes):
            image, dem, labels = ground(10 * number + i, metres)
            fine = np.repeat(np.repeat(dem, 2, 0), 2, 1)
            write_raster(folder / "data" / split / "images" / f"s{i}_{split}.tif", image)
            write_raster(folder / "data" / split / "dem" / f"s{i}_{split}.tif", fine, pixel=5, nodata=-9999)
            write_raster(folder / "data" / split / "labels" / f"s{i}_{split}.tif", labels)
    save_encoder(folder / "encoder", "dinov2")
    content = content_of(folder, folder / "run", {"derive": DERIVE})
    finetune(load_recipe(write_recipe(folder / "recipe.yaml", content)))
    return folder


def test_mounds_are_found_whatever_the_height_above_the_sea(place: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    assert segmenter.evaluate(place / "recipe.yaml", "test")["miou"] > 0.6
    image, dem, _ = ground(99, 0.0)
    rgb = write_raster(tmp_path / "rgb.tif", image)  # an array beside it lies where it does
    low, high = (segmenter.predict({"rgb": str(rgb), "dem": one[None]}) for one in (dem, dem + 4096))
    assert (low == high).mean() > 0.999  # float32 keeps 0.0002 m less of what lies 4 km high
    assert 0.03 < low.mean() < 0.9
    # control: by its height alone no mound is told from a valley of another scene
    content = content_of(place, tmp_path / "run", {"derive": ["height"]})
    finetune(load_recipe(write_recipe(tmp_path / "recipe.yaml", content)))
    control = Segmenter.from_pretrained(tmp_path / "run" / "best")
    assert control.evaluate(tmp_path / "recipe.yaml", "test")["miou"] < 0.5


def test_statistics_are_those_of_the_derived_bands(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    dem = inputs_of(recipe, open_split(recipe, "train"))[1]
    assert (dem.count, dem.stored, len(dem.said), dem.dtype, dem.normalize) == (2, 1, 1, "float32", "dataset")
    assert 0 < dem.mean[0] < 90
    assert abs(dem.mean[1]) < 5
    assert max(dem.std) < 40
    assert Segmenter.from_pretrained(place / "run" / "best").inputs[1] == dem


@pytest.mark.pitfall("C16", "P25")
def test_a_map_has_the_same_bytes_for_two_memory_limits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, dem, _ = ground(5, 500.0, 48, 4000)
    dem[10:20, 1000:1100] = -9999
    rgb = write_raster(tmp_path / "rgb.tif", image)
    scene = {"rgb": rgb, "dem": write_raster(tmp_path / "dem.tif", dem[:, :3990], pixel=10, nodata=-9999)}
    strips, plan_of = [], jobs.Plan
    monkeypatch.setattr(jobs, "Plan", lambda *how: strips.append(plan_of(*how)) or strips[-1])
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    for limit, readers in ((16, 1), (1024, 3)):
        segmenter.label(scene, Output(tmp_path / f"{limit}.tif"), {"memory_limit": limit, "readers": readers})
    assert [len(plan.strips) > 1 for plan in strips] == [True, False]
    assert (tmp_path / "16.tif").read_bytes() == (tmp_path / "1024.tif").read_bytes()


@pytest.mark.pitfall("P13")
def test_the_folder_says_how_many_bands_are_derived(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "run" / "best", tmp_path / "best")
    record = json.loads((tmp_path / "best" / "segmenter.json").read_text())
    assert (record["input"]["dem"]["bands"], len(record["input"]["dem"]["said"])) == (2, 1)
    recipe = (tmp_path / "best" / "recipe.yaml").read_text()
    (tmp_path / "best" / "recipe.yaml").write_text(recipe.replace("[slope, height_above_local]", "[slope]"))
    sign(tmp_path / "best")
    with pytest.raises(CheckpointError, match=r"input\.dem\.bands = 2; expected 1 as in recipe\.yaml"):
        Segmenter.from_pretrained(tmp_path / "best")


def test_arrays_of_two_bands_are_refused_and_one_is_chosen_by_number(place: Path) -> None:
    segmenter = Segmenter.from_pretrained(place / "run" / "best")
    image, dem, _ = ground(3, 10.0)
    two = np.stack([np.zeros_like(dem), dem])
    with pytest.raises(DataError, match="2 bands are read, but slope, height_above_local can be derived from one"):
        segmenter.predict({"rgb": image, "dem": two})
    chosen = segmenter.predict({"rgb": image, "dem": two}, bands={"dem": [2]})
    np.testing.assert_array_equal(chosen, segmenter.predict({"rgb": image, "dem": dem[None]}))


def test_a_recipe_that_derives_something_else_is_no_measure(place: Path, tmp_path: Path) -> None:
    content = content_of(place, tmp_path / "run", {"derive": ["height", "slope"]})
    with pytest.raises(RecipeError, match=r"data\.modalities\.dem\.derive is \['height', 'slope'\], but .*same"):
        Segmenter.from_pretrained(place / "run" / "best").evaluate(write_recipe(tmp_path / "r.yaml", content))


@pytest.mark.pitfall("P55")
def test_a_run_does_not_go_on_with_other_derived_bands(place: Path, tmp_path: Path) -> None:
    content = content_of(place, tmp_path / "run", {"derive": DERIVE})
    content["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    content["train"]["epochs"] = 2
    content["data"]["modalities"]["dem"] = {"derive": DERIVE, "local_radius": 50}
    with pytest.raises(Exception, match="another recipe") as caught:
        finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)), resume=True)
    assert "local_radius" in str(caught.value)


@pytest.mark.parametrize(
    ("dem", "text"),
    [
        ({"derive": ["slop"]}, "data.modalities.dem.derive"),
        ({"derive": ["slope", "slope"]}, "derive = ['slope', 'slope'] must name each band once"),
        ({"derive": ["slope"], "bands": [1, 2]}, "bands = [1, 2] must name one band: the elevation"),
        ({"derive": ["slope"], "normalize": "encoder"}, "'encoder' is for red, green and blue"),
        ({"derive": ["slope"], "local_radius": 5}, "local_radius is for height_above_local, which is not in derive"),
        ({"local_radius": 5}, "local_radius is for derive: [height_above_local]"),
        ({"pixel_size": 5}, "pixel_size is for derive: [height_above_local]"),
        ({"derive": ["height_above_local"], "local_radius": 0}, "local_radius = 0 must be above 0"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(tmp_path: Path, dem: dict[str, Any], text: str) -> None:
    content = content_of(tmp_path, tmp_path / "run", dem)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "r.yaml", content))
    assert text in str(caught.value)


def test_checks_of_band_counts_count_derived_bands(tmp_path: Path) -> None:
    """Two bands and one of elevation that becomes two are four, which enter the encoder as the recipe says."""
    content = content_of(tmp_path, tmp_path / "run", {"bands": [1], "derive": DERIVE})
    content["data"]["modalities"]["rgb"] = {"bands": [1, 2]}
    content["model"]["encoder"]["input"] = "project"
    (tmp_path / "encoder").mkdir()
    load_recipe(write_recipe(tmp_path / "r.yaml", content))
    content["data"]["modalities"]["dem"]["derive"] = ["slope"]
    with pytest.raises(RecipeError, match=r"model\.encoder\.input = 'project' is not used: 3 bands enter"):
        load_recipe(write_recipe(tmp_path / "r.yaml", content))
