"""What goes through an encoder and what comes out: tokens of patches, and maps of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a batch between two blocks."""

    values: Tensor  # (B, P + N, D), patches row by row: that of row r and column c is number P + r * columns + c
    seen: Tensor  # (B, N), the share of each patch that is valid, 0 to 1
    grid: tuple[int, int]  # rows and columns of patches; their product is N
    prefix: int  # P: class, register and prompt tokens before those of patches


@dataclass(frozen=True, eq=False)
class Features:
    """Feature maps of a batch, shallow to deep."""

    maps: tuple[Tensor, ...]  # each (B, D_i, h_i, w_i)
    seen: tuple[Tensor, ...]  # each (B, h_i, w_i), the share of each cell that is valid, 0 to 1
    strides: tuple[float, ...]  # pixels of the reference grid per cell of each map


StreamRows = Mapping[str, slice]
"""{stream: its rows of the batch axis}, where several streams go through the blocks as one batch."""
