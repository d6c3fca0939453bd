"""What a labelled scene is, and scenes in raster files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from vfmseg.data.opened import OPENED
from vfmseg.data.traces import raster_trace
from vfmseg.errors import DataError
from vfmseg.geo.crs import short_name
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.notes import notes_of
from vfmseg.geo.reader import Raster
from vfmseg.geo.said import BandSaid
from vfmseg.geo.validity import Chip, Hidden
from vfmseg.terminal import say_once


class SceneLike(Protocol):
    """One place, labelled: what training, statistics and scoring ask of a scene."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def grid(self) -> Grid:
        """The grid of every modality and of the labels."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Where it comes from: full paths, or rows of a published set. Two scenes that share one are the same place.

        Files of further modalities are not among them: one elevation model may lie under all scenes.
        """
        ...

    def read(self, window: Window) -> dict[str, Chip]:
        """{modality: pixels (C, h, w) and valid (h, w)}; beyond the edge everything is invalid."""
        ...

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w); beyond the edge IGNORE."""
        ...

    def bands(self) -> dict[str, int]:
        """{modality: number of bands that are read}."""
        ...

    def dtypes(self) -> dict[str, str]:
        """{modality: type of the stored numbers, such as uint8}."""
        ...

    def said(self) -> dict[str, tuple[BandSaid, ...]]:
        """{modality: what its files say of the bands that are read, and the scale and offset by which they are}."""
        ...

    def follow(self, said: Mapping[str, Sequence[BandSaid]]) -> None:
        """Read the bands of which another scene says the same, in its order, and scale them if they are there."""
        ...

    def notes(self) -> dict[tuple[str, str], str]:
        """{(modality, kind): what a person should know of how its file is read, behind its name}."""
        ...

    def hidden(self) -> dict[str, Hidden]:
        """{modality: what has hidden how many of the pixels read so far}."""
        ...

    def traces(self) -> dict[str, tuple[str, str]]:
        """{modality, or "labels": its name and a cheap digest}; that of labels is made where they are read."""
        ...


class FileScene:
    """A scene in raster files, one per modality and one with labels, on the grid of the first modality.

    A further modality that lies on another grid, and says where, is resampled as it is read; labels never are. Raises
    DataError if they do not fit. Cheap to send to a worker: files are opened where they are read, and only
    the last few stay open.
    """

    def __init__(self, name: str, rasters: Mapping[str, Raster], labels: LabelRaster) -> None:
        self.name = name
        self._rasters = dict(rasters)
        self._labels = labels
        own = os.path.realpath(labels.path)
        if any(os.path.realpath(path) == own for raster in rasters.values() for path in raster.paths):
            raise DataError(f"{labels.path}: is image and labels at once; expected the labels in a file of their own")
        first = next(iter(rasters.values()), None)
        self.files = (*(os.path.realpath(path) for path in (first.paths if first else ())), own)
        self.grid = self._common_grid()
        self._look()

    def _look(self) -> None:
        self._bands = {name: raster.count for name, raster in self._rasters.items()}
        self._dtypes = {name: raster.dtype for name, raster in self._rasters.items()}

    def _common_grid(self) -> Grid:
        """The grid of the first modality, after moving others to it; labels must lie on it."""
        if not self._rasters:
            raise DataError(f"{self.name}: no image; expected at least one modality")
        first_name, *others = self._rasters
        first = self._rasters[first_name]
        grid = OPENED.use(first).grid
        for name in others:
            raster = self._rasters[name]
            own = OPENED.use(raster).grid
            if not grid.same_place(own) and grid.georeferenced and own.georeferenced:
                self._rasters[name] = raster = Raster(raster.paths, raster.bands, onto=grid)
                own = OPENED.use(raster).grid  # DataError if they share no ground
                say_once(f"{name}: lies on another grid than {first_name}, and is resampled to it as it is read")
            _check_one_grid(first.paths[0], grid, raster.paths[0], own)
        for name, raster in self._rasters.items():
            if OPENED.use(raster).palette:
                say_once(
                    f"{name}: holds a colour table, and the numbers of its colours are taken as values; if colours are "
                    "meant, `gdal_translate -expand rgb` makes bands of them"
                )
        _check_one_grid(first.paths[0], grid, self._labels.path, OPENED.use(self._labels).grid)
        return grid

    def read(self, window: Window) -> dict[str, Chip]:
        """Pixels and validity of each modality in a window."""
        return {name: OPENED.use(raster).read(window) for name, raster in self._rasters.items()}

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w) in a window."""
        return OPENED.use(self._labels).read(window)

    def traces(self) -> dict[str, tuple[str, str]]:
        """{modality, or "labels": its file and a cheap digest}; that of labels is made where they are read."""
        images = {name: (raster.paths[0], raster_trace(OPENED.use(raster))) for name, raster in self._rasters.items()}
        return {**images, "labels": (self._labels.path, "")}

    def bands(self) -> dict[str, int]:
        """{modality: number of bands that are read}."""
        return dict(self._bands)

    def dtypes(self) -> dict[str, str]:
        """{modality: type of the stored numbers}."""
        return dict(self._dtypes)

    def said(self) -> dict[str, tuple[BandSaid, ...]]:
        """{modality: what its files say of the bands that are read}."""
        return {name: OPENED.use(raster).said for name, raster in self._rasters.items()}

    def follow(self, said: Mapping[str, Sequence[BandSaid]]) -> None:
        """Read the bands of which another scene says the same, in its order."""
        for name, raster in self._rasters.items():
            OPENED.use(raster).follow(said[name])
        self._look()

    def notes(self) -> dict[tuple[str, str], str]:
        """{(modality, kind): what a person should know of how its file is read}."""
        found = {name: (raster.paths[0], notes_of(OPENED.use(raster))) for name, raster in self._rasters.items()}
        return {(name, kind): f"{path} {text}" for name, (path, notes) in found.items() for kind, text in notes.items()}

    def hidden(self) -> dict[str, Hidden]:
        """{modality: what has hidden how many of the pixels read so far}."""
        return {name: raster.hidden for name, raster in self._rasters.items()}


def _check_one_grid(first: str, one: Grid, path: str, two: Grid) -> None:
    if (one.height, one.width) != (two.height, two.width):
        raise DataError(
            f"{first} and {path} differ in size: {one.height} x {one.width} and {two.height} x {two.width} pixels "
            "(rows x columns); expected one grid: resample one to the other's (labels by nearest neighbour)"
        )
    if not one.same_place(two):
        raise DataError(
            f"{first} and {path} have one size but lie elsewhere: {_where(one)} and {_where(two)}; expected the same "
            "CRS and transform: warp one to the other's grid (labels by nearest neighbour)"
        )


def _where(grid: Grid) -> str:
    return f"{short_name(grid.crs)} at ({grid.transform[2]:.10g}, {grid.transform[5]:.10g})"
