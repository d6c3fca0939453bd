"""Cells of a Hugging Face `datasets` table as arrays: encoded images and nested lists, with their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from vfmseg.data.traces import array_trace, bytes_trace
from vfmseg.disk.paths import require_file
from vfmseg.errors import DataError, nearest

# PIL's name of a pixel layout -> (bands without alpha, stored type); every other layout is read as RGB
_MODES = {
    "1": (1, "uint8"),
    "L": (1, "uint8"),
    "LA": (1, "uint8"),
    "I;16": (1, "uint16"),
    "I;16B": (1, "uint16"),
    "I": (1, "int32"),
    "F": (1, "float32"),
    "RGB": (3, "uint8"),
    "RGBA": (3, "uint8"),
}
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap height and width


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are decoded."""

    height: int
    width: int
    bands: int
    dtype: str


class Rows:
    """The rows of a split and how their cells become arrays; shared by the scenes, which each stand for one row."""

    def __init__(self, data: Any, place: str, columns: Mapping[str, str]) -> None:
        import datasets

        self.place = place
        self._kinds: dict[str, str | None] = {}  # column -> type of its numbers, None for encoded images
        for role, column in columns.items():
            if column not in data.column_names:
                raise DataError(f"{place}: {role}: no column {column!r}; {nearest(column, data.column_names)}")
            feature = data.features[column]
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(mode=feature.mode, decode=False))
                self._kinds[column] = None
            else:
                self._kinds[column] = _array_type(feature, f"{place}: {role}: column {column!r}")
        encoded = [column for column, kind in self._kinds.items() if kind is None]
        arrays = [column for column, kind in self._kinds.items() if kind is not None]
        self._encoded = data.select_columns(encoded) if encoded else None
        self._arrays = data.select_columns(arrays).with_format("numpy") if arrays else None
        self._length = len(data)
        self._last: tuple[int, dict[str, Any]] = (-1, {})

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": (-1, {})}

    def kept(self, row: int) -> dict[str, Any]:
        """A place to keep what was decoded of the row that was read last."""
        if self._last[0] != row:
            self._last = (row, {})
        return self._last[1]

    def header(self, row: int, column: str) -> Header:
        """Size, bands and type of a cell; of an encoded image without decoding its pixels."""
        kind = self._kinds[column]
        if kind is not None:
            bands, height, width = self.values(row, column, label=False)[0].shape
            return Header(height, width, bands, kind)
        with self._damage(row, column):
            image = self._open(row, column)
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
        return Header(height, width, *_MODES.get(image.mode, (3, "uint8")))

    def values(self, row: int, column: str, label: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Stored numbers (C, H, W), and where an alpha channel shows the image (H, W) if it has one."""
        kind = self._kinds[column]
        if kind is not None and self._arrays is not None:
            array = np.asarray(self._arrays[row][column])
            if array.ndim not in (2, 3) or array.dtype == object:
                raise DataError(
                    f"{self.where(row, column)}: array of shape {array.shape}; expected (height, width) or "
                    "(height, width, bands)"
                )
            if array.dtype.kind != "f":  # whole numbers with gaps come as float with NaN, which no integer can hold
                array = array.astype(kind, copy=False)
            return (array[None] if array.ndim == 2 else array.transpose(2, 0, 1)), None
        return self._pixels(row, column, label)

    def trace(self, row: int, column: str) -> str:
        """A cheap digest of a cell; of an encoded image without decoding it."""
        if self._kinds[column] is not None:
            return array_trace(self.values(row, column, label=False)[0])
        cell = None if self._encoded is None else self._encoded[row][column]
        if cell is None:
            raise DataError(f"{self.where(row, column)}: the cell is empty; expected an image")
        if cell["bytes"] is not None:
            return bytes_trace(BytesIO(cell["bytes"]))
        with open(cell["path"], "rb") as file:
            return bytes_trace(file)

    def _pixels(self, row: int, column: str, label: bool) -> tuple[np.ndarray, np.ndarray | None]:
        from PIL import ImageOps

        with self._damage(row, column):
            image = self._open(row, column)
            if label and image.format == "JPEG":
                raise DataError(
                    f"{self.where(row, column)}: is compressed as JPEG, which changes class ids; expected labels "
                    "without loss, such as PNG"
                )
            if image.mode not in _MODES and not (label and image.mode == "P"):  # palette indexes of labels are classes
                image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
            array = np.asarray(ImageOps.exif_transpose(image))
        if array.dtype == bool:
            array = array.astype(np.uint8)
        if array.ndim == 2:
            return array[None], None
        if array.shape[2] in (2, 4):
            return array[..., :-1].transpose(2, 0, 1), array[..., -1] > 0
        return array.transpose(2, 0, 1), None

    def _open(self, row: int, column: str) -> Any:
        """The cell as a PIL image whose pixels are not decoded yet."""
        from PIL import Image, UnidentifiedImageError

        cell = None if self._encoded is None else self._encoded[row][column]
        if cell is None:
            raise DataError(f"{self.where(row, column)}: the cell is empty; expected an image")
        if cell["bytes"] is None:
            require_file(cell["path"] or "")
        try:
            image = Image.open(BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where(row, column)}: cannot be read as an image ({error})") from error
        if image.format == "EPS":
            raise DataError(f"{self.where(row, column)}: is EPS, which another program has to draw; save it as PNG")
        if image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(part) for part in image.tile):
            raise DataError(  # PIL keeps 16 bits of single bands only, and cuts the others to 8 without a word
                f"{self.where(row, column)}: holds 16 bits a band in {len(image.getbands())} bands; expected 8, or one "
                "band: store it as an array (height, width, bands), or name the files in the recipe"
            )
        return image

    @contextmanager
    def _damage(self, row: int, column: str) -> Iterator[None]:
        """What goes wrong while PIL decodes, as an error that names the cell."""
        try:
            yield
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{self.where(row, column)}: the image is damaged ({error}); replace it") from error

    def where(self, row: int, column: str) -> str:
        """A cell, for messages."""
        return f"{self.place} row {row}, column {column!r}"


def null_cells(data: Any, column: str) -> list[bool]:
    """For each row of a table whether a cell of the column holds nothing; nothing is decoded."""
    cells = data.select_columns([column]).with_format("arrow")
    return [
        null
        for first in range(0, len(data), 1000)
        for null in cells[first : first + 1000][column].is_null().to_pylist()
    ]


def _array_type(feature: Any, place: str) -> str:
    """The type of the numbers in a column of arrays."""
    import datasets

    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return str(feature.dtype)
    depth, inner = 0, feature
    while isinstance(inner, (datasets.List, list)):
        depth, inner = depth + 1, inner[0] if isinstance(inner, list) else inner.feature
    numbers = ("int", "uint", "float", "bool")
    if depth not in (2, 3) or not isinstance(inner, datasets.Value) or not inner.dtype.startswith(numbers):
        raise DataError(
            f"{place} holds {feature}; expected an image, or an array (height, width) or (height, width, bands), in "
            "every row: labels are maps of class ids, one for each pixel"
        )
    return str(np.dtype(inner.dtype))
