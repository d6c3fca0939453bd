"""What GDAL may open for us: plain formats on this machine, and no servers.

GDAL opens more than pictures: descriptions of services, virtual rasters that name other files, raw bands over any file.
Here are the formats and settings; `vetting` looks at what a file names. docs/security.md says what is promised.
VFMSEG_TRUST=1 in the environment turns both off, but for Python code in files. Nothing here imports rasterio: commands
call `close_services` before GDAL is loaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PLAIN = [
    "VRT", "GTiff", "LIBERTIFF", "SNAP_TIFF", "COG", "PNG", "JPEG", "JPEGXL", "JP2OpenJPEG", "JP2ECW", "JP2KAK",
    "JP2MrSID", "ECW", "MrSID", "WEBP", "AVIF", "HEIF", "GIF", "BIGGIF", "BMP", "PNM", "TGA", "HFA", "ENVI", "EHdr",
    "AIG", "AAIGrid", "GRASSASCIIGrid", "ISG", "GSAG", "GSBG", "GS7BG", "RST", "SAGA", "RMF", "GXF", "NWT_GRD",
    "NWT_GRC", "XYZ", "SRTMHGT", "DTED", "USGSDEM", "GTX", "NTv2", "NITF", "BSB", "GPKG", "MBTiles", "netCDF", "HDF4",
    "HDF4Image", "HDF5", "HDF5Image", "BAG", "KEA", "GRIB", "ESAT", "L1B", "MSGN", "CEOS", "SAR_CEOS", "JAXAPALSAR",
    "SAFE", "SENTINEL2", "DIMAP", "TIL", "RS2", "TSX", "COSAR",
]  # fmt: skip
"""GDAL's names of the formats that are opened: pixels lie in the file, or in rasters that it names."""

PLAIN_BUT_VRT = [name for name in PLAIN if name != "VRT"]
"""For what nobody has looked through for the names in it."""

_SERVICES = [
    "WMS", "WMTS", "WCS", "OGCAPI", "HTTP", "EEDA", "EEDAI", "DAAS", "PLMOSAIC", "PLSCENES", "STACIT", "STACTA", "NGW",
    "WFS", "OAPIF", "CSW", "Elasticsearch", "Carto", "AmigoCloud", "GPSBabel", "OGR_VRT", "GTI", "MRF",
    "KMLSUPEROVERLAY",
]  # fmt: skip
"""Drivers that ask servers, start programs, or go where a file says."""

_SERVER = re.compile(r"://|/vsi(?:curl|s3|gs|az|adls|oss|swift|hdfs|webhdfs)(?:_streaming)?/")
_LOCAL = re.compile(r"^(?:(?:vrt|file|zip|tar|gzip)://)+", re.IGNORECASE)

_NO_SERVERS = {
    "CPL_VSIL_CURL_ALLOWED_FILENAME": "none",
    "GDAL_HTTP_PROXY": "none://none",  # no such kind of proxy: libcurl gives up before it looks for the server
    "GDAL_HTTPS_PROXY": "none://none",
}

_COMMON = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x89PNG", b"\xff\xd8")  # TIFF, BigTIFF, PNG and JPEG begin so

START = 1024
"""Bytes that GDAL looks at to tell a format."""

REMEDY = "if you trust whoever made it, set VFMSEG_TRUST=1"
_asked_servers = False  # whether a scene behind a server was named in this process


def trusted() -> bool:
    """Whether the user answers for all files: VFMSEG_TRUST=1."""
    return os.environ.get("VFMSEG_TRUST", "").strip() == "1"


def local_name(path: str) -> str:
    """A name without the prefixes by which GDAL and rasterio mark local files: vrt://a.tif -> a.tif."""
    return _LOCAL.sub("", path)


def is_remote(path: str) -> bool:
    """Whether GDAL reads a path from a server."""
    return _SERVER.search(local_name(path)) is not None


def close_services() -> None:
    """For a command, before GDAL is there: drivers that ask servers are not loaded, whatever would name them."""
    if not trusted():
        before = os.environ.get("GDAL_SKIP", "")
        skipped = before.split("," if "," in before else None)  # GDAL takes spaces or commas, but not both
        os.environ["GDAL_SKIP"] = ",".join([*skipped, *_SERVICES])


def closed_network(path: str) -> dict[str, str]:
    """GDAL's settings for `path` that let it ask no server; none once a scene behind one has been asked for."""
    global _asked_servers
    _asked_servers = _asked_servers or is_remote(path)
    return {} if _asked_servers or trusted() else _NO_SERVERS


def drivers_for(path: str) -> list[str]:
    """The formats in which a local `path` may be opened; a VRT only where `vet` looks through it: in no archive."""
    looked_through = path.lstrip().startswith("<") or os.path.isfile(local_name(path).partition("?")[0])
    return PLAIN if looked_through else PLAIN_BUT_VRT


def or_trust_it(path: str) -> str:
    """What to do about a name that opens in no plain format, if it can be of another one; else nothing."""
    if is_remote(path):
        return ""
    if not os.path.isfile(path):
        return "; other formats, and virtual rasters in archives, are opened with VFMSEG_TRUST=1"
    other = not start_of(path).startswith(_COMMON)
    return "; other formats, and services such as WMS, are opened with VFMSEG_TRUST=1" if other else ""


def start_of(path: str | Path) -> bytes:
    """The first bytes of a file, by which formats are told; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(START)
    except OSError:  # whoever opens it says so
        return b""
