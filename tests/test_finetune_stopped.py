"""A training run that is stopped anywhere goes on, ends as if it had not been, and says of itself what is true."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import recipe_dict, save_encoder, stopped_anywhere, toy_folder, write_recipe

from vfmseg.errors import CheckpointError, MachineError
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.training.run_folder import segmenter_run


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
    return dict(torch.load(folder / "state.pt", weights_only=True)["tensors"])


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def stops(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, of one epoch, and in stops/ what kills before its end would have left of it."""
    folder = tmp_path_factory.mktemp("stops")
    with stopped_anywhere(folder / "run", folder / "stops"):
        run(folder, recipe(place, folder / "run"))
    return folder


@pytest.mark.pitfall("F3")
def test_wherever_a_run_is_stopped_there_is_something_to_go_on_with(stops: Path) -> None:
    left = sorted((stops / "stops").iterdir())
    assert any((folder / "last").is_dir() != (folder / "best").is_dir() for folder in left)
    assert len(left) > 10
    for folder in left:
        segmenter_run(folder).require_own(resume=True, overwrite=False)


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
@pytest.mark.pitfall("F3")
def test_a_run_that_was_stopped_in_its_first_save_goes_on(
    place: Path, stops: Path, tmp_path: Path, share: float
) -> None:
    left = sorted((stops / "stops").iterdir())
    goes_on(place, stops, Path(shutil.copytree(left[int(share * (len(left) - 1))], tmp_path / "run")))


@pytest.mark.slow
@pytest.mark.pitfall("F3")
def test_a_run_that_was_stopped_anywhere_goes_on(place: Path, stops: Path, tmp_path: Path) -> None:
    for folder in sorted((stops / "stops").iterdir()):
        goes_on(place, stops, Path(shutil.copytree(folder, tmp_path / folder.name)))


