"""Recipes named after published systems learn and are scored on miniature files in the published folder layout."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import save_encoder, write_raster, write_recipe

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.build.data import open_split
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.recipe.text import read_yaml
from vfmseg.segmenter import Segmenter

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
COLOURS = np.array([(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0)])
"""Of the ISPRS classes in the order of their ids; the last is the eroded boundary."""

SIDE = 64

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def ground(seed: int, classes: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture uint8 (3, H, W) and a surface float32 (H, W) that tell classes, and the classes (H, W)."""
    random = np.random.default_rng(seed)
    truth = np.kron(random.integers(0, classes, (4, 4)), np.ones((SIDE // 4, SIDE // 4), int))
    noise = random.normal(0, 4, (4, SIDE, SIDE))
    picture = np.stack([40 * truth, 200 - 30 * truth, 20 + 10 * truth]) + noise[:3]
    return picture.clip(0, 255).astype(np.uint8), (250 + 3.0 * truth + noise[3]).astype(np.float32), truth


def write_isprs(names: dict[str, Path], seed: int, pixel: float) -> None:
    """One area in colours, as published; `eroded`: a frame round each block is black."""
    picture, surface, truth = ground(seed)
    edge = np.zeros((SIDE, SIDE), dtype=bool)
    edge[:: SIDE // 4] = edge[:, :: SIDE // 4] = True
    write_raster(names["image"], picture, pixel=pixel, crs=None)  # the published files carry no CRS
    write_raster(names["dsm"], surface, pixel=pixel, crs=None)
    write_raster(names["whole"], COLOURS[truth].transpose(2, 0, 1).astype(np.uint8), pixel=pixel, crs=None)
    eroded = COLOURS[np.where(edge, 6, truth)].transpose(2, 0, 1).astype(np.uint8)
    write_raster(names["eroded"], eroded, pixel=pixel, crs=None)


def vaihingen(data: Path) -> None:
    root = data / "isprs_vaihingen"
    for area in (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37):
        name = f"top_mosaic_09cm_area{area}"
        write_isprs(
            {
                "image": root / "top" / f"{name}.tif",
                "dsm": root / "dsm" / f"dsm_09cm_matching_area{area}.tif",
                "whole": root / "gts_for_participants" / f"{name}.tif",
                "eroded": root / "gts_eroded_for_participants" / f"{name}_noBoundary.tif",
            },
            area,
            0.09,
        )


def potsdam(data: Path) -> None:
    root = data / "isprs_potsdam"
    for number, (row, col) in enumerate(
        [(r, c) for r in range(2, 6) for c in range(10, 13)] + [(r, c) for r in (6, 7) for c in range(7, 13)]
    ):
        name = f"top_potsdam_{row}_{col}"
        write_isprs(
            {
                "image": root / "2_Ortho_RGB" / f"{name}_RGB.tif",
                "dsm": root / "1_DSM" / f"dsm_potsdam_{row:02d}_{col:02d}.tif",
                "whole": root / "5_Labels_all" / f"{name}_label.tif",
                "eroded": root / "5_Labels_all_noBoundary" / f"{name}_label_noBoundary.tif",
            },
            number,
            0.05,
        )


def hunan(data: Path) -> None:
    ids = np.array([0, 1, 2, 3, 5, 6, 8, 9])
    for number, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        picture, surface, truth = ground(number, len(ids))
        folder = data / "mmhunan" / split
        s2 = np.concatenate([np.zeros((1, SIDE, SIDE)), picture[::-1], np.zeros((9, SIDE, SIDE))]).astype(np.uint16)
        write_raster(folder / "s2" / f"s2_{number}.tif", s2 * 20)
        write_raster(folder / "topo" / f"topo_{number}.tif", np.stack([surface, 0 * surface]))
        write_raster(folder / "lc" / f"lc_{number}.tif", ids[truth].astype(np.uint8))


LAYOUTS = {
    "mfnet-vaihingen": (vaihingen, "isprs_vaihingen", 12, 4),
    "ftransunet-style-potsdam": (potsdam, "isprs_potsdam", 18, 6),
    "mmhunan-mfnet": (hunan, "mmhunan", 6, 2),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe's name, and a folder of recipes, encoders, and data whose labels were converted as the recipe says."""
    folder = tmp_path_factory.mktemp(request.param)
    make, root, _, _ = LAYOUTS[request.param]
    make(folder / "data")
    shutil.copytree(RECIPES, folder / "recipes")
    snippet = [line[3:] for line in recipe_text(request.param).splitlines() if line.startswith("#| ")]
    before = os.getcwd()
    os.chdir(folder / "data" / root)
    try:
        exec("\n".join(snippet), {})
    finally:
        os.chdir(before)
    for family in ("sam", "dinov2"):
        save_encoder(folder / family, family)
    return request.param, folder


def recipe_text(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def small(name: str, folder: Path, adapter: dict[str, Any] | None = None) -> Path:
    """The recipe with a tiny encoder for one short epoch, in its own folder; `adapter`: instead of its own."""
    content = read_yaml(recipe_text(name), name)
    content["data"] |= {"tile": 32, "samples_per_epoch": 8}
    content["train"] |= {"epochs": 1, "batch_size": 4}
    encoder = content["model"]["encoder"]
    encoder["checkpoint"] = str(folder / encoder["name"])
    content["model"]["decoder"]["channels"] = 16
    content["predict"]["overlap"] = 0.5
    content["output_dir"] = str(folder / "run")
    if adapter is not None:
        content["model"]["adapter"] = adapter
    return write_recipe(folder / "recipes" / "small.yaml", content)


@pytest.mark.pitfall("C5")
def test_the_split_is_the_published_one(published: tuple[str, Path]) -> None:
    name, folder = published
    recipe = load_recipe(small(name, folder, {"name": "lora", "rank": 2}))
    _, _, train, test = LAYOUTS[name]
    learned, tested = open_split(recipe, "train"), open_split(recipe, "test")
    assert (len(learned), len(tested)) == (train, test)
    assert not {scene.name for scene in learned} & {scene.name for scene in tested}
    if name == "mfnet-vaihingen":
        assert [scene.name.rpartition("area")[2] for scene in tested] == ["5", "15", "21", "30"]
    if name == "ftransunet-style-potsdam":
        found = {scene.name.removeprefix("top_potsdam_").removesuffix("_RGB") for scene in tested}
        assert found == {"4_10", "5_11", "2_11", "3_10", "6_11", "7_12"}


@pytest.mark.pitfall("C3", "C4")
@pytest.mark.parametrize("own", [False, True], ids=["with lora", "with its own adapter"])
def test_a_step_is_trained_and_the_protocol_is_in_the_scores(published: tuple[str, Path], own: bool) -> None:
    name, folder = published
    named = read_yaml(recipe_text(name), name)["model"]["adapter"]["name"]
    if own and named not in ADAPTERS:
        pytest.skip(f"the adapter {named} is not there yet")
    path = small(name, folder, None if own else {"name": "lora", "rank": 2})
    finetune(load_recipe(path), overwrite=True)
    segmenter = Segmenter.from_pretrained(folder / "run" / "best")
    scores = segmenter.evaluate(path, "test")
    if name == "mmhunan-mfnet":
        assert (len(scores["classes"]), scores.get("outside_mean")) == (7, None)
        return
    assert (len(scores["classes"]), scores.get("outside_mean")) == (6, ["clutter"])
    content = read_yaml(path.read_text(encoding="utf-8"), name)
    content["data"]["test"]["labels"] = content["data"]["train"]["labels"]
    whole = segmenter.evaluate(write_recipe(path, content), "test")
    pixels = LAYOUTS[name][3] * SIDE**2
    assert (whole["pixels"], scores["pixels"]) == (pixels, pixels * (15 * 15) // (16 * 16))


def test_headers_say_what_is_reproduced_and_what_is_not() -> None:
    for name in LAYOUTS:
        header = " ".join(line[2:] for line in recipe_text(name).splitlines() if line.startswith("# "))
        for said in ("Score not verified here", "What differs", "Protocol", "Ma, Zhang, Pun"):
            assert said in header, (name, said)


@pytest.mark.pitfall("C5")
def test_each_split_of_a_table_names_every_area_once() -> None:
    for name, key, counts in (
        ("isprs_vaihingen", "area", {"ssrs": (12, 4), "participants": (16, 17)}),
        ("isprs_potsdam", "tile", {"ssrs": (18, 6), "participants": (24, 14)}),
    ):
        with (RECIPES / "splits" / f"{name}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len({row[key] for row in rows}) == len(rows)
        for split, (train, test) in counts.items():
            found = [row[split] for row in rows]
            assert (found.count("train"), found.count("test")) == (train, test), (name, split)
