"""Segmenter folders of before: format 1, in which one encoder held mean, std and stem of its only stream."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import an_input, recipe_dict, save_encoder, sign, write_recipe
from safetensors.torch import load_file, save_file

from vfmseg.build.model import build_model
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.checkpoint.writing import save_segmenter
from vfmseg.data.image import Image
from vfmseg.errors import CheckpointError
from vfmseg.recipe import load_recipe

INPUTS = (an_input(), an_input("ir", 1, "uint16", 500.0, 50.0))


def in_format_1(folder: Path) -> None:
    """Name the tensors of a head as format 1 did, and say so."""
    tensors = load_file(folder / "head.safetensors")
    start = "stems.of_rgb+ir."
    names = {f"{start}mean": "encoder.mean", f"{start}std": "encoder.std"}
    old = {names.get(name) or name.replace(f"{start}mix.", "encoder.stem."): t for name, t in tensors.items()}
    assert set(old) != set(tensors)
    save_file(old, folder / "head.safetensors")
    record = json.loads((folder / "segmenter.json").read_text())
    (folder / "segmenter.json").write_text(json.dumps(record | {"format": 1}))
    sign(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A segmenter of two stacked modalities with random weights everywhere, and its model."""
    root = tmp_path_factory.mktemp("formats")
    save_encoder(root / "encoder", "dinov2")
    content = recipe_dict(root, root / "encoder", root / "run")
    content["data"]["modalities"] = {"rgb": {}, "ir": {}}
    for split in ("train", "val", "test"):
        content["data"][split]["ir"] = f"{split}.tif"
    recipe = load_recipe(write_recipe(root / "r.yaml", content))
    model = build_model(recipe, INPUTS)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape) / 5)
    save_segmenter(root / "s", model, recipe, INPUTS, {"epoch": 1})
    return root / "s", model


def test_a_segmenter_of_format_1_answers_as_before(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = made
    shutil.copytree(folder, tmp_path / "old")
    in_format_1(tmp_path / "old")
    valid = torch.ones(1, 42, 30, dtype=torch.bool)
    images = {
        "rgb": Image(torch.rand(1, 3, 42, 30) * 255, valid),
        "ir": Image(torch.rand(1, 1, 42, 30) * 100 + 450, valid),
    }
    with torch.no_grad():
        expected = model(images)
        for place in (folder, tmp_path / "old"):
            torch.testing.assert_close(load_segmenter(place, merge=False).model(images), expected, atol=0, rtol=0)


@pytest.mark.pitfall("P14")
def test_names_of_format_1_in_format_2_are_refused(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    shutil.copytree(folder, tmp_path / "s")
    in_format_1(tmp_path / "s")
    record = json.loads((tmp_path / "s" / "segmenter.json").read_text())
    (tmp_path / "s" / "segmenter.json").write_text(json.dumps(record | {"format": 2}))
    sign(tmp_path / "s")
    with pytest.raises(CheckpointError, match=r"head\.safetensors: .* tensors missing"):
        load_segmenter(tmp_path / "s")


@pytest.mark.parametrize("number", [0, 3, "2", None])
def test_other_formats_are_refused(made: tuple[Path, Any], tmp_path: Path, number: Any) -> None:
    folder, _ = made
    shutil.copytree(folder, tmp_path / "s")
    record = json.loads((tmp_path / "s" / "segmenter.json").read_text())
    (tmp_path / "s" / "segmenter.json").write_text(json.dumps(record | {"format": number}))
    sign(tmp_path / "s")
    with pytest.raises(CheckpointError, match=r"segmenter\.json: format = .* reads the formats 1 and 2; update vfmseg"):
        load_segmenter(tmp_path / "s")
