"""Whether opening a raster or vector file would reach further than its name: looked at before GDAL opens it.

A virtual raster, a mask or an overview may name other files, servers or code. What a file names is vetted in turn, to
the end; DataError names the first thing that is none of the plain formats of `trust`.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from vfmseg.disk.paths import require_file
from vfmseg.errors import DataError
from vfmseg.geo.quiet import in_pixels
from vfmseg.geo.trust import PLAIN, PLAIN_BUT_VRT, REMEDY, START, is_remote, local_name, start_of, trusted
from vfmseg.geo.virtual import MARK, names_in

_INSIDE = re.compile(r"(?:NETCDF|HDF4_\w+|HDF5|GPKG|GTIFF_DIR|NITF_IM|DIMAP|BAG|SENTINEL[12]_\w+):", re.IGNORECASE)
"""Beginnings of the names of data sets inside a file."""

_ARCHIVES = ("/vsizip/", "/vsitar/", "/vsigzip/", "/vsi7z/", "/vsirar/", "/vsimem/")

_BESIDE = (".msk", ".ovr")
"""Endings of the rasters that GDAL looks for beside another one."""

# A vector file in text is plain if its first element is of KML or GPX, or it is GeoJSON. OGR's other drivers tell a
# file by such words as well, and some of those send requests or follow paths that the text names.
_BEFORE_ROOT = re.compile(rb"^(?:\xef\xbb\xbf|\s|<\?.*?\?>|<!--.*?-->)+", re.DOTALL)
_LAYERS = re.compile(rb'<(?:kml|gpx)\b|\{[^{]*"type"\s*:\s*"(?:Feature|\w*Polygon|GeometryCollection)')
_BESIDE_LAYERS = (".xml", ".html", ".qml", ".qmd", ".sld")

_vetted: dict[str, tuple[int, int]] = {}  # virtual rasters that have been looked through: time and size


def vet(path: str) -> None:
    """DataError if opening a raster by this name, which the user has given, would reach further than the name.

    The name may be of a file, of a data set inside one (GPKG:a.gpkg:ortho), or the XML of a virtual raster itself.
    """
    require_file(path)
    if trusted() or is_remote(path):
        return
    path = local_name(path)
    try:
        if path.lstrip().startswith("<"):
            _vet_virtual(path.encode(), path[:40], os.curdir, set())
        for piece in [path] if os.path.isfile(path) else _pieces(path):
            _vet_file(piece, set())
    except RecursionError:
        raise DataError(
            f"{path[:200]}: is a virtual raster over a virtual raster, and so on without end; build one over the tiles "
            "themselves (gdalbuildvrt)"
        ) from None


def vet_opened(path: str, driver: str, files: Sequence[str], overviews: Mapping[str, str]) -> None:
    """The same for what only the open data set tells: its format, its files, and what it names for overviews."""
    if driver not in PLAIN:
        raise DataError(f"{path}: is of GDAL's format {driver}, which is none of the plain ones; {REMEDY}")
    if not is_remote(path):
        _vet_belonging(path, driver, files, set())
    smaller = overviews.get("OVERVIEW_FILE", "").removeprefix(":::BASE:::")
    if smaller and not is_remote(path):
        _vet_name(smaller, path, [os.path.dirname(path) or os.curdir], set())


def vet_vector(path: Path) -> None:
    """DataError for a vector file that asks servers or leads to other files: by its content, or an archive's."""
    if trusted():
        return
    heads = {str(path): start_of(path)}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            layers = [name for name in archive.namelist() if not name.lower().endswith(_BESIDE_LAYERS)]
            heads |= {f"{path}/{name}": archive.open(name).read(START) for name in layers}
    for name, head in heads.items():
        text = head.partition(b"\0")[0]
        start = _BEFORE_ROOT.sub(b"", text)
        if (start.startswith((b"<", b"{")) and not _LAYERS.match(start)) or b"<OGR" in text:
            raise DataError(
                f"{name}: is no plain vector file (GeoPackage, GeoJSON, Shapefile, FlatGeobuf, KML, GPX); export the "
                f"area to one, or {REMEDY}"
            )


def _vet_file(path: str, seen: set[str], nested: bool = False) -> None:
    """A file and what GDAL opens beside it, by content: suffixes say nothing.

    seen: files that were looked at on the way here; two that name each other would else be followed for ever. nested:
    whether another file names this one, which must then be a raster, where the user may name what he likes.
    """
    require_file(path)
    if path in seen or not os.path.isfile(path):
        return
    seen.add(path)
    for sidecar in _sidecars(path):
        _vet_file(sidecar, seen, nested=True)
    text = start_of(path).partition(b"\0")[0]
    if MARK.search(text):
        found = os.stat(path)
        state = (found.st_mtime_ns, found.st_size)
        if _vetted.get(path) != state:
            _vet_virtual(Path(path).read_bytes(), path, os.path.dirname(path) or os.curdir, seen)
            _vetted[path] = state
    elif nested and (b"<" in text or b"{" in text):
        _probe(path, path, seen)


