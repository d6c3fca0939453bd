"""The command line as a user meets it: help, exit codes, one clear message, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import hear_ctrl_c, recipe_dict, save_encoder, toy_folder, toy_scene, write_raster, write_recipe

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
    for verb in ("finetune", "predict", "evaluate", "compare", "demo"):
        assert verb in done.stdout
        assert f"vfmseg {verb}" in vfmseg(verb, "--help").stdout.split("Example:")[1]


def test_finetune_evaluate_predict(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", content(place, tmp_path / "run"))
    done = vfmseg("finetune", recipe, "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"encoder +0 +[1-9].*\nadapter +[1-9].*\ndecoder +[1-9]", done.stderr)  # what learns, by part
    scored = vfmseg("evaluate", tmp_path / "run" / "best", recipe, "--json")
    assert scored.returncode == 0, scored.stderr
    assert 0 <= json.loads(scored.stdout)["miou"] <= 1
    assert "mean IoU" in vfmseg("evaluate", tmp_path / "run" / "best", recipe).stdout
    with monkeypatch.context() as patch:  # of several processes one prints
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        silent = vfmseg("evaluate", tmp_path / "run" / "best", recipe, "--json")
        assert (silent.returncode, silent.stdout) == (0, "")
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
@pytest.mark.pitfall("P62")
def test_bad_input_is_one_message_and_exit_code_2(place: Path, tmp_path: Path, change: Any, message: str) -> None:
    assert message in refused(place, tmp_path, change)


@pytest.mark.pitfall("P62")
def test_truncated_image_names_the_file(place: Path, tmp_path: Path) -> None:
    broken = toy_folder(tmp_path / "data", {"train": 1, "val": 1, "test": 1})
    file = broken / "train" / "images" / "s0_train.tif"
    file.write_bytes(file.read_bytes()[:900])
    recipe = recipe_dict(broken, place / "encoder", tmp_path / "run")
    done = vfmseg("finetune", write_recipe(tmp_path / "r.yaml", recipe))
    assert done.returncode == 2, done.stderr
    assert "s0_train.tif" in done.stderr
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.pitfall("P31")
def test_unpaired_and_misfit_labels(place: Path, tmp_path: Path) -> None:
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


@pytest.mark.pitfall("P37")
def test_full_disk_while_saving_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails half-way, the folder stays as it was."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from vfmseg.disk.files import whole_folder
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


@pytest.mark.pitfall("P63")
def test_a_new_segmenter_leaves_what_others_have_put_beside_the_old_one(tmp_path: Path) -> None:
    from vfmseg.checkpoint.folder import OWN
    from vfmseg.disk.files import whole_folder

    best = tmp_path / "best"
    with whole_folder(best, OWN) as aside:
        (aside / "adapters").mkdir()
        (aside / "head.safetensors").write_bytes(b"old")
    (best / "adapters" / "a").write_bytes(b"old")
    (best / "maps").mkdir()
    for name in ("maps/labels.tif", "notes.txt"):
        (best / name).write_bytes(b"mine")
    (best / "link").symlink_to("notes.txt")
    with whole_folder(best, OWN) as aside:
        (aside / "head.safetensors").write_bytes(b"new")
    found = {path.relative_to(best).as_posix(): path.read_bytes() for path in best.rglob("*") if path.is_file()}
    kept = {"maps/labels.tif": b"mine", "notes.txt": b"mine", "link": b"mine"}
    assert found == kept | {"head.safetensors": b"new"}
    assert (best / "link").is_symlink()


@pytest.mark.pitfall("F3")
def test_a_link_to_a_folder_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    from vfmseg.disk.files import whole_folder
    from vfmseg.training.run_folder import segmenter_run

    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    (disk / "a").write_bytes(b"old")
    (run / "best").symlink_to(disk)
    (run / ".best.1.old").symlink_to(disk)
    for content in (b"new", b"newer"):  # a run saves more than once
        with whole_folder(run / "best") as aside:
            (aside / "a").write_bytes(content)
        assert (run / "best" / "a").read_bytes() == content
    segmenter_run(run).remove_leftovers()
    assert [path.name for path in run.iterdir()] == ["best"]
    assert (disk / "a").read_bytes() == b"old"


@pytest.mark.pitfall("P37")
def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vfmseg.disk.files import whole_folder

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


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.pitfall("P55")
def test_ctrl_c_prints_the_line_that_resumes(place: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """The line is typed as it stands, and the run ends as it would have: same recipe, overrides included."""
    recipe = write_recipe(tmp_path / "my recipe.yaml", content(place, tmp_path / "run"))
    command = [sys.executable, "-m", "vfmseg.cli", "finetune", str(recipe), "train.epochs=20", "seed=3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2"):
            process.send_signal(sent)
            break
    said = process.stderr.read()
    assert process.wait(60) == code, said
    line = said.strip().splitlines()[-1]
    program, *arguments = shlex.split(line.split("go on with: ")[1])
    assert program == "vfmseg"
    done = vfmseg(*arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming after epoch [1-9]", done.stderr)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == list(range(1, 21))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "scene.tif"], "is the scene itself"),
        (["-o", "x.tif", "--modality", "rgb=scene.tif"], "'rgb' is SCENE itself"),
        (["-o", "x.tif", "--modality", "dem=a.tif", "--modality", "dem=b.tif"], "given twice"),
        (["-o", "x.tif", "--area", "a.geojson", "--bounds", "0,0,1,1"], "exclude each other"),
        (["-o", "x.tif", "--bounds", "0,0,1"], "expected 4 numbers"),
        (["-o", "x.tif", "--min-area", "9"], "add --polygons"),
        (["-o", "x.tif", "--compress", "zst"], "compress = 'zst'; did you mean 'zstd'?"),
        (["-o", "x.tif", "--scales", "nan"], "scales.0 = nan must be a finite number"),
    ],
)
@pytest.mark.pitfall("P62")
def test_wrong_predict_arguments_are_one_message(
    place: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from vfmseg.cli import app
    from vfmseg.finetune import finetune
    from vfmseg.recipe import load_recipe

    if not (place / "trained").exists():
        finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content(place, place / "trained")), ["train.epochs=1"]))
    monkeypatch.chdir(tmp_path)
    write_raster(tmp_path / "scene.tif", toy_scene(5)[0])
    done = CliRunner().invoke(app, ["predict", str(place / "trained" / "best"), "scene.tif", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "x.tif").exists()


@pytest.mark.pitfall("P62")
def test_errors_of_rights_and_of_other_processes_say_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg.terminal import guarded

    def locked() -> None:
        raise PermissionError(13, "Permission denied", "runs/locked")

    assert guarded(locked) == 2
    assert "vfmseg: runs/locked: Permission denied" in capsys.readouterr().err

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert guarded(locked) == 2
    assert "vfmseg, process 1: runs/locked" in capsys.readouterr().err
    assert guarded(interrupted, "again") == 130
    assert capsys.readouterr().err == ""  # one process tells for all


@pytest.mark.pitfall("P62")
def test_another_process_that_has_ended_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vfmseg.errors import MachineError
    from vfmseg.inference import ranks

    def closed(*_: object) -> None:
        raise torch.distributed.DistBackendError("Connection closed by peer\nGLHF!")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", closed)
    monkeypatch.setattr(torch.distributed, "all_gather_object", closed)
    for wait in (ranks.meet, lambda: ranks.gather(1)):
        with pytest.raises(MachineError, match=r"another process has ended \(Connection closed by peer\); see its"):
            wait()


def test_a_validation_without_a_score_is_shown_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    from vfmseg.progress import TrainingProgress
    from vfmseg.training.objectives.segmentation import in_words

    progress = TrainingProgress(2, 1)
    progress.epoch(1, 1, in_words({"miou": 0.5}))
    progress.epoch(2, 1, in_words({"miou": None}))
    assert re.findall(r"val mIoU [^,]+", capsys.readouterr().err) == ["val mIoU 0.500", "val mIoU none"]


def test_the_shares_of_several_objectives_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from vfmseg.progress import TrainingProgress

    progress = TrainingProgress(2, 1)
    progress.step(1, 1, 0.5, 4, {"mae": 0.4, "distill": 0.1})
    progress.step(2, 1, 0.7, 4, {"mae": 0.6, "distill": 0.1})
    progress.epoch(2, 1, "")
    assert "loss 0.510 (mae 0.410, distill 0.100), " in capsys.readouterr().err
    alone = TrainingProgress(1, 1)
    alone.step(1, 1, 0.5, 4)
    alone.epoch(1, 1, "")
    assert "loss 0.500, " in capsys.readouterr().err


@pytest.mark.pitfall("P62")
def test_out_of_memory_is_no_traceback_and_a_bug_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from vfmseg.terminal import guarded

    def python() -> None:
        raise MemoryError

    def cpu() -> None:
        torch.empty(1 << 58)

    def gpu() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for verb, words in ((python, "out of memory"), (cpu, "out of memory"), (gpu, "the accelerator ran out of memory")):
        assert guarded(verb) == 3
        assert f"vfmseg: {words}; try a smaller batch_size" in capsys.readouterr().err.replace(" or tile", "")

    def bug() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        guarded(bug)


def test_demo_with_an_encoder_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo with a very small encoder and a shortened run, into a folder whose name YAML would cut at the #."""
    from vfmseg import demo
    from vfmseg.recipe import Recipe, load_recipe

    def shortened(path: Path, changes: list[str]) -> Recipe:
        return load_recipe(path, [*changes, "train.epochs=1", "data.samples_per_epoch=8"])

    monkeypatch.setattr(demo, "load_recipe", shortened)
    output = tmp_path / "my demo #1"
    result = demo.run_demo(output, str(place / "encoder"))
    assert {p.name for p in output.iterdir()} == {"run", "labels.tif", "preview.png", "metrics.json"}
    assert json.loads((output / "metrics.json").read_text())["test"] == result["test"]
    assert f"mean IoU {result['test']['miou']:.3f}" in capsys.readouterr().err
    again = vfmseg("demo", "--output", output, "--encoder", place / "encoder")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert "--resume" not in again.stderr  # which the demo does not have


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
@pytest.mark.pitfall("P62")
def test_demo_names_an_encoder_that_is_none(tmp_path: Path, text: str) -> None:
    from vfmseg.demo import encoder_family
    from vfmseg.errors import CheckpointError, RecipeError

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        encoder_family(str(tmp_path))
    for name in ("nothing", "./nothing/dinov2", str(tmp_path / "no" / "dinov2")):
        with pytest.raises(RecipeError, match="neither a folder"):
            encoder_family(name)
    assert encoder_family("someone/dinov2-of-mine") == "dinov2"


