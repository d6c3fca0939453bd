"""A finished label map as polygons in a vector file, band of rows by band of rows.

Only what is complete is placed on the ground and written, so that the scene may have any height.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform

from vfmseg.disk.files import folder_aside, publish, remove_leftovers
from vfmseg.errors import DataError, MachineError
from vfmseg.geo.crs import short_name
from vfmseg.geo.dateline import near_zero
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.opening import gdal, open_dataset
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.validity import as_stored
from vfmseg.vector.tracing import Pieces, trace

_DRIVERS = {".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".geojson": "GeoJSON"}
_LAYER = "polygons"
_FIELDS = ("class_id", "class_name", "area")
_SYNCHRONOUS = "OGR_SQLITE_SYNCHRONOUS"

_BATCH = 20_000
"""Polygons written at a time."""

_EDGE = 64
"""Pixels: longest edge in GeoJSON, because what is straight in a projection is a curve in longitude and latitude."""

_JOURNALS = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a GeoPackage; an old one would be played into the new file."""

Placed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Polygons of shapely in the CRS (n), class ids (n) and areas (n)."""

_NOTHING: Pieces = (np.empty(0, dtype=object), np.empty(0, dtype=np.int64))
"""What makes the file, also if there will be no polygon."""


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
    remove_leftovers(target)
    with contextlib.closing(source.file), folder_aside(target) as folder, _unsynced():
        package = folder / "polygons.gpkg"
        count = 0
        for pieces in chain([_NOTHING], _batches(trace(source.bands(rows), source.grid.width))):
            placed = _placed(pieces, grid, min_area, simplify, to_degrees)
            _append(package, placed, source, target)
            count += len(placed[0])
        finished = package if target.suffix.lower() == ".gpkg" else _converted(package, target, source.grid.crs)
        _publish(finished, target, count)
    return count


def check_polygons(target: Path, min_area: float, simplify: float) -> None:
    """What can be known before there are labels: DataError for a wrong argument, MachineError for a missing extra."""
    if target.suffix.lower() not in _DRIVERS:
        raise DataError(f"{target}: polygons cannot be written as {target.suffix!r}; expected {', '.join(_DRIVERS)}")
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


def is_ours(target: Path) -> bool:
    """Whether a vector file has the form of those that are written here, and so may be made anew."""
    import pyogrio

    try:
        layers = [name for name, _ in pyogrio.list_layers(target)]
        return len(layers) == 1 and tuple(pyogrio.read_info(target, layer=layers[0])["fields"]) == _FIELDS
    except pyogrio.errors.DataSourceError:
        return False


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
    """A label file: its grid, its class names, and polygons of its rows."""

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
        """Ids (h, width) of `rows` rows at a time, and bool (h, width): whether the pixel counts."""
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
    """The same polygons, many at a time: every write has a price of its own."""
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
    pixel = abs(a * e - b * d)
    areas = shapely.area(polygons) * pixel
    large = areas >= min_area
    matrix, origin = np.array([[a, d], [b, e]]), np.array([c, f])
    ground = shapely.transform(polygons[large], lambda points: points @ matrix + origin)
    if simplify:
        simple = shapely.simplify(ground, simplify, preserve_topology=True)
        ground = np.where(shapely.is_valid(simple), simple, ground)
    if to_degrees:
        ground = shapely.segmentize(ground, _EDGE * pixel**0.5)
    return ground, ids[large], areas[large]


def _append(package: Path, placed: Placed, source: _Map, target: Path) -> None:
    """Put polygons into the GeoPackage; the first time, make it."""
    import pyogrio
    import shapely

    polygons, ids, areas = placed
    names = np.array([source.names.get(i, str(i)) for i in ids.tolist()], dtype=object)
    with _machine(target), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")  # maps without a place have none to give
        pyogrio.raw.write(
            package,
            shapely.to_wkb(polygons),
            [ids.astype(np.int32), names, areas],
            list(_FIELDS),
            layer=_LAYER,
            driver="GPKG",
            geometry_type="Polygon",
            crs=source.grid.crs,
            append=package.exists(),
        )


def _converted(package: Path, target: Path, crs: str | None) -> Path:
    """The same polygons in the format of the target; these formats cannot be written in pieces."""
    import pyogrio

    suffix = target.suffix.lower()
    made = package.with_suffix(suffix)
    # RFC 7946: projected to longitude and latitude, outlines anticlockwise, cut at the antimeridian
    options = {"RFC7946": "YES", "COORDINATE_PRECISION": "9"} if suffix == ".geojson" else {}
    with _machine(target), warnings.catch_warnings(), pyogrio.open_arrow(package, layer=_LAYER) as (meta, stream):
        warnings.filterwarnings("ignore", "'crs' was not provided")
        pyogrio.write_arrow(
            stream, made, layer=_LAYER, driver=_DRIVERS[suffix], geometry_name=meta["geometry_name"],
            geometry_type="Polygon", crs=crs, layer_options=options,
        )  # fmt: skip
    return made


@contextlib.contextmanager
def _unsynced() -> Iterator[None]:
    """SQLite does not wait for the disk at every batch: the file counts only once `_publish` has waited for it."""
    import pyogrio

    before = pyogrio.get_gdal_config_option(_SYNCHRONOUS)
    pyogrio.set_gdal_config_options({_SYNCHRONOUS: "OFF"})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({_SYNCHRONOUS: before})


def _publish(finished: Path, target: Path, count: int) -> None:
    """Give a file the target's name once it is on the disk and holds what it should."""
    import pyogrio

    def check() -> None:
        held = pyogrio.read_info(finished, layer=_LAYER, force_feature_count=True)["features"]
        if held != count:
            raise OSError(f"{held} of {count} polygons arrived")
        if finished.suffix.lower() == ".gpkg":
            _require_closed(finished, count)

    with _machine(target):
        publish(finished, target, check, stale=_JOURNALS)


def _require_closed(package: Path, count: int) -> None:
    """OSError if a GeoPackage lacks what GDAL writes into it last of all; on a full disk that fails without a word."""
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(package))}?mode=ro", uri=True)) as stored:
        (placed,) = stored.execute("SELECT min_x IS NOT NULL AND max_y IS NOT NULL FROM gpkg_contents").fetchone()
        (noted,) = stored.execute("SELECT feature_count FROM gpkg_ogr_contents").fetchone()
        (kept,) = stored.execute(
            "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name LIKE '%_feature_count_%'"
        ).fetchone()
    if noted != count or kept != 2 or (count and not placed):
        raise OSError("its table of contents is not complete")


@contextlib.contextmanager
def _machine(target: Path) -> Iterator[None]:
    """Errors of the disk, of Python or GDAL, as ours."""
    import pyogrio

    try:
        yield
    except (OSError, sqlite3.Error, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise MachineError(
            f"{target}: could not be written ({error}); nothing was left behind: make room or choose another disk, "
            "then run again"
        ) from error
