"""A vector file of polygons: made aside, batch by batch, and complete under its name or not there at all."""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import numpy as np

from vfmseg.disk.files import folder_aside, publish, remove_leftovers
from vfmseg.errors import MachineError

DRIVERS = {".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".geojson": "GeoJSON"}
"""{ending of a name: GDAL's name of the format}."""

FIELDS = ("class_id", "class_name", "area")
"""The attributes of each polygon, in their order."""

_LAYER = "polygons"
_SYNCHRONOUS = "OGR_SQLITE_SYNCHRONOUS"

_JOURNALS = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a GeoPackage; an old one would be played into the new file."""

Placed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Polygons of shapely in the CRS (n), class ids (n) and areas (n)."""


class VectorFile:
    """Takes polygons for a file that is being made by `vector_file`. count: polygons so far.

    names {class id: name}; a class without a name goes by its id.
    """

    def __init__(self, package: Path, target: Path, crs: str | None, names: Mapping[int, str]) -> None:
        self.count = 0
        self._package = package  # a GeoPackage, whatever the target is: other formats cannot be written in pieces
        self._target = target
        self._crs = crs
        self._names = names

    def add(self, placed: Placed) -> None:
        """Append polygons; the first time, make the file, also for none."""
        import pyogrio
        import shapely

        polygons, ids, areas = placed
        names = np.array([self._names.get(i, str(i)) for i in ids.tolist()], dtype=object)
        with _machine(self._target), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")  # maps without a place have none to give
            pyogrio.raw.write(
                self._package,
                shapely.to_wkb(polygons),
                [ids.astype(np.int32), names, areas],
                list(FIELDS),
                layer=_LAYER,
                driver="GPKG",
                geometry_type="Polygon",
                crs=self._crs,
                append=self._package.exists(),
            )
        self.count += len(polygons)


@contextlib.contextmanager
def vector_file(target: Path, crs: str | None, names: Mapping[int, str]) -> Iterator[VectorFile]:
    """A file to add polygons to; it takes the target's name when the block ends without an error.

    Temporary files of processes that were killed go first. DataError: the target's folder cannot be made or written
    to. MachineError: the disk is full or broken.
    """
    remove_leftovers(target)
    with folder_aside(target) as folder, _unsynced():
        package = folder / "polygons.gpkg"
        file = VectorFile(package, target, crs, names)
        file.add((np.empty(0, dtype=object), np.empty(0, dtype=np.int64), np.empty(0)))  # there may be no polygon
        yield file
        finished = package if target.suffix.lower() == ".gpkg" else _converted(package, target, crs)
        publish_polygons(finished, target, file.count)


def publish_polygons(finished: Path, target: Path, count: int) -> None:
    """Give a file the target's name once it is on the disk and holds `count` polygons; MachineError if it does not."""
    import pyogrio

    def check() -> None:
        held = pyogrio.read_info(finished, layer=_LAYER, force_feature_count=True)["features"]
        if held != count:
            raise OSError(f"{held} of {count} polygons arrived")
        if finished.suffix.lower() == ".gpkg":
            _require_closed(finished, count)

    with _machine(target):
        publish(finished, target, check, stale=_JOURNALS)


def is_ours(target: Path) -> bool:
    """Whether a vector file has the form of those that are written here, and so may be made anew."""
    import pyogrio

    try:
        layers = [name for name, _ in pyogrio.list_layers(target)]
        return len(layers) == 1 and tuple(pyogrio.read_info(target, layer=layers[0])["fields"]) == FIELDS
    except pyogrio.errors.DataSourceError:
        return False


def _converted(package: Path, target: Path, crs: str | None) -> Path:
    """The same polygons in the format of the target."""
    import pyogrio

    suffix = target.suffix.lower()
    made = package.with_suffix(suffix)
    # RFC 7946: projected to longitude and latitude, outlines anticlockwise, cut at the antimeridian;
    # 9 digits of a degree are 0.1 mm
    options = {"RFC7946": "YES", "COORDINATE_PRECISION": "9"} if suffix == ".geojson" else {}
    with _machine(target), warnings.catch_warnings(), pyogrio.open_arrow(package, layer=_LAYER) as (meta, stream):
        warnings.filterwarnings("ignore", "'crs' was not provided")
        pyogrio.write_arrow(
            stream, made, layer=_LAYER, driver=DRIVERS[suffix], geometry_name=meta["geometry_name"],
            geometry_type="Polygon", crs=crs, layer_options=options,
        )  # fmt: skip
    return made


@contextlib.contextmanager
def _unsynced() -> Iterator[None]:
    """SQLite does not wait for the disk at every batch: the file counts only once `publish` has waited for it."""
    import pyogrio

    before = pyogrio.get_gdal_config_option(_SYNCHRONOUS)
    pyogrio.set_gdal_config_options({_SYNCHRONOUS: "OFF"})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({_SYNCHRONOUS: before})


def _require_closed(package: Path, count: int) -> None:
    """OSError if a GeoPackage lacks what GDAL writes into it last of all; on a full disk that fails without a word.

    That is the box round all polygons, their number, and the two triggers that keep the number right.
    """
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
