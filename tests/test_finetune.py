"""Fine-tuning end to end on toy scenes: what is trained, what is frozen, what is written, how it goes on."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rasterio
import torch
from makers import recipe_dict, save_encoder, toy_folder, write_raster, write_recipe
from safetensors.torch import load_file

from vfmseg.errors import BusyError, CheckpointError, DataError, MachineError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.terminal import guarded
from vfmseg.training.loop import _plain_errors, dropout_seed
from vfmseg.training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("dinov2", "clip", "sam")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {family: save_encoder(folder / family, family) for family in FAMILIES}


def run(folder: Path, content: dict[str, Any], **how: bool) -> dict[str, Any]:
    return finetune(load_recipe(write_recipe(folder / "recipe.yaml", content)), **how)


def launch(
    arguments: list[str], processes: int = 1, script: Path = ROOT / "vfmseg" / "finetune.py"
) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it: by `accelerate launch`, or on several CPU processes by torchrun.

    (On the CPU `accelerate launch` starts one process however many are asked for; on GPUs it starts torchrun itself.)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(script), *arguments],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, epoch: int) -> Iterator[None]:
    """The training started in this block is interrupted when it begins this epoch, counted from 0."""
    from vfmseg.training import loop

    honest = loop.Loop._train_epoch

    def until(self: loop.Loop, number: int, tell: Any) -> None:
        if number == epoch:
            raise KeyboardInterrupt
        honest(self, number, tell)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train_epoch", until)
        with pytest.raises(KeyboardInterrupt):
            yield


def records(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` for each "step" or "epoch"."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def trained_tensors(run_folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run_folder / "state.pt", weights_only=True)
    return dict(state["tensors"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.pitfall("C6")
def test_frozen_tensors_stay_bit_identical(family: str, data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    """Train through `accelerate launch`; the base file is untouched and no base tensor is in what was trained."""
    before = (encoders[family] / "model.safetensors").read_bytes()
    recipe = write_recipe(tmp_path / "r.yaml", recipe_dict(data, encoders[family], tmp_path / "run", family))
    done = launch([str(recipe)])
    assert done.returncode == 0, done.stderr
    assert (encoders[family] / "model.safetensors").read_bytes() == before
    trained = trained_tensors(tmp_path / "run")
    for name in trained:
        assert "lora_" in name or name.startswith("model.decoder."), name
    loaded = Segmenter.from_pretrained(tmp_path / "run" / "best")
    assert loaded.record["encoder"]["sha256"]
    # the adapter opens in plain peft on the upstream model and holds only the encoder's own layers
    adapter = load_file(tmp_path / "run" / "best" / "adapters" / "rgb" / "adapter_model.safetensors")
    assert adapter
    assert all("lora_" in name for name in adapter)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.pitfall("P5")
def test_one_run_moves_every_adapter(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    ups = {n: t for n, t in trained_tensors(tmp_path / "run").items() if "lora_B" in n}
    assert len(ups) == 2 * 3  # q and v of three blocks
    assert all(t.abs().sum() > 0 for t in ups.values())


@pytest.mark.pitfall("P6")
def test_fresh_process_gives_same_labels_and_probabilities(
    data: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    scene = data / "test" / "images" / "s0_test.tif"
    segmenter = Segmenter.from_pretrained(tmp_path / "run" / "best")
    labels, probabilities = segmenter.predict(str(scene)), segmenter.probabilities(str(scene))
    script = (
        "import sys, numpy, torch; torch.set_num_threads(1); from vfmseg import Segmenter\n"
        "s = Segmenter.from_pretrained(sys.argv[1])\n"
        "numpy.savez(sys.argv[3], l=s.predict(sys.argv[2]), p=s.probabilities(sys.argv[2]))"
    )
    out = tmp_path / "fresh.npz"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run" / "best"), str(scene), str(out)], check=True)
    import numpy as np

    fresh = np.load(out)
    np.testing.assert_array_equal(fresh["l"], labels)
    np.testing.assert_array_equal(fresh["p"], probabilities)


@pytest.mark.pitfall("P55")
def test_interrupted_and_resumed_run_ends_with_the_same_weights(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "whole")
    content["train"]["epochs"] = 3
    run(tmp_path, content)
    content["output_dir"] = str(tmp_path / "cut")
    with interrupted(monkeypatch, epoch=1):
        run(tmp_path, content)
    Segmenter.from_pretrained(tmp_path / "cut" / "last")  # every finished epoch leaves one that can be used
    run(tmp_path, content, resume=True)
    whole, cut = trained_tensors(tmp_path / "whole"), trained_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [records(tmp_path / f, "step") for f in ("whole", "cut")]
    assert logs[0] == logs[1]
    results = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("whole", "cut")]
    assert results[0]["best_epoch"] == results[1]["best_epoch"]
    assert results[0]["validation"] == results[1]["validation"]


@pytest.mark.pitfall("P55")
def test_the_minutes_of_a_resumed_run_are_those_of_all_sittings(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["epochs"] = 2
    with interrupted(monkeypatch, epoch=1):
        run(tmp_path, content)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert 0 < state["state"]["seconds"] < 60
    state["state"]["seconds"] = 600.0
    torch.save(state, tmp_path / "run" / "state.pt")
    assert 10 <= run(tmp_path, content, resume=True)["minutes"] < 11


@pytest.mark.pitfall("P63")
def test_an_overwritten_run_cannot_be_resumed(
    data: Path,
    encoders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted in its first epoch, the new run must not go on from the old one's state."""
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    run(tmp_path, content)
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with interrupted(monkeypatch, epoch=0):
        run(tmp_path, content, overwrite=True)
    capsys.readouterr()
    run(tmp_path, content, resume=True)
    assert "starts with the first one" in capsys.readouterr().err
    assert [r["step"] for r in records(tmp_path / "run", "step")] == list(range(1, 9))
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"


