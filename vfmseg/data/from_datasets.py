"""Scenes from a Hugging Face `datasets` set: a folder, a parquet file or an id on the hub, one scene a row."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vfmseg.data.cells import Header, Rows, null_cells
from vfmseg.errors import DataError, nearest
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.said import BandSaid
from vfmseg.geo.validity import Chip, Hidden


class DatasetScene:
    """One row of a published set: images of some modalities and a label map of the same size, without a CRS."""

    def __init__(
        self,
        rows: Rows,
        row: int,
        identity: str,
        columns: Mapping[str, str],
        labels: str,
        bands: Mapping[str, Bands],
        label_map: LabelMap,
    ) -> None:
        self.name = f"{rows.place} row {row}"
        self.files = (identity,)
        self._rows, self._row = rows, row
        self._columns, self._labels = dict(columns), labels
        self._settings, self._label_map = {name: bands[name] for name in columns}, label_map
        self._hidden = {name: Hidden() for name in columns}

    @cached_property
    def _headers(self) -> dict[str, Header]:
        headers = {name: self._rows.header(self._row, column) for name, column in self._columns.items()}
        label = self._rows.header(self._row, self._labels)
        for name, header in headers.items():
            if (header.height, header.width) != (label.height, label.width):
                raise DataError(
                    f"{self.name}: {self._columns[name]!r} has {header.height} x {header.width} pixels and "
                    f"{self._labels!r} {label.height} x {label.width}; expected one size (arrays are "
                    "(height, width, bands), with the bands last)"
                )
        return headers

    @cached_property
    def grid(self) -> Grid:
        """Height and width; such sets carry no CRS."""
        first = next(iter(self._headers.values()))
        return Grid(None, IDENTITY, first.height, first.width)

    def bands(self) -> dict[str, int]:
        """{modality: number of bands that are read}."""
        return {
            name: len(s.derive or s.indexes or range(self._headers[name].bands)) for name, s in self._settings.items()
        }

    def dtypes(self) -> dict[str, str]:
        """{modality: type of the stored numbers}."""
        return {n: "float32" if self._settings[n].derive else header.dtype for n, header in self._headers.items()}

    def said(self) -> dict[str, tuple[BandSaid, ...]]:
        """Such sets say nothing of their bands; they are scaled as the recipe says."""
        return {
            name: (BandSaid(scale=1.0 if s.scale is None else s.scale, offset=s.offset or 0.0),)
            * (1 if s.derive else count)
            for name, count, s in ((name, count, self._settings[name]) for name, count in self.bands().items())
        }

    def follow(self, said: Mapping[str, Sequence[BandSaid]]) -> None:
        """Bands are taken by their places."""

    def notes(self) -> dict[tuple[str, str], str]:
        """Nothing is read otherwise than it is stored."""
        return {}

    def hidden(self) -> dict[str, Hidden]:
        """{modality: what has hidden how many of the pixels decoded so far}."""
        return self._hidden

    def traces(self) -> dict[str, tuple[str, str]]:
        """{modality, or "labels": its column and a cheap digest}; that of labels is made where they are read."""
        images = {name: (column, self._rows.trace(self._row, column)) for name, column in self._columns.items()}
        return {**images, "labels": (self._labels, "")}

    def read(self, window: Window) -> dict[str, Chip]:
        """Pixels and validity of each modality in a window; beyond the edge invalid."""
        kept = self._rows.kept(self._row)
        if "chips" not in kept:
            kept["chips"] = {name: self._decode(name, column) for name, column in self._columns.items()}
        return {
            name: Chip(_part(chip.pixels, window, 0.0), _part(chip.valid[None], window, False)[0])
            for name, chip in kept["chips"].items()
        }

    def _decode(self, name: str, column: str) -> Chip:
        settings, place = self._settings[name], self._rows.where(self._row, column)
        array, shown = self._rows.values(self._row, column, label=False)
        if max(settings.indexes or (1,)) > len(array):  # asked here, where the message can name the column
            raise DataError(
                f"{place} has {len(array)} bands, but data.modalities.{name}.bands asks for "
                f"{list(settings.indexes or ())}; bands are counted from 1"
            )
        if settings.derive and shown is not None:  # what is hidden must not reach its neighbours
            array = np.where(shown, array, np.nan)
        with ArrayRaster(array, settings, name) as raster:
            chip = raster.read(Window(0, 0, *array.shape[1:]))
        self._hidden[name].add(raster.hidden)
        if shown is None:
            return chip
        self._hidden[name].by("alpha", ~shown)
        return Chip(np.where(shown, chip.pixels, np.float32(0)), chip.valid & shown)

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w) in a window; beyond the edge IGNORE."""
        kept = self._rows.kept(self._row)
        if "labels" not in kept:
            place = self._rows.where(self._row, self._labels)
            array, shown = self._rows.values(self._row, self._labels, label=True)
            if len(array) != 1:
                raise DataError(f"{place} has {len(array)} bands; expected one, with the class id of each pixel")
            kept["labels"] = self._label_map.to_index(array[0], place, None if shown is None else ~shown)
        return _part(kept["labels"][None], window, IGNORE)[0]


