"""Batches of one constant shape, in which each tile has a place of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vfmseg.geo.grid import Window
from vfmseg.inference.reading import Rows

OPEN_BATCHES = 3
"""Batches that wait for tiles at the same time, where left-out tiles leave places free."""


@dataclass
class Batch:
    """Tiles for one call of the model. `places`: slot -> number of the tile in the order of the run."""

    pixels: dict[str, np.ndarray]  # float32 (B, C, t, t)
    valid: dict[str, np.ndarray]  # bool (B, t, t)
    places: dict[int, int] = field(default_factory=dict)


class Batcher:
    """Fills batches; each tile has its place in a batch, whatever the other places hold."""

    def __init__(self, size: int, tile: int, hand_on: Callable[[Batch], None]) -> None:
        self.size = size
        self.tile = tile
        self.hand_on = hand_on
        self.open: deque[Batch] = deque()

    def add(self, rows: Rows, window: Window, slot: int, number: int) -> None:
        """Copy a tile into its place in the first open batch that has it free."""
        batch = next((b for b in self.open if slot not in b.places), None)
        if batch is None:
            if len(self.open) == OPEN_BATCHES:
                self.hand_on(self.open.popleft())
            batch = self._empty(rows)
            self.open.append(batch)
        rows.copy(
            window,
            {name: array[slot] for name, array in batch.pixels.items()},
            {name: array[slot] for name, array in batch.valid.items()},
        )
        batch.places[slot] = number
        while self.open and len(self.open[0].places) == self.size:
            self.hand_on(self.open.popleft())

    def finish(self) -> None:
        """Hand on what is left; places without a tile hold nothing valid."""
        while self.open:
            self.hand_on(self.open.popleft())

    def _empty(self, rows: Rows) -> Batch:
        side = (self.tile, self.tile)
        bands = rows.bands()
        return Batch(
            {name: np.zeros((self.size, count, *side), dtype=np.float32) for name, count in bands.items()},
            {name: np.zeros((self.size, *side), dtype=bool) for name in bands},
        )
