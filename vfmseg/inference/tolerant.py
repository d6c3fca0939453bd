"""A scene of which some blocks cannot be read: they count as invalid, and are told afterwards."""

from __future__ import annotations

import threading

import numpy as np

from vfmseg.errors import DamagedError
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.validity import Chip
from vfmseg.inference.reading import SceneSource


class Unreadable:
    """What could not be read, collected over the reader threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.blocks: dict[Window, str] = {}  # each block once, however many tiles see it, and why

    @property
    def messages(self) -> list[str]:
        """Why, for each block."""
        return list(self.blocks.values())

    @property
    def pixels(self) -> int:
        """Pixels of all of them."""
        return sum(block.height * block.width for block in self.blocks)

    def add(self, error: DamagedError, block: Window) -> None:
        """Note a block that was given up."""
        with self._lock:
            self.blocks.setdefault(block, str(error))


class Tolerant:
    """A scene whose damaged blocks are invalid instead of an error. bands {modality: number}."""

    def __init__(
        self, scene: SceneSource, bands: dict[str, int], block: tuple[int, int], unreadable: Unreadable
    ) -> None:
        self._scene = scene
        self._bands = bands
        self._block = block
        self._unreadable = unreadable

    @property
    def grid(self) -> Grid:
        """The grid of the scene."""
        return self._scene.grid

    def read(self, window: Window) -> dict[str, Chip]:
        """As the scene reads it; where that fails, block by block, damaged ones invalid.

        A file that cannot be opened any more, because it was removed or its server is away, is an error as ever.

        Whole blocks are read whatever the window is: what counts as damaged must not depend on how work was cut.
        """
        inside = window.clip(self.grid.height, self.grid.width)
        blocks = self._blocks(inside)
        if not blocks:
            return self._nothing(window)
        try:
            return _cropped(self._scene.read(_round(blocks)), _round(blocks), window)
        except DamagedError:
            whole = self._nothing(window)
        for block in blocks:
            try:
                chips = self._scene.read(block)
            except DamagedError as error:
                self._unreadable.add(error, block)
                continue
            for name, chip in chips.items():
                _copy(chip, block, whole[name], window)
        return whole

    def _nothing(self, window: Window) -> dict[str, Chip]:
        return {
            name: Chip(np.zeros((count, *window.shape), dtype=np.float32), np.zeros(window.shape, dtype=bool))
            for name, count in self._bands.items()
        }

    def _blocks(self, window: Window) -> list[Window]:
        """The file's blocks that a window inside the scene touches, as far as they lie in the scene."""
        height, width = self._block
        rows = _cuts(window.row, window.height, height, self.grid.height)
        cols = _cuts(window.col, window.width, width, self.grid.width)
        return [Window(r, c, h, w) for r, h in rows for c, w in cols]


def _cuts(first: int, count: int, step: int, size: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of `step` pixels that first to first + count - 1 touches."""
    return [(start, min(step, size - start)) for start in range(first // step * step, first + count, step) if count]


def _round(blocks: list[Window]) -> Window:
    """The window round neighbouring blocks, in the order of `_blocks`."""
    first, last = blocks[0], blocks[-1]
    return Window(first.row, first.col, last.row + last.height - first.row, last.col + last.width - first.col)


def _cropped(chips: dict[str, Chip], place: Window, window: Window) -> dict[str, Chip]:
    if place == window:
        return chips
    found = {
        name: Chip(np.zeros((len(c.pixels), *window.shape), c.pixels.dtype), np.zeros(window.shape, bool))
        for name, c in chips.items()
    }
    for name, chip in chips.items():
        _copy(chip, place, found[name], window)
    return found


def _copy(chip: Chip, place: Window, into: Chip, window: Window) -> None:
    """Copy what a chip that lies at `place` shares with `window` into the chip of that."""
    shared = window.shared(place)
    if shared is not None:
        here, there = shared
        into.pixels[(slice(None), *here)] = chip.pixels[(slice(None), *there)]
        into.valid[here] = chip.valid[there]
