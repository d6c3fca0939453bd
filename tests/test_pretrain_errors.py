"""Bad input to `vfmseg pretrain`, by the command line: one message that helps, exit code 2, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from makers import (
    MAE_DECODER,
    NEW_ENCODER,
    finished_run,
    pretrain_recipe,
    recipe_dict,
    save_encoder,
    toy_scene,
    write_raster,
    write_recipe,
)
from typer.testing import CliRunner

from vfmseg.cli import app
from vfmseg.pretrain import pretrain


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of good scenes and of bad ones, a teacher, and an earlier run of pretraining in run/."""
    folder = tmp_path_factory.mktemp("errors")
    images = [toy_scene(number, 80, 96)[0] for number in range(3)]
    for number, image in enumerate(images):
        write_raster(folder / "rgb" / f"{number}.tif", image)
        write_raster(folder / "mixed" / f"{number}.tif", image if number else np.concatenate([image, image[:2]]))
        write_raster(folder / "labels" / f"{number}.tif", image)
        write_raster(folder / "labels" / f"{number}_mask.tif", toy_scene(number, 80, 96)[1])
        write_raster(folder / "masks" / f"{number}.tif", toy_scene(number, 80, 96)[1])
        write_raster(folder / "blank" / f"{number}.tif", np.zeros_like(image), nodata=0)
        write_raster(folder / "thumbnails" / f"{number}.tif", image[:, :10, :12])
        write_raster(folder / "cut" / f"{number}.tif", image)
        striped = np.maximum(image, 1)
        striped[:, :, ::3] = 0  # a third is nodata, so that every window is valid enough, and no patch is whole
        write_raster(folder / "striped" / f"{number}.tif", striped, nodata=0)
    (folder / "empty").mkdir()
    (folder / "cut" / "1.tif").write_bytes((folder / "cut" / "1.tif").read_bytes()[:6000])
    (folder / "list.txt").write_text(f"{folder}/rgb/0.tif\n")
    save_encoder(folder / "clip", "clip")
    pretrain(pretrain_recipe(folder, folder / "run"))
    return folder


def scenes(place: Path, *folders: str, **data: Any) -> dict[str, Any]:
    content = {"modalities": {"rgb": {}}, "tile": 32, "samples_per_epoch": 4, **data}
    return {"data": content | {"scenes": {"rgb": [f"{place}/{folder}" for folder in folders]}}}


def distill(place: Path, **teacher: Any) -> dict[str, Any]:
    named = {"name": "clip", "checkpoint": f"{place}/clip", "layers": [1, 3], **teacher}
    return {"objectives": {"distill": {"teacher": named}}}


def mae(**changes: Any) -> dict[str, Any]:
    return {"objectives": {"mae": {"decoder": MAE_DECODER, **changes}}}


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no image": (
        lambda p: scenes(p, "empty"),
        "data.scenes.rgb: the folder HERE/empty holds no image; expected files ending in .tif",
    ),
    "nothing there": (
        lambda p: scenes(p, "gone/*.tif"),
        "data.scenes.rgb: the pattern HERE/gone/*.tif matches no file",
    ),
    "other bands": (lambda p: scenes(p, "mixed"), "data.scenes: 1 has bands {'rgb': 3}, but 0 has {'rgb': 5}; choose"),
    "labels among them": (
        lambda p: scenes(p, "labels"),
        "data.scenes: 0_mask has bands {'rgb': 1}, but 0 has {'rgb': 3}; choose",
    ),
    "all nodata": (lambda p: scenes(p, "blank"), "data.scenes: rgb is invalid (nodata, NaN, alpha or mask) wherever"),
    "no whole patch": (
        lambda p: scenes(p, "striped"),
        "objectives.mae: no patch of which something is hidden is wholly valid in any of 64 windows, so nothing would",
    ),
    "no whole cell": (
        lambda p: scenes(p, "striped") | distill(p, upscale=2),
        "objectives.distill: no cell is wholly valid in any of 64 windows, so nothing would be learned; expected",
    ),
    "cut short": (lambda p: scenes(p, "cut"), "HERE/cut/1.tif: rows 0 to 79, columns 0 to 95 cannot be read: the file"),
    "a list": (lambda p: scenes(p, "list.txt"), "a list of files is written into the recipe itself: [a.tif, b.tif]"),
    "thumbnails": (
        lambda p: scenes(p, "thumbnails"),
        "data.scale = [0.5, 2] of data.tile = 32 makes windows of up to 64 px a side, but the longest side of a scene "
        "is 12 px",
    ),
    "scale": (
        lambda p: scenes(p, "rgb", scale=[1, 9]),
        "data.scale = [1, 9] of data.tile = 32 makes windows of up to 288 px a side, but the longest side of a scene "
        "is 96 px; expected at most twice that; try data.scale = [1, 3]",
    ),
    "ratio": (
        lambda p: mae(ratio=0.99),
        "objectives.mae.ratio = 0.99 hides 16 of the 16 patches of a window; expected",
    ),
    "one patch": (
        lambda p: {"model": {"encoder": NEW_ENCODER | {"patch": 32}}},
        "objectives.mae.ratio = 0.75 hides 1 of the 1 patches of a window; expected at least one hidden and one "
        "visible, which takes two or more: set data.tile to 64 or more",
    ),
    "bands": (
        lambda p: mae(mask="spectral", ratio=0.9),
        "objectives.mae.ratio = 0.9 hides 3 of the 3 bands of rgb; expected at least one hidden and one visible, try "
        "0.75",
    ),
    "cells of the teacher": (
        lambda p: distill(p),
        "objectives.distill.teacher: its cells are 16 px wide, those of the student 8 px; set "
        "objectives.distill.teacher.upscale = 2, or take a student of patch 16",
    ),
    "no teacher": (lambda p: distill(p, checkpoint=f"{p}/gone"), "HERE/gone: no such folder, and not a hub id"),
    "nothing weighs": (lambda p: mae(weight=0), "objectives weighs all it names with 0, so that nothing would be"),
    "large patches": (
        lambda p: {"model": {"encoder": NEW_ENCODER | {"patch": 64}}},
        "model.encoder.patch = 64 is larger than data.tile = 32",
    ),
    "empty probe": (
        lambda p: {
            "probe": {
                "sets": {
                    "towns": {
                        "classes": {0: "a", 1: "b"},
                        "train": {"rgb": f"{p}/rgb", "labels": f"{p}/masks"},
                        "val": {"rgb": f"{p}/empty", "labels": f"{p}/empty"},
                    }
                }
            }
        },
        "probe.sets.towns.val.rgb: the folder HERE/empty holds no image",
    ),
}


