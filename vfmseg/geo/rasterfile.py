"""One raster file, opened when first needed: the only place that opens files for reading.

It knows what GDAL says of a file (size, place, bands, nodata, masks) and reads stored numbers. What they mean,
as imagery or as labels, is decided in `reader` and `labels`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError  # the only name that rasterio has for what GDAL says of some damaged headers
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterioWindow

from vfmseg.errors import DamagedError, DataError
from vfmseg.geo import trust
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.orientation import Turn, orientation_of
from vfmseg.geo.said import BandSaid, said_of, split_alpha
from vfmseg.geo.trust import is_remote
from vfmseg.paths import elsewhere, files_behind

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

_NO_PIXELS = (".aux.xml", ".ovr")
"""Files that GIS programs put beside a raster when they show it."""

_HIGHEST = 1024
"""Most rows that count as a block of a mosaic: whole blocks are read ahead, and one may be as high as a tile."""

_warnings_lock = threading.Lock()  # Python's warning filters belong to the process, not to a thread


@contextmanager
def gdal(path: str = "") -> Iterator[None]:
    """GDAL with our options, and its messages turned into Python errors instead of lines on stderr.

    `path`: what the user asks for, which may lie behind a server.
    """
    servers = trust.closed_network(path) or {name: value for name, value in _SERVERS.items() if name not in os.environ}
    with rasterio.Env(**_OPTIONS, **servers):
        yield


def open_dataset(path: str, mode: str = "r", **profile: Any) -> Any:
    """`rasterio.open` inside `gdal()`, silent about a missing georeference: a verb says that once.

    What is read is looked at first, see `trust`: DataError if it reaches further than its name says.
    """
    if mode == "r":
        trust.vet(path)
    with in_pixels():
        if mode != "r" or trust.trusted():
            return rasterio.open(path, mode, **profile)
        dataset = rasterio.open(path) if is_remote(path) else DatasetReader(path, driver=trust.drivers_for(path))
    try:
        trust.vet_opened(path, dataset.driver, dataset.tags(ns="OVERVIEWS"))
    except DataError:
        dataset.close()
        raise
    return dataset


@contextmanager
def in_pixels() -> Iterator[None]:
    """rasterio does not warn that pixel numbers are no coordinates."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@dataclass(frozen=True)
class FileInfo:
    """What a file says of itself. Band numbers are 1-based; `dtypes` and `nodata` hold one entry a band."""

    grid: Grid
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    bands: tuple[BandSaid, ...]  # names, colours, scale and offset
    alpha: tuple[int, ...]  # bands that are marked as alpha, and look like it
    not_alpha: tuple[int, ...]  # bands that are marked as alpha, but hold other numbers than an alpha band does
    palette: tuple[int, ...]  # bands that hold numbers of colours
    shared_mask: bool  # one mask band for all bands, inside the file or beside it (.msk)
    own_masks: tuple[int, ...]  # bands that have a mask of their own
    block: tuple[int, int]  # rows and columns of the blocks of the first band
    lossy: bool  # JPEG: stored numbers are near those that were meant
    control_points: int  # of the ground: they say where some pixels lie, but not what grid
    others: tuple[str, ...]  # files that belong to it: tiles of a VRT and of those in it, a header or a mask beside it
    turn: Turn  # how the stored pixels are shown; grid and block are those of the picture as shown

    @property
    def count(self) -> int:
        """Number of bands, alpha included."""
        return len(self.dtypes)


