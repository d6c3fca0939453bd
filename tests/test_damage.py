"""Damage inside the files of a segmenter and of a run: one flipped bit is seen, and the file is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import finished_run, recipe_dict, save_encoder, sign, toy_folder, write_recipe

from vfmseg.checkpoint.folder import saved_epoch
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.disk.digests import changed, signed
from vfmseg.errors import CheckpointError, VfmsegError
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.training.resume import load_run

FILES = (
    "adapters/rgb/adapter_config.json", "adapters/rgb/adapter_model.safetensors", "head.safetensors", "recipe.yaml",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("damage"))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", [*FILES, "segmenter.json"])
@pytest.mark.pitfall("F8")
def test_one_flipped_bit_in_a_segmenter_is_refused(place: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place / "run" / "best", copy)
    bits = 8 * (copy / file).stat().st_size
    for bit in random.Random(0).sample(range(bits), 40):
        whole = (copy / file).read_bytes()
        flip(copy / file, bit)
        try:
            record = json.loads((copy / "segmenter.json").read_bytes())
            seen = changed(record, copy)[0] is not None
            same = file == "segmenter.json" and json.loads(whole) == record  # a blank that has become another
        except ValueError:
            seen, same = True, False
        assert seen or same, bit
        if bit % 4 == 0 and not same:
            with pytest.raises(VfmsegError):
                load_segmenter(copy)
        (copy / file).write_bytes(whole)
    load_segmenter(copy)


@pytest.mark.parametrize("file", FILES[1:3])
@pytest.mark.pitfall("F8")
def test_a_damaged_file_of_a_segmenter_is_named(place: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place / "run" / "best", copy)
    flip(copy / file, 8 * ((copy / file).stat().st_size - 3))  # inside the last tensor: a number like any other
    with pytest.raises(CheckpointError, match=rf"{file}: is not what was written with this segmenter.*copy the folder"):
        Segmenter.from_pretrained(copy)
    (copy / file).write_bytes((place / "run" / "best" / file).read_bytes())
    (copy / "README.md").write_text("my own words")  # the card is no part of what is loaded
    (copy / "notes.txt").touch()
    Segmenter.from_pretrained(copy)


@pytest.mark.pitfall("F7")
def test_nothing_of_a_segmenter_is_read_through_a_link_to_a_folder(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run" / "best", tmp_path / "best")
    (tmp_path / "best" / "adapters").rename(tmp_path / "elsewhere")
    (tmp_path / "best" / "adapters").symlink_to(tmp_path / "elsewhere")
    weights = next((tmp_path / "elsewhere").rglob("*.safetensors"))
    weights.unlink()
    os.mkfifo(weights)  # which would be waited for
    with pytest.raises(CheckpointError, match=r"link to a folder.*cp -rL"):
        load_segmenter(tmp_path / "best")


@pytest.mark.pitfall("F8")
def test_folders_of_before_there_were_digests_still_load(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place / "run" / "best", copy)
    record = json.loads((copy / "segmenter.json").read_text())
    assert sorted(record["files"]) == list(FILES)
    del record["files"], record["sha256"]
    (copy / "segmenter.json").write_text(json.dumps(record))
    flip(copy / "head.safetensors", 8 * ((copy / "head.safetensors").stat().st_size - 3))
    Segmenter.from_pretrained(copy)
    assert saved_epoch(copy) is not None


@pytest.mark.parametrize("files", [[], "all", {"../secret": "0"}, {"head.safetensors": 3}, {"gone": "0"}])
@pytest.mark.pitfall("F8")
def test_a_record_whose_digests_are_none_is_refused(place: Path, tmp_path: Path, files: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place / "run" / "best", copy)
    record = json.loads((copy / "segmenter.json").read_text()) | {"files": files}
    del record["sha256"]
    (copy / "segmenter.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="copy the folder again"):
        load_segmenter(copy)


@pytest.mark.parametrize("adapter", ["full", "adapter", "none"])
@pytest.mark.pitfall("F8")
def test_every_kind_of_segmenter_names_all_its_files(tmp_path: Path, adapter: str) -> None:
    toy_folder(tmp_path / "data")
    save_encoder(tmp_path / "encoder", "dinov2")
    content = recipe_dict(tmp_path / "data", tmp_path / "encoder", tmp_path / "run")
    content["model"]["adapter"] = {"name": adapter}
    content["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    best = tmp_path / "run" / "best"
    record = json.loads((best / "segmenter.json").read_text())
    weights = {path.relative_to(best).as_posix() for path in best.rglob("*.safetensors")}
    assert set(record["files"]) == weights | {"recipe.yaml"}
    assert ("encoder.safetensors" in weights) is (adapter == "full")
    load_segmenter(best)


@pytest.mark.pitfall("F8")
def test_a_record_is_signed_as_it_will_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    record = {"b": (1, 2.5), "a": {10: "x", 9: "y"}, "nothing": None, "wide": 1e-7, "text": "\u00e9\ud83d\ude00"}
    read = json.loads(json.dumps(signed(record, tmp_path, {"a"}), indent=2))
    assert changed(read, tmp_path)[0] is None
    assert changed(read | {"wide": 2e-7}, tmp_path)[0] == ""
    assert changed({}, tmp_path) == (None, {})


@pytest.mark.pitfall("F8")
def test_a_flipped_bit_in_a_state_is_refused(place: Path, tmp_path: Path) -> None:
    state = Path(shutil.copy(place / "run" / "state.pt", tmp_path / "state.pt"))
    whole = state.read_bytes()
    seal_too = range(8 * (len(whole) - 100), 8 * len(whole))
    for bit in (*random.Random(0).sample(range(8 * len(whole)), 100), *seal_too):
        flip(state, bit)
        with pytest.raises(CheckpointError, match=r"state\.pt: is damaged.*copy it again.*or start anew with --overwr"):
            load_run(state, None, None)  # type: ignore[arg-type]
        state.write_bytes(whole)
    torch.load(state, weights_only=True)
    state.write_bytes(whole[:-300])
    with pytest.raises(CheckpointError, match=r"state\.pt: is damaged.*start anew with --overwrite"):
        load_run(state, None, None)  # type: ignore[arg-type]


@pytest.mark.pitfall("F8")
def test_resume_refuses_a_damaged_state_and_leaves_it(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    flip(tmp_path / "run" / "state.pt", 8 * 2000)
    before = (tmp_path / "run" / "state.pt").read_bytes()
    content = recipe_dict(place / "data", place / "encoder", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"state\.pt: is damaged"):
        finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)), resume=True)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


@pytest.mark.pitfall("F8", "F4")
def test_a_damaged_best_segmenter_is_not_called_done(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    head = tmp_path / "run" / "best" / "head.safetensors"
    epoch = saved_epoch(head.parent)
    flip(head, 8 * (head.stat().st_size - 3))
    assert epoch is not None
    assert saved_epoch(head.parent) is None


@pytest.mark.pitfall("F8")
def test_only_what_was_loaded_is_saved(place: Path, tmp_path: Path) -> None:
    """A training run may have replaced the folder since."""
    shutil.copytree(place / "run" / "best", tmp_path / "best")
    segmenter = Segmenter.from_pretrained(tmp_path / "best")
    segmenter.save_pretrained(tmp_path / "saved")
    load_segmenter(tmp_path / "saved")
    flip(tmp_path / "best" / "head.safetensors", 8 * ((tmp_path / "best" / "head.safetensors").stat().st_size - 3))
    sign(tmp_path / "best")
    before = (tmp_path / "saved" / "segmenter.json").read_bytes()
    with pytest.raises(CheckpointError, match="is no longer the segmenter that was loaded; load it again"):
        segmenter.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "segmenter.json").read_bytes() == before
