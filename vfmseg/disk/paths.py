"""What a name leads to on this disk: a file, a data set inside one, a file in an archive, what a pattern fits."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator

from vfmseg.errors import DataError

SIDECARS = (".aux.xml", ".ovr", ".msk")
"""What GIS programs keep beside a raster, under its name; of an overwritten map they would show the old pixels."""

# such as GPKG:a.gpkg:ortho, /vsizip/a.zip/b.tif, NETCDF:"a.nc":band, zip://a.zip!b.tif
_STARTS = re.compile(r"""/vsi\w+/|://|[:"'{=,|]""")  # behind each of these a path may begin
_ENDS = re.compile(r"""[:"'}?&!,|]""")  # before each of these a path may end


def elsewhere(name: str) -> bool:
    """Whether a name is GDAL's own or an address (`/vsizip/...`, `https://...`), and no plain path of this disk."""
    return "://" in name or name.startswith("/vsi")


def files_behind(name: str, folder: str = "") -> list[str]:
    """Files of this disk that a name leads into: `a.gpkg` for `GPKG:a.gpkg:ortho`, `a.zip` for `/vsizip/a.zip/b.tif`.

    Relative ones start from `folder`. Told by what is there and not by the many ways in which GDAL writes names: each
    part of the name that is a file counts, so the list may hold a file too many, but none too few.
    """
    return list(dict.fromkeys(path for path, _, _ in _found(name, folder)))


def made_absolute(name: str, folder: str) -> str:
    """The same name with the file in it, if it is one beside `folder`, written as an absolute path.

    `GPKG:s.gpkg:ortho` becomes `GPKG:/data/s.gpkg:ortho`. A name in which no file is found stays as it is.
    """
    for path, start, end in _found(name, folder):
        return name[:start] + os.path.abspath(path) + name[end:]
    return name


def readings(pattern: str) -> list[str]:
    """What a pattern may mean to `glob`, the likeliest first: a folder that is there by its letters is no pattern.

    `data[1]/*.tif` is about the folder data[1] where there is one; and what no file matches is tried once more with its
    brackets as letters.
    """
    parts = pattern.replace(os.sep, "/").split("/")
    known = 0
    while known < len(parts) - 1 and os.path.isdir("/".join(parts[: known + 1]) + "/"):
        known += 1
    start, rest = [glob.escape(part) for part in parts[:known]], parts[known:]
    letters = [part.replace("[", "[[]") for part in rest]
    return ["/".join([*start, *rest]), *(["/".join([*start, *letters])] if letters != rest else [])]


def _found(name: str, folder: str) -> Iterator[tuple[str, int, int]]:
    """(file, where it starts and ends in the name), for each part of a name that is a file.

    In `/vsizip/a.zip/b.tif` the part from 8 to 13 is one: of `a.zip/b.tif` the longest beginning that is on the disk.
    """
    if os.path.isfile(os.path.join(folder, name)):
        yield os.path.join(folder, name), 0, len(name)
        return
    if len(name) > 4096:  # XML instead of a name: the files in it are told by GDAL
        return
    for start in sorted({0, *(hit.end() for hit in _STARTS.finditer(name))}):
        for end in sorted({len(name), *(hit.start() for hit in _ENDS.finditer(name, start))}, reverse=True):
            part = name[start:end]
            while part.strip("/."):
                path = os.path.join(folder, part)
                if os.path.isfile(path):
                    yield path, start, start + len(part)
                    break
                part = os.path.dirname(part) if os.path.dirname(part) != part else ""


def require_file(path: str | os.PathLike[str]) -> None:
    """DataError for what is there but is neither file nor folder: opening a pipe may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens it says so
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise DataError(f"{os.fspath(path)}: is {kind}, no regular file; copy what it gives to a file")
