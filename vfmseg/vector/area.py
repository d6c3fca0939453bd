"""Areas of interest: polygons from a vector file, or bounds, brought into a scene's CRS and made a mask of its pixels.

What a file holds is taken in steps: geometries as GeoJSON, rings as arrays, those near the scene, the scene's CRS, the
turn of the Earth that the scene is on (`dateline`), and last the pixels (`inside`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.warp import transform, transform_bounds

from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.paths import require_file
from vfmseg.errors import DataError, MachineError
from vfmseg.geo.crs import same_ground, short_name
from vfmseg.geo.dateline import Rings, brought_to, crosses, goes_round, period, x_range
from vfmseg.geo.grid import Grid
from vfmseg.geo.vetting import vet_vector
from vfmseg.vector.inside import Polygons

LONGITUDE_LATITUDE = "OGC:CRS84"
"""What GeoJSON is in (RFC 7946) unless it says otherwise."""

_JSON = (".geojson", ".json")

_PIECES = 100
"""Edges longer than a hundredth of the scene are split before they are projected: straight lines become curves."""


def read_area(area: str | Path | Sequence[float], grid: Grid) -> Polygons:
    """An area of interest: a GeoJSON file, another vector file (needs pyogrio), or (west, south, east, north).

    Bounds are in the CRS of the scene. Polygons are moved by whole turns of the Earth to where the scene is: 180 and
    -180 degrees are one place. DataError if the file cannot be read, holds no polygon, or holds the centre of no pixel
    of the scene.
    """
    if not isinstance(area, str | Path):
        turn = period(grid.crs)
        return Polygons(brought_to([_rectangle(area, turn)], *x_range(grid), turn), grid, f"bounds {list(area)}")
    path = Path(area)
    if re.search(r"[\t\n\r]", str(path.absolute())) and path.suffix.lower() not in _JSON:
        raise DataError(f"{str(path)!r}: holds a line break or a tab, which pyogrio takes out of names; rename it")
    require_file(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file; expected polygons (GeoJSON, GeoPackage) or four bounds")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected a file: export the polygons as GeoPackage or GeoJSON")
    geometries, crs = _geojson(path) if path.suffix.lower() in _JSON else _vector_file(path)
    polygons = [rings for i, one in enumerate(geometries, 1) for rings in _polygons(one, f"{path}: feature {i}")]
    if not polygons:
        raise DataError(f"{path}: holds no polygon among its {len(geometries)} features; expected at least one")
    taken = " (taken as longitude and latitude)" if crs == LONGITUDE_LATITUDE and grid.crs is not None else ""
    if crs is None and grid.crs is not None:
        taken = f" (names no coordinate reference system: taken to be in the scene's, {short_name(grid.crs)})"
    placed = _onto(polygons, crs, grid, path)
    if grid.crs is not None and any(crosses(rings, period(crs or grid.crs)) for rings in polygons):
        taken += " (edges of more than three quarters of a turn lead across the date line)"
    return Polygons(placed, grid, f"{path}{taken}")


def _rectangle(bounds: Sequence[float], turn: float | None) -> Rings:
    """Bounds as a ring; west > east is across the date line if the way over it is the short one."""
    if len(bounds) == 4 and turn is not None and bounds[0] - bounds[2] > 0.75 * turn:  # 170 to -170, not 20 to 10
        bounds = [bounds[0], bounds[1], bounds[2] + turn, bounds[3]]
    if len(bounds) != 4 or not (bounds[0] < bounds[2] and bounds[1] < bounds[3] and np.isfinite(bounds).all()):
        raise DataError(
            f"area = {list(bounds)}: expected west, south, east, north with west < east and south < north, in units "
            "of the scene's coordinate reference system"
        )
    west, south, east, north = bounds
    return [np.array([(west, south), (east, south), (east, north), (west, north)], dtype=np.float64)]


def _polygons(geometry: Any, place: str) -> list[Rings]:
    """The polygons of a GeoJSON geometry, each a list of rings (points, 2) of x and y; points and lines have none.

    Rings are checked here (3 points or more, finite numbers), because GDAL crashes on malformed ones.
    """
    if geometry is None:
        return []
    try:
        kind = geometry["type"]
        if kind == "GeometryCollection":
            return [rings for part in geometry["geometries"] for rings in _polygons(part, place)]
        if kind not in ("Polygon", "MultiPolygon"):
            return []
        parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
        polygons = [[np.array([point[:2] for point in ring], dtype=np.float64) for ring in part] for part in parts]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: is no GeoJSON geometry ({error!r}); repair or remove it") from None
    polygons = [rings for rings in polygons if rings and rings[0].size]
    for ring in (ring for rings in polygons for ring in rings):
        if ring.ndim != 2 or ring.shape[0] < 3 or ring.shape[1] != 2 or not np.isfinite(ring).all():
            raise DataError(f"{place}: a ring of {len(ring)} points is no polygon; expected 3 or more x, y; repair it")
    return polygons


def _onto(polygons: list[Rings], crs: str | None, grid: Grid, path: Path) -> list[Rings]:
    """The polygons in the CRS of the grid; a scene or file without one is taken to be in the other's.

    What lies far from the scene is cut off first: projections hold near their own region only.
    """
    if grid.crs is None:
        return polygons
    try:
        turn = period(grid.crs)
        if crs is None or same_ground(crs, grid.crs):
            return brought_to(polygons, *x_range(grid), turn)
        # in the file's CRS: to the turn where the scene is, and cut to its surroundings; then split and projected
        box = _surroundings(grid, crs)
        polygons = brought_to(polygons, float(box[0, 0]), float(box[1, 0]), period(crs))
        near = [[_clipped(ring, box) for ring in rings] for rings in polygons]
        step = float((box[1] - box[0]).max()) / _PIECES
        moved = [
            [np.stack(transform(crs, grid.crs, *_split(ring, step).T), axis=1) for ring in rings if len(ring)]
            for rings in near
            if len(rings[0])  # an outline that is cut off wholly takes its holes with it
        ]
    except Exception as error:  # PROJ's errors have no class of their own that rasterio makes public
        raise DataError(
            f"{path}: cannot be brought from {short_name(crs)} to the scene's {short_name(grid.crs)} ({error}); check "
            "the coordinate reference system that the file names"
        ) from error
    if any(goes_round(rings[0], turn) for rings in moved):
        raise DataError(
            f"{path}: a polygon goes round a pole, which has no outline in the scene's {short_name(grid.crs)}; cut it "
            "at 180 degrees and give it in longitude and latitude"
        )
    return brought_to(moved, *x_range(grid), turn)


def _surroundings(grid: Grid, crs: str) -> np.ndarray:
    """Lower and upper corner (2, 2), x and y, of a box around the scene in another CRS, with a margin."""
    places = [grid.point(row, col) for row in (0, grid.height) for col in (0, grid.width)]
    (west, south), (east, north) = np.min(places, axis=0), np.max(places, axis=0)
    box = np.array(transform_bounds(grid.crs, crs, west, south, east, north, densify_pts=101)).reshape(2, 2)
    if box[0, 0] > box[1, 0]:
        box[1, 0] += period(crs) or 0.0  # across the date line
    margin = 0.1 * (box[1] - box[0])
    return np.stack([box[0] - margin, box[1] + margin])


def _clipped(ring: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part (n, 2) of a ring inside a box (2, 2: lower and upper corner); may be empty.

    After Sutherland and Hodgman: one side of the box after the other, each keeps the points inside and puts a new one
    where an edge crosses it, at the share depth / (depth - after) of the edge.
    """
    for side, sign in ((0, 1.0), (1, -1.0)):
        for axis in (0, 1):
            depth = sign * (ring[:, axis] - box[side, axis])  # how far inside this side, negative beyond it
            after = np.roll(depth, -1)
            inside, crosses = depth >= 0, (depth >= 0) != (after >= 0)
            share = np.divide(depth, depth - after, out=np.zeros_like(depth), where=crosses)
            crossings = ring + share[:, None] * (np.roll(ring, -1, axis=0) - ring)
            ring = np.stack([ring, crossings], axis=1)[np.stack([inside, crosses], axis=1)]
    return ring


