"""Batches of constant shapes, in which each tile has a place of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vfmseg.data.image import Image
from vfmseg.geo.grid import Window
from vfmseg.geo.validity import Chip
from vfmseg.inference.contracts import Tiles
from vfmseg.inference.plan import Place
from vfmseg.inference.reading import Chunks

OPEN_BATCHES = 3
"""Batches that wait for tiles at the same time, where left-out tiles leave places free."""


@dataclass
class TileBatch:
    """Places for the tiles of one call of the model; chips of pixels float32 (B, C, t, t) and valid (B, t, t).

    numbers {place: number of its tile in the run}, windows {place: where it lies}; first: the least number.
    """

    first: int
    chips: dict[str, Chip]
    numbers: dict[int, int] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Places of the batch."""
        return len(next(iter(self.chips.values())).valid)

    def tiles(self) -> Tiles:
        """The batch as a predictor takes it; tensors that share its memory."""
        images = {name: Image.of(chip) for name, chip in self.chips.items()}
        return Tiles(images, tuple(self.windows.get(place) for place in range(self.size)))


class Batcher:
    """Fills batches; each tile has its place in a batch, whatever the other places hold."""

    def __init__(self, tile: int, hand_on: Callable[[TileBatch], None]) -> None:
        self.tile = tile
        self.hand_on = hand_on
        self.open: deque[TileBatch] = deque()

    def add(self, rows: Chunks, window: Window, place: Place, number: int) -> None:
        """Copy a tile into its place in the first open batch of its size that has it free."""
        slot = place.slot
        batch = next((b for b in self.open if b.size == place.size and slot not in b.numbers), None)
        if batch is None:
            if len(self.open) == OPEN_BATCHES:
                self.hand_on(self.open.popleft())
            batch = self._empty(rows, place.size, number)
            self.open.append(batch)
        rows.copy(window, {name: Chip(chip.pixels[slot], chip.valid[slot]) for name, chip in batch.chips.items()})
        batch.numbers[slot] = number
        batch.windows[slot] = window
        while self.open and len(self.open[0].numbers) == self.open[0].size:
            self.hand_on(self.open.popleft())

    def finish(self, before: float = math.inf) -> None:
        """Hand on batches begun before tile `before`, full or not; places without a tile hold nothing valid."""
        while self.open and self.open[0].first < before:
            self.hand_on(self.open.popleft())

    def _empty(self, rows: Chunks, size: int, first: int) -> TileBatch:
        side = (self.tile, self.tile)
        chips = {
            name: Chip(np.zeros((size, count, *side), dtype=np.float32), np.zeros((size, *side), dtype=bool))
            for name, count in rows.bands().items()
        }
        return TileBatch(first, chips)
