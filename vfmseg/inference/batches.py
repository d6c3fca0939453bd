"""Filling batches: arrays of constant shape, in which each tile takes the slot that the plan names (`Plan.place`).

Which tiles share a batch depends on what is run and what is left out; the slot and the size of the batch do not.
"""

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
"""Batches that are filled at the same time.

Where tiles are left out, or a strip holds only part of each row, a tile's slot may be taken in the oldest open batch
while others there are free: then it goes into the next one. With one open batch each such tile would send it off early.
"""


@dataclass
class TileBatch:
    """The tiles of one call of the model: for each modality pixels float32 (B, C, t, t) and valid bool (B, t, t).

    first: number in the run of the tile that the batch was begun for. numbers {slot: number in the run of its tile},
    windows {slot: where that lies in the scene}; both leave out free slots, in which nothing is valid.
    """

    first: int
    chips: dict[str, Chip]
    numbers: dict[int, int] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """B: slots of the batch, taken or free."""
        return len(next(iter(self.chips.values())).valid)

    def tiles(self) -> Tiles:
        """The batch as a predictor takes it; tensors that share its memory."""
        images = {name: Image.of(chip) for name, chip in self.chips.items()}
        return Tiles(images, tuple(self.windows.get(slot) for slot in range(self.size)))


class Batcher:
    """Puts tiles into batches, and hands these on when they are full, oldest first."""

    def __init__(self, tile: int, hand_on: Callable[[TileBatch], None]) -> None:
        """`tile`: pixels. `hand_on` takes a batch and may wait until there is room for it."""
        self.tile = tile
        self.hand_on = hand_on
        self.open: deque[TileBatch] = deque()

    def add(self, chunks: Chunks, window: Window, place: Place, number: int) -> None:
        """Copy tile `number` of the run into the oldest open batch of its size in which its slot is free."""
        slot = place.slot
        batch = next((b for b in self.open if b.size == place.size and slot not in b.numbers), None)
        if batch is None:
            if len(self.open) == OPEN_BATCHES:
                self.hand_on(self.open.popleft())
            batch = self._empty(chunks, place.size, number)
            self.open.append(batch)
        chunks.copy(window, {name: Chip(chip.pixels[slot], chip.valid[slot]) for name, chip in batch.chips.items()})
        batch.numbers[slot] = number
        batch.windows[slot] = window
        # a full batch behind one that is not waits for it
        while self.open and len(self.open[0].numbers) == self.open[0].size:
            self.hand_on(self.open.popleft())

    def finish(self, before: float = math.inf) -> None:
        """Hand on the batches that were begun for a tile of a number below `before`, full or not."""
        while self.open and self.open[0].first < before:
            self.hand_on(self.open.popleft())

    def _empty(self, chunks: Chunks, size: int, first: int) -> TileBatch:
        """A batch of free slots: pixels 0 and nothing valid."""
        side = (self.tile, self.tile)
        chips = {
            name: Chip(np.zeros((size, count, *side), dtype=np.float32), np.zeros((size, *side), dtype=bool))
            for name, count in chunks.bands().items()
        }
        return TileBatch(first, chips)
