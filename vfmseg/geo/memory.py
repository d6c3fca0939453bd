"""Arrays as rasters: an array in memory goes through the same reading rules as a file.

It is written to a GeoTIFF in GDAL's memory, at the cost of a copy; so there is one way of reading, and not a second one
that could differ in what it takes for nodata.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from rasterio.io import MemoryFile

from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.fileinfo import FileInfo
from vfmseg.geo.opening import gdal, open_dataset
from vfmseg.geo.reader import Raster

# types that GDAL has no like of -> the next one that holds them
_STORED = {"bool": "uint8", "float16": "float32"}


class ArrayRaster(Raster):
    """An array (C, H, W) that is read like a file of that content: bands, scale, nodata and NaN.

    Whole numbers are taken for stored ones: they are scaled as the training files were, if those said how. Others are
    values. `name` is what messages call it. DataError if the array has another shape or holds no real numbers.
    """

    def __init__(self, array: np.ndarray, bands: Bands, name: str) -> None:
        if array.ndim != 3 or 0 in array.shape:
            raise DataError(f"the array for '{name}' has shape {array.shape}; expected (bands, height, width)")
        if array.dtype.kind not in "buif":
            raise DataError(f"the array for '{name}' holds {array.dtype}; expected integers or real numbers")
        stored = array.astype(_STORED.get(array.dtype.name, array.dtype.name), copy=False)
        count, height, width = stored.shape
        with gdal():
            # the file lives in GDAL's memory as long as this object
            self._memory = MemoryFile(filename=f"{name}.tif")
            with open_dataset(
                self._memory.name, "w", driver="GTiff", count=count, height=height, width=width, dtype=stored.dtype,
                photometric="MINISBLACK", interleave="band", BIGTIFF="IF_SAFER",
            ) as target:  # fmt: skip
                target.write(stored)
                read, like = bands.indexes or range(1, count + 1), bands.like or ()
                said = {number: (band.scale, band.offset) for number, band in zip(read, like, strict=False)}
                known = len(read) == len(like) and not any(None in pair for pair in said.values())
                if array.dtype.kind in "ui" and known:
                    pairs = [said.get(number, (1.0, 0.0)) for number in range(1, count + 1)]
                    target.scales, target.offsets = ([pair[i] for pair in pairs] for i in range(2))
        self._array = array
        super().__init__(self._memory.name, bands)

    @property
    def infos(self) -> dict[str, FileInfo]:
        """In place of a file what tells this array from another one, also in another process."""
        (info,) = super().infos.values()
        return {self._content: info}

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for band in self._array:
            digest.update(np.ascontiguousarray(band).data)
        shape = " x ".join(map(str, self._array.shape))
        return f"array of {shape} {self._array.dtype.str} ({digest.hexdigest()[:16]})"

    def close(self) -> None:
        """Release the memory."""
        super().close()
        self._memory.close()
