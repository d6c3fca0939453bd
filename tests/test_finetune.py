"""Fine-tuning end to end on toy scenes: what is trained, what is frozen, what is written, how it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import recipe_dict, save_encoder, toy_folder, write_recipe
from safetensors.torch import load_file

from vfmseg.errors import CheckpointError, DataError, MachineError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter

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


def launch(arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it: by `accelerate launch`, or on several CPU processes by torchrun.

    (On the CPU `accelerate launch` starts one process however many are asked for; on GPUs it starts torchrun itself.)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(ROOT / "vfmseg" / "finetune.py"), *arguments],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip


def records(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` for each "step" or "epoch"."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def trained_tensors(run_folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run_folder / "state.pt", weights_only=True)
    return dict(state["model"])


@pytest.mark.parametrize("family", FAMILIES)
def test_c6_frozen_tensors_stay_bit_identical(
    family: str, data: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    """Train through `accelerate launch`; the base file is untouched and no base tensor is in what was trained."""
    before = (encoders[family] / "model.safetensors").read_bytes()
    recipe = write_recipe(tmp_path / "r.yaml", recipe_dict(data, encoders[family], tmp_path / "run", family))
    done = launch([str(recipe)])
    assert done.returncode == 0, done.stderr
    assert (encoders[family] / "model.safetensors").read_bytes() == before
    trained = trained_tensors(tmp_path / "run")
    for name in trained:
        assert "lora_" in name or name.startswith("decoder."), name
    loaded = Segmenter.from_pretrained(tmp_path / "run" / "best")
    assert loaded.record["encoder"]["sha256"]
    # the adapter opens in plain peft on the upstream model and holds only the encoder's own layers
    adapter = load_file(tmp_path / "run" / "best" / "adapters" / "rgb" / "adapter_model.safetensors")
    assert adapter
    assert all("lora_" in name for name in adapter)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_p5_one_run_moves_every_adapter(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    ups = {n: t for n, t in trained_tensors(tmp_path / "run").items() if "lora_B" in n}
    assert len(ups) == 2 * 3  # q and v of three blocks
    assert all(t.abs().sum() > 0 for t in ups.values())


def test_p6_fresh_process_gives_same_labels_and_probabilities(
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


def test_p55_interrupted_and_resumed_run_ends_with_the_same_weights(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "whole")
    content["train"]["epochs"] = 3
    run(tmp_path, content)
    content["output_dir"] = str(tmp_path / "cut")
    from vfmseg import loop

    honest = loop.Loop._train_epoch

    def stops_in_second_epoch(self: loop.Loop, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        honest(self, epoch)

    monkeypatch.setattr(loop.Loop, "_train_epoch", stops_in_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, content)
    monkeypatch.setattr(loop.Loop, "_train_epoch", honest)
    run(tmp_path, content, resume=True)
    whole, cut = trained_tensors(tmp_path / "whole"), trained_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [records(tmp_path / f, "step") for f in ("whole", "cut")]
    assert logs[0] == logs[1]
    results = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("whole", "cut")]
    assert results[0]["best_epoch"] == results[1]["best_epoch"]
    assert results[0]["validation"] == results[1]["validation"]


def test_p63_an_overwritten_run_cannot_be_resumed(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its first epoch, the new run must not go on from the old one's state, nor show its results."""
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    run(tmp_path, content)
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    from vfmseg import loop

    def interrupted(self: loop.Loop, epoch: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, content, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["mine.txt", "recipe.yaml"]


def test_p55_resume_with_another_recipe_is_refused(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    run(tmp_path, content)
    content["train"]["optimizer"]["lr"] = 0.5
    with pytest.raises(CheckpointError, match=r"lr: 0\.5"):
        run(tmp_path, content, resume=True)


def test_p63_output_of_another_run_is_refused(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(RecipeError, match="--resume"):
        run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_p49_two_processes_equal_one(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    """Same effective batch, cross-entropy and dice: same loss per step, same weights, same validation metrics.

    Four scenes of 64 px give 16 samples an epoch; batches of 6 leave a short last step (uneven ranks).
    """
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "one")
    content["train"] |= {"batch_size": 6, "epochs": 2, "loss": {"cross_entropy": 1.0, "dice": 1.0}}
    content["data"]["samples_per_epoch"] = 15
    one = launch([str(write_recipe(tmp_path / "one.yaml", content))])
    assert one.returncode == 0, one.stderr
    content["train"]["batch_size"] = 3
    content["output_dir"] = str(tmp_path / "two")
    two = launch([str(write_recipe(tmp_path / "two.yaml", content))], processes=2)
    assert two.returncode == 0, two.stderr
    steps = [records(tmp_path / f, "step") for f in ("one", "two")]
    assert len(steps[0]) == len(steps[1]) == 2 * 3
    for a, b in zip(*steps, strict=True):
        assert a["lr"] == b["lr"]  # P50: one schedule, stepped by optimizer step
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * abs(a["loss"])
    epochs = [records(tmp_path / f, "epoch") for f in ("one", "two")]
    for a, b in zip(*epochs, strict=True):
        assert a["validation"]["pixels"] == b["validation"]["pixels"]  # P54: nothing counted twice
        assert abs(a["validation"]["miou"] - b["validation"]["miou"]) < 1e-3
    weights = [trained_tensors(tmp_path / f) for f in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


def test_p49_accumulation_equals_one_large_batch(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
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


def test_p60_fp16_without_a_gpu_is_refused(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"]["precision"] = "fp16"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MachineError, match="needs a GPU"):
        run(tmp_path, content)
    assert not (tmp_path / "run").exists()


def test_p60_bf16_run_is_finite_and_close(data: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe_dict(data, encoders["dinov2"], tmp_path / "run")
    content["train"] |= {"precision": "bf16", "epochs": 1}
    run(tmp_path, content)
    content["train"]["precision"] = "no"
    content["output_dir"] = str(tmp_path / "fp32")
    run(tmp_path, content)
    losses = [[r["loss"] for r in records(tmp_path / f, "step")] for f in ("run", "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_c1_test_split_is_not_read_during_training(
    data: Path, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg.geo import labels, reader

    seen: list[str] = []
    for cls in (reader.Raster, labels.LabelRaster):
        honest = cls.read

        def spy(self: Any, window: Any, honest: Any = honest) -> Any:
            seen.append(str(self.path))
            return honest(self, window)

        monkeypatch.setattr(cls, "read", spy)
    run(tmp_path, recipe_dict(data, encoders["dinov2"], tmp_path / "run"))
    assert any("_train" in path for path in seen)
    assert not [path for path in seen if "_test" in path]


def test_p30_unknown_label_ids_are_refused_before_training(
    data: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
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
    from vfmseg.loop import learning_rate

    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[-1] < 0.001
