"""Scenes of the rows of a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Formatter

from vfmseg.data.raster_scene import RasterScene
from vfmseg.data.scene import Scene
from vfmseg.disk.paths import elsewhere, files_behind, made_absolute, require_file
from vfmseg.errors import DataError, nearest
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.reader import Raster


def scenes_from_table(
    table: str | Path,
    split: str,
    split_column: str,
    images: Mapping[str, str],
    labels: str,
    bands: Mapping[str, Bands],
    label_map: LabelMap,
    optional: Collection[str] = (),
) -> list[Scene]:
    """Scenes of the rows of a CSV file whose `split_column` is exactly `split`, in the table's order.

    `images` and `labels` name a column that holds paths, or are a template over columns such as
    "{split}/rgb/{name}.png"; paths are relative to the table's folder. A scene lacks a modality in `optional` where the
    cell (or one that its template uses) is empty.
    """
    columns, rows = _read_table(table)
    if split_column not in columns:
        raise DataError(f"{table}: there is no column {split_column!r}; {nearest(split_column, columns)}")
    chosen = [(line, row) for line, row in rows if row[split_column] == split]
    if not chosen:
        known = sorted({row[split_column] for _, row in rows})
        raise DataError(f"{table}: no row has {split_column} = {split!r}; {nearest(split, known)}")
    scenes: list[Scene] = []
    seen: dict[tuple[str, ...], int] = {}
    for line, row in chosen:
        place = f"{table} line {line}"
        there = [name for name, how in images.items() if not (name in optional and _is_empty(columns, row, how))]
        if not there:
            raise DataError(
                f"{place}: the cells of all modalities ({', '.join(images)}) are empty; expected an image of one of "
                "them: fill it in, or remove the row"
            )
        paths = {name: _table_path(Path(table), columns, row, images[name], place) for name in there}
        label = _table_path(Path(table), columns, row, labels, place)
        files = (*paths.values(), label)
        if files in seen:
            raise DataError(f"{place} names the same files as line {seen[files]}; expected each scene once")
        seen[files] = line
        rasters = {name: Raster(path, bands[name]) for name, path in paths.items()}
        scenes.append(
            RasterScene(Path(next(iter(paths.values()))).stem, rasters, LabelRaster(label, label_map), many=True)
        )
    return scenes


def _read_table(table: str | Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Columns, and (line number, cells) of each row; fields split by comma, semicolon or tab."""
    require_file(table)
    try:
        text = Path(table).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read as a table ({error}); expected a CSV file in UTF-8") from error
    header = text.partition("\n")[0]
    # strict: a quotation mark that is left open would quietly swallow the rows below it
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count), strict=True)
    rows = []
    try:
        columns = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = columns
        twice = [column for column in columns if column and columns.count(column) > 1]
        if twice:
            raise DataError(f"{table}: has two columns {twice[0]!r}; expected each name once")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{table} line {reader.line_num}: expected {len(columns)} cells, one for each column")
            rows.append((reader.line_num, {key: value.strip() for key, value in row.items()}))
    except csv.Error as error:
        raise DataError(
            f"{table} line {reader.line_num + 1}: is not a row of a table ({error}); check its quotation marks"
        ) from error
    return columns, rows


def _is_empty(columns: Sequence[str], row: Mapping[str, str], how: str) -> bool:
    """Whether a column, or any that a template uses, holds nothing in a row."""
    used = [how] if how in columns else [field for _, field, _, _ in Formatter().parse(how) if field in columns]
    return any(not row[column] for column in used if column is not None)


def _table_path(table: Path, columns: Sequence[str], row: Mapping[str, str], how: str, place: str) -> str:
    """The file that a column or template names in one row."""
    if how in columns:
        named = row[how]
    else:
        fields = [field for _, field, _, _ in Formatter().parse(how) if field is not None]
        unknown = [field for field in fields if field not in columns]
        if unknown or not fields:
            raise DataError(
                f"{table}: there is no column {(unknown or [how])[0]!r} (asked for by {how!r}); "
                f"{nearest((unknown or [how])[0], columns)}"
            )
        named = how.format_map(row)
    if not named:
        raise DataError(f"{place}: the cell for {how!r} is empty; expected a path: fill it in, or remove the row")
    path = table.parent / named
    if not os.path.exists(path) and (elsewhere(named) or files_behind(named, str(table.parent))):
        return made_absolute(named, str(table.parent))
    if not os.path.exists(path):
        raise DataError(f"{place}: {how!r} names {str(path)!r}, which does not exist; correct the table or the path")
    return str(path)
