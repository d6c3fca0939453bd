"""Maps written row by row: a file under its final name is complete, whatever happened on the way.

Rows are as wide as the map, or, where that would not fit in memory, as wide as strips side by side. They go to a
temporary file beside the target. Only after the last was written, flushed, read back and found equal does the file
take the target's name; any error or interruption removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio.shutil
from rasterio.transform import Affine

from vfmseg.disk.files import aside_of, not_created, publish
from vfmseg.disk.paths import SIDECARS, elsewhere
from vfmseg.errors import DataError, MachineError
from vfmseg.geo.compression import check_compression, cog_options, geotiff_options
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.opening import GDAL_ERRORS, gdal, open_dataset, rasterio_window

BLOCK = 256
"""Height and width of the GeoTIFF's tiles in pixels; rows are collected until a row of tiles is full."""


class MapWriter:
    """A GeoTIFF with a scene's CRS and transform, tiled and compressed.

    Missing folders are made; an existing file is replaced at the end. DataError: it cannot be created. MachineError:
    the disk is full or broken. `level`: of the compression, 1 (fast) to 9 (small). `cog`: a cloud-optimised GeoTIFF
    with overviews, made of the finished rows. `compress`: deflate, zstd or lzw. `last`: what is done to the closed
    file, by its temporary name, before it is flushed and read back.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        grid: Grid,
        layer: Layer,
        level: int = 6,
        cog: bool = False,
        compress: str = "deflate",
        last: Callable[[Path], None] | None = None,
    ) -> None:
        if elsewhere(os.fspath(path)):  # Path would make folders of these names
            raise DataError(f"{os.fspath(path)}: maps are written to this machine's disks only; choose a path there")
        self.path = Path(path)
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; expected the name of a GeoTIFF to write")
        check_compression(compress)
        self.grid = grid
        self.layer = layer
        self._compress = compress
        self._level = level
        self._cog = cog
        self._last = last
        self._partial = aside_of(self.path)
        self._rows = np.empty((len(layer.names), BLOCK, 0), dtype=layer.dtype)  # of the strip that is written
        self._col = 0  # first column of that strip
        self._next = grid.height  # first row that is still to come
        self._sums: dict[Window, int] = {}  # checksum of what was written, to compare with what the disk holds
        self._dataset: Any = None
        self._made = False  # whether there should be a temporary file

    def __enter__(self) -> MapWriter:
        try:
            with self._machine():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._partial.touch()  # Python says why a file cannot be made, GDAL does not
                self._made = True
                with gdal():
                    self._dataset = self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, row: int, values: np.ndarray, col: int = 0) -> None:
        """Write rows: stored numbers (bands, h, w), from `row` on, each row once, in order.

        All are as wide as the grid, or they are of a strip that begins at column `col`: strips come from left to
        right, each from top to bottom, and begin at multiples of BLOCK.
        """
        if self._dataset is None:
            raise ValueError(f"{self.path}: not open; use the writer in a `with` statement")
        # a strip begins where the one before it, which is complete, has ended; the first at 0, beside an empty one
        if values.ndim == 3 and self._next == self.grid.height and col == self._col + self._rows.shape[2]:
            self._rows = np.empty((len(self.layer.names), BLOCK, values.shape[2]), dtype=self.layer.dtype)
            self._col, self._next = col, 0
        bands, _, width = self._rows.shape
        height = values.shape[1] if values.ndim == 3 else 0
        fits = values.shape == (bands, height, width) and values.dtype == self._rows.dtype and col == self._col
        last = col + width == self.grid.width
        if row != self._next or not fits or row + height > self.grid.height or not (last or width % BLOCK == 0):
            raise ValueError(
                f"{self.path}: rows {row} to {row + height - 1} from column {col} on, shape {values.shape} of "
                f"{values.dtype}; expected rows from {self._next} on, {bands} x rows x {width} of {self._rows.dtype}, "
                f"{self.grid.height} rows in all"
            )
        while values.shape[1]:
            # rows wait until a row of tiles is full: GDAL would compress half a row twice
            filled = self._next % BLOCK
            part, values = values[:, : BLOCK - filled], values[:, BLOCK - filled :]
            self._rows[:, filled : filled + part.shape[1]] = part
            self._next += part.shape[1]
            if self._next % BLOCK == 0 or self._next == self.grid.height:
                self._flush(filled + part.shape[1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()  # after a clean end the temporary name is gone already

    def _create(self) -> Any:
        options: dict[str, Any] = {}
        if not self.layer.colors:
            options["photometric"] = "MINISBLACK"  # GDAL takes 3 and 4 bands for red, green, blue and alpha
        if self.grid.crs is not None:
            options["crs"] = self.grid.crs
        if self.grid.transform != IDENTITY:
            options["transform"] = Affine(*self.grid.transform)
        dataset = open_dataset(
            str(self._partial),
            "w",
            driver="GTiff",
            width=self.grid.width,
            height=self.grid.height,
            count=len(self.layer.names),
            dtype=self.layer.dtype,
            nodata=self.layer.nodata,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            interleave="band",
            num_threads="all_cpus",
            BIGTIFF="IF_SAFER",
            **geotiff_options(self._compress, self._level),
            **options,
        )
        # before the first pixel: later GDAL would put them into a second file beside this one
        if self.layer.colors:
            dataset.write_colormap(1, {number: (*color, 255) for number, color in self.layer.colors.items()})
        if any(self.layer.names):
            dataset.descriptions = self.layer.names
        if self.layer.scale != 1:
            dataset.scales = (self.layer.scale,) * len(self.layer.names)
        dataset.update_tags(**self.layer.tags)
        return dataset

    def _flush(self, count: int) -> None:
        """Write the first `count` of the collected rows, which end before row `_next`, and keep their checksum."""
        rows = np.ascontiguousarray(self._rows[:, :count])  # no copy but of the last rows of several bands
        window = Window(self._next - count, self._col, count, rows.shape[2])
        self._sums[window] = zlib.crc32(rows.data)
        with self._machine(), gdal():
            self._dataset.write(rows, window=rasterio_window(window))

    def _finish(self) -> None:
        right = self._col + self._rows.shape[2]
        if self._next != self.grid.height:
            lost = f"rows {self._next} to {self.grid.height - 1} of columns {self._col} to {right - 1}"
            raise ValueError(f"{self.path}: {lost} were never written")
        if right != self.grid.width:
            raise ValueError(f"{self.path}: columns {right} to {self.grid.width - 1} were never written")
        with self._machine():
            with gdal():
                self._dataset.close()
                if self._cog:
                    self._optimise()
            if self._last is not None:
                self._last(self._partial)
            publish(self._partial, self.path, self._check, stale=SIDECARS)

    def _optimise(self) -> None:
        """Put a cloud-optimised copy in the place of the temporary file.

        Its overviews average numbers that measure something (confidence), but never class ids.
        """
        copy = self._partial.with_name(self._partial.name + ".cog")
        try:
            rasterio.shutil.copy(
                str(self._partial), str(copy), driver="COG", bigtiff="IF_SAFER",
                overview_resampling="NEAREST" if self.layer.colors or self.layer.scale == 1 else "AVERAGE",
                num_threads="ALL_CPUS", **cog_options(self._compress, self._level),
            )  # fmt: skip
            os.replace(copy, self._partial)
        finally:
            copy.unlink(missing_ok=True)

    def _check(self) -> None:
        """Read the file back: closing a GDAL file on a full disk reports no error."""
        with gdal(), contextlib.closing(open_dataset(str(self._partial))) as stored:
            complete = stored.nodata == self.layer.nodata and self.layer.tags.items() <= stored.tags().items()
            for window, expected in self._sums.items():
                rows = stored.read(window=rasterio_window(window))
                complete = complete and zlib.crc32(rows.data) == expected
        if not complete:
            raise MachineError(self._lost("what the disk holds differs from what was written"))
        self._made = False  # what follows is the rename

    def _discard(self) -> None:
        """Close what is open and remove the temporary file, whatever state they are in; raises nothing."""
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            with contextlib.suppress(*GDAL_ERRORS, OSError), gdal():
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
            raise not_created(self.path, error) from error
        except (*GDAL_ERRORS, OSError) as error:
            raise MachineError(self._lost(str(error.__cause__ or error))) from error

    def _lost(self, reason: str) -> str:
        """The message for a map that could not be written."""
        if self._made and not self._partial.exists():
            return (
                f"{self.path}: could not be written: its temporary file was removed meanwhile, by hand or by another "
                f"run that writes there ({reason}); see to it that only one does, then run again"
            )
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.path.parent).free / 1e6:.0f} MB"
        return (
            f"{self.path}: could not be written ({reason}); free space there: {free}; nothing half "
            "written was left behind: make room or choose another disk, then run again"
        )
