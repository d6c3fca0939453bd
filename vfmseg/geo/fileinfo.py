"""What a raster file says of itself: size, place, bands, nodata, masks, and which other files belong to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError

from vfmseg.errors import DataError
from vfmseg.geo.geopackage import lossy_tiles
from vfmseg.geo.grid import Grid
from vfmseg.geo.opening import open_dataset
from vfmseg.geo.orientation import Turn, orientation_of
from vfmseg.geo.said import BandSaid, said_of, split_alpha

_NO_PIXELS = (".aux.xml", ".ovr")
"""Files that GIS programs put beside a raster when they show it."""

LARGEST_BLOCK = 2**28
"""Pixels of a block that no file has to justify."""

DENSEST = 10_000
"""Pixels for each byte of a file, beyond which larger blocks are not believed; deflate reaches 1030."""

_HIGHEST = 1024
"""Most rows that count as a block of a mosaic: whole blocks are read ahead, and one may be as high as a tile."""


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


def describe(dataset: Any, path: str) -> FileInfo:
    """What an open data set says of itself; `path`: the name that it was opened by."""
    flags = dataset.mask_flag_enums
    compression = dataset.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION") or "NONE"
    others = tuple(sorted(file for file in _belonging(dataset) - {path} if not file.endswith(_NO_PIXELS)))
    alpha, not_alpha = split_alpha(dataset)
    turn = Turn(orientation_of(dataset, path), dataset.height, dataset.width)
    block = _block(dataset, others)
    _require_plausible(block, dataset, path)
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
        lossy="JPEG" in (dataset.driver, compression.split()[-1]) or lossy_tiles(dataset),  # such as "YCbCr JPEG"
        control_points=len(dataset.gcps[0]),
        others=others,
        turn=turn,
    )


def _block(dataset: Any, others: Sequence[str]) -> tuple[int, int]:
    """Rows and columns that are decoded at a time; of a VRT those of its first tile.

    A VRT's own blocks (128 x 128) are those of no file: reading along them would decode the tiles' blocks many times.
    """
    first = next((file for file in others if not _is_mosaic(file)), None)
    if dataset.driver == "VRT" and first is not None:
        with contextlib.suppress(RasterioError), open_dataset(first) as tile:
            rows, cols = tile.block_shapes[0]
            return min(rows, _HIGHEST), cols
    return dataset.block_shapes[0]


def _require_plausible(block: tuple[int, int], dataset: Any, path: str) -> None:
    """DataError for a small file whose header claims blocks that would fill the memory as soon as one is read."""
    pixels = block[0] * block[1]
    if pixels > LARGEST_BLOCK and os.path.isfile(path) and pixels > DENSEST * os.path.getsize(path):
        raise DataError(
            f"{path}: its header claims blocks of {block[0]} x {block[1]} px in a file of {os.path.getsize(path)} "
            "bytes: it is damaged; if it is not, write it again in tiles (gdal_translate -co TILED=YES)"
        )


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