def _part(array: np.ndarray, window: Window, beyond: float) -> np.ndarray:
    """The window (C, h, w) of an array (C, H, W), filled with `beyond` outside of it."""
    out = np.full((len(array), *window.shape), beyond, dtype=array.dtype)
    shared = window.shared(Window(0, 0, *array.shape[1:]))
    if shared is not None:
        here, there = shared
        out[(slice(None), *here)] = array[(slice(None), *there)]
    return out


def scenes_from_dataset(
    dataset: str,
    split: str,
    images: Mapping[str, str],
    labels: str,
    bands: Mapping[str, Bands],
    label_map: LabelMap,
    config: str | None = None,
    revision: str | None = None,
    optional: Collection[str] = (),
) -> list[Any]:
    """One scene for each row of `split` (which may be a part, such as "train[:80%]").

    dataset: a folder (written by save_to_disk, of images with a metadata file, or of parquet files), a parquet file,
    or an id on the hub. `images` {modality: column} and `labels` name columns of images or of arrays (H, W) or
    (H, W, C). A row lacks a modality in `optional` where the cell is null. Raises DataError if the set cannot be
    loaded, a column is missing or holds no maps.
    """
    parts, known = _load(dataset, config, revision)
    place = f"{dataset} ({split})"
    chosen = _choose(parts, split, place)
    scenes: list[DatasetScene] = []
    for part, data, first in chosen:
        rows = Rows(data, place, {**images, "labels": labels})
        nulls = {name: null_cells(data, column) for name, column in images.items() if name in optional}
        for row in range(len(rows)):
            there = {name: column for name, column in images.items() if not (name in nulls and nulls[name][row])}
            if not there:
                raise DataError(
                    f"{place} row {row}: the cells of all modalities ({', '.join(images)}) are null; expected an image "
                    "of one of them: leave the row out"
                )
            scenes.append(DatasetScene(rows, row, f"{known}#{part}#{first + row}", there, labels, bands, label_map))
    if not scenes:
        raise DataError(f"{place}: the split has no rows; expected at least one")
    return scenes


def _load(dataset: str, config: str | None, revision: str | None) -> tuple[dict[str, Any], str]:
    """{split: rows} of a set ("" where it has no named splits), and what identifies the set."""
    import datasets

    path = Path(dataset).expanduser()
    if not path.exists() and (path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1):
        raise DataError(f"dataset {dataset} does not exist; expected a folder, a parquet file or an id on the hub")
    if path.is_dir() and glob.has_magic(str(path)):
        raise DataError(
            f"dataset {dataset}: the library that reads it takes *, ? and [ in the name of a folder for a pattern; "
            "rename the folder, or name its parquet file"
        )
    known = os.path.realpath(path) if path.exists() else f"{dataset}@{config}@{revision}"
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=glob.escape(str(path)))["train"]
        else:
            name = str(path) if path.exists() else dataset
            loaded = datasets.load_dataset(name, name=config, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        remedy = (
            "expected a folder written by save_to_disk, of images with a metadata file, or of parquet files"
            if path.exists()
            else "it is no local folder or file, and the hub could not be asked; check the name and the connection, "
            "or download it and name the folder"
        )
        raise DataError(f"dataset {dataset} cannot be loaded ({_one_line(error)}); {remedy}") from error
    if isinstance(loaded, datasets.DatasetDict):
        return dict(loaded), known
    return {"": loaded}, known


def _choose(parts: dict[str, Any], split: str, place: str) -> list[tuple[str, Any, int]]:
    """(split, rows, number of the first row in that split) of what `split` asks for."""
    import datasets

    names = list(parts)
    if names == [""]:  # one unnamed table: whatever its split is called, it is this table
        base = split.partition("[")[0]
        parts = {base: parts[""]}
    try:
        wanted = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in parts.items()})
    except (ValueError, KeyError, AssertionError) as error:
        base = split.partition("[")[0]
        hint = nearest(base, parts) if base not in parts else _one_line(error)
        raise DataError(f"{place}: there is no split {split!r}; {hint}") from error
    chosen = []
    for instruction in wanted:
        rows = parts[instruction.splitname]
        first, end = instruction.from_ or 0, len(rows) if instruction.to is None else instruction.to
        name = "" if names == [""] else instruction.splitname
        asked = range(len(rows))[first:end]  # a slice may reach beyond the rows
        if asked:
            chosen.append((name, rows.select(asked), first))
    return chosen


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
