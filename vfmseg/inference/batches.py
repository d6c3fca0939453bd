"""Batches of constant shapes, in which each tile has a place of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vfmseg.geo.grid import Window
from vfmseg.inference.plan import Place
from vfmseg.inference.reading import Rows

OPEN_BATCHES = 3
"""Batches that wait for tiles at the same time, where left-out tiles leave places free."""


@dataclass
class Batch:
    """Tiles for one call of the model. numbers: slot -> number of the tile in the run; first: the least of them."""

    first: int
    pixels: dict[str, np.ndarray]  # float32 (B, C, t, t)
    valid: dict[str, np.ndarray]  # bool (B, t, t)
    numbers: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Places of the batch."""
        return len(next(iter(self.valid.values())))


class Batcher:
    """Fills batches; each tile has its place in a batch, whatever the other places hold."""

    def __init__(self, tile: int, hand_on: Callable[[Batch], None]) -> None:
        self.tile = tile
        self.hand_on = hand_on
        self.open: deque[Batch] = deque()

    def add(self, rows: Rows, window: Window, place: Place, number: int) -> None:
        """Copy a tile into its place in the first open batch of its size that has it free."""
        slot = place.slot
        batch = next((b for b in self.open if b.size == place.size and slot not in b.numbers), None)
        if batch is None:
            if len(self.open) == OPEN_BATCHES:
                self.hand_on(self.open.popleft())
            batch = self._empty(rows, place.size, number)
            self.open.append(batch)
        rows.copy(
            window,
            {name: array[slot] for name, array in batch.pixels.items()},
            {name: array[slot] for name, array in batch.valid.items()},
        )
        batch.numbers[slot] = number
        while self.open and len(self.open[0].numbers) == self.open[0].size:
            self.hand_on(self.open.popleft())

    def finish(self, before: float = math.inf) -> None:
        """Hand on batches begun before tile `before`, full or not; places without a tile hold nothing valid."""
        while self.open and self.open[0].first < before:
            self.hand_on(self.open.popleft())

    def _empty(self, rows: Rows, size: int, first: int) -> Batch:
        side = (self.tile, self.tile)
        bands = rows.bands()
        return Batch(
            first,
            {name: np.zeros((size, count, *side), dtype=np.float32) for name, count in bands.items()},
            {name: np.zeros((size, *side), dtype=bool) for name in bands},
        )
