"""What a training run has seen of its data, cheaply: so that one that goes on with other data is told.

Labels are all read before a run, so their trace is of every pixel: the same labels in another file are the same. Of an
image it is what decides how it is read (size, place, types, nodata), its length, and at most 64 KiB of its bytes,
spread over the file; where no file of this machine holds it, some pixels. Times and folders do not count, so that a
copy of the data is the same. What slips through: a change of an image, of the same length, between those places.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from vfmseg.errors import DamagedError
from vfmseg.geo.grid import Window
from vfmseg.geo.reader import Raster

if TYPE_CHECKING:
    from vfmseg.data.scene import Scene

_END = 16 * 1024
_PLACES = 8
_PART = 4 * 1024


class Traces:
    """{what it is, in words: digest} of every image and every label map of a run."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._labels: dict[int, hashlib.blake2b] = {}
        self._twins: dict[str, int] = {}

    def labels(self, number: int, indexes: np.ndarray) -> None:
        """Class indexes of scene `number` of a split, window by window."""
        self._labels.setdefault(number, _hash()).update(np.ascontiguousarray(indexes, dtype=np.int32).data)

    def split(self, name: str, scenes: Sequence[Scene], below: str = "data.") -> None:
        """All scenes of a split, whose labels were shown before. `below`: where the split is in the recipe."""
        for number, scene in enumerate(scenes):
            labels = self._labels.pop(number, _hash()).hexdigest()
            for role, (place, digest) in scene.traces().items():
                what = f"{os.path.basename(place)} ({role} of {below}{name}, scene {scene.name})"
                self._twins[what] = twins = self._twins.get(what, 0) + 1  # of one name in several folders
                self.found[what if twins == 1 else f"{what} #{twins}"] = labels if role == "labels" else digest


def of_split(found: Mapping[str, str], name: str) -> dict[str, str]:
    """Those of one split, of what `Traces` has found of several."""
    return {what: digest for what, digest in found.items() if f" of data.{name}, scene " in what}


def raster_trace(raster: Raster) -> str:
    """Of the files of a raster and what they say of themselves."""
    digest = _hash()
    for path, info in raster.infos.items():
        digest.update(repr((info.grid.crs, info.grid.transform, info.grid.height, info.grid.width)).encode())
        digest.update(repr((info.dtypes, info.nodata, info.bands, info.alpha, info.turn)).encode())
        for file in (path, *info.others):
            if os.path.isfile(file):
                found = os.stat(file)
                digest.update(_file_trace(file, found.st_size, found.st_mtime_ns).encode())
    if not all(os.path.isfile(path) for path in raster.infos):
        digest.update(_pixels(raster))
    return digest.hexdigest()


@lru_cache(4096)  # one elevation model may lie under all scenes, in many tiles
def _file_trace(file: str, size: int, time: int) -> str:
    with open(file, "rb") as opened:
        return bytes_trace(opened)


def bytes_trace(file: BinaryIO) -> str:
    """Of the length of a file, its beginning, its end and some places between."""
    size = file.seek(0, os.SEEK_END)
    digest = _hash()
    digest.update(f"{size}:".encode())
    spread = 2 * _END + _PLACES * _PART
    step = (size - 2 * _END) // _PLACES
    parts = [(_END + i * step, _PART) for i in range(_PLACES)] if size > spread else [(_END, size)]
    for start, length in ((0, _END), *parts, (max(size - _END, 0), _END)):
        file.seek(start)
        digest.update(file.read(length))
    return digest.hexdigest()


def array_trace(array: np.ndarray) -> str:
    """Of an array in memory."""
    return bytes_trace(io.BytesIO(f"{array.shape}{array.dtype}".encode() + array.tobytes()))


def _pixels(raster: Raster) -> bytes:
    grid = raster.grid
    sixths = ((1, 1), (1, 5), (3, 3), (5, 1), (5, 5))
    places = [Window(grid.height * i // 6, grid.width * j // 6, 4, 64) for i, j in sixths]
    try:
        return b"".join(raster.read(place).pixels.tobytes() for place in places)
    except DamagedError:  # whoever reads it again will say so
        return b"damaged"


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
