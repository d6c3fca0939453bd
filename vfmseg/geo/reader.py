"""Imagery read by window: values, and which pixels hold any.

A pixel is invalid where the file or the recipe says so (nodata, alpha, mask band), where a value is NaN or
infinite, and beyond the edge of the scene. Invalid pixels carry 0.0, so that nothing downstream can spread NaN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.crs import short_name
from vfmseg.geo.fileinfo import FileInfo
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.said import BandSaid, places_by_name
from vfmseg.geo.validity import Chip, Hidden, as_stored, equals, hides_alone, no_numbers
from vfmseg.geo.warp import Warp


@dataclass(frozen=True)
class Bands:
    """Which bands of a modality are read, and how stored numbers become values.

    indexes: 1-based, in the order wanted; None = all but alpha. Value = stored * scale + offset; where both are None,
    those that each file says of its bands. nodata: a stored number that means "nothing here", beside the one that the
    file itself may name.
    like: what the bands of the training files say of themselves. A file that says where these bands are is read in
    their order, unless `chosen`; and it is scaled as it says if they were, else not.
    """

    indexes: tuple[int, ...] | None = None
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None
    like: tuple[BandSaid, ...] | None = None
    chosen: bool = False  # indexes are meant for this very file


_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class _Layer:
    """One band to read: which file, which band of it, and how its numbers are taken.

    any_of: stored numbers that hide the pixel if this band holds one. all_of: {who says so, the recipe or the file:
    stored number} that hides the pixel if all bands hold theirs.
    """

    file: int
    band: int
    dtype: np.dtype
    any_of: tuple[np.generic, ...]
    all_of: Mapping[str, np.generic]
    scale: float
    offset: float


class Raster:
    """The bands of one modality of one scene: one file, or several files on one grid, stacked in order.

    With several files the band numbers count through them: files of 3 and 1 bands have bands 1 to 4. Files are
    opened at the first need and told by content, not by suffix. A palette image gives its palette indexes. `onto`:
    the grid on which the raster is wanted; files on another one are resampled as they are read, see `warp`.
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
        self._layers: tuple[_Layer, ...] = ()
        self._onto = onto
        self._warp: Warp | None = None  # only where the files lie on another grid
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
        return any(layer.band in self._files[layer.file].info.palette for layer in self._plan())

    @property
    def places(self) -> tuple[int, ...]:
        """1-based numbers of the bands that are read, counted through the files."""
        there = [(number, band) for number, file in enumerate(self._files) for band in _numbers(file)]
        return tuple(there.index((layer.file, layer.band)) + 1 for layer in self._plan())

    @property
    def said(self) -> tuple[BandSaid, ...]:
        """What the files say of the bands that are read, with the scale and offset by which they are read."""
        told = [(self._files[layer.file].info.bands[layer.band - 1], layer) for layer in self._plan()]
        return tuple(replace(band, scale=layer.scale, offset=layer.offset) for band, layer in told)

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
        return len(self._plan())

    @property
    def dtype(self) -> str:
        """The stored type of the bands read, such as "uint16"; for mixed types the one that holds them all."""
        return str(np.result_type(*(layer.dtype for layer in self._plan())))

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the blocks that the first file is stored in."""
        self._plan()
        return self._files[0].info.block

    @property
    def compact(self) -> np.dtype:
        """A type that holds every value that `read` returns without loss: that of the file where it is a small one."""
        stored = self.dtype
        plain = all((layer.scale, layer.offset) == (1.0, 0.0) for layer in self._plan()) and self._warp is None
        return np.dtype(stored if plain and stored in ("uint8", "uint16", "int16") else "float32")

    def read(self, window: Window, compact: bool = False) -> Chip:
        """Values and validity of a window of any position; what lies beyond the scene is invalid.

        Values are float32, or with `compact` of the type `compact`, which takes less memory on the way as well.
        DataError names the file, and the window if its part of the file is damaged.
        """
        layers = self._plan()
        kind = self.compact if compact else _FLOAT
        inside = window.clip(self.grid.height, self.grid.width)
        if inside == window and self._warp is None and inside.height and inside.width:
            return Chip(*self._read_inside(inside, kind))
        pixels = np.zeros((len(layers), *window.shape), dtype=kind)
        valid = np.zeros(window.shape, dtype=bool)
        shared = window.shared(inside)
        if shared is not None:
            here, _ = shared
            if self._warp is None:
                values, good = self._read_inside(inside, kind)
            else:
                values, good = self._warp.read(inside, len(layers), self._read_inside)
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
        self._layers, self._warp = (), None

    def _plan(self) -> tuple[_Layer, ...]:
        """The bands to read; made once, when the files are first opened."""
        if not self._layers:
            self._check_grids()
            own = self._files[0].info.grid
            if self._onto is not None and not self._onto.same_place(own):
                self._warp = Warp(self._name, own, self._onto)
            self._layers = tuple(self._choose())
        return self._layers

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

    def _choose(self) -> list[_Layer]:
        there = [(number, band) for number, file in enumerate(self._files) for band in _numbers(file)]
        indexes = self._places(there)
        if indexes is None:
            chosen = [(f, b) for f, b in there if b not in self._files[f].info.alpha]
        else:
            for index in indexes:
                if not 1 <= index <= len(there):
                    raise DataError(
                        f"{self._name}: band {index} is asked for, but there "
                        f"{'is 1 band' if len(there) == 1 else f'are {len(there)} bands'}; "
                        f"choose from 1 to {len(there)}"
                    )
            chosen = [there[index - 1] for index in indexes]
        if not chosen:
            raise DataError(f"{self._name}: no band to read; expected at least one that is not alpha")
        return [self._layer(number, band) for number, band in chosen]

    def _places(self, there: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
        """Which bands are read, counted through the files: as the files themselves say, else as the recipe does."""
        wanted = self.bands.indexes
        if self.bands.chosen or self.bands.like is None:
            return wanted
        found = places_by_name(self.bands.like, [self._files[f].info.bands[b - 1] for f, b in there])
        if found is not None:
            return found
        # the number of bands that the model was trained on tells whether one that is marked as alpha is among them
        marked = [b in (*self._files[f].info.alpha, *self._files[f].info.not_alpha) for f, b in there]
        for places in (range(1, len(there) + 1), [i for i, is_marked in enumerate(marked, 1) if not is_marked]):
            if wanted is None and len(places) == len(self.bands.like):
                return tuple(places)
        return wanted

    def _layer(self, number: int, band: int) -> _Layer:
        info = self._files[number].info
        dtype = info.dtypes[band - 1]
        if dtype.startswith("complex"):
            raise DataError(
                f"{self.paths[number]}: band {band} holds complex numbers ({dtype}); expected real ones: "
                "write amplitude or intensity to a file and use that"
            )
        stored = np.dtype(dtype)
        any_of: list[np.generic] = []
        all_of: dict[str, np.generic] = {}
        ours = self.bands.nodata
        theirs = None if set(info.nodata) <= {None, ours} else info.nodata[band - 1]  # the file says nothing else
        for source, value in (("recipe", ours), ("file", theirs)):
            mark = None if value is None else as_stored(value, stored)
            if value is None or mark is None:
                continue
            if hides_alone(value, stored, of_file=source == "file"):
                any_of.append(mark)
            else:
                all_of[source] = mark
        return _Layer(number, band, stored, tuple(any_of), all_of, *self._scaling(info.bands[band - 1]))

    def _scaling(self, said: BandSaid) -> tuple[float, float]:
        """Scale and offset of a band: the recipe's, else the file's where the training files were scaled by theirs."""
        ours = self.bands
        if ours.scale is not None or ours.offset is not None:
            return (1.0 if ours.scale is None else ours.scale), ours.offset or 0.0
        if ours.like is not None and not any(band.scaled for band in ours.like):
            return 1.0, 0.0
        return said.scale or 1.0, said.offset or 0.0

    def _read_inside(self, window: Window, kind: np.dtype = _FLOAT) -> tuple[np.ndarray, np.ndarray]:
        """Values and validity of a window inside the files, on their own grid, in a type that holds them."""
        layers = self._layers
        values = np.empty((len(layers), *window.shape), dtype=kind)
        empty: dict[str, np.ndarray] = {}  # where all bands so far hold their number of this source
        hidden: dict[str, np.ndarray] = {}  # where any band so far says so, by cause

        def hide(cause: str, hit: np.ndarray) -> None:
            hidden[cause] = hidden[cause] | hit if cause in hidden else hit

        for number, file in enumerate(self._files):
            slots = [slot for slot, layer in enumerate(layers) if layer.file == number]
            if not slots:
                continue
            bands = [layers[slot].band for slot in slots]
            for cause, hit in file.read_hidden(bands, window).items():
                hide(cause, hit)
            for slot, stored in zip(slots, file.read(bands, window), strict=True):
                layer = layers[slot]
                for mark in layer.any_of:
                    hide(f"nodata {mark:g}", equals(stored, mark))
                for source, mark in layer.all_of.items():
                    hit = equals(stored, mark)
                    empty[source] = empty[source] & hit if source in empty else hit
                values[slot] = _scaled(stored, layer.scale, layer.offset) if kind.kind == "f" else stored
                if stored.dtype.kind == "f" or (layer.scale, layer.offset) != (1.0, 0.0):
                    hide("no number", no_numbers(values[slot]))
        for source, hit in empty.items():
            marks = sorted({f"{layer.all_of[source]:g}" for layer in layers if source in layer.all_of})
            hide(f"nodata {' and '.join(marks)} in all bands", hit)
        bad = np.zeros(window.shape, dtype=bool)
        for cause, hit in hidden.items():
            bad |= self.hidden.by(cause, hit)
        self.hidden.pixels += bad.size
        values[:, bad] = 0
        return values, ~bad


def _scaled(stored: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """Float32 values; 32- and 64-bit numbers are scaled in float64 first, or large ones lose digits."""
    exact = np.result_type(stored.dtype, np.float32)  # float64 for int32 and wider
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite, hence invalid
        if (scale, offset) == (1.0, 0.0):
            return stored.astype(np.float32)
        return (stored.astype(exact) * scale + offset).astype(np.float32)


def _numbers(file: RasterFile) -> range:
    return range(1, file.info.count + 1)


def _grid_text(grid: Grid) -> str:
    a, _, c, _, e, f = grid.transform
    where = f" from ({c:.10g}, {f:.10g}) in steps of ({a:g}, {e:g})" if grid.georeferenced else ""
    where += f" in {short_name(grid.crs)}" if grid.georeferenced else ""
    return f"{grid.height} x {grid.width} pixels{where}"
