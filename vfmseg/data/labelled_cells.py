"""The cells of an encoder's map as labelled samples: which cells of which tiles there are, and of which class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.data.dataset import CoverWindows
from vfmseg.data.image import known
from vfmseg.data.traces import Traces
from vfmseg.data.windows import Purpose, rng
from vfmseg.geo.classes import IGNORE

LEAST_LABELLED = 0.5
"""Share of a cell's pixels that must be labelled: less is the rim of a tile's core, or of what was labelled."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Some cells of the tiles of labelled scenes.

    numbers {tile: int64 (n,), counted row by row}; labels int64, as many as all these.
    """

    windows: CoverWindows
    numbers: dict[int, Tensor]
    labels: Tensor

    def counts(self, classes: int) -> list[int]:
        """How many there are of each class."""
        found: list[int] = torch.bincount(self.labels, minlength=classes).tolist()
        return found


def cells_of(
    windows: CoverWindows, grid: Callable[[int, int], tuple[int, int]], side: float, most: int, traces: Traces | None
) -> Cells:
    """All labelled cells of the scenes, or `most` of them, the same ones in every run.

    `grid`: rows and columns of cells of an image of so many pixels; `side`: of a cell, in pixels. `traces` is told of
    the labels.
    """
    found: list[tuple[int, Tensor, Tensor]] = []
    for tile in range(len(windows)):
        sample = windows[tile]
        assert sample.labels is not None
        if traces is not None:
            traces.labels(windows.place(tile)[0], sample.labels.numpy())
        visible = torch.where(known(sample.images, "all"), sample.labels, IGNORE)
        labels = cell_labels(visible, grid(*visible.shape), side).flatten()
        numbers = (labels != IGNORE).nonzero()[:, 0]
        found.append((tile, numbers, labels[numbers]))
    total = sum(len(numbers) for _, numbers, _ in found)
    taken = torch.ones(total, dtype=torch.bool)
    if total > most:
        chosen = rng(Purpose.PROBE, 0, 0).permutation(total)[:most]
        taken = torch.zeros(total, dtype=torch.bool).scatter(0, torch.from_numpy(chosen), True)
    kept = taken.split([len(numbers) for _, numbers, _ in found])
    chosen_of = {tile: mine[keep] for (tile, mine, _), keep in zip(found, kept, strict=True) if bool(keep.any())}
    all_labels = torch.cat([mine for _, _, mine in found] or [torch.empty(0, dtype=torch.int64)])
    return Cells(windows, chosen_of, all_labels[taken])


def cell_labels(labels: Tensor, grid: tuple[int, int], side: float) -> Tensor:
    """Class indexes int64 (h, w) of pixels -> (rows, columns) of cells, `side` pixels wide each.

    A cell is of the class that covers more than half of its labelled pixels, and IGNORE where none does, or fewer than
    half of its pixels are labelled. Cells may reach beyond the image.
    """
    rows, columns = grid
    below, right = (max(0, round(count * side) - size) for count, size in zip(grid, labels.shape, strict=True))
    padded = F.pad(labels, (0, right, 0, below), value=IGNORE)

    def share(where: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(where.double()[None], (rows, columns))[0]

    labelled = share(padded != IGNORE)
    found = torch.full((rows, columns), IGNORE, dtype=torch.int64)
    for index in padded.unique().tolist():
        if index != IGNORE:
            found[share(padded == index) > 0.5 * labelled] = index
    found[labelled < LEAST_LABELLED] = IGNORE
    return found
