"""What files say of their bands: names, colours, scale and offset; and whether a band marked as alpha is one.

Models read other scenes by it: band 4 called "red" is given to the model as the band that was red in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window as RasterioWindow

_SAMPLE = 64
"""Side in pixels of the nine places at which a band marked as alpha is looked at."""

_OPAQUE = (1, 255)
"""What stands for "shown" in alpha bands, beside the largest number of their type."""

_COLORS = {
    "red": "red",
    "green": "green",
    "blue": "blue",
    "nir": "nir",
    "near infrared": "nir",
    "near-infrared": "nir",
    "infrared": "nir",
    "swir": "swir",
    "red edge": "rededge",
    "rededge": "rededge",
    "coastal": "coastal",
    "yellow": "yellow",
    "pan": "pan",
}
"""Words for colours, in band names and in GDAL's colour interpretation."""

_COUNTING = re.compile(r"(?:(?:band|layer|channel|raster|gray|grey)[\s_#-]*)?\d*")
"""Names that programs make up; those of sensors, such as B04, are none."""


@dataclass(frozen=True)
class BandSaid:
    """What a file says of one band. value = stored * scale + offset; None: the training files differ in it.

    name: the band's description, "" if it has none. color: GDAL's colour interpretation, such as red, gray, undefined.
    """

    name: str = ""
    color: str = "undefined"
    scale: float | None = 1.0
    offset: float | None = 0.0

    @property
    def scaled(self) -> bool:
        """Whether values are others than the stored numbers."""
        return (self.scale, self.offset) != (1.0, 0.0)

    @property
    def own_name(self) -> str:
        """The name in small letters; "" if it only counts (Band 1), as programs name bands that have no name."""
        name = self.name.strip().lower()
        return "" if _COUNTING.fullmatch(name) else name

    @property
    def meaning(self) -> str:
        """The colour that the name or the interpretation tells; "" if neither does."""
        return _COLORS.get(self.name.strip().lower(), "") or _COLORS.get(self.color, "")

    @property
    def called(self) -> str:
        """What to call it in messages."""
        return self.name or self.meaning or self.color


def numbers_by_name(wanted: Sequence[BandSaid], there: Sequence[BandSaid]) -> tuple[int, ...] | None:
    """1-based numbers of the bands `there` that are the wanted ones, in their order; None if the file does not tell.

    By descriptions where all wanted bands have one, else by colours: both must be there, each exactly once.
    """
    for key in (lambda band: band.own_name, lambda band: band.meaning):
        names, found = [key(band) for band in wanted], [key(band) for band in there]
        if all(names) and len(set(names)) == len(names) and all(found.count(name) == 1 for name in names):
            return tuple(found.index(name) + 1 for name in names)
    return None


def said_of(dataset: Any) -> tuple[BandSaid, ...]:
    """What an open file says of each band."""
    described = zip(dataset.descriptions, dataset.colorinterp, dataset.scales, dataset.offsets, strict=True)
    return tuple(
        BandSaid(name or "", color.name.lower(), *((scale, offset) if _usable(scale, offset) else (1.0, 0.0)))
        for name, color, scale, offset in described
    )


def _usable(scale: float, offset: float) -> bool:
    """A scale of 0, or one that is no number, would erase the image; nobody means it."""
    return bool(np.isfinite(scale) and np.isfinite(offset) and scale != 0)


def split_alpha(dataset: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(bands that are alpha, bands that are only marked as such), both 1-based: ((4,), ()) or ((), (4,)) of four bands.

    Many writers mark the fourth band of an 8-bit file as alpha although it holds infrared. An alpha band holds 0 where
    the picture is hidden and the largest number nearly everywhere else; nine places are looked at. Where it holds one
    other number (a picture that shines through), or none, it is alpha if the picture is empty wherever it is 0.
    """
    marked = [band for band, color in enumerate(dataset.colorinterp, 1) if color == ColorInterp.alpha]
    alpha = tuple(band for band in marked if _is_alpha(dataset, band))
    return alpha, tuple(band for band in marked if band not in alpha)


def _is_alpha(dataset: Any, band: int) -> bool:
    try:
        numbers = _some_of(dataset, band)
        shown = numbers[numbers != 0]
        # "shown" in half of what is not hidden is enough: the rest may be smooth edges
        top = np.iinfo(numbers.dtype).max if numbers.dtype.kind in "iu" else 1.0
        opaque = max(np.count_nonzero(shown == value) for value in (*_OPAQUE, top))
        if opaque and 2 * opaque >= len(shown):
            return True
        below = _some_of(dataset, 1 if band > 1 else dataset.count)[numbers == 0]
    except RasterioError:  # damaged there: whoever reads it will say so
        return True
    return bool((shown == shown[:1]).all() and (below == below[:1]).all())


def _some_of(dataset: Any, band: int) -> np.ndarray:
    """The numbers (n) of a band at nine places spread over the file."""
    height, width = min(_SAMPLE, dataset.height), min(_SAMPLE, dataset.width)
    rows = sorted({(dataset.height - height) * i // 2 for i in range(3)})
    cols = sorted({(dataset.width - width) * i // 2 for i in range(3)})
    parts = [dataset.read(band, window=RasterioWindow(c, r, width, height)) for r in rows for c in cols]
    return np.concatenate([part.ravel() for part in parts])