def _vet_virtual(content: bytes, place: str, folder: str, seen: set[str]) -> None:
    """A virtual raster, and all that its names lead to."""
    try:
        found = names_in(content)
    except ValueError as error:
        raise DataError(
            f"{place}: is a virtual raster, but no clean XML ({error}), so what it would open is not known; write it "
            f"again (gdalbuildvrt), or {REMEDY}"
        ) from None
    folders = [folder]
    if os.path.islink(place):  # GDAL starts from where the link leads
        folders.append(os.path.dirname(os.path.realpath(place)))
    for name in found:
        if name.code and name.text.lower() == "python":
            raise DataError(f"{place}: holds Python code, which is never run; have GDAL write its pixels to a file")
        if name.raw:
            _require_beside(name.text, place, folders)
        elif not name.code:
            _vet_name(name.text, place, folders, seen)


def _vet_name(name: str, place: str, folders: list[str], seen: set[str]) -> None:
    """A raster that a file names: plain, on this machine, and itself naming no other kind."""
    inner = local_name(name)
    if inner.startswith("<"):
        if MARK.match(inner.encode()):
            return _vet_virtual(inner.encode(), place, folders[0], seen)
        raise _no_raster(place, name)
    if is_remote(inner):
        raise DataError(f"{place}: names {name[:200]}, which lies behind a server, where no file sends us; {REMEDY}")
    there = [path for path in _candidates(inner, folders) if os.path.lexists(path)]
    pieces = there or [path for piece in _pieces(inner) for path in _candidates(piece, folders)]
    for path in pieces:
        _vet_file(path, seen, nested=True)
    if there:
        return None
    if inner.startswith(_ARCHIVES):
        return _probe(inner, place, seen)
    prefixed = re.match(r"[A-Za-z]\w+:", inner) and not _INSIDE.match(inner)  # such as WMS:
    if inner.startswith("/vsi") or prefixed:
        raise _no_raster(place, name)
    return None


def _sidecars(path: str) -> list[str]:
    """Masks and overviews beside a file, as GDAL finds them: in whatever case."""
    folder, name = os.path.split(path)
    try:
        found = _names_of(folder or os.curdir, os.stat(folder or os.curdir).st_mtime_ns)
    except OSError:  # a folder that may be entered, but not listed
        return [sidecar for end in _BESIDE for sidecar in (path + end, path + end.upper()) if os.path.exists(sidecar)]
    return [os.path.join(folder, one) for end in _BESIDE for one in found.get(name.lower() + end, ())]


@lru_cache(maxsize=16)
def _names_of(folder: str, time: int) -> dict[str, list[str]]:
    """{name in small letters: such names} of the masks and overviews in a folder, which is of this time."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        if name.lower().endswith(_BESIDE):
            found.setdefault(name.lower(), []).append(name)
    return found


def _vet_belonging(path: str, driver: str, files: Sequence[str], seen: set[str]) -> None:
    """Look at the files that an open data set is read from: some formats name others, and archives hold sidecars."""
    if driver == "VRT":  # which has been looked through before
        return
    for file in files:
        if file != path and os.path.isfile(file):
            _vet_file(file, seen)
        elif file != path and file.startswith(_ARCHIVES) and _is_virtual(file):
            raise _no_raster(path, file)


def _candidates(name: str, folders: list[str]) -> list[str]:
    """Where a name may lead: GDAL starts from the current folder or the file's own."""
    return [name] if os.path.isabs(name) else [name, *(os.path.join(folder, name) for folder in folders)]


def _pieces(name: str) -> list[str]:
    """Parts of a name that may be files: NETCDF, a.nc and band of `NETCDF:"a.nc":band`; vsizip prefixes taken off."""
    parts = [part for part in re.split(r'[":?,]', name) if part]
    return [*parts, *(re.sub(r"^(?:/vsi(?!mem)\w+/)+", "", part) for part in parts if part.startswith("/vsi"))]


def _require_beside(name: str, place: str, folders: list[str]) -> None:
    """DataError for a raw file outside of the folder of the file that names it.

    Bytes of a raw file are pixels as they stand, so that any file could be shown as one: /etc/passwd as grey values.
    """
    if name.startswith("/vsi") or is_remote(name):
        raise _no_raster(place, name)
    homes = [Path(folder).resolve() for folder in folders]
    for path in _candidates(name, folders):
        require_file(path)
        if os.path.lexists(path) and not any(Path(path).resolve().is_relative_to(home) for home in homes):
            raise DataError(
                f"{place}: takes the bytes of {name} for pixels, which lies outside of its folder; move it there, or "
                f"{REMEDY}"
            )


def _probe(path: str, place: str, seen: set[str]) -> None:
    """Open what may be the description of a service, or a virtual raster in an archive, in other plain formats only."""
    try:
        with in_pixels(), DatasetReader(path, driver=PLAIN_BUT_VRT) as dataset:
            driver, files = dataset.driver, dataset.files
    except RasterioError:
        raise _no_raster(place, path) from None
    _vet_belonging(path, driver, files, seen)


def _is_virtual(path: str) -> bool:
    """Whether a file in an archive opens as a VRT; its bytes are not on this disk to look at."""
    try:
        with in_pixels():
            DatasetReader(path, driver="VRT").close()
    except RasterioError:
        return False
    return True


def _no_raster(place: str, name: str) -> DataError:
    named = "" if name == place else f"names {name[:200]}, which "
    return DataError(f"{place}: {named}is no plain raster file on this machine; replace it, or {REMEDY}")