@pytest.mark.parametrize("file", ["last", "metrics.jsonl", "recipe.yaml", "best"])
@pytest.mark.pitfall("F3")
def test_a_run_that_meets_a_full_disk_in_its_first_save_goes_on(
    place: Path, stops: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg.checkpoint import folder as checkpoint
    from vfmseg.disk import files
    from vfmseg.training import run_folder

    def full(target: Path, *own: Any) -> Any:
        if target.name == file:
            raise OSError(28, "No space left on device", str(target))
        return files.whole_folder(target, *own) if file in ("best", "last") else files.whole_file(target)

    with monkeypatch.context() as patch:
        if file in ("best", "last"):
            patch.setattr(checkpoint, "whole_folder", full)
        else:
            patch.setattr(run_folder, "whole_file", full)
        with pytest.raises((OSError, MachineError)):
            run(tmp_path, recipe(place, tmp_path / "run"))
    goes_on(place, stops, tmp_path / "run")


@pytest.mark.pitfall("F3")
def test_a_run_that_fails_before_anything_is_reached_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be started again by the same command."""
    from vfmseg.training import loop

    def broken(*_: Any) -> None:
        assert (tmp_path / "run" / "state.pt").is_file()
        raise MachineError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train_epoch", broken)
        with pytest.raises(MachineError):
            run(tmp_path, recipe(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert run(tmp_path, recipe(place, tmp_path / "run"))["best_epoch"] == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best_epoch"] == 1


def scored(patch: pytest.MonkeyPatch, *scores: float) -> None:
    """The validation of the epochs to come."""
    following = iter(scores)

    class Confusion:
        def scores(self, names: list[str], outside: list[str]) -> dict[str, Any]:
            score = next(following)
            classes = {name: {"iou": score, "support": 1} for name in ("ground", "disc")}
            return {"miou": score, "classes": classes, "absent": [], "classes_in_mean": 2}

    patch.setattr("vfmseg.training.objectives.segmentation.score_windows", lambda *_: Confusion())


def head(folder: Path) -> bytes:
    return (folder / "head.safetensors").read_bytes()


@pytest.mark.pitfall("F4")
def test_a_best_segmenter_that_is_gone_is_made_again_from_the_state(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(place, tmp_path / "run", epochs=2)
    scored(monkeypatch, 0.4, 0.5)
    run(tmp_path, content)
    best = {path.name: path.read_bytes() for path in (tmp_path / "run" / "best").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "run" / "best")
    assert run(tmp_path, content, resume=True)["best_epoch"] == 2
    again = {path.name: path.read_bytes() for path in (tmp_path / "run" / "best").rglob("*") if path.is_file()}
    assert again == best
    assert "done: best epoch 2 (" in capsys.readouterr().err
    (tmp_path / "run" / "best" / "head.safetensors").unlink()
    run(tmp_path, content, resume=True)
    assert head(tmp_path / "run" / "best") == best["head.safetensors"]


@pytest.mark.pitfall("F4")
def test_whatever_else_is_gone_of_a_run_is_made_again_from_the_state(place: Path, tmp_path: Path) -> None:
    content = recipe(place, tmp_path / "run", epochs=2)
    run(tmp_path, content)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for name in ("metrics.jsonl", "recipe.yaml", "metrics.json", "last/head.safetensors"):
        (tmp_path / "run" / name).unlink()
        run(tmp_path, content, resume=True)
        assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(tmp_path / "run" / "last")
    run(tmp_path, content, resume=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.pitfall("F4")
def test_a_run_whose_best_segmenter_is_lost_does_not_end_well(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], epochs: int
) -> None:
    content = recipe(place, tmp_path / "run", epochs)
    scored(monkeypatch, 0.5, 0.4)
    with pytest.raises(StopIteration) if epochs == 3 else nullcontext():  # stopped in the third epoch, or finished
        run(tmp_path, content)
    capsys.readouterr()
    shutil.move(tmp_path / "run" / "best", tmp_path / "elsewhere")
    told = r"best: is missing or not whole; expected that of epoch 1, the best of 2.*copy it back there, or train again"
    with pytest.raises(CheckpointError, match=told):
        run(tmp_path, content, resume=True)
    assert "done" not in capsys.readouterr().err
    shutil.move(tmp_path / "elsewhere", tmp_path / "run" / "best")
    scored(monkeypatch, 0.3)
    assert run(tmp_path, content, resume=True)["best_epoch"] == 1


@pytest.mark.pitfall("F4")
def test_a_best_segmenter_that_goes_while_the_run_lasts_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vfmseg.training import loop

    scored(monkeypatch, 0.5, 0.4)
    honest = loop.Loop._train_epoch

    def removed(self: loop.Loop, number: int, tell: Any) -> None:
        shutil.rmtree(tmp_path / "run" / "best", ignore_errors=True)
        honest(self, number, tell)

    monkeypatch.setattr(loop.Loop, "_train_epoch", removed)
    with pytest.raises(CheckpointError, match="best: is missing"):
        run(tmp_path, recipe(place, tmp_path / "run", epochs=2))
    assert "done" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.pitfall("F4")
def test_stopped_anywhere_in_the_save_of_a_better_epoch_the_best_is_what_the_run_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the epoch, done again, is not the best any more: a GPU does not repeat itself bit by bit."""
    content = recipe(place, tmp_path / "run", epochs=2)
    with monkeypatch.context() as patch, stopped_anywhere(tmp_path / "run", tmp_path / "stops"):
        scored(patch, 0.4, 0.5)
        run(tmp_path, content)
    left = []
    for folder in sorted((tmp_path / "stops").iterdir()):
        if (folder / "state.pt").is_file():
            state = torch.load(folder / "state.pt", weights_only=True)["state"]
            best = folder / "best" / "segmenter.json"
            epoch = json.loads(best.read_text())["metrics"]["epoch"] if best.is_file() else None
            left.append((state["epoch"], epoch, folder))
    kinds = {one[:2]: one[2] for one in left}
    assert {(1, 1), (2, 1), (2, None), (2, 2)} <= kinds.keys()
    assert (1, 2) not in kinds  # what the state does not know of
    for (done, _), folder in kinds.items():
        scored(monkeypatch, *(0.4, 0.3)[done:])
        content["output_dir"] = str(folder)
        said = run(tmp_path, content, resume=True)["best_epoch"]
        assert said == (2 if done == 2 else 1)
        assert json.loads((folder / "best" / "segmenter.json").read_text())["metrics"]["epoch"] == said
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
