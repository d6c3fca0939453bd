"""Pieces of a map: read one, and show many as one (a VRT, GDAL's virtual raster)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from xml.etree import ElementTree as xml

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.opening import GDAL_ERRORS, gdal, open_dataset, rasterio_window

_TYPES = {"uint8": "Byte", "uint16": "UInt16", "int16": "Int16", "int32": "Int32"}


def read_map(path: str | os.PathLike[str], window: Window) -> np.ndarray:
    """Stored numbers (bands, h, w) of a window inside a map file; DataError if the file is damaged."""
    try:
        with gdal(), contextlib.closing(open_dataset(os.fspath(path))) as dataset:
            stored: np.ndarray = dataset.read(window=rasterio_window(window))
            return stored
    except GDAL_ERRORS as error:
        raise DataError(f"{path}: {window} cannot be read: the map is damaged ({error.__cause__ or error})") from error


def map_tags(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a map file says of itself; nothing if it is none."""
    try:
        with gdal(), contextlib.closing(open_dataset(os.fspath(path))) as dataset:
            return dict(dataset.tags())
    except GDAL_ERRORS:
        return {}


def mosaic(grid: Grid, layer: Layer, pieces: Sequence[tuple[str, Window]]) -> str:
    """The XML text of a VRT of `grid` that shows the pieces; nodata where there is none.

    pieces: (name of a map file beside the VRT, its window of the grid); the file is as large as the window.
    """
    root = xml.Element("VRTDataset", rasterXSize=str(grid.width), rasterYSize=str(grid.height))
    if grid.crs is not None:
        xml.SubElement(root, "SRS").text = grid.crs
    if grid.transform != IDENTITY:
        a, b, c, d, e, f = grid.transform
        # GDAL's order is another one than that of affine matrices; repr keeps every digit
        xml.SubElement(root, "GeoTransform").text = ", ".join(repr(v) for v in (c, a, b, f, d, e))
    metadata = xml.SubElement(root, "Metadata")
    for key, value in layer.tags.items():
        xml.SubElement(metadata, "MDI", key=key).text = value
    for number, title in enumerate(layer.names, 1):
        band = xml.SubElement(root, "VRTRasterBand", dataType=_TYPES[layer.dtype], band=str(number))
        if title:
            xml.SubElement(band, "Description").text = title
        if layer.scale != 1:
            xml.SubElement(band, "Scale").text = repr(layer.scale)
        xml.SubElement(band, "NoDataValue").text = str(layer.nodata)
        if layer.colors:
            xml.SubElement(band, "ColorInterp").text = "Palette"
            table = xml.SubElement(band, "ColorTable")
            for stored in range(max(layer.colors) + 1):  # a table has no gaps
                red, green, blue = layer.colors.get(stored, (0, 0, 0))
                xml.SubElement(table, "Entry", c1=str(red), c2=str(green), c3=str(blue), c4="255")
        for name, window in pieces:
            source = xml.SubElement(band, "SimpleSource")
            xml.SubElement(source, "SourceFilename", relativeToVRT="1").text = name
            xml.SubElement(source, "SourceBand").text = str(number)
            size = {"xSize": str(window.width), "ySize": str(window.height)}
            xml.SubElement(source, "SrcRect", {"xOff": "0", "yOff": "0", **size})
            xml.SubElement(source, "DstRect", {"xOff": str(window.col), "yOff": str(window.row), **size})
    return xml.tostring(root, encoding="unicode")
