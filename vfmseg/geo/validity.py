"""Which stored numbers mean "nothing measured here", and how many pixels that hides.

    said by                                     hides a pixel where
    nodata of the file, 8-bit numbers           all bands that are read hold theirs: each of 256 may be measured
    nodata 0, of the file or the recipe         all bands that are read hold 0: one dark band is a measurement
    any other nodata                            any band that is read holds it: no sensor measures it
    NaN, infinity, numbers beyond +-1e37        any band that is read holds one

What mask and alpha bands hide is added in `reader`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

LIMIT = 1e37
"""Numbers beyond are no measurements, as infinity is none: what writers put where there is nothing (-3.4e38)."""

CLOSE = 1e-6
"""Share of a nodata value by which a stored number may differ from it: tags are text, and cut after some digits.

A tag says 0.1 where the pixels hold 0.10000000149, the float32 next to it.
"""


def as_stored(value: float, dtype: np.dtype) -> np.generic | None:
    """A nodata value as a number of this type, to compare pixels with; None if no pixel need be compared.

    No pixel of uint8 is -9999 or 0.5; NaN and -3.4e38 are found by `no_numbers`.
    """
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not np.isfinite(value) or value != int(value) or not limits.min <= value <= float(limits.max):
            return None
        return dtype.type(min(int(value), limits.max))  # GDAL tells nodata in float64, which rounds the largest int64
    return dtype.type(value) if abs(value) < LIMIT else None


def equals(stored: np.ndarray, mark: Any) -> np.ndarray:
    """Bool, of the array's shape: where stored numbers are this nodata value, to 1e-6 of it if they are floats."""
    if stored.dtype.kind != "f" or mark == 0:
        return np.asarray(stored == mark)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(stored - mark) <= CLOSE * abs(float(mark)))


def no_numbers(values: np.ndarray) -> np.ndarray:
    """Bool, of the array's shape: where values are NaN, infinite or beyond LIMIT."""
    return np.asarray(~(np.abs(values) < LIMIT))  # NaN is not below it either


def hides_alone(nodata: float, dtype: np.dtype, of_file: bool) -> bool:
    """Whether one band with this nodata value hides the pixel; else all bands must hold theirs (the table above)."""
    return nodata != 0 and not (of_file and dtype == np.uint8)


@dataclass
class Chip:
    """One window of imagery: pixels (C, h, w), float32 unless asked otherwise, 0 where invalid; valid bool (h, w)."""

    pixels: np.ndarray
    valid: np.ndarray


@dataclass
class Hidden:
    """How many pixels were read, and by what they were hidden; one that two causes hide counts for both."""

    pixels: int = 0
    causes: dict[str, int] = field(default_factory=dict)

    def by(self, cause: str, hit: np.ndarray) -> np.ndarray:
        """Count the True of `hit` for a cause; returns `hit`, so that it can be used on the way."""
        count = int(np.count_nonzero(hit))
        if count:
            self.causes[cause] = self.causes.get(cause, 0) + count
        return hit

    def add(self, other: Hidden) -> None:
        """Add what another reader has counted."""
        self.pixels += other.pixels
        for cause, count in other.causes.items():
            self.causes[cause] = self.causes.get(cause, 0) + count

    def since(self, before: Hidden) -> Hidden:
        """What was counted after `before`."""
        causes = {cause: count - before.causes.get(cause, 0) for cause, count in self.causes.items()}
        return Hidden(self.pixels - before.pixels, {cause: count for cause, count in causes.items() if count})

    def shares(self) -> dict[str, float]:
        """{cause: share of the pixels read}, largest first."""
        found = sorted(self.causes.items(), key=lambda item: -item[1])
        return {cause: count / self.pixels for cause, count in found}

    def text(self) -> str:
        """Such as `12.5 % nodata 255 in all bands, 1 % alpha`; empty if nothing is hidden."""
        return ", ".join(f"{share:.1%} by {cause}" for cause, share in self.shares().items())
