"""A finished label map as polygons in a vector file, band of rows by band of rows.

Only what is complete is placed on the ground and written, so that the scene may have any height.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform

from vfmseg.errors import DataError, MachineError
from vfmseg.geo.crs import short_name
from vfmseg.geo.dateline import near_zero
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.opening import gdal, open_dataset
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.validity import as_stored
from vfmseg.vector.tracing import Pieces, trace
from vfmseg.vector.vectorfile import DRIVERS, Placed, vector_file

_BATCH = 20_000
"""Polygons written at a time."""

_EDGE = 64
"""Pixels: longest edge in GeoJSON, because what is straight in a projection is a curve in longitude and latitude."""


def write_polygons(
    labels: Path,
    target: Path,
    *,
    classes: Sequence[int] | None = None,
    min_area: float = 0.0,
    simplify: float = 0.0,
    rows: int = 1024,
) -> int:
    """Write the areas of equal class of a label map as polygons; returns their number.

    Pixels that share an edge belong together, those that share a corner do not; nodata gives no polygon. Attributes:
    `class_id`; `class_name`, the id where the map has no name for it; `area`, before any simplification. The CRS is
    the map's, but GeoJSON is in longitude and latitude.

    target: .gpkg, .fgb or .geojson; complete under this name or not there at all. classes: only these ids.
    min_area: smaller polygons are left out; square units of the map's CRS (square pixels without one), as is `area`.
    simplify: outlines may move by so many units of the CRS, each for itself: neighbours may overlap or leave gaps.
    rows: pixel rows traced at a time, which changes memory and time but not the polygons.

    DataError: the map, an argument or the target's folder is wrong. MachineError: an extra is missing, or the disk is
    full or broken.
    """
    labels, target = Path(labels), Path(target)
    check_polygons(target, min_area, simplify)
    if rows < 1:
        raise DataError(f"{target}: rows {rows}: expected at least 1")
    source = _Map(labels, classes)
    to_degrees = check_place(target, source.grid, labels)
    # GDAL cuts GeoJSON at 180 and -180 degrees, but loses what lies beyond 360
    grid = near_zero(source.grid) if target.suffix.lower() == ".geojson" else source.grid
    with contextlib.closing(source.file), vector_file(target, source.grid.crs, source.names) as file:
        for pieces in _batches(trace(source.bands(rows), source.grid.width)):
            file.add(_placed(pieces, grid, min_area, simplify, to_degrees))
    return file.count


def check_polygons(target: Path, min_area: float, simplify: float) -> None:
    """What can be known before there are labels: DataError for a wrong argument, MachineError for a missing extra."""
    if target.suffix.lower() not in DRIVERS:
        raise DataError(f"{target}: polygons cannot be written as {target.suffix!r}; expected {', '.join(DRIVERS)}")
    unfit = unfit_vector_name(target)
    if unfit is not None:
        raise DataError(unfit)
    if target.is_dir():
        raise DataError(f"{target}: is a folder; expected the name of a vector file to write")
    if not (0 <= min_area < float("inf") and 0 <= simplify < float("inf")):
        raise DataError(f"{target}: min_area {min_area}, simplify {simplify}: expected numbers of 0 or more")
    try:
        import pyogrio  # noqa: F401
        import shapely  # noqa: F401
    except ImportError:
        raise MachineError(f"{target}: writing it needs pyogrio and shapely: pip install 'vfmseg[vector]'") from None


def unfit_vector_name(target: Path) -> str | None:
    """Why no vector file of this name can be written, and what to do; None if one can."""
    if re.search(r"[\t\n\r]", str(target.absolute())) is None:
        return None
    return (
        f"{str(target)!r}: holds a line break or a tab, which pyogrio takes out of names, so that polygons would go "
        "elsewhere; name the output and its folders without"
    )


def check_place(target: Path, grid: Grid, labels: str | Path) -> bool:
    """Whether outlines must be projected to degrees. DataError if the target has to say where they lie and cannot."""
    if target.suffix.lower() != ".geojson":
        return False
    remedy = f"GeoJSON is in longitude and latitude; write {target.with_suffix('.gpkg').name} instead"
    if grid.crs is None:
        raise DataError(f"{labels}: has no coordinate reference system, but {target.name} needs one: {remedy}")
    try:
        transform(grid.crs, "OGC:CRS84", *([value] for value in grid.point(grid.height / 2, grid.width / 2)))
    except Exception as error:  # PROJ's errors have no class of their own that rasterio makes public
        raise DataError(f"{labels}: {short_name(grid.crs)} has no way to degrees ({error}): {remedy}") from error
    return not CRS.from_user_input(grid.crs).is_geographic


class _Map:
    """A label file: its grid, its class names {id: name}, and the ids of its rows. DataError if it is no label map."""

    def __init__(self, path: Path, classes: Sequence[int] | None) -> None:
        self.file = RasterFile(path)
        info = self.file.info
        dtype = np.dtype(info.dtypes[0])
        with gdal(), contextlib.closing(open_dataset(str(path))) as dataset:
            tags, scale = dataset.tags(), dataset.scales[0]
        if info.count != 1 or dtype.kind not in "iu" or dtype.itemsize > 4 or dtype == np.uint32 or scale != 1:
            raise DataError(
                f"{path}: holds {info.count} band(s) of {dtype} (scale {scale:g}); expected a label map: one band of "
                "class ids, whole numbers of at most 32 bits with sign"
            )
        found = {key: re.fullmatch(r"CLASS_(-?\d+)", key) for key in tags}
        self.names = {int(match[1]): str(tags[key]) for key, match in found.items() if match}
        unknown = sorted(set(classes or ()) - self.names.keys()) if self.names else []
        if unknown:
            known = ", ".join(f"{i} ({name})" for i, name in sorted(self.names.items()))
            raise DataError(f"{path}: has no class {', '.join(map(str, unknown))}; choose among {known}")
        self.grid = info.grid
        self._classes = None if classes is None else list(classes)
        self._nodata = None if info.nodata[0] is None else as_stored(info.nodata[0], dtype)

    def bands(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (h, width) of `rows` rows at a time, and bool (h, width): whether the pixel is part of any polygon."""
        for top in range(0, self.grid.height, rows):
            window = Window(top, 0, min(rows, self.grid.height - top), self.grid.width)
            stored = self.file.read([1], window)[0]
            shown = np.ones(stored.shape, dtype=bool)
            for hidden in self.file.read_hidden([1], window).values():
                shown &= ~hidden
            if self._nodata is not None:
                shown &= stored != self._nodata
            if self._classes is not None:
                shown &= np.isin(stored, self._classes)
            yield stored, shown


