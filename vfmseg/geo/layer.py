"""What a map file says of its numbers: their type, nodata, names, scale and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vfmseg.errors import DataError

_TYPES = (
    # type, smallest and largest class id, nodata; colour tables exist for unsigned types only. The first that fits is
    # taken. There is no int8: it is new in GDAL (3.7), and older programs do not open it
    ("uint8", 0, 254, 255),
    ("uint16", 0, 65534, 65535),
    ("int16", -32767, 32767, -32768),
    ("int32", -(2**31) + 1, 2**31 - 1, -(2**31)),
)


@dataclass(frozen=True)
class Layer:
    """What the bands of a map file hold.

    A stored number times `scale` is the value; `nodata` is a stored number. names: what each band is called.
    colors {stored number: (red, green, blue)}: a colour table, only for one unsigned band.
    """

    dtype: str
    nodata: int
    names: tuple[str, ...] = ("",)
    scale: float = 1.0
    tags: Mapping[str, str] = field(default_factory=dict)
    colors: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)


def label_layer(
    ids: Sequence[int],
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    tags: Mapping[str, str] | None = None,
) -> Layer:
    """A map of class ids with class names (tags CLASS_<id>) and colours; nodata is no class id.

    ids, names and colors (0..255) belong together. Ids below 0 get a signed type, which has no colour table.
    """
    if not len(ids) == len(names) == len(colors):
        raise ValueError(f"{len(ids)} ids, {len(names)} names, {len(colors)} colors: expected as many of each")
    dtype, nodata = label_type(ids)
    return Layer(
        dtype,
        nodata,
        tags={**(tags or {}), **{f"CLASS_{i}": name for i, name in zip(ids, names, strict=True)}},
        colors=dict(zip(ids, colors, strict=True)) if dtype.startswith("uint") else {},
    )


def label_type(ids: Sequence[int]) -> tuple[str, int]:
    """The smallest integer type that holds these class ids, and its nodata value, which is none of them."""
    for dtype, smallest, largest, nodata in _TYPES:
        if min(ids) >= smallest and max(ids) <= largest:
            return dtype, nodata
    raise DataError(f"class ids {min(ids)} to {max(ids)} do not fit 32 bits; choose smaller ones")
