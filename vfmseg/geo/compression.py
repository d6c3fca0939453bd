"""How map files are compressed, always without loss, and whether this machine's GDAL can do it."""

from __future__ import annotations

from functools import cache
from typing import Any

from rasterio.io import MemoryFile

from vfmseg.errors import MachineError, RecipeError, nearest
from vfmseg.geo.opening import GDAL_ERRORS, gdal
from vfmseg.geo.quiet import in_pixels

COMPRESSIONS = ("deflate", "zstd", "lzw")

_LEVELS = {"deflate": "zlevel", "zstd": "zstd_level"}  # LZW has none


def check_compression(name: str) -> None:
    """RecipeError: there is no such compression here. MachineError: this GDAL was built without it."""
    if name not in COMPRESSIONS:
        raise RecipeError(f"compress = {name!r}; {nearest(name, COMPRESSIONS)}")
    if not _works(name):
        raise MachineError(
            f"compress = {name}: the GDAL of this machine was built without it; choose deflate, which every one has"
        )


def geotiff_options(name: str, level: int) -> dict[str, Any]:
    """Creation options of GDAL's GeoTIFF. `level`: 1 (fast) to 9 (small)."""
    return {"compress": name, **({_LEVELS[name]: level} if name in _LEVELS else {})}


def cog_options(name: str, level: int) -> dict[str, Any]:
    """The same of its cloud-optimised GeoTIFF."""
    return {"compress": name.upper(), **({"level": level} if name in _LEVELS else {})}


@cache
def _works(name: str) -> bool:
    """Whether a map of one pixel comes back with this compression: GDAL may refuse it, or leave it out in silence."""
    try:
        with gdal(), in_pixels(), MemoryFile() as memory:
            with memory.open(driver="GTiff", width=1, height=1, count=1, dtype="uint8", compress=name):
                pass
            with memory.open() as stored:
                return bool(stored.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION") == name.upper())
    except GDAL_ERRORS:
        return False
