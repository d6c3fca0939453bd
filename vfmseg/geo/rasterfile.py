"""One raster file, opened when first needed: stored numbers (bands, h, w) by window, and what masks and alpha hide.

What the numbers mean, as imagery or as labels, is decided in `reader` and `labels`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from vfmseg.errors import DamagedError, DataError
from vfmseg.geo.fileinfo import FileInfo, describe
from vfmseg.geo.grid import Window
from vfmseg.geo.opening import gdal, open_raster, rasterio_window, why_not_opened
from vfmseg.geo.trust import is_remote


class RasterFile:
    """One file of any format that GDAL tells by its content. Safe in threads, after a fork and in pickles.

    What a file says of itself travels in the pickle, the open handle does not: each process opens its own.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._info: FileInfo | None = None
        self._reset()

    def _reset(self) -> None:
        self._dataset: Any = None
        self._pid = os.getpid()
        self._lock = threading.Lock()  # a GDAL handle must not be used by two threads at once

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_info": self._info}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def info(self) -> FileInfo:
        """What the file says of itself; opens it at the first call. DataError if it cannot be opened."""
        if self._info is None:
            try:
                with self._handle() as dataset:
                    self._info = describe(dataset, self.path)
            except CPLE_BaseError as error:
                raise DataError(why_not_opened(self.path, error)) from error
        return self._info

    def read(self, bands: Sequence[int], window: Window) -> np.ndarray:
        """Stored numbers (len(bands), height, width) of a window inside the file, in the file's own dtype."""
        turn = self.info.turn
        with self._handle() as dataset, _damage(self.path, window):
            return turn.shown(dataset.read(list(bands), window=rasterio_window(turn.stored_window(window))))

    def read_hidden(self, bands: Sequence[int], window: Window) -> dict[str, np.ndarray]:
        """{what hides pixels: bool (height, width) where it does}: "mask" for mask bands, "alpha" for an alpha band.

        An alpha band that is itself among `bands` hides nothing: whoever asks for it by number means its values.
        Nodata values are not looked at here.
        """
        masks = [bands[0]] if self.info.shared_mask else [b for b in bands if b in self.info.own_masks]
        alphas = [band for band in self.info.alpha if band not in bands]
        hidden: dict[str, np.ndarray] = {}
        if not masks and not alphas:
            return hidden
        turn = self.info.turn
        with self._handle() as dataset, _damage(self.path, window):
            place = rasterio_window(turn.stored_window(window))
            if masks:
                shown = np.all([dataset.read_masks(band, window=place) != 0 for band in masks], axis=0)
                hidden["mask"] = turn.shown(~shown)
            if alphas:
                shown = np.all([dataset.read(band, window=place) != 0 for band in alphas], axis=0)
                hidden["alpha"] = turn.shown(~shown)
        return hidden

    def close(self) -> None:
        """Give the handle back; the next read opens the file again."""
        if self._pid != os.getpid():
            self._reset()  # the handle is the parent process's
        with self._lock, gdal():
            if self._dataset is not None:
                self._dataset.close()
            self._dataset = None  # still locked: no thread may find it closed

    @contextmanager
    def _handle(self) -> Iterator[Any]:
        if self._pid != os.getpid():
            self._reset()  # a handle inherited through fork shares its file position with the parent process
        with self._lock, gdal(self.path):
            if self._dataset is None:
                self._dataset = open_raster(self.path)
            try:
                yield self._dataset
            except Exception:
                # of a VRT whose file is missing, the same handle answers the next read with zeros
                self._dataset.close()
                self._dataset = None
                raise


def files_of(path: str) -> list[str]:
    """Every file that a raster is read from, the tiles of a VRT among them; of one that cannot be opened its name."""
    try:
        return [path, *RasterFile(path).info.others]
    except DataError:
        return [path]


@contextmanager
def _damage(path: str, window: Window) -> Iterator[None]:
    try:
        yield
    except RasterioError as error:
        why = "the server did not answer, or the file" if is_remote(path) else "the file"
        raise DamagedError(
            f"{path}: {window} cannot be read: {why} is damaged or cut short "
            f"({error.__cause__ or error}); {'try again, or ' if is_remote(path) else ''}copy or download it again"
        ) from error
