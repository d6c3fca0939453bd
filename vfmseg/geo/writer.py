"""Label maps written row by row: a file under its final name is complete, whatever happened on the way.

Rows go to a temporary file beside the target. Only after the last row was written, flushed, read back and found
equal does it take the target's name; any error or interruption removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from rasterio.windows import Window as RasterioWindow

from vfmseg.errors import DataError, MachineError
from vfmseg.geo.grid import IDENTITY, Grid
from vfmseg.geo.rasterfile import gdal, open_dataset

_BLOCK = 256
"""Height and width of the GeoTIFF's tiles in pixels; rows are collected until a row of tiles is full."""

_TYPES = (
    # type, smallest and largest class id, nodata; colour tables exist for unsigned types only
    ("uint8", 0, 254, 255),
    ("uint16", 0, 65534, 65535),
    ("int16", -32767, 32767, -32768),
    ("int32", -(2**31) + 1, 2**31 - 1, -(2**31)),
)

_SIDECARS = (".aux.xml", ".ovr", ".msk")
"""What GIS programs keep beside a raster; of an overwritten map they would show the old pixels."""


class LabelWriter:
    """A GeoTIFF of class ids with the scene's CRS and transform, class names (tags CLASS_<id>) and colours.

    ids, names, colors (red, green, blue, 0..255) belong together: index i of the labels is written as ids[i].
    IGNORE is written as the file's nodata, which is no class id. Ids below 0 get a signed type, which has no
    colour table. Missing folders are made. DataError: target exists and `overwrite` is off, or cannot be
    created. MachineError: the disk is full or broken.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        grid: Grid,
        ids: Sequence[int],
        names: Sequence[str],
        colors: Sequence[tuple[int, int, int]],
        tags: Mapping[str, str] | None = None,
        overwrite: bool = True,
    ) -> None:
        if not len(ids) == len(names) == len(colors):
            raise ValueError(f"{len(ids)} ids, {len(names)} names, {len(colors)} colors: expected as many of each")
        if os.fspath(path).startswith("/vsi") or "://" in os.fspath(path):  # Path would make folders of these names
            raise DataError(f"{os.fspath(path)}: maps are written to this machine's disks only; choose a path there")
        self.path = Path(path)
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; expected the name of a GeoTIFF to write")
        if not overwrite and self.path.exists():
            raise DataError(f"{self.path}: exists already; choose another name or allow overwriting")
        self.grid = grid
        self.dtype, self.nodata = label_type(ids)
        self._numbers = np.array([*ids, self.nodata], dtype=self.dtype)  # [-1], IGNORE, is the last: nodata
        self._colors = {i: (*color, 255) for i, color in zip(ids, colors, strict=True)}
        self._tags = {**(tags or {}), **{f"CLASS_{i}": name for i, name in zip(ids, names, strict=True)}}
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._rows = np.empty((_BLOCK, grid.width), dtype=self.dtype)
        self._next = 0  # first row that is still to come
        self._sums: list[int] = []  # checksum of each row of tiles, to compare with what the disk holds
        self._dataset: Any = None

    def __enter__(self) -> LabelWriter:
        try:
            with self._machine():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._partial.touch()  # Python says why a file cannot be made, GDAL does not
                with gdal():
                    self._dataset = self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, row: int, labels: np.ndarray) -> None:
        """Write whole rows: labels int (h, width) of indexes or IGNORE, from `row` on, each row once, in order."""
        if self._dataset is None:
            raise ValueError(f"{self.path}: not open; use the writer in a `with` statement")
        if row != self._next or labels.shape[1:] != (self.grid.width,) or row + len(labels) > self.grid.height:
            raise ValueError(
                f"{self.path}: rows {row} to {row + len(labels) - 1}, shape {labels.shape}; expected rows from "
                f"{self._next} on, of {self.grid.width} pixels, {self.grid.height} rows in all"
            )
        if labels.size and not -1 <= labels.min() <= labels.max() < len(self._numbers) - 1:
            raise ValueError(
                f"{self.path}: labels {labels.min()} to {labels.max()}; expected -1 to {len(self._numbers) - 2}"
            )
        while len(labels):
            filled = self._next % _BLOCK
            part, labels = labels[: _BLOCK - filled], labels[_BLOCK - filled :]
            self._rows[filled : filled + len(part)] = self._numbers[part]
            self._next += len(part)
            if self._next % _BLOCK == 0 or self._next == self.grid.height:
                self._flush(filled + len(part))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()  # after a clean end the temporary name is gone already

    def _create(self) -> Any:
        georeference: dict[str, Any] = {}
        if self.grid.crs is not None:
            georeference["crs"] = self.grid.crs
        if self.grid.transform != IDENTITY:
            georeference["transform"] = Affine(*self.grid.transform)
        dataset = open_dataset(
            str(self._partial),
            "w",
            driver="GTiff",
            width=self.grid.width,
            height=self.grid.height,
            count=1,
            dtype=self.dtype,
            nodata=self.nodata,
            tiled=True,
            blockxsize=_BLOCK,
            blockysize=_BLOCK,
            compress="deflate",
            BIGTIFF="IF_SAFER",
            **georeference,
        )
        # before the first pixel: later GDAL would put them into a second file beside this one
        if self.dtype.startswith("uint"):
            dataset.write_colormap(1, self._colors)
        dataset.update_tags(**self._tags)
        return dataset

    def _flush(self, count: int) -> None:
        rows = self._rows[:count]
        self._sums.append(zlib.crc32(rows.tobytes()))
        with self._machine(), gdal():
            self._dataset.write(rows, 1, window=RasterioWindow(0, self._next - count, self.grid.width, count))

    def _finish(self) -> None:
        if self._next != self.grid.height:
            raise ValueError(f"{self.path}: rows {self._next} to {self.grid.height - 1} were never written")
        with self._machine():
            with gdal():
                self._dataset.close()
            _sync(self._partial)
            self._check()
            for suffix in _SIDECARS:
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            os.replace(self._partial, self.path)
            if os.name == "posix":
                _sync(self.path.parent)

    def _check(self) -> None:
        """Read the file back: closing a GDAL file on a full disk reports no error."""
        with gdal(), contextlib.closing(open_dataset(str(self._partial))) as stored:
            complete = stored.nodata == self.nodata and self._tags.items() <= stored.tags().items()
            for number, expected in enumerate(self._sums):
                first = number * _BLOCK
                height = min(_BLOCK, self.grid.height - first)
                rows = stored.read(1, window=RasterioWindow(0, first, self.grid.width, height))
                complete = complete and zlib.crc32(rows.tobytes()) == expected
        if not complete:
            raise MachineError(self._lost("what the disk holds differs from what was written"))

    def _discard(self) -> None:
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            with contextlib.suppress(RasterioError, OSError), gdal():
                dataset.close()
        for path in (self._partial, self._partial.with_name(self._partial.name + ".aux.xml")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _machine(self) -> Iterator[None]:
        """Errors of the disk, of Python or GDAL, as ours."""
        try:
            yield
        except (FileExistsError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
            raise DataError(
                f"{self.path}: cannot be created ({error.strerror}: {error.filename}); choose a folder where "
                "you may write"
            ) from error
        except (RasterioError, OSError) as error:
            raise MachineError(self._lost(str(error.__cause__ or error))) from error

    def _lost(self, reason: str) -> str:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.path.parent).free / 1e6:.0f} MB"
        return (
            f"{self.path}: could not be written ({reason}); free space there: {free}; nothing was left "
            "behind: make room or choose another disk, then run again"
        )


def label_type(ids: Sequence[int]) -> tuple[str, int]:
    """The smallest integer type that holds these class ids, and its nodata value, which is none of them."""
    for dtype, smallest, largest, nodata in _TYPES:
        if min(ids) >= smallest and max(ids) <= largest:
            return dtype, nodata
    raise DataError(f"class ids {min(ids)} to {max(ids)} do not fit 32 bits; choose smaller ones")


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk; delayed errors (quota, network disk) are raised here."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