def _batches(pieces: Iterable[Pieces]) -> Iterator[Pieces]:
    """The same polygons, `_BATCH` or more at a time: every write has a price of its own."""
    held: list[Pieces] = []
    for some in pieces:
        held.append(some)
        if sum(len(ids) for _, ids in held) >= _BATCH:
            yield np.concatenate([p for p, _ in held]), np.concatenate([i for _, i in held])
            held = []
    if held:
        yield np.concatenate([p for p, _ in held]), np.concatenate([i for _, i in held])


def _placed(pieces: Pieces, grid: Grid, min_area: float, simplify: float, to_degrees: bool) -> Placed:
    """Polygons in pixels as they go into the file: on the ground, large enough, simplified."""
    import shapely

    polygons, ids = pieces
    a, b, c, d, e, f = grid.transform
    pixel = abs(a * e - b * d)  # area of a pixel: the determinant, also of a turned grid
    areas = shapely.area(polygons) * pixel
    large = areas >= min_area
    matrix, origin = np.array([[a, d], [b, e]]), np.array([c, f])  # (x, y) = (col, row) @ matrix + origin
    ground = shapely.transform(polygons[large], lambda points: points @ matrix + origin)
    if simplify:
        # an outline stays valid nearly always; the few that would cross themselves stay as they were
        simple = shapely.simplify(ground, simplify, preserve_topology=True)
        ground = np.where(shapely.is_valid(simple), simple, ground)
    if to_degrees:
        ground = shapely.segmentize(ground, _EDGE * pixel**0.5)
    return ground, ids[large], areas[large]
