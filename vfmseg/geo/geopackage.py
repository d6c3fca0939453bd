"""What GDAL does not tell of rasters in a GeoPackage: how their tiles are compressed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import Any
from urllib.parse import quote


def lossy_tiles(dataset: Any) -> bool:
    """Whether tiles of an open table are JPEG or WebP, as they are where nobody asks for PNG; False for other files."""
    if dataset.driver != "GPKG" or not os.path.isfile(dataset.files[0]):
        return False
    with contextlib.closing(sqlite3.connect(f"file:{quote(dataset.files[0])}?mode=ro", uri=True)) as package:
        try:
            tables = [
                name for (name,) in package.execute("SELECT table_name FROM gpkg_contents WHERE data_type = 'tiles'")
            ]
            chosen = [name for name in tables if len(tables) == 1 or dataset.name.endswith(f":{name}")]
            return any(_has_lossy(package, name) for name in chosen)
        except sqlite3.Error:  # damaged: whoever reads it will say so
            return False


def _has_lossy(package: sqlite3.Connection, table: str) -> bool:
    quoted = '"' + table.replace('"', '""') + '"'
    first = f"SELECT 1 FROM {quoted} WHERE substr(tile_data, 1, 2) IN (x'FFD8', x'5249') LIMIT 1"  # "RI": WebP
    return package.execute(first).fetchone() is not None
