"""A training run that is stopped anywhere goes on, ends as if it had not been, and says of itself what is true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import recipe_dict, save_encoder, stopped_anywhere, toy_folder, write_recipe

from vfmseg.errors import MachineError
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.run_folder import check_output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    toy_folder(folder / "data")
    save_encoder(folder / "encoder", "dinov2")
    return folder


def recipe(place: Path, output: Path, epochs: int = 1) -> dict[str, Any]:
    content = recipe_dict(place / "data", place / "encoder", output)
    content["train"]["epochs"] = epochs
    return content


def run(folder: Path, content: dict[str, Any], **how: bool) -> dict[str, Any]:
    return finetune(load_recipe(write_recipe(folder / "recipe.yaml", content)), **how)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "state.pt", weights_only=True)["model"])


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def stops(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, of one epoch, and in stops/ what kills before its end would have left of it."""
    folder = tmp_path_factory.mktemp("stops")
    with stopped_anywhere(folder / "run", folder / "stops"):
        run(folder, recipe(place, folder / "run"))
    return folder


def test_f3_wherever_a_run_is_stopped_there_is_something_to_go_on_with(stops: Path) -> None:
    left = sorted((stops / "stops").iterdir())
    assert any((folder / "last").is_dir() != (folder / "best").is_dir() for folder in left)
    assert len(left) > 10
    for folder in left:
        check_output(folder, resume=True, overwrite=False)


def goes_on(place: Path, stops: Path, folder: Path) -> None:
    run(folder.parent, recipe(place, folder), resume=True)
    assert same(trained(folder), trained(stops / "run"))
    names = ["best", "last", "metrics.json", "metrics.jsonl", "recipe.yaml", "state.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in ("best", "last"):
        for file in ("head.safetensors", "recipe.yaml", "segmenter.json"):
            assert (folder / name / file).is_file()
    assert (folder / "best" / "head.safetensors").read_bytes() == (folder / "last" / "head.safetensors").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 0.8, 1.0])
def test_f3_a_run_that_was_stopped_in_its_first_save_goes_on(
    place: Path, stops: Path, tmp_path: Path, share: float
) -> None:
    left = sorted((stops / "stops").iterdir())
    goes_on(place, stops, Path(shutil.copytree(left[int(share * (len(left) - 1))], tmp_path / "run")))


@pytest.mark.slow
def test_f3_a_run_that_was_stopped_anywhere_goes_on(place: Path, stops: Path, tmp_path: Path) -> None:
    for folder in sorted((stops / "stops").iterdir()):
        goes_on(place, stops, Path(shutil.copytree(folder, tmp_path / folder.name)))


@pytest.mark.parametrize("file", ["last", "metrics.jsonl", "recipe.yaml", "best"])
def test_f3_a_run_that_meets_a_full_disk_in_its_first_save_goes_on(
    place: Path, stops: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg import checkpoint, files
    from vfmseg import finetune as script

    def full(target: Path) -> Any:
        if target.name == file:
            raise OSError(28, "No space left on device", str(target))
        return files.whole_folder(target) if file in ("best", "last") else files.whole_file(target)

    with monkeypatch.context() as patch:
        if file in ("best", "last"):
            patch.setattr(checkpoint, "whole_folder", full)
        else:
            patch.setattr(script, "whole_file", full)
        with pytest.raises((OSError, MachineError)):
            run(tmp_path, recipe(place, tmp_path / "run"))
    goes_on(place, stops, tmp_path / "run")


def test_f3_a_run_that_fails_before_anything_is_reached_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be started again by the same command."""
    from vfmseg import loop

    def broken(self: loop.Loop, number: int) -> None:
        assert (tmp_path / "run" / "state.pt").is_file()
        raise MachineError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train_epoch", broken)
        with pytest.raises(MachineError):
            run(tmp_path, recipe(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert run(tmp_path, recipe(place, tmp_path / "run"))["best_epoch"] == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best_epoch"] == 1
