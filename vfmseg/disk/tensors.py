"""Whether the tensors of a file are those that are expected: names, shapes, types, finite numbers. CheckpointError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vfmseg.errors import CheckpointError

WRITTEN = (torch.float32, torch.float16, torch.bfloat16)
"""Types of trained weights; a float8 or integer is a quantised one, whose scale is elsewhere."""


def require_tensors(file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor there, none too many, each of its shape and made of finite weights."""
    found = misfits(tensors, expected)
    if found:
        raise CheckpointError(f"{file}: {found}; this adapter belongs to another encoder or recipe")
    found = unusable(tensors)
    if found:
        raise CheckpointError(f"{file}: {found}; the file is damaged or was not written by a training run")


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files hold them: on the CPU, contiguous, without gradients."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_strictly(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Copy `tensors` into `expected` in place; every one there, none too many, each of its shape (CheckpointError)."""
    found = misfits(tensors, {name: tensor.shape for name, tensor in expected.items()})
    if found:
        raise CheckpointError(f"{path}: {found}; this file belongs to another architecture than its recipe.yaml")
    found = unusable({name: tensors[name] for name, tensor in expected.items() if tensor.is_floating_point()})
    if found:
        raise CheckpointError(f"{path}: {found}; the file is damaged or was not written by a training run")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> str:
    """Which tensors are missing, not expected or of another shape, in words; empty if none is."""
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    wrong = sorted(n for n in expected if n in tensors and tuple(tensors[n].shape) != tuple(expected[n]))
    return _told([("missing", missing), ("not expected", extra), ("of another shape", wrong)])


def unusable(tensors: Mapping[str, Tensor]) -> str:
    """Which tensors are no weights as training writes them, in words; empty if none is."""
    types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype not in WRITTEN})
    wrong = sorted(name for name, tensor in tensors.items() if tensor.dtype not in WRITTEN)
    usable = {name: tensor for name, tensor in tensors.items() if tensor.dtype in WRITTEN}
    lost = sorted(name for name, tensor in usable.items() if not torch.isfinite(tensor).all())
    return _told([(f"of type {', '.join(types)} instead of float", wrong), ("with NaN or infinity", lost)])


def _told(parts: Sequence[tuple[str, Sequence[str]]]) -> str:
    return "; ".join(
        f"{len(names)} tensors {what} ({', '.join(n[:80] for n in names[:3])})" for what, names in parts if names
    )
