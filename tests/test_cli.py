"""The command line as a user meets it: help, exit codes, one clear message, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import recipe_dict, save_encoder, toy_folder, toy_scene, write_raster, write_recipe

ROOT = Path(__file__).resolve().parents[1]


def vfmseg(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vfmseg.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=200, check=False, env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    toy_folder(folder / "data", {"train": 2, "val": 1, "test": 1})
    save_encoder(folder / "encoder", "dinov2")
    return folder


def content(place: Path, output: Path) -> dict[str, Any]:
    return recipe_dict(place / "data", place / "encoder", output)


def refused(place: Path, tmp_path: Path, change: Any) -> str:
    """Run `vfmseg finetune` on a changed recipe; it must end with 2, one message and no output folder."""
    changed = content(place, tmp_path / "run")
    change(changed)
    done = vfmseg("finetune", write_recipe(tmp_path / "r.yaml", changed))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    return done.stderr


def test_help_answers_within_a_second_and_shows_examples() -> None:
    started = time.process_time()
    children = os.times().children_user
    done = vfmseg("--help")
    spent = os.times().children_user - children + time.process_time() - started
    assert done.returncode == 0
    assert spent < 1.0
    for verb in ("finetune", "predict", "evaluate", "demo"):
        assert verb in done.stdout
        assert f"vfmseg {verb}" in vfmseg(verb, "--help").stdout.split("Example:")[1]


def test_finetune_evaluate_predict(place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", content(place, tmp_path / "run"))
    done = vfmseg("finetune", recipe, "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"encoder +[1-9]", done.stderr)  # the table of trainable parameters
    scored = vfmseg("evaluate", tmp_path / "run" / "best", recipe, "--json")
    assert scored.returncode == 0, scored.stderr
    assert 0 <= json.loads(scored.stdout)["miou"] <= 1
    assert "mean IoU" in vfmseg("evaluate", tmp_path / "run" / "best", recipe).stdout
    image, _ = toy_scene(5)
    scene = write_raster(tmp_path / "scene.tif", image, crs=None)
    started = time.perf_counter()
    done = vfmseg("predict", tmp_path / "run" / "best", scene, "-o", tmp_path / "labels.tif", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"].endswith("labels.tif")
    assert time.perf_counter() - started < 60  # about 7 s on a quiet machine, nearly all of it imports
    again = vfmseg("finetune", recipe, "train.epochs=1")
    assert again.returncode == 2
    assert "--resume" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["train"].update(epoch=3), "did you mean 'epochs'"),
        (lambda r: r["train"].update(epochs="many"), "train.epochs"),
        (lambda r: r["data"]["train"].update(rgb="nowhere/*.tif"), "nowhere"),
        (lambda r: r["data"]["modalities"]["rgb"].update(bands=[1, 2, 9]), "band 9"),
        (lambda r: r["model"]["encoder"].update(checkpoint="/no/such/encoder"), "/no/such/encoder"),
        (lambda r: r["model"]["encoder"].update(layers=[9]), "9"),
        (lambda r: r["data"].update(classes={4: "a", 5: "b"}), "0"),
    ],
    ids=["unknown key", "wrong type", "empty glob", "band", "encoder", "layer", "label ids"],
)
def test_p62_bad_input_is_one_message_and_exit_code_2(place: Path, tmp_path: Path, change: Any, message: str) -> None:
    assert message in refused(place, tmp_path, change)


def test_p62_truncated_image_names_the_file(place: Path, tmp_path: Path) -> None:
    broken = toy_folder(tmp_path / "data", {"train": 1, "val": 1, "test": 1})
    file = broken / "train" / "images" / "s0_train.tif"
    file.write_bytes(file.read_bytes()[:900])
    recipe = recipe_dict(broken, place / "encoder", tmp_path / "run")
    done = vfmseg("finetune", write_recipe(tmp_path / "r.yaml", recipe))
    assert done.returncode == 2, done.stderr
    assert "s0_train.tif" in done.stderr
    assert not (tmp_path / "run" / "best").exists()


def test_p31_unpaired_and_misfit_labels(place: Path, tmp_path: Path) -> None:
    data = toy_folder(tmp_path / "data", {"train": 2, "val": 1, "test": 1})
    label = data / "train" / "labels" / "s1_train.tif"
    label.rename(data / "train" / "labels" / "other.tif")
    recipe = write_recipe(tmp_path / "r.yaml", recipe_dict(data, place / "encoder", tmp_path / "run"))
    done = vfmseg("finetune", recipe)
    assert done.returncode == 2
    assert "s1_train" in done.stderr
    (data / "train" / "labels" / "other.tif").unlink()
    write_raster(label, np.zeros((10, 10), np.uint8))
    done = vfmseg("finetune", recipe)
    assert done.returncode == 2
    assert "10 x 10" in done.stderr


def test_a_pickled_encoder_is_refused(place: Path, tmp_path: Path) -> None:
    import torch

    (tmp_path / "enc").mkdir()
    (tmp_path / "enc" / "config.json").write_text((place / "encoder" / "config.json").read_text())
    torch.save({"x": Path("code")}, tmp_path / "enc" / "pytorch_model.bin")
    message = refused(place, tmp_path, lambda r: r["model"]["encoder"].update(checkpoint=str(tmp_path / "enc")))
    assert "expected model.safetensors" in message


def test_a_run_state_with_code_is_refused(place: Path, tmp_path: Path) -> None:
    import torch

    (tmp_path / "run").mkdir()
    torch.save({"recipe": Path("code")}, tmp_path / "run" / "state.pt")
    recipe = write_recipe(tmp_path / "r.yaml", content(place, tmp_path / "run"))
    done = vfmseg("finetune", recipe, "--resume")
    assert done.returncode == 2, done.stderr
    assert "state.pt" in done.stderr


def test_p37_full_disk_while_saving_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails half-way, the folder stays as it was."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from vfmseg.files import whole_folder
from vfmseg.terminal import guarded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
target = Path({str(tmp_path / "best")!r})
with whole_folder(target) as aside:
    (aside / "a").write_bytes(b"old")
def verb():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with whole_folder(target) as aside:
        (aside / "a").write_bytes(b"x" * 5000)
sys.exit(guarded(verb))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "best" / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_p37_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vfmseg.files import whole_folder

    with whole_folder(tmp_path / "best") as aside:
        (aside / "a").write_bytes(b"old")
    honest = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="no"), whole_folder(tmp_path / "best") as aside:
        (aside / "a").write_bytes(b"new")
    assert (tmp_path / "best" / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_p63_overwrite_replaces_the_run(place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", content(place, tmp_path / "run"))
    assert vfmseg("finetune", recipe, "train.epochs=1").returncode == 0
    done = vfmseg("finetune", recipe, "train.epochs=2", "--overwrite")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "epoch" for line in lines) == 2


def test_c38_examples_run(place: Path, tmp_path: Path) -> None:
    def example(name: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "validation mIoU" in example("first_segmenter.py", tmp_path / "first")
    assert "LoRA sits on" in example("own_encoder.py", place / "encoder")
    image, _ = toy_scene(5, 70, 90)
    scene = write_raster(tmp_path / "scene.tif", image)
    counted = example("predict_scene.py", tmp_path / "first" / "run" / "best", scene, tmp_path / "labels.tif")
    pixels = [int(number.replace(",", "")) for number in re.findall(r": ([\d,]+) pixels", counted)]
    assert sum(pixels) == 70 * 90


def test_c38_recipes_name_what_exists() -> None:
    from vfmseg.recipe import load_recipe

    names = {load_recipe(path).name for path in (ROOT / "recipes").glob("*.yaml")}
    assert names == {"oam-buildings", "aerial-multiclass", "s2-india-rgb-ir"}
