"""Labels read by window: int64 (h, w), an index 0..K-1 for each class id of the file, IGNORE where there is no label.

An id that nobody declared is an error with its count, never a class: neither clamped, wrapped nor turned into 0.
"""

from __future__ import annotations

import os
from types import TracebackType

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.validity import as_stored, equals, no_numbers


class LabelRaster:
    """The labels of one scene: a file with one band of class ids, whole numbers of any type.

    Palette images give their palette indexes, and a grey picture that is stored as red, green and blue (as in every
    GeoPackage) its grey. Unlabelled is: ignore_index, NaN, pixels hidden by alpha or a mask
    band, and the file's nodata value unless that is a class id (many label files name class 0 as nodata).
    """

    def __init__(self, path: str | os.PathLike[str], label_map: LabelMap) -> None:
        self.path = os.fspath(path)
        self.label_map = label_map
        self._file = RasterFile(path)

    @property
    def grid(self) -> Grid:
        """The grid of the labels. DataError if the file is missing, unreadable or not one band."""
        self._bands()
        return self._file.info.grid

    def read(self, window: Window) -> np.ndarray:
        """Indexes int64 (h, w) of a window of any position: 0..K-1, or IGNORE, also beyond the scene."""
        index = np.full(window.shape, IGNORE, dtype=np.int64)
        bands = self._bands()
        inside = window.clip(self._file.info.grid.height, self._file.info.grid.width)
        shared = window.shared(inside)
        if shared is not None:
            here, _ = shared
            stored, *twins = self._file.read(bands, inside)
            hidden = np.zeros(stored.shape, dtype=bool)
            for by_it in self._file.read_hidden(bands, inside).values():
                hidden |= by_it
            if any(((twin != stored) & ~hidden).any() for twin in twins):  # colours, not grey three times
                raise self._not_one_band(len(bands))
            # many label files name 0, their first class, as nodata: the classes of the recipe count for more
            nodata = self._file.info.nodata[bands[0] - 1]
            if nodata is not None and nodata not in self.label_map.ids:
                mark = as_stored(nodata, stored.dtype)
                hidden |= False if mark is None else equals(stored, mark)
            if stored.dtype.kind == "f":
                hidden |= no_numbers(stored)
            place = f"{self.path} ({inside})"
            index[here] = self.label_map.to_index(stored, place, hidden)
        return index

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._file.close()

    def __enter__(self) -> LabelRaster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bands(self) -> list[int]:
        """Numbers, from 1, of the bands that hold class ids: one, or red, green and blue alike, of a grey picture."""
        info = self._file.info
        bands = [band for band in range(1, info.count + 1) if band not in info.alpha]
        if len(bands) != 1 and [info.bands[band - 1].color for band in bands] != ["red", "green", "blue"]:
            raise self._not_one_band(len(bands))
        if info.lossy:
            raise DataError(
                f"{self.path}: is compressed as JPEG or WebP, which changes class ids; expected labels without loss: "
                "export them as GeoTIFF or PNG from their source (a conversion does not bring the ids back)"
            )
        return bands

    def _not_one_band(self, count: int) -> DataError:
        asked = " (a picture of the labels in colours?)" if count == 3 else ""
        if count == len(self.label_map.ids):
            asked += " (one band a class? write the id of the class whose band is largest)"
        return DataError(
            f"{self.path}: has {count} bands{asked}; expected one band of class ids; convert it to one number a class"
        )
