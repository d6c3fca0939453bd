"""Areas of interest: polygons from a vector file, or bounds, as pixels of a scene."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.features import geometry_mask
from rasterio.transform import Affine
from rasterio.warp import transform, transform_bounds

from vfmseg.errors import DataError, MachineError, OutsideError
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.rasterfile import in_pixels

Rings = list[np.ndarray]
"""A polygon: its outline, then its holes, each float64 (points, 2) of x and y; the last point may repeat the first."""

LONGITUDE_LATITUDE = "OGC:CRS84"
"""What GeoJSON is in (RFC 7946) unless it says otherwise."""

_BLOCK = 256
"""Height and width in pixels of the fixed squares that polygons are burnt in."""

_KEPT = 512
"""Squares that are kept, of 64 KiB each: some rows of tiles of a strip."""

_BANDS = 8
"""Rows of squares for which the parts of the polygons are kept."""

_MARGIN = 2
"""Pixels around a square in which its polygons are left as they are."""

_FEW = 64
"""Rings of so few points are burnt as they are: looking for the part that matters would take longer."""

_PIECES = 100
"""Edges longer than this part of the scene are split before they are projected: straight lines become curves."""


class Polygons:
    """Which pixels of a grid lie in any of some polygons: those whose centre does.

    polygons: in the CRS of the grid; name: where they are from. DataError if they hold the centre of no pixel.
    """

    def __init__(self, polygons: Sequence[Rings], grid: Grid, name: str) -> None:
        self._grid = grid
        self._burnt = lru_cache(_KEPT)(self._burn)  # readers and tiles ask for a square many times
        self._band = lru_cache(_BANDS)(self._cut)
        self._placed: list[Rings] = []  # in pixels: row, column
        self._boxes = np.empty((len(polygons), 4))  # top, left, bottom, right
        for i, rings in enumerate(polygons):
            placed = [np.stack(grid.pixel(*ring.T), axis=1) for ring in rings]
            self._boxes[i] = [*placed[0].min(axis=0), *placed[0].max(axis=0)]
            self._placed.append(placed)
        if not any(block.any() for _, _, block in self._blocks(Window(0, 0, grid.height, grid.width))):
            raise OutsideError(
                f"{name}: none of its polygons holds the centre of a pixel of the scene; check the area's place, size "
                "and coordinate reference system"
            )

    def mask(self, window: Window) -> np.ndarray:
        """Bool (h, w): True inside. A pixel's answer is the same in every window; beyond the scene it is False."""
        inside = np.zeros(window.shape, dtype=bool)
        seen = window.clip(self._grid.height, self._grid.width)
        top, left = seen.row // _BLOCK * _BLOCK, seen.col // _BLOCK * _BLOCK
        blocks = np.zeros((seen.row + seen.height + _BLOCK - top, seen.col + seen.width + _BLOCK - left), dtype=bool)
        for row, col, block in self._blocks(seen):
            place = Window(row - top, col - left, *block.shape)
            blocks[place.rows, place.cols] = block
        within = Window(seen.row - window.row, seen.col - window.col, *seen.shape)
        origin = Window(seen.row - top, seen.col - left, *seen.shape)
        inside[within.rows, within.cols] = blocks[origin.rows, origin.cols]
        return inside

    def touches(self, window: Window) -> bool:
        """Whether any pixel of a window lies inside."""
        seen = window.clip(self._grid.height, self._grid.width)
        for row, col, block in self._blocks(seen):
            shared = Window(seen.row - row, seen.col - col, *seen.shape).clip(*block.shape)
            if block[shared.rows, shared.cols].any():
                return True
        return False

    def _blocks(self, window: Window) -> Iterator[tuple[int, int, np.ndarray]]:
        """First row and column and mask, cropped to the scene, of the squares that meet a window and a polygon's box.

        GDAL's answer for a centre that lies on an edge hangs on rounding, and so on where the raster begins: burnt
        window by window, the area would have flaws along the windows' seams.
        """
        top, left, bottom, right = self._boxes.T
        for row in range(window.row // _BLOCK * _BLOCK, window.row + window.height, _BLOCK):
            level = (top < row + _BLOCK) & (bottom > row)
            for col in range(window.col // _BLOCK * _BLOCK, window.col + window.width, _BLOCK) if level.any() else ():
                near = np.flatnonzero(level & (left < col + _BLOCK) & (right > col))
                if near.size:
                    block = self._burnt(row, col, tuple(near.tolist()))
                    yield row, col, block[: self._grid.height - row, : self._grid.width - col]

    def _burn(self, row: int, col: int, near: tuple[int, ...]) -> np.ndarray:
        """One square. GDAL looks at every point it is given, so it gets those that matter here."""
        box = _around(row, col, col + _BLOCK)
        band = self._band(row)
        shapes = [_geometry(rings) for i in near if (rings := _thinned(band[i], box))]
        if not shapes:
            return np.zeros((_BLOCK, _BLOCK), dtype=bool)
        with in_pixels():
            return geometry_mask(shapes, (_BLOCK, _BLOCK), Affine(1, 0, col, 0, 1, row), invert=True)

    def _cut(self, row: int) -> dict[int, Rings]:
        """{number of a polygon: what matters of it} in a row of squares, of which each square takes its part."""
        top, _, bottom, _ = self._boxes.T
        level = np.flatnonzero((top < row + _BLOCK) & (bottom > row))
        box = _around(row, 0, self._grid.width)
        return {i: _thinned(self._placed[i], box) for i in level.tolist()}


def _around(row: int, left: int, right: int) -> np.ndarray:
    """Upper left and lower right corner (2, 2) of part of a row of squares, with a margin."""
    return np.array([(row - _MARGIN, left - _MARGIN), (row + _BLOCK + _MARGIN, right + _MARGIN)], dtype=np.float64)


def _thinned(rings: Rings, box: np.ndarray) -> Rings:
    """Rings that hold the same points of a box, to the last bit: no edge that meets it is changed.

    Of points that follow each other beyond one side, the first and last stay: what they enclose lies beyond as well.
    """
    thinned = []
    for ring in rings:
        for side, sign in ((0, 1.0), (1, -1.0)) if len(ring) > _FEW else ():
            for axis in (0, 1):
                beyond = sign * (ring[:, axis] - box[side, axis]) < 0
                ring = ring[~(beyond & np.roll(beyond, 1) & np.roll(beyond, -1))]
        if len(ring):
            thinned.append(ring)
    return thinned


def _geometry(rings: Rings) -> dict[str, Any]:
    """GeoJSON, x the column and y the row, of rings in pixels."""
    return {"type": "Polygon", "coordinates": [np.concatenate([r, r[:1]])[:, ::-1].tolist() for r in rings]}


def read_area(area: str | Path | Sequence[float], grid: Grid) -> Polygons:
    """An area of interest: a GeoJSON file, another vector file (needs pyogrio), or (west, south, east, north).

    Bounds are in the CRS of the scene. DataError if the file cannot be read, holds no polygon, or holds the centre
    of no pixel of the scene.
    """
    if not isinstance(area, str | Path):
        return Polygons([_rectangle(area)], grid, f"bounds {list(area)}")
    path = Path(area)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected polygons (GeoJSON, GeoPackage) or four bounds")
    geometries, crs = _geojson(path) if path.suffix.lower() in (".geojson", ".json") else _vector_file(path)
    polygons = [rings for i, one in enumerate(geometries, 1) for rings in _polygons(one, f"{path}: feature {i}")]
    if not polygons:
        raise DataError(f"{path}: holds no polygon among its {len(geometries)} features; expected at least one")
    taken = " (taken as longitude and latitude)" if crs == LONGITUDE_LATITUDE and grid.crs is not None else ""
    return Polygons(_onto(polygons, crs, grid, path), grid, f"{path}{taken}")


def _rectangle(bounds: Sequence[float]) -> Rings:
    if len(bounds) != 4 or not (bounds[0] < bounds[2] and bounds[1] < bounds[3] and np.isfinite(bounds).all()):
        raise DataError(
            f"area = {list(bounds)}: expected west, south, east, north with west < east and south < north, in units "
            "of the scene's coordinate reference system"
        )
    west, south, east, north = bounds
    return [np.array([(west, south), (east, south), (east, north), (west, north)], dtype=np.float64)]


def _polygons(geometry: Any, place: str) -> list[Rings]:
    """The polygons of a GeoJSON geometry; points and lines have none. GDAL crashes on malformed ones: none passes."""
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
    if crs is None or grid.crs is None:
        return polygons
    try:
        if CRS.from_user_input(crs) == CRS.from_user_input(grid.crs):
            return polygons
        box = _surroundings(grid, crs)
        near = [[_clipped(ring, box) for ring in rings] for rings in polygons]
        step = float((box[1] - box[0]).max()) / _PIECES
        return [
            [np.stack(transform(crs, grid.crs, *_split(ring, step).T), axis=1) for ring in rings if len(ring)]
            for rings in near
            if len(rings[0])
        ]
    except Exception as error:  # PROJ's errors have no class of their own that rasterio makes public
        raise DataError(
            f"{path}: cannot be brought from {crs} to the scene's {grid.crs} ({error}); check the coordinate "
            "reference system that the file names"
        ) from error


def _surroundings(grid: Grid, crs: str) -> np.ndarray:
    """Lower and upper corner (2, 2), x and y, of a box around the scene in another CRS, with a margin."""
    places = [grid.point(row, col) for row in (0, grid.height) for col in (0, grid.width)]
    (west, south), (east, north) = np.min(places, axis=0), np.max(places, axis=0)
    box = np.array(transform_bounds(grid.crs, crs, west, south, east, north, densify_pts=101)).reshape(2, 2)
    if box[0, 0] > box[1, 0]:
        box[:, 0] = -180, 180  # across the antimeridian
    margin = 0.1 * (box[1] - box[0])
    return np.stack([box[0] - margin, box[1] + margin])


def _clipped(ring: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of a ring inside a box (Sutherland and Hodgman: one side after the other); may be empty."""
    for side, sign in ((0, 1.0), (1, -1.0)):
        for axis in (0, 1):
            depth = sign * (ring[:, axis] - box[side, axis])
            after = np.roll(depth, -1)
            inside, crosses = depth >= 0, (depth >= 0) != (after >= 0)
            share = np.divide(depth, depth - after, out=np.zeros_like(depth), where=crosses)
            crossings = ring + share[:, None] * (np.roll(ring, -1, axis=0) - ring)
            ring = np.stack([ring, crossings], axis=1)[np.stack([inside, crosses], axis=1)]
    return ring


def _split(ring: np.ndarray, step: float) -> np.ndarray:
    """The same ring with edges of at most `step` along x and y."""
    edges = np.roll(ring, -1, axis=0) - ring
    pieces = np.maximum(np.ceil(np.abs(edges).max(axis=1) / step), 1).astype(np.int64)
    edge = np.repeat(np.arange(len(ring)), pieces)
    share = (np.arange(len(edge)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) / pieces[edge]
    return ring[edge] + share[:, None] * edges[edge]


def _geojson(path: Path) -> tuple[list[Any], str]:
    """Geometries as they stand, and the CRS."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
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
        raise DataError(
            f"{path}: cannot be read as a vector file ({error}); expected GeoPackage, GeoJSON or another OGR format"
        ) from None
    return [None if shape is None else json.loads(shapely.to_geojson(shape)) for shape in shapes], meta["crs"]
