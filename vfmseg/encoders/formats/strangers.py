"""Folders and files that are named as encoders and are something else: what each is, and what to do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PUBLISHED = "checkpoints.md lists encoders that are published in the form of transformers"

_FILES = {  # endings of files that hold weights, but not as transformers saves them
    ".onnx": "an ONNX model, which is made to be run and not to be trained",
    ".gguf": "a GGUF model, which is made to be run and not to be trained",
    ".h5": "weights of TensorFlow",
    ".msgpack": "weights of Flax",
    ".pth": "weights of PyTorch without a description of the model",
    ".pt": "weights of PyTorch without a description of the model",
    ".ckpt": "weights of PyTorch without a description of the model",
    ".bin": "weights of PyTorch without a description of the model",
    ".safetensors": "weights without a description of the model",
}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_POINTER = b"version https://git-lfs"


def stranger(path: Path) -> str | None:
    """What a file or folder is, if it is no encoder as transformers saves one, and what to do. None: it may be one."""
    if path.is_file():
        kind = _FILES.get(path.suffix.lower(), "no folder")
        beside = f"; its folder {path.parent} may be one: name that" if (path.parent / "config.json").is_file() else ""
        expected = "an encoder is a folder with config.json and model.safetensors"
        return f"is a file ({kind}), and {expected}{beside}; {_PUBLISHED}"
    if (path / "segmenter.json").is_file() or (path / "best" / "segmenter.json").is_file():
        return (
            "is a segmenter that vfmseg has trained, and not an encoder: label with it (vfmseg predict), or name the "
            "base encoder that its README.md names"
        )
    if (path / "adapter_config.json").is_file():
        base = _content(path / "adapter_config.json").get("base_model_name_or_path")
        named = f" {base}" if isinstance(base, str) and base else ""
        return (
            "holds an adapter of peft (adapter_config.json) that is not merged into its base: merge it "
            "(merge_and_unload, then save_pretrained) and name the new folder, or name the base encoder"
            f"{named} itself and let vfmseg train an adapter for it"
        )
    if not (path / "config.json").is_file():
        return _without_config(path)
    if "model_type" not in (content := _content(path / "config.json")) and "architecture" in content:
        return f"is a model of timm ({content['architecture']}), whose weights have other names; {_PUBLISHED}"
    weights = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    if not weights:
        return f"has a config.json, but no weights (model.safetensors){_holds(path)}; download the whole repository"
    pointers = [file.name for file in weights if _starts(file) == _POINTER]
    if pointers:
        return f"{pointers[0]} is a pointer of Git LFS and not the weights; get them by `git lfs pull` in that folder"
    return None


def _without_config(path: Path) -> str:
    inside = sorted(
        file.parent for pattern in ("*", "snapshots/*", "*/snapshots/*") for file in path.glob(f"{pattern}/config.json")
    )
    if inside:
        return f"has no config.json, but {inside[0]} has one: name that folder"
    return (
        f"has no config.json{_holds(path)}; expected a folder that save_pretrained of transformers has written; "
        f"{_PUBLISHED}"
    )


def _holds(path: Path) -> str:
    """What else a folder has, if it has weights of another form."""
    for file in sorted([*path.glob("*.*"), *path.glob("onnx/*.onnx")]):
        if file.suffix.lower() in _FILES:
            return f"; {file.relative_to(path)} is {_FILES[file.suffix.lower()]}"
    return ""


def _content(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _starts(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_POINTER))
