"""How much ground scenes share, told by the boxes around them: shares 0..1, or whether they lie apart.

Boxes are quick and never miss an overlap, but may see one that is none: a turned grid has a box larger than itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rasterio.warp import transform_bounds

from vfmseg.geo.dateline import period, turned, x_range
from vfmseg.geo.grid import Grid
from vfmseg.geo.opening import GDAL_ERRORS


def ground_shared(of: Sequence[Grid], by: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays (len(of)): the largest share (0..1) of each grid's box that one grid of `by` covers, and its index.

    0 and -1 where a grid has no place on Earth, or nothing covers it. A training scene 0..100 m and test scenes
    at 60..160 m and 90..190 m (same y) give 0.4 and 0. Boxes are compared in the reference system of `of`.
    """
    shares, which = np.zeros(len(of)), np.full(len(of), -1)
    others = [i for i, grid in enumerate(by) if grid.georeferenced]
    for crs in sorted({grid.crs for grid in of if grid.georeferenced and grid.crs}):
        turn = period(crs)
        moves = (0.0,) if turn is None else (0.0, turn, -turn)
        moved = [(i, box) for i in others if (box := _box(by[i], crs)) is not None]
        if not moved:
            continue
        numbers = np.array([i for i, _ in moved])
        west, south, east, north = np.array([box for _, box in moved]).T
        for i, grid in enumerate(of):
            box = _box(grid, crs) if grid.georeferenced and grid.crs == crs else None
            if box is None:
                continue
            # width of the overlap with every other box at once, also of what lies a turn of the Earth away
            across = sum(
                (np.minimum(east + move, box[2]) - np.maximum(west + move, box[0])).clip(min=0) for move in moves
            )
            down = np.minimum(north, box[3]) - np.maximum(south, box[1])
            areas = across * down.clip(min=0) / ((box[2] - box[0]) * (box[3] - box[1]))
            most = int(areas.argmax())
            if areas[most] > 0:
                shares[i], which[i] = areas[most], numbers[most]
    return shares, which


def apart(one: Grid, two: Grid) -> bool:
    """Whether `one`, seen in the reference system of `two`, clearly lies elsewhere. False where that cannot be told."""
    turn = period(one.crs)
    if turn is not None and np.ptp(x_range(one)) > turn / 2:  # half a world has no box in a projection
        return False
    try:
        west, south, east, north = transform_bounds(one.crs, two.crs, *bounds(one))
    except GDAL_ERRORS:
        return False
    if not all(map(math.isfinite, (west, south, east, north))) or west > east:  # beyond a system, over the date line
        return False
    left, bottom, right, top = bounds(two)
    turn = period(two.crs)
    beside = west >= right or east <= left if turn is None else not turned(left, right, west, east, turn)
    return beside or south >= top or north <= bottom


def bounds(grid: Grid) -> tuple[float, float, float, float]:
    """West, south, east and north of the box round a grid, in units of its own CRS."""
    xs, ys = zip(*(grid.point(row, col) for row in (0, grid.height) for col in (0, grid.width)), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _box(grid: Grid, crs: str) -> tuple[float, float, float, float] | None:
    """West, south, east, north of a grid in a reference system; None if it reaches out of it."""
    box = bounds(grid)
    if grid.crs == crs:
        return box
    try:
        moved = transform_bounds(grid.crs, crs, *box)
    except GDAL_ERRORS:
        return None
    west, south, east, north = moved  # west > east is GDAL's way to say that a box lies across the date line
    if west > east:  # across the date line
        east += period(crs) or 0.0
    return (west, south, east, north) if all(map(math.isfinite, moved)) and west < east and south < north else None
