"""Coordinates that come round: 180 and -180 degrees are one meridian, and 250 degrees is -110.

A *turn* is the step in x that leads back to the same ground, 360 in degrees. What is compared or joined is moved by
whole turns first: a scene from 179 to 181 degrees and a polygon from -180 to -179 share the ground from 180 to 181.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform

from vfmseg.geo.grid import Grid
from vfmseg.geo.opening import GDAL_ERRORS

Rings = list[np.ndarray]
"""A polygon: its outline, then its holes, each float64 (points, 2) of x and y; the last point may repeat the first."""

_JUMP = 0.75
"""Turns: an edge that is longer leads the short way round, across the date line (170 to -170, but not -170 to 15)."""

_FARTHEST = 1.5
"""Turns from 0: what lies farther out are metres, or other numbers, that somebody took for degrees."""

_THIN = 1e-7
"""Turns: a ring that is narrower when its edges lead the short way is the frame of a world, from -180 to 180."""


@lru_cache
def period(crs: str | None) -> float | None:
    """The step in x that leads back to the same ground: 360 degrees, or the width of a cylindrical projection's world.

    360.0 for EPSG:4326, 40075016.7 for EPSG:3857. None where there is none, as in UTM. ValueError or one of rasterio's
    errors for a CRS that is none.
    """
    if crs is None:
        return None
    system = CRS.from_user_input(crs)
    if system.is_geographic:
        return round(math.tau / system.units_factor[1], 9)  # a unit is so many radians
    # A projection is cylindrical if steps of 60 degrees are steps of one length in x, at the equator and at 40 degrees,
    # but for the one step that jumps back at the end of its world.
    longitudes = np.arange(0.0, 360.0, 60.0)
    try:
        equator, beside = (
            np.array(transform("OGC:CRS84", system, longitudes, np.full(6, lat))[0]) for lat in (0, 40)
        )  # fmt: skip
    except GDAL_ERRORS:
        return None
    steps = np.diff(equator)
    width = 6 * float(np.median(steps))
    turns = (equator - equator[0] - width * longitudes / 360) / width if width else steps
    cylindrical = np.isfinite(turns).all() and np.abs(turns - turns.round()).max() < 1e-6
    return abs(width) if cylindrical and np.abs(equator - beside).max() < 1e-6 * abs(width) else None


def x_range(grid: Grid) -> tuple[float, float]:
    """The least and the largest x of a grid."""
    xs = [grid.point(row, col)[0] for row in (0, grid.height) for col in (0, grid.width)]
    return min(xs), max(xs)


def turned(low: float, high: float, west: float, east: float, turn: float) -> range:
    """By which numbers of turns west..east may be moved to meet low..high; empty if it meets it nowhere.

    turned(179, 181, -180, -179, 360) is range(1, 2): moved by one turn, to 180..181, it does.
    """
    return range(math.ceil((low - east) / turn), math.floor((high - west) / turn) + 1)


def within(places: np.ndarray, middle: float, turn: float) -> np.ndarray:
    """The same x at most half a turn from a middle: -179 becomes 181 round 170, in degrees.

    Those that are so already keep their last bit.
    """
    turns = np.round((places - middle) / turn)
    return np.where(turns == 0, places, places - turns * turn)


def near_zero(grid: Grid) -> Grid:
    """The same ground with x of its middle at most half a turn from 0."""
    turn = period(grid.crs)
    if turn is None:
        return grid
    a, b, c, d, e, f = grid.transform
    turns = math.ceil(sum(x_range(grid)) / 2 / turn - 0.5)
    return Grid(grid.crs, (a, b, c - turns * turn, d, e, f), grid.height, grid.width) if turns else grid


def brought_to(polygons: list[Rings], low: float, high: float, turn: float | None) -> list[Rings]:
    """Polygons moved by whole turns to meet x = low..high: each as often as it does, and left out if it never does.

    A ring that jumps from one end of the world to the other is made continuous first. Without a turn: as they are.
    For example, for a scene of the whole world in 0..360 degrees a polygon from -10 to 10 comes twice, as it lies at
    both its ends: at -10..10 and at 350..370.
    """
    if turn is None:
        return polygons
    met = []
    for polygon in polygons:
        rings = _whole(polygon, turn)
        west, east = float(rings[0][:, 0].min()), float(rings[0][:, 0].max())
        known = max(-west, east) <= _FARTHEST * turn  # else these are no degrees, and are not moved
        for turns in turned(low, high, west, east, turn) if known else (0,):
            met.append([_moved(ring, turns * turn) for ring in rings] if turns else rings)
    return met


def crosses(rings: Rings, turn: float | None) -> bool:
    """Whether an edge is so long that it is taken to lead across the date line."""
    return turn is not None and any(_continuous(ring, turn) is not ring for ring in rings)


def goes_round(ring: np.ndarray, turn: float | None) -> bool:
    """Whether a ring ends a turn from where it began: it runs round a pole."""
    return turn is not None and bool(_jumps(ring, turn).sum())


def _whole(rings: Rings, turn: float) -> Rings:
    """A polygon whose rings do not jump, its holes moved to where its outline is; the same object if none did."""
    smooth = [_continuous(ring, turn) for ring in rings]
    if all(one is other for one, other in zip(smooth, rings, strict=True)):
        return rings
    west = smooth[0][:, 0].min()
    return [smooth[0], *(_moved(ring, math.ceil((west - ring[:, 0].min()) / turn) * turn) for ring in smooth[1:])]


def _moved(ring: np.ndarray, by: float) -> np.ndarray:
    return ring + np.array([by, 0.0])


def _jumps(ring: np.ndarray, turn: float) -> np.ndarray:
    """Turns (points) to add behind each edge of a ring so that it is the short way: 1, -1 or, nearly always, 0.

    The edge from 170 to -170 degrees is 340 degrees long; 1 turn behind it makes it lead to 190.
    """
    edges = np.diff(ring[:, 0], append=ring[:1, 0])
    return np.where(np.abs(edges) > _JUMP * turn, -np.sign(edges), 0.0)


def _continuous(ring: np.ndarray, turn: float) -> np.ndarray:
    """The ring without jumps: x 170, -170, -170, 170 becomes 170, 190, 190, 170; the same object if it has none."""
    jumps = _jumps(ring, turn) if np.abs(ring[:, 0]).max() <= _FARTHEST * turn else np.zeros(len(ring))
    if not jumps.any() or jumps.sum():  # what goes round a pole is as it is drawn: cut along the end of the world
        return ring
    moved = ring.copy()
    moved[1:, 0] += turn * np.cumsum(jumps)[:-1]
    return ring if np.ptp(moved[:, 0]) < _THIN * turn else moved