class RasterFile:
    """One file of any format that GDAL tells by its content. Safe in threads, after a fork and in pickles."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._info: FileInfo | None = None
        self._reset()

    def _reset(self) -> None:
        self._dataset: Any = None
        self._pid = os.getpid()
        self._lock = threading.Lock()  # a GDAL handle must not be used by two threads at once

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_info": self._info}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def info(self) -> FileInfo:
        """What the file says of itself; opens it at the first call. DataError if it cannot be opened."""
        if self._info is None:
            try:
                with self._handle() as dataset:
                    self._info = _describe(dataset, self.path)
            except CPLE_BaseError as error:
                raise DataError(_why_not_opened(self.path, error)) from error
        return self._info

    def read(self, bands: Sequence[int], window: Window) -> np.ndarray:
        """Stored numbers (len(bands), height, width) of a window inside the file, in the file's own dtype."""
        turn = self.info.turn
        with self._handle() as dataset, _damage(self.path, window):
            return turn.shown(dataset.read(list(bands), window=rasterio_window(turn.stored_window(window))))

    def read_hidden(self, bands: Sequence[int], window: Window) -> dict[str, np.ndarray]:
        """{what hides pixels: bool (height, width) where it does}: "mask" for mask bands, "alpha" for an alpha band.

        An alpha band that is itself among `bands` hides nothing: whoever asks for it by number means its values.
        Nodata values are not looked at here.
        """
        masks = [bands[0]] if self.info.shared_mask else [b for b in bands if b in self.info.own_masks]
        alphas = [band for band in self.info.alpha if band not in bands]
        hidden: dict[str, np.ndarray] = {}
        if not masks and not alphas:
            return hidden
        turn = self.info.turn
        with self._handle() as dataset, _damage(self.path, window):
            place = rasterio_window(turn.stored_window(window))
            if masks:
                shown = np.all([dataset.read_masks(band, window=place) != 0 for band in masks], axis=0)
                hidden["mask"] = turn.shown(~shown)
            if alphas:
                shown = np.all([dataset.read(band, window=place) != 0 for band in alphas], axis=0)
                hidden["alpha"] = turn.shown(~shown)
        return hidden

    def close(self) -> None:
        """Give the handle back; the next read opens the file again."""
        if self._pid != os.getpid():
            self._reset()  # the handle is the parent process's
        with self._lock, gdal():
            if self._dataset is not None:
                self._dataset.close()
            self._dataset = None  # still locked: no thread may find it closed

    @contextmanager
    def _handle(self) -> Iterator[Any]:
        if self._pid != os.getpid():
            self._reset()  # a handle inherited through fork shares its file position with the parent process
        with self._lock, gdal(self.path):
            if self._dataset is None:
                self._dataset = _open(self.path)
            try:
                yield self._dataset
            except Exception:
                # of a VRT whose file is missing, the same handle answers the next read with zeros
                self._dataset.close()
                self._dataset = None
                raise


def rasterio_window(window: Window) -> RasterioWindow:
    """A window as rasterio takes it."""
    return RasterioWindow(window.col, window.row, window.width, window.height)


@contextmanager
def _damage(path: str, window: Window) -> Iterator[None]:
    try:
        yield
    except RasterioError as error:
        why = "the server did not answer, or the file" if is_remote(path) else "the file"
        raise DamagedError(
            f"{path}: {window} cannot be read: {why} is damaged or cut short "
            f"({error.__cause__ or error}); {'try again, or ' if is_remote(path) else ''}copy or download it again"
        ) from error


def _open(path: str) -> Any:
    try:
        dataset = open_dataset(path)
    except UnicodeEncodeError:
        raise DataError(f"{path}: its name is not UTF-8, in which GDAL takes names; rename it, or link it") from None
    except RasterioError as error:
        raise DataError(_why_not_opened(path, error)) from error
    if dataset.count == 0:
        inner = list(dataset.subdatasets)
        dataset.close()
        advice = f"name one of the {len(inner)} data sets inside it, such as {inner[0]}" if inner else "replace it"
        raise DataError(f"{path}: has no bands of its own; {advice}")
    return dataset


