"""Photographs that are stored turned or mirrored, and say so (the EXIF tag Orientation, also of TIFF).

Cameras store what the sensor gives, and note how they were held. An F is stored in one of eight ways,

    1  ###   2  ###   3  ..#   4  #..   5  ####   6  #...   7  ...#   8  ####
       #..      ..#      .##      ##.      #.#.      #.#.      .#.#      .#.#
       ##.      .##      ..#      #..      #...      ####      ####      ...#
       #..      ..#      ###      ###

and is shown as in 1. Windows, grids and arrays everywhere else are those of the picture as it is shown.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfmseg.geo.grid import Window

_TAG = 274  # Orientation in EXIF and TIFF

# orientation: whether the stored rows are shown as columns, and whether stored rows, and columns, run backwards
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


@dataclass(frozen=True)
class Turn:
    """How a stored picture of height x width pixels is shown. orientation: 1 (as stored) to 8, as EXIF numbers them."""

    orientation: int
    height: int
    width: int

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width of the picture as it is shown."""
        return (self.width, self.height) if _TURNS[self.orientation][0] else (self.height, self.width)

    def stored_window(self, window: Window) -> Window:
        """Where the pixels of a window of the shown picture are stored.

        For 6 the shown picture is the stored one turned clockwise: of a stored picture of 2 x 3 pixels (3 x 2 as it is
        shown) the first shown row is the first stored column, from the bottom up, and Window(0, 0, 1, 2) is
        stored at Window(0, 0, 2, 1).
        """
        swap, backwards_down, backwards_across = _TURNS[self.orientation]
        row, col, height, width = window.row, window.col, window.height, window.width
        if swap:
            row, col, height, width = col, row, width, height
        if backwards_down:
            row = self.height - row - height
        if backwards_across:
            col = self.width - col - width
        return Window(row, col, height, width)

    def shown(self, stored: np.ndarray) -> np.ndarray:
        """The pixels (..., h, w) of a stored window as they are shown."""
        swap, backwards_down, backwards_across = _TURNS[self.orientation]
        turned = stored[..., :: -1 if backwards_down else 1, :: -1 if backwards_across else 1]
        return turned.swapaxes(-1, -2) if swap else turned


def orientation_of(dataset: Any, path: str) -> int:
    """1 to 8: how a picture is to be shown. A file with a place on Earth is taken as stored, as GIS programs do.

    GDAL tells the tag of JPEG alone; of other formats it is read where the file is on this disk.
    """
    if dataset.crs is not None or not dataset.transform.is_identity or dataset.gcps[0]:
        return 1
    found: Any = None
    if dataset.driver in ("JPEG", "VRT"):
        found = dataset.tags().get("EXIF_Orientation")
    elif dataset.driver in ("PNG", "WEBP", "GTiff") and os.path.isfile(path):
        found = _tag_of(path, dataset.driver)
    with contextlib.suppress(TypeError, ValueError):
        return int(found) if int(found) in _TURNS else 1
    return 1


def _tag_of(path: str, driver: str) -> Any:
    """The tag in a file, None if it has none. The format's own class: `Image.open` refuses large pictures."""
    from PIL import PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    kinds: dict[str, Any] = {
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "GTiff": TiffImagePlugin.TiffImageFile,
    }
    try:
        with open(path, "rb") as file:
            return kinds[driver](file).getexif().get(_TAG)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):  # what PIL raises for what it cannot read
        return None
