"""Pretraining that is killed, or shared by two processes, ends as a run that nothing has happened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import MAE_DECODER, ROOT, on_two_processes, pretrain_recipe, save_encoder, toy_scene, write_raster
from safetensors.torch import load_file

from vfmseg.pretrain import pretrain
from vfmseg.recipe import PretrainRecipe
from vfmseg.training.loop import Loop

STEPS = 4
"""Of an epoch: eight windows, two in a batch."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes, of one of which more than half is nodata, and a teacher."""
    folder = tmp_path_factory.mktemp("stopped")
    for number in range(3):
        image, _ = toy_scene(number, 80, 96)
        if number == 1:
            image[:, :, :50] = 0
        write_raster(folder / "rgb" / f"{number}.tif", image, nodata=0)
    save_encoder(folder / "clip", "clip")
    return folder


KINDS = ("mae", "distill", "both")


def recipe_of(place: Path, output: Path, kind: str, batch_size: int = 2, samples: int = 8) -> PretrainRecipe:
    teacher = {"name": "clip", "checkpoint": str(place / "clip"), "layers": [1, 3], "upscale": 2}
    mae = {"mask": "incomplete" if kind == "both" else "random", "decoder": MAE_DECODER}
    objectives = {"mae": {"mae": mae}, "distill": {"distill": {"teacher": teacher}}}
    objectives["both"] = {"mae": mae, "distill": {"teacher": teacher, "masked": True}}
    train = {"epochs": 2, "batch_size": batch_size, "optimizer": {"lr": 0.003}}
    return pretrain_recipe(place, output, samples=samples, objectives=objectives[kind], train=train)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run has learned, and what it writes."""
    learned = dict(torch.load(folder / "state.pt", weights_only=True)["tensors"])
    written = load_file(folder / "best" / "model.safetensors")
    return learned | {f"best.{name}": tensor for name, tensor in written.items()}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def require_same(one: Path, two: Path) -> None:
    """The same bits, and the same curve of losses, each step once."""
    first, second = state_of(one), state_of(two)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert steps_of(one) == steps_of(two)
    assert [line["step"] for line in steps_of(one)] == list(range(1, 2 * STEPS + 1))


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request: pytest.FixtureRequest, place: Path) -> tuple[str, Path]:
    """A kind of run, and its folder when it is done."""
    recipe = recipe_of(place, place / "whole" / request.param, request.param)
    pretrain(recipe)
    return request.param, recipe.output_dir


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2])
@pytest.mark.pitfall("P55", "K25")
def test_stopped_in_an_epoch_or_between_two_a_run_ends_with_the_same_bits(
    undisturbed: tuple[str, Path], place: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C before the step with this number, counted from 0; the epoch is begun again."""
    kind, whole = undisturbed
    recipe, honest = recipe_of(place, tmp_path / "run", kind), Loop._step

    def interrupted(self: Loop, epoch: int, group: Any) -> Any:
        if self.state.step == step:
            raise KeyboardInterrupt
        return honest(self, epoch, group)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe)
    pretrain(recipe, resume=True)
    require_same(whole, tmp_path / "run")


KILLED = """
import os, signal, sys
from vfmseg.pretrain import pretrain
from vfmseg.recipe import load_pretrain_recipe
from vfmseg.training.loop import Loop
honest = Loop._step
def killed(self, epoch, group):
    if self.state.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(self, epoch, group)
Loop._step = killed
pretrain(load_pretrain_recipe(sys.argv[1]), resume=os.path.exists(sys.argv[3]))
"""


@pytest.mark.pitfall("F3", "P55", "K25")
def test_killed_twice_in_its_epochs_a_run_ends_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    recipe, whole = recipe_of(place, tmp_path / "run", "both"), recipe_of(place, tmp_path / "whole", "both")
    (tmp_path / "killed.py").write_text(KILLED)
    for step in (2, STEPS + 1):
        state = recipe.output_dir / "state.pt"
        done = subprocess.run(
            [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "run.yaml"), str(step), str(state)],
            capture_output=True, text=True, timeout=240, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert state.is_file()
    pretrain(recipe, resume=True)
    pretrain(whole)
    require_same(whole.output_dir, recipe.output_dir)


@pytest.mark.pitfall("P49", "P51", "K1", "K25")
def test_two_processes_are_one_with_batches_twice_as_large(place: Path, tmp_path: Path) -> None:
    """The mean is over all hidden patches, or cells, that both have, not of two means: one has less nodata.

    Ten windows: in the last step the second process has none, and shows a filler.
    """
    recipe_of(place, tmp_path / "two", "both", samples=10)
    on_two_processes(ROOT / "vfmseg" / "pretrain.py", tmp_path / "two.yaml")
    pretrain(recipe_of(place, tmp_path / "one", "both", batch_size=4, samples=10))
    losses = [[line["loss"] for line in steps_of(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    first, second = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, tensor in first.items():  # Adam makes steps of the rounding of a gradient that is truly zero
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-4)
