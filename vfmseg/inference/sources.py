"""What prediction reads from: files or arrays, one or several modalities, on the grid of the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.notes import notes_of
from vfmseg.geo.reader import Raster
from vfmseg.geo.validity import Chip, Hidden
from vfmseg.inference.reading import Stored
from vfmseg.terminal import say_once

# a path that GDAL can read, the files of one modality, or an array (C, H, W)
Source = str | Path | Sequence[str] | np.ndarray
# one of them, or with several modalities a dictionary
Input = Source | Mapping[str, Source]


class OpenScene:
    """The modalities of one scene, opened; the first one's grid is that of the labels.

    Files of the others may lie on another grid, with another pixel size, CRS or extent: they are resampled to the first
    one's as they are read, and where they do not cover it they are invalid. Arrays must have its size.
    """

    def __init__(self, inputs: Mapping[str, Source], bands: Mapping[str, Bands]) -> None:
        names = list(inputs)
        first = _open(names[0], inputs[names[0]], bands[names[0]])
        self.grid = first.grid
        self.rasters = {names[0]: first}
        for name in names[1:]:
            self.rasters[name] = self._beside(name, inputs[name], bands[name], names[0])

    def _beside(self, name: str, given: Source, bands: Bands, first_name: str) -> Raster:
        raster = _open(name, given, bands)
        if self.grid.same_place(raster.grid):
            return raster
        if isinstance(given, np.ndarray):
            raise DataError(
                f"the array for '{name}' has {raster.grid.height} x {raster.grid.width} px, that for '{first_name}' "
                f"{self.grid.height} x {self.grid.width}; expected one size, or files that say where they lie"
            )
        raster.close()
        moved = _open(name, given, bands, self.grid)
        _ = moved.grid  # whether it can be moved is known now, not at the first window
        return moved

    def bands(self) -> dict[str, int]:
        """Number of bands that are read of each modality."""
        return {name: raster.count for name, raster in self.rasters.items()}

    def files(self) -> list[str]:
        """Every file that is read, the tiles of a VRT among them."""
        found = [raster.infos for raster in self.rasters.values()]
        return [name for infos in found for path, info in infos.items() for name in (path, *info.others)]

    def stored(self) -> Stored:
        """Blocks of the first modality, and the type that holds each without loss."""
        first = next(iter(self.rasters.values()))
        return Stored(first.block, {name: raster.compact for name, raster in self.rasters.items()})

    def read(self, window: Window) -> dict[str, Chip]:
        """Pixels and validity of one window of every modality, in the types of `stored`."""
        return {name: raster.read(window, compact=True) for name, raster in self.rasters.items()}

    def hidden(self) -> dict[str, Hidden]:
        """{modality: what has hidden how many of the pixels read so far}."""
        return {name: raster.hidden for name, raster in self.rasters.items()}

    def close(self) -> None:
        """Release files and memory."""
        for raster in self.rasters.values():
            raster.close()


def _open(name: str, given: Source, bands: Bands, onto: Grid | None = None) -> Raster:
    if isinstance(given, np.ndarray):
        return ArrayRaster(given, bands, name)
    return Raster(str(given) if isinstance(given, str | Path) else [str(path) for path in given], bands, onto)


def open_scenes(
    scene: Input, bands: Mapping[str, Bands], counts: Mapping[str, int], types: Mapping[str, str], threads: int
) -> list[OpenScene]:
    """A scene for each reader thread (an array once, as it is shared), after looking whether it fits the model.

    bands: how each modality is read; counts: the number of its bands in training; types: its stored type in training.
    DataError for a missing modality, another number of bands, or something that is no scene.
    """
    given = scene if isinstance(scene, Mapping) else {next(iter(bands)): scene}
    if set(given) != set(bands):
        raise DataError(
            f"the segmenter needs the modalities {', '.join(bands)}, but got {', '.join(map(str, given))}; pass one "
            "path or array for each"
        )
    for name, one in given.items():
        if isinstance(one, np.ma.MaskedArray):
            raise DataError(f"'{name}' is a masked array; pass array.astype('float32').filled(numpy.nan) instead")
        if not isinstance(one, str | Path | np.ndarray | list | tuple):
            raise DataError(f"'{name}' is a {type(one).__name__}; expected a path or a numpy array (bands, H, W)")
        if isinstance(one, np.ndarray) and one.ndim == 3 and one.shape[2] == counts[name] < one.shape[0]:
            highest = max(bands[name].indexes or (counts[name],))
            if one.shape[0] > highest:
                raise DataError(
                    f"the array for '{name}' has shape {one.shape}, which looks like (height, width, bands); expected "
                    "(bands, height, width): pass array.transpose(2, 0, 1)"
                )
        varied = any(None in (band.scale, band.offset) for band in bands[name].like or ())
        if isinstance(one, np.ndarray) and one.dtype.kind in "ui" and varied and bands[name].scale is None:
            raise DataError(
                f"the array for '{name}' holds whole numbers, but each of the training files says a scale of its own, "
                "so what they mean is not known; pass values (stored * scale + offset) as float32"
            )
    arrays = [name for name, one in given.items() if isinstance(one, np.ndarray)]
    inputs = {name: given[name] for name in bands}
    opened = [OpenScene(inputs, bands) for _ in range(1 if arrays else threads)]
    tell_types({name: raster.dtype for name, raster in opened[0].rasters.items()}, types)
    if next(iter(bands)) not in arrays and not opened[0].grid.georeferenced:
        points = opened[0].rasters[next(iter(bands))].control_points
        unused = (
            f" (its {points} ground control points are not used: bring it onto a grid by gdalwarp)" if points else ""
        )
        say_once(f"the scene carries no CRS: its labels will have none either{unused}")
    for name, expected in counts.items():
        raster = opened[0].rasters[name]
        if raster.count != expected:
            if name in arrays:
                place, remedy = f"the array for '{name}'", "pass an array of those alone"
            else:
                some = ",".join(str(number) for number in range(1, expected + 1))
                place = " + ".join(raster.paths)
                remedy = f"name them, such as --bands {name}={some} (in Python bands={{'{name}': [{some}]}})"
                there = sum(info.count for info in raster.infos.values())
                if there < expected:
                    remedy = f"it holds {there} in all: choose a scene that has them"
            names = [band.called for band in bands[name].like or () if band.called != "undefined"]
            called = f" ({', '.join(names)})" if len(names) == expected else ""
            raise DataError(
                f"{place}: {raster.count} bands are read, but the model was trained on {expected} bands{called} for "
                f"'{name}'; {remedy}"
            )
        if name not in arrays:
            for text in notes_of(raster).values():
                say_once(f"{name}: {raster.paths[0]} {text}")
    return opened


def hidden_by(scenes: Sequence[OpenScene]) -> dict[str, Hidden]:
    """{modality: what has hidden pixels}, from all the readers of one scene."""
    found: dict[str, Hidden] = {}
    for scene in scenes:
        for name, hidden in scene.hidden().items():
            found.setdefault(name, Hidden()).add(hidden)
    return found


def tell_types(found: Mapping[str, str], trained: Mapping[str, str]) -> None:
    """Say once where stored types {modality: name} are others than in training: allowed, but seldom meant."""
    for name, dtype in trained.items():
        if found[name] != dtype:
            say_once(
                f"{name}: this scene holds {found[name]}, the training scenes {dtype}; its values are taken as they "
                "are, so they must be in the same units"
            )
