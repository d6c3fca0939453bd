"""How rasters are opened: GDAL with our settings, what it may open, and why something could not be opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rasterio
from rasterio._err import CPLE_BaseError  # the only name that rasterio has for what GDAL says of some damaged headers
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterioWindow

from vfmseg.disk.paths import elsewhere, files_behind
from vfmseg.errors import DataError
from vfmseg.geo.grid import Window
from vfmseg.geo.quiet import in_pixels
from vfmseg.geo.trust import closed_network, drivers_for, is_remote, or_trust_it, trusted
from vfmseg.geo.vetting import vet, vet_opened

GDAL_ERRORS = (RasterioError, CPLE_BaseError)
"""What rasterio raises when GDAL fails: in some functions GDAL's own error, which is none of rasterio's."""

_OPTIONS: dict[str, Any] = {
    # bytes, which rasterio hands on as they are; GDAL would take 5 % of the memory, and windows are read once
    "GDAL_CACHEMAX": 32 * 2**20,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a truncated JPEG is an error, not a grey area
    "GDAL_VRT_ENABLE_PYTHON": "NO",  # no code from files, whatever the environment says
}

_SERVERS = {
    "GDAL_HTTP_MAX_RETRY": "4",  # of what is worth it (429, 500, 502, 503, 504), each time after twice as long
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_LOW_SPEED_TIME": "30",  # seconds of silence that are as good as an error
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
}
"""For files behind a server, unless the environment says otherwise: GDAL alone would neither retry nor ever give up."""

_ARCHIVES = {".zip": "/vsizip/{}/FILE.tif", ".tar": "/vsitar/{}/FILE.tif", ".tgz": "/vsitar/{}/FILE.tif",
             ".tar.gz": "/vsitar/{}/FILE.tif", ".gz": "/vsigzip/{}"}  # fmt: skip
"""Endings of archives, and how GDAL is told to look inside."""

_VECTORS = (".shp", ".geojson", ".json", ".kml", ".kmz", ".gml", ".fgb", ".gpkg", ".gpx", ".dxf")


@contextmanager
def gdal(path: str = "") -> Iterator[None]:
    """GDAL with our options, and its messages turned into Python errors instead of lines on stderr.

    `path`: what the user asks for, which may lie behind a server.
    """
    servers = closed_network(path) or {name: value for name, value in _SERVERS.items() if name not in os.environ}
    with rasterio.Env(**_OPTIONS, **servers):
        yield


def open_dataset(path: str, mode: str = "r", **profile: Any) -> Any:
    """`rasterio.open` inside `gdal()`, silent about a missing georeference: a verb says that once.

    What is read is looked at first, see `vetting`: DataError if it reaches further than its name says.
    """
    if mode == "r":
        vet(path)
    with in_pixels():
        if mode != "r" or trusted():
            return rasterio.open(path, mode, **profile)
        dataset = rasterio.open(path) if is_remote(path) else DatasetReader(path, driver=drivers_for(path))
    try:
        vet_opened(path, dataset.driver, dataset.files, dataset.tags(ns="OVERVIEWS"))
    except DataError:
        dataset.close()
        raise
    return dataset


def open_raster(path: str) -> Any:
    """A data set with bands, open for reading; DataError, in words for people, if it cannot be opened."""
    try:
        dataset = open_dataset(path)
    except UnicodeEncodeError:
        raise DataError(f"{path}: its name is not UTF-8, in which GDAL takes names; rename it, or link it") from None
    except RasterioError as error:
        raise DataError(why_not_opened(path, error)) from error
    if dataset.count == 0:
        inner = list(dataset.subdatasets)
        dataset.close()
        advice = f"name one of the {len(inner)} data sets inside it, such as {inner[0]}" if inner else "replace it"
        raise DataError(f"{path}: has no bands of its own; {advice}")
    return dataset


def why_not_opened(path: str, error: Exception) -> str:
    """What stands under a path instead of a raster, and what to do."""
    if elsewhere(path) or files_behind(path) not in ([], [path]):  # a data set inside a file, or a file in an archive
        return f"{path}: cannot be opened ({error}){or_trust_it(path)}"
    if not os.path.exists(path):
        return f"{path}: there is no such file; check the path"
    if os.path.isdir(path):
        pattern = os.path.join(path, "*.tif")
        return f"{path}: is a folder; expected a raster file, or a pattern such as {pattern}{or_trust_it(path)}"
    if os.path.getsize(path) == 0:
        return f"{path}: is empty (0 bytes); expected a raster file; copy or download it again"
    inside = next((how for ending, how in _ARCHIVES.items() if path.lower().endswith(ending)), None)
    if inside is not None:
        return f"{path}: is an archive; name the raster in it as {inside.format(path)}, or unpack it"
    if path.lower().endswith(_VECTORS):
        return (
            f"{path}: holds vectors, and a raster is expected ({error}); to make labels of polygons, burn the class "
            "ids onto the grid of the image (gdal_rasterize, or Rasterize in QGIS)"
        )
    return (
        f"{path}: is not a raster that GDAL can open, or its header is damaged ({error}); "
        f"expected GeoTIFF, PNG, JPEG or another plain GDAL format{or_trust_it(path)}"
    )


def rasterio_window(window: Window) -> RasterioWindow:
    """A window as rasterio takes it."""
    return RasterioWindow(window.col, window.row, window.width, window.height)
