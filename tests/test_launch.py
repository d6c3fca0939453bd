"""Which process this is: what a launcher says, and what a leftover or a mistake in the environment must not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from makers import recipe_dict, save_encoder, toy_folder, write_recipe

from vfmseg import terminal
from vfmseg.errors import MachineError
from vfmseg.finetune import finetune
from vfmseg.inference.ranks import joined, own_device
from vfmseg.launch import local_rank, rank_and_size, several
from vfmseg.recipe import load_recipe
from vfmseg.training.processes import connect

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

WRONG = [
    (
        {"WORLD_SIZE": "2", "RANK": "abc"},
        r"RANK = 'abc' in the environment: expected a whole number from 0 to 1; start",
    ),
    ({"WORLD_SIZE": "2", "RANK": "-1"}, r"RANK = '-1' .* from 0 to 1"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK = '2' .* from 0 to 1"),
    (
        {"WORLD_SIZE": "2"},
        r"WORLD_SIZE = 2 is set in the environment, but RANK is not; start the processes by torchrun",
    ),
    ({"WORLD_SIZE": "2", "RANK": "0"}, r"WORLD_SIZE = 2 is set in the environment, but MASTER_ADDR is not"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, r"but MASTER_PORT is not"),
    ({"WORLD_SIZE": "x"}, r"WORLD_SIZE = 'x' .* from 1 to 1000000"),
    ({"WORLD_SIZE": "0"}, r"WORLD_SIZE = '0' "),
    ({"WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE = '9{40}' "),
    (
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x", "LOCAL_RANK": "x"},
        r"LOCAL_RANK = 'x' ",
    ),
    (
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        r"the 2 processes cannot be connected \(.*\); start the processes",
    ),
]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("environment", "words"), WRONG)
@pytest.mark.pitfall("F11")
def test_an_environment_that_fits_no_launch_is_one_message(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match=words), joined():
        pass
    if "cannot be connected" not in words:
        with pytest.raises(MachineError, match=words):
            connect("no")


@pytest.mark.parametrize("size", [None, "1", ""])
@pytest.mark.parametrize("rank", ["3", "abc", "-1"])
@pytest.mark.pitfall("F11")
def test_a_rank_that_was_left_behind_silences_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, size: str | None
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert terminal.is_main_process()
    terminal.say("hello")
    terminal.complain("oh")
    assert capsys.readouterr().err == "hello\nvfmseg: oh\n"
    assert (several(), rank_and_size(), local_rank()) == (False, (0, 1), 0)
    with joined() as place:
        assert place == (0, 1)
    assert own_device() in ("cpu", "cuda:0")


@pytest.mark.pitfall("F11")
def test_settings_of_accelerate_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert connect("no").num_processes == 1
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "bogus")
    with pytest.raises(MachineError, match=r"settings of accelerate .*BOGUS.*; correct them"):
        connect("no")


@pytest.mark.pitfall("F11")
def test_one_of_several_is_told_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert rank_and_size() == (3, 4)
    assert not terminal.is_main_process()
    monkeypatch.setenv("RANK", "abc")  # somebody must say so
    assert terminal.is_main_process()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    toy_folder(folder / "data", {"train": 1, "val": 1, "test": 1})
    save_encoder(folder / "encoder", "dinov2")
    return folder


@pytest.mark.pitfall("F11")
def test_a_run_with_leftovers_of_a_launch_is_a_run_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    recipe = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    recipe["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", recipe)))
    assert (tmp_path / "run" / "best" / "segmenter.json").is_file()
    assert "done: best epoch 1" in capsys.readouterr().err


@pytest.mark.pitfall("F11")
def test_weights_that_the_last_step_made_infinite_are_not_saved(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg.errors import VfmsegError

    real = torch.optim.AdamW.step

    def burst(self: torch.optim.AdamW, *args: object) -> None:
        real(self)
        with torch.no_grad():
            self.param_groups[-1]["params"][0].view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", burst)
    recipe = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    recipe["train"] |= {"epochs": 1, "batch_size": 64}  # one step: no loss is ever computed with what it made
    with pytest.raises(VfmsegError, match=r"training: 1 tensors hold NaN or infinity after epoch 1 .*lower train.*lr"):
        finetune(load_recipe(write_recipe(tmp_path / "r.yaml", recipe)))
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("losses", [{"cross_entropy": 1e308}, {"dice": 1e308, "focal": 1e308}])
@pytest.mark.parametrize("lr", [1e-4, 100])
@pytest.mark.pitfall("F11")
def test_numbers_that_burst_a_training_are_one_message(
    place: Path, tmp_path: Path, losses: dict[str, float], lr: float
) -> None:
    from vfmseg.errors import VfmsegError

    recipe = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    recipe["train"] |= {"epochs": 1, "loss": losses, "optimizer": {"lr": lr, "weight_decay": 100}}
    with pytest.raises(VfmsegError, match=r"^training: .*train\.optimizer\.lr"):
        finetune(load_recipe(write_recipe(tmp_path / "r.yaml", recipe)))
