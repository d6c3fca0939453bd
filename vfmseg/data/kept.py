"""The few small scenes that stay decoded in memory: of a JPEG or PNG a window costs as much as the whole image."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import numpy as np

from vfmseg.geo.grid import Window
from vfmseg.geo.reader import Raster
from vfmseg.geo.validity import Chip

LIMIT = 2**28
"""Bytes of each process that reads: 256 MiB, of 8-bit RGB 67 megapixels."""


class Kept:
    """Keeps the most recently used rasters decoded, as far as `limit` bytes reach; each process has its own."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.size = 0
        self._recent: OrderedDict[int, tuple[Raster, Chip]] = OrderedDict()
        self._lock = Lock()

    def worth(self, raster: Raster) -> bool:
        """Whether its blocks are as wide as it is, so that windows decode far more than they show, and it is small."""
        grid = raster.grid
        size = grid.height * grid.width * (raster.count * raster.compact.itemsize + 1)
        return raster.block[1] >= grid.width and size <= self.limit // 16

    def read(self, raster: Raster, window: Window) -> Chip:
        """What `raster.read(window)` returns, of the pixels in memory; a raster that is not there is read whole."""
        with self._lock:
            found = self._recent.get(id(raster))
            if found is not None:
                self._recent.move_to_end(id(raster))
        if found is None:
            grid = raster.grid
            found = (raster, _compact(raster.read(Window(0, 0, grid.height, grid.width), compact=True)))
            raster.close()  # what is in memory needs no file handle
            self._keep(*found)
        return _cut(found[1], window)

    def forget(self, raster: Raster) -> None:
        """Its pixels are read anew the next time, as it is read otherwise from now on."""
        with self._lock:
            found = self._recent.pop(id(raster), None)
            self.size -= 0 if found is None else _bytes(found[1])

    def _keep(self, raster: Raster, chip: Chip) -> None:
        with self._lock:
            if id(raster) not in self._recent:  # held here, so that its id cannot be given to another
                self._recent[id(raster)] = (raster, chip)
                self.size += _bytes(chip)
            while self.size > self.limit and len(self._recent) > 1:
                self.size -= _bytes(self._recent.popitem(last=False)[1][1])


KEPT = Kept()
"""The decoded rasters of this process, shared by all scenes."""


def _compact(chip: Chip) -> Chip:
    """The same, with one True for all pixels where all are valid."""
    return Chip(chip.pixels, np.broadcast_to(np.True_, chip.valid.shape)) if chip.valid.all() else chip


def _bytes(chip: Chip) -> int:
    return chip.pixels.nbytes + (chip.valid.nbytes if chip.valid.strides[-1] else 1)


def _cut(whole: Chip, window: Window) -> Chip:
    """A window of a whole raster, in float32; beyond the edge it is invalid."""
    height, width = whole.valid.shape
    inside = window.clip(height, width)
    part, shown = whole.pixels[:, inside.rows, inside.cols], whole.valid[inside.rows, inside.cols]
    if inside == window:
        return Chip(part.astype(np.float32), shown.copy())
    pixels = np.zeros((len(part), *window.shape), dtype=np.float32)
    valid = np.zeros(window.shape, dtype=bool)
    shared = window.shared(inside)
    if shared is not None:
        here, _ = shared
        pixels[(slice(None), *here)], valid[here] = part, shown
    return Chip(pixels, valid)