def _split(ring: np.ndarray, step: float) -> np.ndarray:
    """The same ring with edges of at most `step` along x and y: (0, 0) to (3, 0) in steps of 1 becomes three edges."""
    edges = np.roll(ring, -1, axis=0) - ring
    pieces = np.maximum(np.ceil(np.abs(edges).max(axis=1) / step), 1).astype(np.int64)
    edge = np.repeat(np.arange(len(ring)), pieces)
    share = (np.arange(len(edge)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) / pieces[edge]  # 0, 1/n, 2/n ...
    return ring[edge] + share[:, None] * edges[edge]


def _geojson(path: Path) -> tuple[list[Any], str]:
    """Geometries as they stand, and the CRS."""
    try:
        content = read_json(path)
        kind = content["type"]
        if kind == "FeatureCollection":
            geometries = [feature["geometry"] for feature in content["features"]]
        else:
            geometries = [content["geometry"] if kind == "Feature" else content]
        named = content.get("crs")  # the 2008 format; today's has longitude and latitude only
        crs = LONGITUDE_LATITUDE if named is None else str(named["properties"]["name"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path}: is not GeoJSON ({error!r}); expected a FeatureCollection, Feature or geometry, and a `crs`, if "
            "any, with a name; export it again"
        ) from None
    return geometries, crs


def _vector_file(path: Path) -> tuple[list[Any], str | None]:
    """Geometries of the only layer that has some, and the CRS."""
    vet_vector(path)
    try:
        import pyogrio
        import shapely
    except ImportError:
        raise MachineError(
            f"{path}: reading it needs pyogrio and shapely: pip install 'vfmseg[vector]'; GeoJSON needs neither"
        ) from None
    try:
        layers = [name for name, kind in pyogrio.list_layers(path) if kind is not None]  # others are tables
        if len(layers) != 1:
            raise DataError(
                f"{path}: has {len(layers)} layers with geometries ({', '.join(layers)}); expected one; export the "
                "area's layer to a file of its own"
            )
        meta, _, wkb, _ = pyogrio.raw.read(path, layer=layers[0], columns=[])
        shapes = shapely.from_wkb(wkb)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.ShapelyError) as error:
        reason = str(error).partition("; It might help")[0]  # to give a driver, which cannot be done here
        raise DataError(
            f"{path}: cannot be read as a vector file ({reason}); expected GeoPackage, GeoJSON or another OGR format"
        ) from None
    return [None if shape is None else json.loads(shapely.to_geojson(shape)) for shape in shapes], meta["crs"]
