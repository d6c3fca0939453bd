"""A scene of raster files or arrays: modalities of one place on the grid of the first, with labels or without."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from vfmseg.data.kept import KEPT
from vfmseg.data.opened import OPENED
from vfmseg.data.traces import raster_trace
from vfmseg.errors import DataError
from vfmseg.geo.crs import short_name
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.notes import notes_of
from vfmseg.geo.reader import Raster
from vfmseg.geo.said import BandSaid
from vfmseg.geo.validity import Chip, Hidden
from vfmseg.terminal import say_once


class RasterScene:
    """One raster for each modality that there is, all on the grid of the first one; labels lie on it as well.

    A further modality that lies on another grid (pixel size, CRS or extent) is resampled to it as it is read, and is
    invalid where it does not cover it; arrays must have its size, and labels are never resampled. DataError if the
    rasters do not fit together. Cheap to send to a worker: files are opened where they are read.
    """

    def __init__(
        self,
        name: str,
        rasters: Mapping[str, Raster],
        labels: LabelRaster | None = None,
        many: bool = False,
        compact: bool = False,
        keep: bool = False,
    ) -> None:
        """`many`: one of many scenes of a split, whose files are closed while others were read more recently.

        `compact`: pixels keep the type of the file where that loses nothing, which takes less memory than float32.
        `keep`: small images that are decoded whole for each window stay in memory while there is room, see `Kept`.
        """
        if not rasters:
            raise DataError(f"{name}: no image; expected at least one modality")
        self.name = name
        self._many = many
        self._compact = compact
        self._keep = keep
        self._rasters = dict(rasters)
        self._labels = labels
        first = next(iter(rasters.values()))
        self.files = tuple(os.path.realpath(path) for path in first.paths)
        if labels is not None:
            own = os.path.realpath(labels.path)
            if any(os.path.realpath(path) == own for raster in rasters.values() for path in raster.paths):
                raise DataError(
                    f"{labels.path}: is image and labels at once; expected the labels in a file of their own"
                )
            self.files = (*self.files, own)
        self.grid = self._use(first).grid
        for other in list(rasters)[1:]:
            self._rasters[other] = self._onto_grid(other, self._rasters[other])
        if labels is not None:
            _check_labels(first.paths[0], self.grid, labels.path, self._use_labels().grid)
        self._look()

    def _look(self) -> None:
        self._bands = {name: raster.count for name, raster in self._rasters.items()}
        self._dtypes = {name: raster.dtype for name, raster in self._rasters.items()}

    def _use(self, raster: Raster) -> Raster:
        """The raster, about to be read."""
        return OPENED.use(raster) if self._many else raster

    def _use_labels(self) -> LabelRaster:
        if self._labels is None:
            raise DataError(f"{self.name}: has no labels; expected a labelled scene")
        return OPENED.use(self._labels) if self._many else self._labels

    def _onto_grid(self, name: str, raster: Raster) -> Raster:
        """A further modality on the grid of the first: itself, or resampled as it is read."""
        own = self._use(raster).grid
        if self.grid.same_place(own):
            if raster.bands.derive and own.crs is None and self.grid.crs is not None:
                raster.lie_on(self.grid)
            return raster
        first = next(iter(self._rasters))
        if isinstance(raster, ArrayRaster):
            raise DataError(
                f"the array for '{name}' has {own.height} x {own.width} px, that for '{first}' {self.grid.height} x "
                f"{self.grid.width}; expected one size, or files that say where they lie"
            )
        raster.close()
        moved = Raster(raster.paths, raster.bands, onto=self.grid)
        _ = self._use(moved).grid  # whether it can be moved is known now, not at the first window
        say_once(f"{name}: lies on another grid than {first}, and is resampled to it as it is read")
        return moved

    @property
    def rasters(self) -> Mapping[str, Raster]:
        """{modality: its raster}, on the grid of the scene."""
        return self._rasters

    def read(self, window: Window) -> dict[str, Chip]:
        """{modality: pixels (C, h, w) and valid (h, w)}; beyond the edge everything is invalid."""
        return {name: self._read(raster, window) for name, raster in self._rasters.items()}

    def _read(self, raster: Raster, window: Window) -> Chip:
        if self._keep and KEPT.worth(raster):
            return KEPT.read(raster, window)
        return self._use(raster).read(window, self._compact)

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w); IGNORE beyond the edge. DataError if the scene has no labels."""
        return self._use_labels().read(window)

    def bands(self) -> dict[str, int]:
        """{modality: number of bands that are read}."""
        return dict(self._bands)

    def dtypes(self) -> dict[str, str]:
        """{modality: type of the stored numbers}."""
        return dict(self._dtypes)

    def said(self) -> dict[str, tuple[BandSaid, ...]]:
        """{modality: what its files say of the bands that are read}."""
        return {name: self._use(raster).said for name, raster in self._rasters.items()}

    def follow(self, said: Mapping[str, Sequence[BandSaid]]) -> None:
        """Read the bands of which another scene says the same, in its order."""
        for name, raster in self._rasters.items():
            self._use(raster).follow(said[name])
            KEPT.forget(raster)
        self._look()

    def notes(self) -> dict[tuple[str, str], str]:
        """{(modality, kind): what a person should know of how its file is read}."""
        found = {name: (raster.paths[0], notes_of(self._use(raster))) for name, raster in self._rasters.items()}
        return {(name, kind): f"{path} {text}" for name, (path, notes) in found.items() for kind, text in notes.items()}

    def hidden(self) -> dict[str, Hidden]:
        """{modality: what has hidden how many of the pixels read so far}."""
        return {name: raster.hidden for name, raster in self._rasters.items()}

    def traces(self) -> dict[str, tuple[str, str]]:
        """{modality, or "labels": its file and a cheap digest}; that of labels is made where they are read."""
        images = {name: (raster.paths[0], raster_trace(self._use(raster))) for name, raster in self._rasters.items()}
        return images if self._labels is None else {**images, "labels": (self._labels.path, "")}

    def read_from(self) -> list[str]:
        """Every file of the images, the tiles of a VRT among them."""
        found = [raster.infos for raster in self._rasters.values()]
        return [name for infos in found for path, info in infos.items() for name in (path, *info.others)]

    def close(self) -> None:
        """Release files and memory."""
        for raster in self._rasters.values():
            raster.close()
        if self._labels is not None:
            self._labels.close()


def _check_labels(first: str, one: Grid, path: str, two: Grid) -> None:
    """DataError for labels that do not lie on the grid of the image."""
    if (one.height, one.width) != (two.height, two.width):
        raise DataError(
            f"{first} and {path} differ in size: {one.height} x {one.width} and {two.height} x {two.width} pixels "
            "(rows x columns); expected one grid: resample the labels to the image's by nearest neighbour"
        )
    if not one.same_place(two):
        raise DataError(
            f"{first} and {path} have one size but lie elsewhere: {_where(one)} and {_where(two)}; expected the same "
            "CRS and transform: warp the labels to the image's grid by nearest neighbour"
        )


def _where(grid: Grid) -> str:
    return f"{short_name(grid.crs)} at ({grid.transform[2]:.10g}, {grid.transform[5]:.10g})"
