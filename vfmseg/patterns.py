"""Patterns of file names: what `data[1]/*.tif` may mean."""

from __future__ import annotations

import glob
import os


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