def started(place: Path, folder: Path, changes: dict[str, Any], *words: str) -> Result:
    """The command on a recipe with these sections and `folder` as its output."""
    content = yaml.safe_load((place / "run.yaml").read_text()) | changes | {"output_dir": str(folder)}
    recipe = write_recipe(folder.parent / "recipe.yaml", content)
    return CliRunner().invoke(app, ["pretrain", str(recipe), *words])


def require_one_message(found: Result, words: str) -> None:
    """It is said once, after what was told on the way, and it is the last thing that is said."""
    assert found.exit_code == 2, found.stderr
    assert "Traceback" not in found.stderr
    told = [line for line in found.stderr.splitlines() if line.startswith("vfmseg: ")]
    assert len(told) == 1, found.stderr
    assert found.stderr.rstrip().endswith(told[0])
    assert words in told[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.pitfall("P62", "F19")
def test_bad_input_is_told_once_and_nothing_is_written_and_no_earlier_run_is_lost(
    place: Path, tmp_path: Path, what: str
) -> None:
    changes, words = BAD[what]
    require_one_message(started(place, tmp_path / "run", changes(place)), words.replace("HERE", str(place)))
    assert not (tmp_path / "run").exists()
    before = tree(place / "run")
    require_one_message(started(place, place / "run", changes(place), "--overwrite"), words.replace("HERE", str(place)))
    assert {name: content for name, content in tree(place / "run").items() if name != ".lock"} == before


@pytest.mark.pitfall("F17", "P62")
def test_a_run_is_not_gone_on_with_by_another_list_of_scenes(place: Path) -> None:
    before = tree(place / "run")
    fewer = scenes(place, "rgb/0.tif", "rgb/1.tif", samples_per_epoch=6)
    require_one_message(
        started(place, place / "run", fewer, "--resume"),
        f"{place}/run/state.pt: the run was started with another recipe (now",
    )
    write_raster(place / "rgb" / "3.tif", toy_scene(3, 80, 96)[0])
    try:  # the recipe is as it was, and its pattern finds another one
        require_one_message(started(place, place / "run", {}, "--resume"), "3.tif (rgb of data.scenes, scene 3) is new")
    finally:
        (place / "rgb" / "3.tif").unlink()
    assert {name: content for name, content in tree(place / "run").items() if name != ".lock"} == before


@pytest.mark.pitfall("F2", "P63")
def test_what_else_an_output_folder_holds_stays(place: Path, tmp_path: Path) -> None:
    finished = finished_run(tmp_path / "tuned") / "run"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"mine")
    before = tree(tmp_path)
    for words in ((), ("--overwrite",), ("--resume",)):
        require_one_message(
            started(place, finished, {}, *words), f"{finished}/best: exists and is no folder that holds"
        )
        require_one_message(
            started(place, tmp_path / "photos", {}, *words), "photos holds one.jpg, but no run to go on"
        )
    require_one_message(started(place, place / "run", {}), "already holds best, last, metrics.json")
    require_one_message(started(place, tmp_path / "photos" / "one.jpg", {}), "one.jpg is a file; expected a folder")
    after = {name: content for name, content in tree(tmp_path).items() if not name.endswith((".lock", "recipe.yaml"))}
    assert after == {name: content for name, content in before.items() if not name.endswith("recipe.yaml")}


@pytest.mark.pitfall("F19")
def test_a_segmenter_is_no_teacher_and_no_encoder(place: Path, tmp_path: Path) -> None:
    best = finished_run(tmp_path / "tuned") / "run" / "best"
    published = {"name": "dinov2", "checkpoint": str(best)}
    for changes in (
        {"objectives": {"distill": {"teacher": published}}},
        {"model": {"encoder": published, "adapter": {"name": "full"}}},
    ):
        found = started(place, tmp_path / "run", changes)
        require_one_message(found, f"{best}: is a segmenter that vfmseg has trained, and not an encoder")


@pytest.mark.pitfall("F19")
def test_a_recipe_of_the_other_command_is_told_as_such(place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tune.yaml", recipe_dict(place / "data", None, tmp_path / "run"))
    require_one_message(
        CliRunner().invoke(app, ["pretrain", str(recipe)]),
        f"{recipe}: is a recipe of vfmseg finetune by its data; expected one of vfmseg pretrain",
    )
    content = yaml.safe_load((place / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "run")}
    recipe = write_recipe(tmp_path / "pre.yaml", content)
    require_one_message(
        CliRunner().invoke(app, ["finetune", str(recipe)]),
        f"start it as vfmseg pretrain {recipe}, or name another recipe",
    )
    broken = write_recipe(tmp_path / "broken.yaml", content | {"objectives": {"mae": {"rato": 0.5}}})
    require_one_message(CliRunner().invoke(app, ["pretrain", str(broken)]), "objectives.mae.rato is not a key here")
