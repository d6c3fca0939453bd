"""A scene of which some blocks cannot be read: their pixels count as invalid, and the blocks are told afterwards."""

from __future__ import annotations

import threading

import numpy as np

from vfmseg.errors import DamagedError
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.validity import Chip
from vfmseg.inference.reading import SceneSource


class Unreadable:
    """The blocks that could not be read, collected over the reader threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.blocks: dict[Window, str] = {}  # {block: why}; each once, however often it is tried

    @property
    def messages(self) -> list[str]:
        """Why each of the blocks could not be read, in the words of its error."""
        return list(self.blocks.values())

    @property
    def pixels(self) -> int:
        """How many pixels the blocks have together."""
        return sum(block.height * block.width for block in self.blocks)

    def add(self, error: DamagedError, block: Window) -> None:
        """Note a block that was given up, and why."""
        with self._lock:
            self.blocks.setdefault(block, str(error))


class Tolerant:
    """The scene that it is given, but for damaged blocks: these are invalid instead of an error."""

    def __init__(
        self, scene: SceneSource, bands: dict[str, int], block: tuple[int, int], unreadable: Unreadable
    ) -> None:
        """`bands` {modality: number}. `block`: height and width of the file's blocks in pixels; see `Unreadable`."""
        self._scene = scene
        self._bands = bands
        self._block = block
        self._unreadable = unreadable

    @property
    def grid(self) -> Grid:
        """The grid of the scene."""
        return self._scene.grid

    def read(self, window: Window) -> dict[str, Chip]:
        """{modality: what it holds in a window}, as the scene reads it; where that fails, block by block.

        Whole blocks are read whatever the window is, as a reader may give the good part of a damaged block or not: what
        counts as damaged must not depend on how the work was cut. A file that cannot be opened any more, because it was
        removed or its server is away, is an error as ever.
        """
        inside = window.clip(self.grid.height, self.grid.width)
        blocks = self._blocks(inside)
        if not blocks:
            return self._nothing(window)
        try:
            around = _around(blocks)
            return _cropped(self._scene.read(around), around, window)
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
        """{modality: invalid pixels} of a window's size."""
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
    """(start, length) of the blocks of `step` pixels that hold pixels first to first + count - 1, up to `size`.

    Pixels 300 to 599 of 700 in blocks of 256: (256, 256), (512, 188).
    """
    return [(start, min(step, size - start)) for start in range(first // step * step, first + count, step) if count]


def _around(blocks: list[Window]) -> Window:
    """The window that neighbouring blocks make together, given in the order of `_blocks`."""
    first, last = blocks[0], blocks[-1]
    return Window(first.row, first.col, last.row + last.height - first.row, last.col + last.width - first.col)


def _cropped(chips: dict[str, Chip], around: Window, window: Window) -> dict[str, Chip]:
    """Chips of the window `around` cut to another one, which may reach beyond it: invalid there."""
    if around == window:
        return chips
    found = {
        name: Chip(np.zeros((len(c.pixels), *window.shape), c.pixels.dtype), np.zeros(window.shape, bool))
        for name, c in chips.items()
    }
    for name, chip in chips.items():
        _copy(chip, around, found[name], window)
    return found


def _copy(chip: Chip, source: Window, into: Chip, target: Window) -> None:
    """Copy the pixels that the windows of two chips share from one chip into the other."""
    shared = target.shared(source)
    if shared is not None:
        here, there = shared
        into.pixels[(slice(None), *here)] = chip.pixels[(slice(None), *there)]
        into.valid[here] = chip.valid[there]
