"""What somebody gives to be labelled: paths or arrays of one or several modalities, opened and held against a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vfmseg.data.image import Known
from vfmseg.data.inputs import Input, Inputs
from vfmseg.data.raster_scene import RasterScene
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.memory import ArrayRaster
from vfmseg.geo.notes import notes_of
from vfmseg.geo.reader import Raster
from vfmseg.geo.validity import Hidden
from vfmseg.terminal import say_once

# a path that GDAL can read, the files of one modality, or an array (C, H, W)
GivenImage = str | Path | Sequence[str] | np.ndarray
# one of them, or with several modalities {modality: one of them}
GivenScene = GivenImage | Mapping[str, GivenImage]


def open_scene(given: Mapping[str, GivenImage], bands: Mapping[str, Bands]) -> RasterScene:
    """The modalities of one place as a scene, in the order of `given`; DataError if they do not fit together."""
    rasters = {name: _raster(name, one, bands[name]) for name, one in given.items()}
    return RasterScene("the scene", rasters, compact=True)


def _raster(name: str, given: GivenImage, bands: Bands) -> Raster:
    if isinstance(given, np.ndarray):
        return ArrayRaster(given, bands, name)
    return Raster(str(given) if isinstance(given, str | Path) else [str(path) for path in given], bands)


def open_scenes(scene: GivenScene, inputs: Inputs, threads: int, rule: Known = "all") -> list[RasterScene]:
    """A scene for each reader thread (an array once, as it is shared), after looking whether it fits the model.

    `rule`: where the model has an answer; if that is where any modality is valid, some may be missing, and the first
    that is there is the grid of the labels. DataError for a modality that is missing otherwise, another number of
    bands, or something that is no scene.
    """
    given = scene if isinstance(scene, Mapping) else {inputs[0].name: scene}
    inputs = _inputs_given(given, inputs, rule)
    for one in inputs:
        _check_kind(one, given[one.name])
    arrays = [name for name, one in given.items() if isinstance(one, np.ndarray)]
    ordered, bands = {one.name: given[one.name] for one in inputs}, {one.name: one.bands for one in inputs}
    opened = [open_scene(ordered, bands) for _ in range(1 if arrays else threads)]
    first = opened[0]
    tell_types(first.dtypes(), inputs)
    if inputs[0].name not in arrays and not first.grid.georeferenced:
        points = first.rasters[inputs[0].name].control_points
        unused = (
            f" (its {points} ground control points are not used: bring it onto a grid by gdalwarp)" if points else ""
        )
        say_once(f"the scene carries no CRS: its labels will have none either{unused}")
    for one in inputs:
        raster = first.rasters[one.name]
        _check_count(one, raster, one.name in arrays)
        if one.name not in arrays:
            for text in notes_of(raster).values():
                say_once(f"{one.name}: {raster.paths[0]} {text}")
        elif one.bands.derive:
            for text in notes_of(raster).values():
                say_once(f"the array for '{one.name}' {text}")
    return opened


def _inputs_given(given: Mapping[str, GivenImage], inputs: Inputs, rule: Known) -> Inputs:
    """Those of the inputs that are given; DataError where the model can do nothing with them."""
    names = [one.name for one in inputs]
    missing = [name for name in names if name not in given]
    if set(given) <= set(names) and given and (rule == "any" or not missing):
        for one in inputs:
            if one.name in missing and not one.optional:
                say_once(
                    f"{one.name} is missing, and the segmenter was never trained without it: its labels may be much "
                    f"worse; train with data.modalities.{one.name}.optional or train.modality_dropout"
                )
        return tuple(one for one in inputs if one.name in given)
    if not set(given) <= set(names):
        remedy = "pass one path or array for each"
    elif rule == "any":
        remedy = "pass a path or array for one of them at least"
    else:
        remedy = "it answers only where all of them are valid, so none may be missing: pass one path or array for each"
    got = ", ".join(map(str, given)) or "none"
    raise DataError(f"the segmenter needs the modalities {', '.join(names)}, but got {got}; {remedy}")


def _check_kind(wanted: Input, given: GivenImage) -> None:
    """DataError for what is no path and no array, or an array that clearly means something else."""
    name, bands = wanted.name, wanted.bands
    if isinstance(given, np.ma.MaskedArray):
        raise DataError(f"'{name}' is a masked array; pass array.astype('float32').filled(numpy.nan) instead")
    if not isinstance(given, str | Path | np.ndarray | list | tuple):
        raise DataError(f"'{name}' is a {type(given).__name__}; expected a path or a numpy array (bands, H, W)")
    if not isinstance(given, np.ndarray):
        return
    bands_last = given.ndim == 3 and given.shape[2] == wanted.stored < given.shape[0]
    if bands_last and given.shape[0] > max(bands.indexes or (wanted.stored,)):
        raise DataError(
            f"the array for '{name}' has shape {given.shape}, which looks like (height, width, bands); expected "
            "(bands, height, width): pass array.transpose(2, 0, 1)"
        )
    varied = any(None in (band.scale, band.offset) for band in bands.like or ())
    if given.dtype.kind in "ui" and varied and bands.scale is None:
        raise DataError(
            f"the array for '{name}' holds whole numbers, but each of the training files says a scale of its own, "
            "so what they mean is not known; pass values (stored * scale + offset) as float32"
        )


def _check_count(wanted: Input, raster: Raster, is_array: bool) -> None:
    """DataError unless as many bands are read as the model was trained on."""
    name, expected = wanted.name, wanted.count
    if raster.count == expected:
        return
    if is_array:
        place, remedy = f"the array for '{name}'", "pass an array of those alone"
    else:
        some = ",".join(str(number) for number in range(1, expected + 1))
        place = " + ".join(raster.paths)
        remedy = f"name them, such as --bands {name}={some} (in Python bands={{'{name}': [{some}]}})"
        there = sum(info.count for info in raster.infos.values())
        if there < expected:
            remedy = f"it holds {there} in all: choose a scene that has them"
    names = [band.called for band in wanted.bands.like or () if band.called != "undefined"]
    called = f" ({', '.join(names)})" if len(names) == expected else ""
    raise DataError(
        f"{place}: {raster.count} bands are read, but the model was trained on {expected} bands{called} for "
        f"'{name}'; {remedy}"
    )


def hidden_by(scenes: Sequence[RasterScene]) -> dict[str, Hidden]:
    """{modality: what has hidden pixels}, from all the readers of one scene."""
    found: dict[str, Hidden] = {}
    for scene in scenes:
        for name, hidden in scene.hidden().items():
            found.setdefault(name, Hidden()).add(hidden)
    return found


def tell_types(found: Mapping[str, str], trained: Inputs) -> None:
    """Say once where stored types {modality: name} are others than in training: allowed, but seldom meant."""
    for one in trained:
        if found.get(one.name, one.dtype) != one.dtype:
            say_once(
                f"{one.name}: this scene holds {found[one.name]}, the training scenes {one.dtype}; its values are "
                "taken as they are, so they must be in the same units"
            )