@pytest.mark.pitfall("P55")
def test_resume_with_another_recipe_is_refused(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    run(tmp_path, content)
    content["train"]["optimizer"]["lr"] = 0.5
    with pytest.raises(CheckpointError, match=r"lr: 0\.5"):
        run(tmp_path, content, resume=True)


@pytest.mark.parametrize("what", ["encoder", "values", "bands", "processes"])
@pytest.mark.pitfall("P55")
def test_a_run_goes_on_only_where_it_stood(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What the state does not hold, frozen weights and statistics, must be what it was, or another model learns on."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(encoders["dinov2"], tmp_path / "encoder")
    content = recipe_dict(tmp_path / "data", tmp_path / "encoder", tmp_path / "run")
    content["data"]["modalities"]["rgb"] = {"normalize": "dataset"}
    with interrupted(monkeypatch, epoch=1):
        run(tmp_path, content)
    said = {
        "encoder": "started on an encoder with SHA-256",
        "values": "mean and std of the training scenes' rgb have changed",  # also told by states without traces
        "bands": "had bands {'rgb': 3}, now they have {'rgb': 2}",
        "processes": "started with 3 processes, now there are 1",
    }
    if what == "encoder":
        shutil.rmtree(tmp_path / "encoder")
        save_encoder(tmp_path / "encoder", "dinov2", seed=5)
    elif what in ("processes", "values"):
        state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
        state["origin"] |= {"processes": 3} if what == "processes" else {"data": {}}
        torch.save(state, tmp_path / "run" / "state.pt")
    if what in ("values", "bands"):
        for path in (tmp_path / "data" / "train" / "images").iterdir():
            with rasterio.open(path) as image:
                pixels = image.read()
            write_raster(path, pixels // 2 if what == "values" else pixels[:2])
        for path in (*(tmp_path / "data" / split / "images" for split in ("val", "test")),) if what == "bands" else ():
            for file in path.iterdir():
                with rasterio.open(file) as image:
                    pixels = image.read()
                write_raster(file, pixels[:2])
    with pytest.raises(CheckpointError, match=re.escape(said[what])):
        run(tmp_path, content, resume=True)


@pytest.mark.pitfall("P55")
def test_what_decides_no_weight_may_change_between_sittings(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    with interrupted(monkeypatch, epoch=1):
        run(tmp_path, content)
    (tmp_path / "run").rename(tmp_path / "moved")
    content |= {"output_dir": str(tmp_path / "moved"), "predict": {"overlap": 0.5}}
    content["data"]["workers"] = 1
    content["train"]["track"] = "tensorboard"
    run(tmp_path, content, resume=True)
    assert [r["step"] for r in records(tmp_path / "moved", "step")] == list(range(1, 9))


@pytest.mark.pitfall("P63")
def test_a_run_without_its_state_is_not_gone_on_with(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    run(tmp_path, content)
    (tmp_path / "run" / "state.pt").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"no state\.pt, without which a run cannot go on"):
        run(tmp_path, content, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [1],
        lambda state: {name: state[name] for name in state if name != "optimizer"},
        lambda state: state | {"state": {"surplus": 1}},
        lambda state: state | {"optimizer": {"state": {}, "param_groups": []}},
        lambda state: state | {"state": state["state"] | {"step": 3}},
    ],
    ids=["list", "no optimizer", "another state", "no groups", "another number of steps an epoch"],
)
@pytest.mark.pitfall("P55")
def test_a_state_that_does_not_fit_is_refused(
    data: Path, encoders: dict[str, Path], tmp_path: Path, change: Any
) -> None:
    """The last: an epoch has 4 steps here, so its 3 were made with other scenes or another number of processes."""
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["epochs"] = 1
    run(tmp_path, content)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["state"]["step"] == 4
    torch.save(change(state), tmp_path / "run" / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt.*--overwrite"):
        run(tmp_path, content, resume=True)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.pitfall("P55")
def test_a_state_of_an_earlier_version_is_refused_by_its_format(
    data: Path, encoders: dict[str, Path], tmp_path: Path, sealed: bool
) -> None:
    """It had no format, its trained tensors under `model` by other names, and at first no seal."""
    from vfmseg.disk.seal import seal

    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    with interrupted(pytest.MonkeyPatch(), epoch=1):
        run(tmp_path, content)
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["format"]
    state["model"] = {name.removeprefix("model."): tensor for name, tensor in state.pop("tensors").items()}
    torch.save(state, path)
    if sealed:
        seal(path, "state")
    before = path.read_bytes()
    message = (
        f"{path}: is the state of a run in format 1, but this version of vfmseg goes on with format 2; finish the run "
        "with the version that began it, or start anew with --overwrite"
    )
    for how in ({}, {"accept_changed_data": True}):
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            run(tmp_path, content, resume=True, **how)
    assert path.read_bytes() == before
    assert run(tmp_path, content, overwrite=True)["best_epoch"]


@pytest.mark.pitfall("P63")
def test_resume_goes_on_with_a_run_or_says_that_there_is_none(
    data: Path, encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["epochs"] = 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(RecipeError, match=r"mine\.txt, but no run"):
        run(tmp_path, content, resume=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
    (tmp_path / "run" / "mine.txt").unlink()
    run(tmp_path, content, resume=True)
    assert "starts with the first" in capsys.readouterr().err


@pytest.mark.pitfall("P63")
def test_overwrite_never_removes_a_folder_that_is_no_segmenter(
    data: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "photo.jpg").write_text("keep me")
    with pytest.raises(CheckpointError, match="best"):
        run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"), overwrite=True)
    assert (tmp_path / "run" / "best" / "photo.jpg").read_text() == "keep me"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["best"]


@pytest.mark.pitfall("P37")
def test_leftovers_of_a_killed_run_are_removed(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["epochs"] = 1
    for again in (False, True):
        (tmp_path / "run" / ".best.123.old").mkdir(parents=True)
        (tmp_path / "run" / ".state.pt.123.partial").write_text("half")
        run(tmp_path, content, overwrite=again)  # without a run they are no reason to refuse
        (tmp_path / "run" / ".mine.old").write_text("keep me")
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")] == [".mine.old"]


@pytest.mark.pitfall("P63")
def test_the_results_of_an_earlier_run_go_when_its_segmenter_goes(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    run(tmp_path, content)
    with interrupted(monkeypatch, epoch=1):
        run(tmp_path, content, overwrite=True)
    names = ["best", "last", "metrics.jsonl", "recipe.yaml", "state.pt"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == names


@pytest.mark.parametrize("how", ["resume", "overwrite", ""])
@pytest.mark.pitfall("P63")
def test_a_folder_with_the_users_own_files_is_no_run(
    data: Path, encoders: dict[str, Path], tmp_path: Path, how: str
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path)
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", content))
    (tmp_path / "metrics.json").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RecipeError, match=r"metrics\.json, recipe\.yaml, but no run"):
        finetune(recipe, **({how: True} if how else {}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.pitfall("P63")
def test_a_run_that_fails_before_its_first_epoch_ends_replaces_nothing(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["epochs"] = 1
    broken = copy.deepcopy(content)
    broken["data"]["train"]["rgb"] = str(tmp_path / "cut" / "*.tif")
    shutil.copytree(data / "train" / "images", tmp_path / "cut")
    last = max((tmp_path / "cut").iterdir())  # the first one is looked at before the training begins
    last.write_bytes(last.read_bytes()[:-4000])
    with pytest.raises(DataError, match="cut short"):
        run(tmp_path, broken)
    assert not (tmp_path / "run").exists()
    run(tmp_path, content)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="cut short"):
        run(tmp_path, broken, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def fails(*_: object) -> None:
        raise DataError("an image that is read for the first time is cut short")

    monkeypatch.setattr("vfmseg.training.loop.Loop._step", fails)
    content["train"]["optimizer"]["lr"] = 0.02
    with pytest.raises(DataError, match="cut short"):
        run(tmp_path, content, overwrite=True)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    state = tmp_path / "run" / "state.pt"  # the results stay, but it is the new run that can be gone on with
    assert after.pop(state) != before.pop(state)
    assert after == before


@pytest.mark.parametrize(("part", "file"), [("head.safetensors", "last"), ("state.pt", "state.pt")])
@pytest.mark.pitfall("P37")
def test_full_disk_is_one_message_and_names_the_file(
    data: Path,
    encoders: dict[str, Path],
    tmp_path: Path,
    part: str,
    file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file size limit stands for the full disk, which safetensors and torch report in their own ways."""
    resource = pytest.importorskip("resource")
    from vfmseg.checkpoint import writing as checkpoint
    from vfmseg.training import resume

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest = {"head.safetensors": checkpoint.save_file, "state.pt": torch.save}[part]

    def on_a_full_disk(content: Any, path: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            honest(content, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    room, name = (checkpoint, "save_file") if part == "head.safetensors" else (resume.torch, "save")
    monkeypatch.setattr(room, name, on_a_full_disk)
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    assert guarded(lambda: run(tmp_path, content) and None) == 3
    assert f"run/{file}: could not be written" in capsys.readouterr().err
    held = {p.name for p in (tmp_path / "run").glob("*")}
    assert not [name for name in held if name.startswith(".") or name == file]


@contextmanager
def training(folder: Path, content: dict[str, Any], how: str) -> Iterator[None]:
    """A run that is about to train its second epoch, in a thread of its own, while the block runs; then it ends."""
    from vfmseg.training import loop

    there, go_on, errors = threading.Event(), threading.Event(), []
    honest = loop.Loop._train_epoch

    def wait(self: loop.Loop, number: int, tell: Any) -> None:
        if number == 1 and threading.current_thread() is thread:
            there.set()
            assert go_on.wait(60)
        honest(self, number, tell)

    def start() -> None:
        try:
            run(folder, content, **({how: True} if how else {}))
        except BaseException as error:
            errors.append(error)
            there.set()

    thread = threading.Thread(target=start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_train_epoch", wait)
        thread.start()
        try:
            assert there.wait(60)
            yield
        finally:
            go_on.set()
            thread.join()
    assert errors == []


@pytest.mark.parametrize("how", ["", "overwrite"])
@pytest.mark.pitfall("F2")
def test_a_second_run_in_one_folder_is_refused_and_the_first_ends_as_if_alone(
    data: Path, encoders: dict[str, Path], tmp_path: Path, how: str
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "alone")
    run(tmp_path, content)
    content["output_dir"] = str(tmp_path / "run")
    if how:
        run(tmp_path, content)
    other = copy.deepcopy(content)
    other["seed"] = 5
    with training(tmp_path, content, how):
        mine = tmp_path / "run" / f".last.{os.getpid()}.partial"  # as while a segmenter is written
        mine.mkdir()
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        for second in ("overwrite", "resume", ""):
            with pytest.raises(BusyError, match=rf"run: another run .*process {os.getpid()}.*training toy"):
                run(tmp_path, other, **({second: True} if second else {}))
        assert mine.is_dir()
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
        assert guarded(lambda: run(tmp_path, other, overwrite=True) and None) == 2
    whole, together = trained_tensors(tmp_path / "alone"), trained_tensors(tmp_path / "run")
    assert all(torch.equal(whole[name], together[name]) for name in whole)
    names = ["best", "last", "metrics.json", "metrics.jsonl", "recipe.yaml", "state.pt"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names


@pytest.mark.skipif(os.name != "posix", reason="Windows has no flock")
@pytest.mark.pitfall("F2")
def test_a_killed_run_leaves_no_lock_that_holds(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    script = (
        "import os, sys; from vfmseg import finetune; from vfmseg.training import loop\n"
        "loop.Loop._train_epoch = lambda *_: os.kill(os.getpid(), 9)\n"
        "finetune.main([sys.argv[1]])"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(recipe)], capture_output=True, check=False)
    assert killed.returncode == -9
    assert (tmp_path / "run" / ".lock").is_file()
    finetune(load_recipe(recipe), resume=True)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.pitfall("P62")
def test_output_below_a_file_is_refused_before_training(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(RecipeError, match="is a file"):
        run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "file" / "run"))


@pytest.mark.pitfall("P55")
def test_the_resume_line_of_a_launch_repeats_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vfmseg import finetune as script

    def interrupted(path: Path, overrides: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_recipe", interrupted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    line = "vfmseg/finetune.py 'my recipe.yaml' train.epochs=5 seed=3 --resume"
    for launcher in ("torchrun --nproc_per_node", "accelerate launch --num_processes"):
        assert script.main(["my recipe.yaml", "train.epochs=5", "seed=3", "--overwrite"]) == 130
        assert capsys.readouterr().err.strip().endswith(f"{launcher} 2 {line}")
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.mark.pitfall("P62")
def test_overrides_may_follow_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vfmseg import finetune as script

    given: list[Any] = []
    monkeypatch.setattr(script, "load_recipe", lambda path, overrides: given.append((path, overrides)))
    monkeypatch.setattr(script, "finetune", lambda recipe, *how: given.append(how))
    assert script.main(["a.yaml", "--overwrite", "train.epochs=5", "seed=3"]) == 0
    assert given == [(Path("a.yaml"), ["train.epochs=5", "seed=3"]), (False, True, False)]
    assert script.main(["a.yaml", "--resume", "--accept-changed-data"]) == 0
    assert given[3] == (True, False, True)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
@pytest.mark.pitfall("P49")
def test_settings_that_cut_the_model_over_processes_are_refused(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`accelerate launch` takes them from the machine's configuration without being asked to."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(MachineError, match=f"configured to use {kind}"):
        run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.pitfall("P49")
def test_accelerates_own_accumulation_changes_nothing(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would divide the gradients before they are clipped."""
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "one")
    content["train"] |= {"epochs": 1, "clip": 0.05}
    run(tmp_path, content)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1000000")
    content["output_dir"] = str(tmp_path / "two")
    run(tmp_path, content)
    one, two = trained_tensors(tmp_path / "one"), trained_tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.pitfall("P49")
def test_processes_that_are_not_connected_are_an_error(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would train a model of its own, and all would write it to one place."""
    monkeypatch.setattr("accelerate.Accelerator", lambda **settings: SimpleNamespace(num_processes=1))
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="2 processes were started, but accelerate connected 1"):
        run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.pitfall("P63")
def test_output_of_another_run_is_refused(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(RecipeError, match="--resume"):
        run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


# `finetune.py` that also notes, per epoch and process, the hash of its weights and which of them got no gradient.
WITNESS = """
import hashlib, json, os, sys
import torch
from vfmseg import finetune
from vfmseg.training import loop

train_epoch, adamw_step = loop.Loop._train_epoch, torch.optim.AdamW.step
unused = []

def step(self, closure=None):
    unused.extend(p for group in self.param_groups for p in group["params"] if p.grad is None)
    return adamw_step(self, closure)

def epoch(self, number, tell):
    train_epoch(self, number, tell)
    digest = hashlib.sha256()
    for name, tensor in sorted(self.step.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    searches = getattr(self.wrapped, "find_unused_parameters", False)
    seen = {"epoch": number, "weights": digest.hexdigest(), "unused": len(unused), "searches": searches}
    with open(os.environ["WITNESS"] + os.environ["RANK"], "a") as file:
        file.write(json.dumps(seen) + chr(10))

loop.Loop._train_epoch, torch.optim.AdamW.step = epoch, step
sys.exit(finetune.main())
"""


@pytest.mark.pitfall("P49", "P50", "P51", "P52", "P53", "P54")
def test_two_processes_equal_one(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same effective batch, cross-entropy and dice: same loss per step, same weights, same validation metrics.

    15 samples an epoch in batches of 6 leave a short last step (uneven ranks). Validation has 7 windows: batches of
    3 and 1 on one process, of 3 on the other.
    """
    toy_folder(tmp_path / "data", {"val": 1}, height=32, width=7 * 32)
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "one")
    content["data"]["val"] = recipe_dict(tmp_path / "data", None, tmp_path)["data"]["val"]
    content["train"] |= {"batch_size": 6, "epochs": 2, "loss": {"cross_entropy": 1.0, "dice": 1.0}}
    content["data"]["samples_per_epoch"] = 15
    one = launch([str(write_recipe(tmp_path / "one.yaml", content))])
    assert one.returncode == 0, one.stderr
    content["train"]["batch_size"] = 3
    content["output_dir"] = str(tmp_path / "two")
    (tmp_path / "witness.py").write_text(WITNESS)
    monkeypatch.setenv("WITNESS", str(tmp_path / "rank"))
    # P52: a wait for a batch that never comes would end in the time limit of `launch`
    recipe = write_recipe(tmp_path / "two.yaml", content)
    two = launch([str(recipe)], processes=2, script=tmp_path / "witness.py")
    assert two.returncode == 0, two.stderr
    steps = [records(tmp_path / f, "step") for f in ("one", "two")]
    table = [learning_rate(step, 2 * 3, 0.01, 0.05) for step in range(2 * 3)]
    assert all([record["lr"] for record in log] == table for log in steps)  # P50: one table, in the log of both
    for a, b in zip(*steps, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * abs(a["loss"])
    ranks = [[json.loads(line) for line in (tmp_path / f"rank{r}").read_text().splitlines()] for r in (0, 1)]
    assert ranks[0] == ranks[1]  # P50, P51: the same weights on both after each epoch
    assert len({seen["weights"] for seen in ranks[0]}) == 2  # which are not those of the epoch before
    assert all(seen["unused"] == 0 and seen["searches"] is False for seen in ranks[0])  # P53
    epochs = [records(tmp_path / f, "epoch") for f in ("one", "two")]
    for a, b in zip(*epochs, strict=True):
        assert a["validation"]["pixels"] == b["validation"]["pixels"] == 7 * 32 * 32  # P54: nothing counted twice
        assert abs(a["validation"]["miou"] - b["validation"]["miou"]) < 1e-3
    weights = [trained_tensors(tmp_path / f) for f in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.pitfall("P49")
def test_accumulation_equals_one_large_batch(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "large")
    content["train"] |= {"batch_size": 8, "epochs": 1}
    content["data"]["samples_per_epoch"] = 13  # a short last group
    run(tmp_path, content)
    content["train"] |= {"batch_size": 2, "accumulate": 4}
    content["output_dir"] = str(tmp_path / "small")
    run(tmp_path, content)
    steps = [[r["loss"] for r in records(tmp_path / f, "step")] for f in ("large", "small")]
    assert len(steps[0]) == len(steps[1]) == 2
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


@pytest.mark.pitfall("P60")
def test_fp16_without_a_gpu_is_refused(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["precision"] = "fp16"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MachineError, match="needs a GPU"):
        run(tmp_path, content)
    assert not (tmp_path / "run").exists()


@pytest.mark.pitfall("P60")
def test_fp16_is_refused_where_accelerate_uses_the_cpu(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is there, but `accelerate config` says otherwise."""
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["precision"] = "fp16"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(MachineError, match="accelerate is configured to use the CPU"):
        run(tmp_path, content)


@pytest.mark.pitfall("P60")
def test_bf16_run_is_finite_and_close(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"] |= {"precision": "bf16", "epochs": 1}
    run(tmp_path, content)
    content["train"]["precision"] = "no"
    content["output_dir"] = str(tmp_path / "fp32")
    run(tmp_path, content)
    losses = [[r["loss"] for r in records(tmp_path / f, "step")] for f in ("run", "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.pitfall("C1")
def test_test_split_is_not_read_during_training(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg.geo import labels, reader

    seen: list[str] = []
    for cls in (reader.Raster, labels.LabelRaster):
        honest = cls.read

        def spy(self: Any, *arguments: Any, honest: Any = honest) -> Any:
            seen.append(str(self.path))
            return honest(self, *arguments)

        monkeypatch.setattr(cls, "read", spy)
    run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    assert any("_train" in path for path in seen)
    assert not [path for path in seen if "_test" in path]


@pytest.mark.pitfall("P62")
def test_a_worker_that_has_ended_is_one_message() -> None:
    """Also what a script without `if __name__ == "__main__":` ends with."""

    def batches() -> Iterator[Any]:
        yield "first"
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")

    def others() -> Iterator[Any]:
        yield "first"
        raise RuntimeError("shapes do not match")

    told = _plain_errors(batches())
    assert next(told) == "first"
    with pytest.raises(MachineError, match=r"__main__.*data\.workers=0"):
        next(told)
    with pytest.raises(RuntimeError, match="shapes"):
        list(_plain_errors(others()))


@pytest.mark.pitfall("P62")
def test_an_error_in_a_worker_is_one_message(encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "data", {"train": 1, "val": 1, "test": 1}, 300, 300)
    content = recipe_dict(folder, encoders["dinov2"], tmp_path / "run")
    content["data"] |= {"workers": 1, "modalities": {"rgb": {"normalize": "encoder"}}}
    image = folder / "train" / "images" / "s0_train.tif"
    image.write_bytes(image.read_bytes()[: 300 * 300])
    with pytest.raises(DataError, match=r"^[^\n]*s0_train\.tif: rows [^\n]* cannot be read[^\n]*$") as caught:
        run(tmp_path, content)
    assert "Traceback" not in str(caught.value)


@pytest.mark.pitfall("P30")
def test_unknown_label_ids_are_refused_before_training(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["data"] |= {"classes": {2: "a", 3: "b"}, "ignore_index": 0}
    with pytest.raises(DataError, match=r"s0_train\.tif"):
        run(tmp_path, content)
    assert not (tmp_path / "run").exists()


def test_learning_falls_on_the_toy(data: Path, tmp_path: Path) -> None:
    """The built-in encoder, trained whole, learns the disc: a run that learns nothing fails here."""
    content = recipe_dict(data, None, tmp_path / "run")
    content["train"] |= {"epochs": 3, "batch_size": 4, "optimizer": {"lr": 0.001}}
    content["data"]["samples_per_epoch"] = 24
    result = run(tmp_path, content)
    assert result["validation"]["miou"] > 0.8
    assert result["trainable_parameters"] == result["total_parameters"]


def test_loop_learning_rate_is_a_closed_form() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[-1] < 0.001


@pytest.mark.pitfall("P57")
def test_dropout_seed_is_another_for_each_epoch_and_process() -> None:
    """The same on every machine, so that a run can go on elsewhere; neighbours and negative seeds do not meet."""
    where = [(seed, epoch, rank) for seed in (-2, -1, 0, 1, 2) for epoch in range(4) for rank in range(4)]
    assert len({dropout_seed(*one) for one in where}) == len(where)
    assert dropout_seed(0, 0, 0) == 6569863346532939966
