"""What prediction reads from: files or arrays, one or several modalities on one grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.grid import Window
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.reader import Bands, Chip, Raster

# a path that GDAL can read, the files of one modality, or an array (C, H, W)
Source = str | Path | Sequence[str] | np.ndarray


class OpenScene:
    """The modalities of one scene, opened; the first one's grid is that of the labels."""

    def __init__(self, inputs: Mapping[str, Source], bands: Mapping[str, Bands]) -> None:
        self.rasters = {name: _open(name, given, bands[name]) for name, given in inputs.items()}
        first_name, first = next(iter(self.rasters.items()))
        self.grid = first.grid
        for name, raster in self.rasters.items():
            if not self.grid.same_place(raster.grid):
                raise DataError(
                    f"{raster.path}: '{name}' has {raster.grid.height} x {raster.grid.width} px on another grid than "
                    f"'{first_name}' ({self.grid.height} x {self.grid.width} px, {first.path}); warp it to that grid "
                    "first, for instance with gdalwarp"
                )

    def bands(self) -> dict[str, int]:
        """Number of bands that are read of each modality."""
        return {name: raster.count for name, raster in self.rasters.items()}

    def read(self, window: Window) -> dict[str, Chip]:
        """Pixels and validity of one window of every modality."""
        return {name: raster.read(window) for name, raster in self.rasters.items()}

    def close(self) -> None:
        """Release files and memory."""
        for raster in self.rasters.values():
            raster.close()


def _open(name: str, given: Source, bands: Bands) -> Raster:
    if isinstance(given, np.ndarray):
        return ArrayRaster(given, bands, name)
    return Raster(str(given) if isinstance(given, str | Path) else [str(path) for path in given], bands)
