"""Scenes of image files, paired by their names, with label files or without."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vfmseg.data.pairing import find, pair, pair_images
from vfmseg.data.raster_scene import RasterScene
from vfmseg.data.scene import Scene
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.reader import Raster


def scenes_from_files(
    images: Mapping[str, str | Sequence[str]],
    labels: str | Sequence[str],
    bands: Mapping[str, Bands],
    label_map: LabelMap,
    base_place: str,
    optional: Collection[str] = (),
) -> list[Scene]:
    """Scenes of patterns, folders, files or lists of these, paired by name; sorted by name.

    `base_place` is the key of the split in the recipe (data.train), for messages; `optional`: modalities that a scene
    may lack.
    """
    found = {name: find(entries, f"{base_place}.{name}") for name, entries in images.items()}
    pairs = pair(found, find(labels, f"{base_place}.labels"), base_place, optional)
    return [
        RasterScene(
            p.name,
            {m: Raster(path, bands[m]) for m, path in p.images.items()},
            LabelRaster(p.labels, label_map),
            many=True,
        )
        for p in pairs
    ]


def unlabelled_from_files(
    images: Mapping[str, str | Sequence[str]],
    bands: Mapping[str, Bands],
    base_place: str,
    optional: Collection[str] = (),
) -> tuple[list[Scene], list[str]]:
    """Scenes without labels, sorted by name, and of each that cannot be opened why not.

    The arguments are those of `scenes_from_files`. DataError if there are no files, or no pairs of them.
    """
    found = {name: find(entries, f"{base_place}.{name}") for name, entries in images.items()}
    scenes: list[Scene] = []
    refused: list[str] = []
    for files in pair_images(found, base_place, optional):
        try:
            name = Path(next(iter(files.values()))).stem
            scenes.append(
                RasterScene(name, {m: Raster(path, bands[m]) for m, path in files.items()}, many=True, keep=True)
            )
        except DataError as error:
            refused.append(str(error))
    return scenes, refused