def _why_not_opened(path: str, error: Exception) -> str:
    if elsewhere(path) or files_behind(path) not in ([], [path]):  # a data set inside a file, or a file in an archive
        return f"{path}: cannot be opened ({error}){trust.or_trust_it(path)}"
    if not os.path.exists(path):
        return f"{path}: there is no such file; check the path"
    if os.path.isdir(path):
        pattern = os.path.join(path, "*.tif")
        return f"{path}: is a folder; expected a raster file, or a pattern such as {pattern}{trust.or_trust_it(path)}"
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
        f"expected GeoTIFF, PNG, JPEG or another plain GDAL format{trust.or_trust_it(path)}"
    )


def _describe(dataset: Any, path: str) -> FileInfo:
    flags = dataset.mask_flag_enums
    compression = dataset.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION") or "NONE"
    others = tuple(sorted(file for file in _belonging(dataset) - {path} if not file.endswith(_NO_PIXELS)))
    alpha, not_alpha = split_alpha(dataset)
    turn = Turn(orientation_of(dataset, path), dataset.height, dataset.width)
    block = _block(dataset, others)
    return FileInfo(
        grid=Grid(_crs_text(dataset.crs, path), tuple(dataset.transform)[:6], *turn.shown_size),
        dtypes=tuple(str(dtype) for dtype in dataset.dtypes),
        nodata=tuple(dataset.nodatavals),
        bands=said_of(dataset),
        alpha=alpha,
        not_alpha=not_alpha,
        palette=tuple(i for i, meaning in enumerate(dataset.colorinterp, 1) if meaning == ColorInterp.palette),
        shared_mask=any(MaskFlags.per_dataset in each and MaskFlags.alpha not in each for each in flags),
        own_masks=tuple(i for i, each in enumerate(flags, 1) if not each),
        block=block if turn.shown_size == (turn.height, turn.width) else (block[1], block[0]),
        lossy="JPEG" in (dataset.driver, compression.split()[-1]),  # such as "YCbCr JPEG"
        control_points=len(dataset.gcps[0]),
        others=others,
        turn=turn,
    )


def _block(dataset: Any, others: Sequence[str]) -> tuple[int, int]:
    """Rows and columns that are decoded at a time; of a VRT its first tile's, as its own are those of no file."""
    first = next((file for file in others if not _is_mosaic(file)), None)
    if dataset.driver == "VRT" and first is not None:
        with contextlib.suppress(RasterioError), open_dataset(first) as tile:
            rows, cols = tile.block_shapes[0]
            return min(rows, _HIGHEST), cols
    return dataset.block_shapes[0]


def _belonging(dataset: Any) -> set[str]:
    """Every file that a data set is read from. GDAL names the tiles of a VRT, but not those of a VRT among them."""
    found = set(dataset.files)
    unseen = {file for file in found - {dataset.name} if _is_mosaic(file)}
    while unseen:
        try:
            with open_dataset(unseen.pop()) as inner:
                new = set(inner.files) - found
        except RasterioError:  # whoever reads it will say so
            continue
        found |= new
        unseen |= {file for file in new if _is_mosaic(file)}
    return found


def _is_mosaic(file: str) -> bool:
    """Whether a file is a VRT: by its content, as GDAL tells it, or by the name of one that is not on this disk."""
    try:
        with open(file, "rb") as start:
            return start.read(64).lstrip().startswith(b"<VRTDataset")
    except OSError:
        return file.lower().endswith(".vrt")


def files_of(path: str) -> list[str]:
    """Every file that a raster is read from, the tiles of a VRT among them; of one that cannot be opened its name."""
    try:
        return [path, *RasterFile(path).info.others]
    except DataError:
        return [path]


def _crs_text(crs: CRS | None, path: str) -> str | None:
    """`EPSG:n` where that says all, else WKT 2."""
    if not crs:
        return None
    try:
        short = crs.to_string()
        # to_string also answers with a code that is merely close
        return short if CRS.from_string(short) == crs else crs.to_wkt(version="WKT2_2019")
    except RasterioError as error:
        raise DataError(f"{path}: its coordinate reference system cannot be understood ({error})") from error
