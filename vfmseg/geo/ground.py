"""How many metres of ground a step in the coordinates of a grid is: what slopes and radii are measured by.

Computed by `math` row by row, not by numpy for an array of rows: vectorised cosines may differ in the last bit with the
length of the array, and with it two windows of one scene.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError

from vfmseg.geo.grid import Grid

_AXIS = 6378137.0
"""Semi-major axis of the WGS 84 ellipsoid in metres."""

_E2 = 0.00669437999014
"""Its first eccentricity, squared."""

_HIGHEST = math.radians(89.9)
"""Latitude beyond which a parallel has no length worth dividing by."""


class Ground:
    """Metres on the ground for the coordinates of one grid.

    In degrees they follow from the latitude of the row, in web Mercator (EPSG:3857) too, whose metres are longer than
    those on the ground. Other projected systems count as true to scale. Coordinates without a CRS count as metres, so
    that without any georeference a pixel counts as one metre.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._kind, self._factor = _units(grid.crs)

    def metres(self, row: float) -> tuple[float, float]:
        """Metres of one unit of x and of one unit of y, at a row in pixels (0.5: the middle of the first)."""
        _, y = self._grid.point(row, self._grid.width / 2)
        if self._kind == "degrees":
            latitude = max(-_HIGHEST, min(_HIGHEST, y * self._factor))
            bent = 1 - _E2 * math.sin(latitude) ** 2
            # radii of curvature along a parallel and along a meridian
            parallel, meridian = _AXIS / math.sqrt(bent) * math.cos(latitude), _AXIS * (1 - _E2) / bent**1.5
            return parallel * self._factor, meridian * self._factor
        if self._kind == "mercator":  # a sphere, on which the cosine of the latitude is 1 / cosh(y / radius)
            shrunk = self._factor / math.cosh(y / _AXIS)
            return shrunk, shrunk
        return self._factor, self._factor

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Metres of one unit of x and of y, float64 (count, 1) each, at the middles of some rows."""
        found = np.array([self.metres(first + i + 0.5) for i in range(count)]).reshape(count, 2)
        return found[:, :1], found[:, 1:]

    @property
    def pixel(self) -> tuple[float, float]:
        """Metres of a step down and a step to the right by one pixel, in the middle of the grid."""
        a, b, _, d, e, _ = self._grid.transform
        x, y = self.metres(self._grid.height / 2)
        return math.hypot(b * x, e * y), math.hypot(a * x, d * y)


@lru_cache
def _units(crs: str | None) -> tuple[str, float]:
    """Kind of the coordinates, and radians (of degrees) or metres of one unit."""
    if crs is None:
        return "metres", 1.0
    try:
        system = CRS.from_user_input(crs)
        factor = float(system.units_factor[1])
        if system.is_geographic:
            return "degrees", factor
        return ("mercator" if system.to_epsg() == 3857 else "metres"), factor
    except CRSError:  # a system of a building site
        return "metres", 1.0
