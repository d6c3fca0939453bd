"""What is named as an encoder or a segmenter and is neither: the message says what it is and what can be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from makers import save_encoder
from safetensors.torch import save_file

from vfmseg.checkpoint.hub import local_segmenter
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.encoders.build import build_backbone
from vfmseg.errors import CheckpointError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "base", "dinov2")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        build_backbone("dinov2", str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.pitfall("F19")
def test_an_adapter_that_is_not_merged_is_called_one(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    model = peft.get_peft_model(
        AutoModel.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    for folder in ("adapter", "beside a config"):
        if folder != "adapter":
            shutil.copytree(tmp_path / "adapter", tmp_path / folder)
            shutil.copy(base / "config.json", tmp_path / folder)
        message = refused(tmp_path / folder)
        assert "holds an adapter of peft" in message
        assert "merge_and_unload" in message
        assert f"the base encoder {base} itself" in message
    (tmp_path / "inside").mkdir()
    shutil.copy(base / "config.json", tmp_path / "inside")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.base_model.model.state_dict().items()},
        tmp_path / "inside" / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    message = refused(tmp_path / "inside")
    assert "an adapter is not merged into them" in message
    assert "download" not in message
    model.merge_and_unload().save_pretrained(tmp_path / "merged")  # the remedy
    build_backbone("dinov2", str(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"segmenter.json": "{}"}, "is a segmenter that vfmseg has trained"),
        ({"best/segmenter.json": "{}"}, "is a segmenter that vfmseg has trained"),
        (
            {"config.json": '{"architecture": "vit_small"}', "model.safetensors": ""},
            r"is a model of timm \(vit_small\)",
        ),
        ({"0_CLIP/config.json": "{}", "modules.json": "[]"}, "0_CLIP has one: name that folder"),
        ({"snapshots/0a/config.json": "{}"}, "0a has one: name that folder"),
        ({"config.json": "{}", "model.onnx": ""}, "no weights.*model.onnx is an ONNX model"),
        ({"model.gguf": ""}, "no config.json; model.gguf is a GGUF model"),
        ({"config.json": "{}"}, "no weights.*download the whole repository"),
        ({"weights.pth": ""}, "weights.pth is weights of PyTorch without a description.*checkpoints.md"),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        ({"config.json": '{"model_type": "sam2"}', "model.safetensors": ""}, "model_type = 'sam2'.*checkpoints.md"),
    ],
)
@pytest.mark.pitfall("F19")
def test_what_is_no_encoder_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        build_backbone("dinov2", str(tmp_path / "x"))


@pytest.mark.pitfall("F19")
def test_a_file_of_weights_is_no_folder(base: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    assert "is a file (weights of PyTorch" in refused(tmp_path / "w.pth")
    assert f"its folder {base} may be one: name that" in refused(base / "model.safetensors")


@pytest.mark.pitfall("F19")
def test_an_encoder_or_a_run_is_no_segmenter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it is an encoder, which labels nothing before.*vfmseg finetune"):
        load_segmenter(base)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "segmenter.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"it is the folder of a run: name .*best"):
        load_segmenter(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; expected a segmenter folder"):
        local_segmenter(tmp_path / "best" / "segmenter.json")
