"""A scene of which some blocks cannot be read: they count as invalid, and are told afterwards."""

from __future__ import annotations

import threading

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.reader import Chip
from vfmseg.inference.reading import SceneSource


class Unreadable:
    """What could not be read, collected over the reader threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.messages: list[str] = []
        self.pixels = 0

    def add(self, error: DataError, window: Window) -> None:
        """Note a window that was given up."""
        with self._lock:
            self.messages.append(str(error))
            self.pixels += window.height * window.width


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
        """As the scene reads it; where that fails, block by block, damaged ones invalid."""
        try:
            return self._scene.read(window)
        except DataError:
            whole = self._nothing(window)
        for part in self._blocks(window):
            try:
                chips = self._scene.read(part)
            except DataError as error:
                self._unreadable.add(error, part)
                continue
            rows = slice(part.row - window.row, part.row - window.row + part.height)
            cols = slice(part.col - window.col, part.col - window.col + part.width)
            for name, chip in chips.items():
                whole[name].pixels[:, rows, cols] = chip.pixels
                whole[name].valid[rows, cols] = chip.valid
        return whole

    def _nothing(self, window: Window) -> dict[str, Chip]:
        return {
            name: Chip(np.zeros((count, *window.shape), dtype=np.float32), np.zeros(window.shape, dtype=bool))
            for name, count in self._bands.items()
        }

    def _blocks(self, window: Window) -> list[Window]:
        """The window cut along the file's blocks."""
        height, width = self._block
        rows = _cuts(window.row, window.row + window.height, height)
        cols = _cuts(window.col, window.col + window.width, width)
        return [Window(r, c, h, w) for r, h in rows for c, w in cols]


def _cuts(first: int, end: int, step: int) -> list[tuple[int, int]]:
    starts = [first, *range((first // step + 1) * step, end, step)]
    return [(a, min(b, end) - a) for a, b in zip(starts, [*starts[1:], end], strict=True)]
