"""Imagery read by window: values float32 (C, h, w), and valid bool (h, w), which pixels hold any.

A pixel is invalid where the file or the recipe says so (nodata, alpha, mask band), where a value is NaN or
infinite, and beyond the edge of the scene. Invalid pixels carry 0.0, so that nothing downstream can spread NaN.
Which bands are read is decided in `bands`, what hides a pixel in `validity`, what is computed of an elevation band in
`derived`, and reading on another grid in `warp`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands, ReadBand, bands_in, chosen_bands
from vfmseg.geo.crs import short_name
from vfmseg.geo.derived import Derivation
from vfmseg.geo.fileinfo import FileInfo
from vfmseg.geo.grid import Grid, Slices, Window
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.said import BandSaid
from vfmseg.geo.validity import Chip, Hidden, equals, no_numbers
from vfmseg.geo.warp import Warp

_FLOAT = np.dtype(np.float32)
_ALL: Slices = (slice(None), slice(None))


class Raster:
    """The bands of one modality of one scene: one file, or several files on one grid, stacked in order.

    With several files the band numbers count through them: files of 3 and 1 bands have bands 1 to 4. Files are
    opened at the first need and told by content, not by suffix. A palette image gives its palette indexes. `onto`:
    the grid on which the raster is wanted; files on another one are resampled as they are read, see `warp`.
    hidden: how many pixels were read so far, and what has hidden how many.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        bands: Bands | None = None,
        onto: Grid | None = None,
    ) -> None:
        several = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        if not several:
            raise DataError("an image needs at least one file; the list of files is empty")
        self.paths: tuple[str, ...] = tuple(os.fspath(one) for one in several)
        self.bands = bands if bands is not None else Bands()
        self._files = [RasterFile(one) for one in self.paths]
        self._chosen: tuple[ReadBand, ...] = ()
        self._onto = onto
        self._warp: Warp | None = None  # only where the files lie on another grid
        self._derivation: Derivation | None = None  # only where bands are computed
        self.hidden = Hidden()

    @property
    def path(self) -> str | tuple[str, ...]:
        """The path of the file; for several files, all their paths."""
        return self.paths[0] if len(self.paths) == 1 else self.paths

    @property
    def infos(self) -> dict[str, FileInfo]:
        """{path: what the file says of itself}."""
        return {file.path: file.info for file in self._files}

    @property
    def palette(self) -> bool:
        """Whether a band that is read holds numbers of colours."""
        return any(read.band in self._files[read.file].info.palette for read in self._plan())

    @property
    def band_numbers(self) -> tuple[int, ...]:
        """1-based numbers of the bands that are read, counted through the files."""
        there = bands_in(self._files)
        return tuple(there.index((read.file, read.band)) + 1 for read in self._plan())

    @property
    def said(self) -> tuple[BandSaid, ...]:
        """What the files say of the bands that are read from them, with the scale and offset by which they are."""
        told = [(self._files[read.file].info.bands[read.band - 1], read) for read in self._plan()]
        return tuple(replace(band, scale=read.scale, offset=read.offset) for band, read in told)

    @property
    def control_points(self) -> int:
        """Number of ground control points of the first file; they are not used."""
        return self._files[0].info.control_points

    @property
    def _name(self) -> str:
        return " + ".join(self.paths)

    @property
    def grid(self) -> Grid:
        """The grid that windows count in. DataError if a file is missing, unreadable or on another grid than others."""
        self._plan()
        return self._files[0].info.grid if self._onto is None else self._onto

    @property
    def count(self) -> int:
        """Number of bands that `read` returns. DataError if a band asked for does not exist."""
        plan = self._plan()
        return len(self.bands.derive or plan)

    @property
    def derivation(self) -> Derivation | None:
        """How bands are computed of the one that is read; None where they are the bands that are read."""
        self._plan()
        return self._derivation

    @property
    def dtype(self) -> str:
        """The stored type of the bands read, such as "uint16"; for mixed types the one that holds them all.

        Computed bands are float32, whatever the elevation is stored in.
        """
        if self.bands.derive:
            return "float32"
        return str(np.result_type(*(read.dtype for read in self._plan())))

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the blocks that the first file is stored in."""
        self._plan()
        return self._files[0].info.block

    @property
    def compact(self) -> np.dtype:
        """A type that holds every value that `read` returns without loss: that of the file where it is a small one."""
        stored = self.dtype
        plain = all((read.scale, read.offset) == (1.0, 0.0) for read in self._plan()) and self._warp is None
        return np.dtype(stored if plain and stored in ("uint8", "uint16", "int16") else "float32")

    def read(self, window: Window, compact: bool = False) -> Chip:
        """Values and validity of a window of any position; what lies beyond the scene is invalid.

        Values are float32, or with `compact` of the type `compact`, which takes less memory on the way as well.
        DataError names the file, and the window if its part of the file is damaged.
        """
        count = self.count
        kind = self.compact if compact else _FLOAT
        inside = window.clip(self.grid.height, self.grid.width)
        if inside == window and self._warp is None and inside.height and inside.width:  # nearly always: spare a copy
            return Chip(*self._read_own(inside, kind))
        pixels = np.zeros((count, *window.shape), dtype=kind)
        valid = np.zeros(window.shape, dtype=bool)
        shared = window.shared(inside)
        if shared is not None:
            here, _ = shared
            if self._warp is None:
                values, good = self._read_own(inside, kind)
            else:
                values, good = self._warp.read(inside, count, self._read_own)
            pixels[(slice(None), *here)], valid[here] = values, good
        return Chip(pixels, valid)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def follow(self, like: Sequence[BandSaid] | None) -> None:
        """Read from now on as the training files were: the same bands where this file names them, in their order."""
        self.bands = replace(self.bands, like=None if like is None else tuple(like))
        self._forget()

    def lie_on(self, grid: Grid) -> None:
        """Files without a CRS, pixel by pixel on a grid that has one: bands are derived by the metres of that one."""
        self._onto = grid
        self._forget()

    def _forget(self) -> None:
        """What follows from `bands` and the grids is settled anew at the next read."""
        self._chosen, self._warp, self._derivation = (), None, None

    def _plan(self) -> tuple[ReadBand, ...]:
        """The bands to read; made once, when the files are first opened."""
        if not self._chosen:
            self._check_grids()
            own = self._files[0].info.grid
            if self._onto is not None and not self._onto.same_place(own):  # else pixel lies on pixel
                self._warp = Warp(self._name, own, self._onto)
            chosen = chosen_bands(self.bands, self._files, self._name)
            if self.bands.derive:
                place = self._onto if own.crs is None and self._onto is not None and self._warp is None else own
                if place.crs is None and (side := self.bands.pixel_size) is not None:
                    place = replace(place, transform=(side, 0.0, 0.0, 0.0, -side, 0.0))
                self._derivation = Derivation(self.bands.derive, self.bands.local_radius, place)
            self._chosen = chosen
        return self._chosen

    def _check_grids(self) -> None:
        first = self._files[0].info.grid
        for file in self._files[1:]:
            other = file.info.grid
            if not first.same_place(other):
                raise DataError(
                    f"{file.path}: {_grid_text(other)} does not lie on the grid of {self.paths[0]}: "
                    f"{_grid_text(first)}; files of one modality are stacked pixel by pixel, so warp them to "
                    "one grid or make them two modalities"
                )

    def _read_own(self, window: Window, kind: np.dtype = _FLOAT) -> tuple[np.ndarray, np.ndarray]:
        """Values (C, h, w) and validity (h, w) of a window inside the files, on their own grid.

        Bands are computed here, before anything is warped: of an interpolated surface the slope would be that of the
        facets between the raster's pixels, and the values would hang on the pixel size of the first modality.
        """
        if self._derivation is None:
            return self._read_inside(window, kind)
        values, valid, lost = self._derivation.read(
            window, lambda around, asked: self._read_inside(around, _FLOAT, asked)
        )
        self.hidden.by("elevation without valid neighbours", lost)
        return values, valid

    def _read_inside(
        self, window: Window, kind: np.dtype = _FLOAT, asked: Slices = _ALL
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values (C, h, w) of type `kind` and validity (h, w) of a window inside the files, of the bands they store.

        A pixel is hidden for all bands alike: there is one validity a modality. `asked`: the part of the window in
        which hidden pixels are counted; the rest is a margin.
        """
        values = np.empty((len(self._chosen), *window.shape), dtype=kind)
        empty: dict[str, np.ndarray] = {}  # {"recipe" or "file": where all bands so far hold its nodata}
        hidden: dict[str, np.ndarray] = {}  # {cause: where any band so far says so}

        def hide(cause: str, hit: np.ndarray) -> None:
            hidden[cause] = hidden[cause] | hit if cause in hidden else hit

        for number, file in enumerate(self._files):
            slots = [slot for slot, read in enumerate(self._chosen) if read.file == number]
            if not slots:
                continue
            bands = [self._chosen[slot].band for slot in slots]
            for cause, hit in file.read_hidden(bands, window).items():
                hide(cause, hit)
            for slot, stored in zip(slots, file.read(bands, window), strict=True):
                read = self._chosen[slot]
                for mark in read.any_of:
                    hide(f"nodata {mark:g}", equals(stored, mark))
                for source, mark in read.all_of.items():
                    hit = equals(stored, mark)
                    empty[source] = empty[source] & hit if source in empty else hit
                values[slot] = _scaled(stored, read.scale, read.offset) if kind.kind == "f" else stored
                if stored.dtype.kind == "f" or (read.scale, read.offset) != (1.0, 0.0):  # others are always numbers
                    hide("no number", no_numbers(values[slot]))
        for source, hit in empty.items():
            marks = sorted({f"{read.all_of[source]:g}" for read in self._chosen if source in read.all_of})
            hide(f"nodata {' and '.join(marks)} in all bands", hit)
        bad = np.zeros(window.shape, dtype=bool)
        for cause, hit in hidden.items():
            self.hidden.by(cause, hit[asked])
            bad |= hit
        self.hidden.pixels += bad[asked].size
        values[:, bad] = 0
        return values, ~bad


def _scaled(stored: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """Float32 values; 32- and 64-bit numbers are scaled in float64 first, or large ones lose digits."""
    exact = np.result_type(stored.dtype, np.float32)  # float64 for int32 and wider
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite, hence invalid
        if (scale, offset) == (1.0, 0.0):
            return stored.astype(np.float32)
        return (stored.astype(exact) * scale + offset).astype(np.float32)


def _grid_text(grid: Grid) -> str:
    a, _, c, _, e, f = grid.transform
    where = f" from ({c:.10g}, {f:.10g}) in steps of ({a:g}, {e:g})" if grid.georeferenced else ""
    where += f" in {short_name(grid.crs)}" if grid.georeferenced else ""
    return f"{grid.height} x {grid.width} pixels{where}"
