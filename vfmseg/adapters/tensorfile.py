"""The file of an adapter that is no peft: its tensors by dotted name, and the settings that no shape tells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vfmseg.disk.tensors import plain_tensors, require_tensors
from vfmseg.errors import CheckpointError

FILE = "adapter.safetensors"


def save_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, float], folder: Path) -> None:
    """Make the folder and write the tensors with their settings, numbers that the recipe gives too."""
    folder.mkdir(parents=True)
    save_file(plain_tensors(tensors), folder / FILE, {name: repr(value) for name, value in settings.items()})


def load_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, float], folder: Path) -> None:
    """Fill `tensors` in place, strictly: CheckpointError for a missing, extra or misshapen one, or other settings."""
    file = folder / FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; the checkpoint is incomplete, copy it again")
    try:
        with safe_open(file, "pt") as stored:
            written = stored.metadata() or {}
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy it again") from None
    require_tensors(file, found, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, value in settings.items():
        if written.get(name) != repr(value):
            raise CheckpointError(
                f"{file}: adapters of {name} {str(written.get(name))[:40]}, but recipe.yaml says {value}; the folder "
                "mixes two checkpoints"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