@pytest.mark.pitfall("P63")
def test_overwrite_replaces_the_run(place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", content(place, tmp_path / "run"))
    assert vfmseg("finetune", recipe, "train.epochs=1").returncode == 0
    done = vfmseg("finetune", recipe, "train.epochs=2", "--overwrite")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "epoch" for line in lines) == 2


@pytest.mark.pitfall("C38")
def test_examples_run(place: Path, tmp_path: Path) -> None:
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


@pytest.mark.pitfall("C38")
def test_recipes_name_what_exists() -> None:
    from vfmseg.recipe import load_recipe

    names = {load_recipe(path).name for path in (ROOT / "recipes").glob("*.yaml")}
    published = {"mfnet-vaihingen", "ftransunet-style-potsdam", "mmhunan-mfnet"}
    assert names == {"oam-buildings", "aerial-multiclass", "s2-india-rgb-ir"} | published


@pytest.mark.pitfall("P37")
def test_the_line_that_resumes_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vfmseg.cli import _resumed

    monkeypatch.setattr(sys, "argv", ["bin/vfmseg", "predict", "a b.tif"])
    assert _resumed() == "bin/vfmseg predict 'a b.tif' --resume"
    monkeypatch.setattr(sys, "argv", ["site/vfmseg/cli.py", "predict", "a.tif"])
    assert _resumed() == shlex.join([sys.executable, "-m", "vfmseg.cli", "predict", "a.tif", "--resume"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _resumed() == "the same command with --resume"
