"""What goes through an encoder and what comes out: tokens of patches, and maps of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a batch between two blocks."""

    values: Tensor  # (B, P + N, D), patches row by row: that of row r and column c is number P + r * columns + c
    seen: Tensor  # (B, N), the share of each patch that is valid, 0 to 1
    grid: tuple[int, int]  # rows and columns of patches; their product is N / groups, unless patches were left out
    prefix: int  # P: class, register and prompt tokens before those of patches
    kept: Tensor | None = None  # (B, N) int64, the numbers of these patches on the grid, where others were left out
    groups: int = 1  # of bands: all patches of the first, then all of the next; numbers of patches go on through them

    def only(self, kept: Tensor) -> Tokens:
        """The prefix tokens and the patches `kept`, int64 (B, M) numbers on the grid; `seen` is then of these M.

        They fill no grid any more: a map cannot be made of them, and only families with `Family.any_patches` run them.
        """
        if self.kept is not None:
            raise ValueError("patches have been left out of these tokens before; expected all of the grid")
        patches = self.values[:, self.prefix :].gather(1, kept[..., None].expand(-1, -1, self.values.shape[-1]))
        values = torch.cat([self.values[:, : self.prefix], patches], dim=1)
        return replace(self, values=values, seen=self.seen.gather(1, kept), kept=kept)


@dataclass(frozen=True, eq=False)
class Features:
    """Feature maps of a batch, shallow to deep."""

    maps: tuple[Tensor, ...]  # each (B, D_i, h_i, w_i)
    seen: tuple[Tensor, ...]  # each (B, h_i, w_i), the share of each cell that is valid, 0 to 1
    strides: tuple[float, ...]  # pixels of the reference grid per cell of each map


StreamRows = Mapping[str, slice]
"""{stream: its rows of the batch axis}, where several streams go through the blocks as one batch."""
