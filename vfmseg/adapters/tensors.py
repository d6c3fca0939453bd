"""Whether the tensors of an adapter's file are those that are expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vfmseg.errors import CheckpointError


def require_tensors(file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor there, none too many, each of its shape."""
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    wrong = sorted(n for n in expected if n in tensors and tuple(tensors[n].shape) != expected[n])
    if missing or extra or wrong:
        parts = [("missing", missing), ("not expected", extra), ("of another shape", wrong)]
        found = "; ".join(f"{len(names)} tensors {what} ({', '.join(names[:3])})" for what, names in parts if names)
        raise CheckpointError(f"{file}: {found}; this adapter belongs to another encoder or recipe")
