"""A frozen encoder asked twice about one window answers from a file: a table of fusions then costs one pass of it.

All rows of a table see the same windows (they follow from seed, epoch and sample), and a frozen encoder says the same
of them. Scores are those of `vfmseg` up to rounding, which depends on how many windows a batch holds; times are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vfmseg.model
from vfmseg.adapters.attached import Attached
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.tokens import StreamRows, Tokens

Answer = tuple[tuple[Tensor, ...], Tensor]


@contextmanager
def remembering(folder: Path) -> Iterator[None]:
    """Within it, what frozen encoders make of tokens is kept in `folder`, one file for each window of each stream."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = vfmseg.model.run_blocks
    vfmseg.model.run_blocks = _remembered(asked, folder)
    try:
        yield
    finally:
        vfmseg.model.run_blocks = asked


def _remembered(asked: Callable[..., Answer], folder: Path) -> Callable[..., Answer]:
    def answer(
        backbone: Backbone, attached: Attached, tokens: Tokens, rows: StreamRows, training: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        learns = any(p.requires_grad for p in backbone.network.parameters()) or tokens.values.requires_grad
        if learns or attached.name != "none":
            return asked(backbone, attached, tokens, rows, training)
        files = [
            folder / f"{_digest(backbone, value, seen)}.npy"
            for value, seen in zip(tokens.values, tokens.seen, strict=True)
        ]
        for row, file in enumerate(files):
            if not file.exists():
                one = slice(row, row + 1)
                alone = Tokens(tokens.values[one], tokens.seen[one], tokens.grid, tokens.prefix)
                maps, _ = asked(backbone, attached, alone, {}, False)
                aside = file.with_suffix(".part.npy")
                np.save(aside, torch.stack(maps)[:, 0].numpy())
                aside.rename(file)
        known = [torch.from_numpy(np.load(file)) for file in files]
        return tuple(torch.stack(level) for level in zip(*known, strict=True)), tokens.seen.unflatten(1, tokens.grid)

    return answer


def _digest(backbone: Backbone, *tensors: Any) -> str:
    """Of the encoder, its layers, and what enters it."""
    found = hashlib.blake2b(f"{backbone.base.sha256} {backbone.layers}".encode(), digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
