"""Where a recipe of `vfmseg pretrain` meets its labelled sets: opened, checked, and cut into cells."""

from __future__ import annotations

from collections.abc import Sequence

from vfmseg.build.data import bands_from, opened
from vfmseg.build.remarks import tell_notes, tell_shared_ground
from vfmseg.data.checks import disjoint
from vfmseg.data.dataset import CoverWindows
from vfmseg.data.inputs import Inputs, bands_in
from vfmseg.data.labelled_cells import Cells, cells_of
from vfmseg.data.scene import Scene
from vfmseg.data.traces import Traces
from vfmseg.errors import DataError
from vfmseg.geo.classes import LabelMap
from vfmseg.model import Encoder
from vfmseg.recipe import PretrainRecipe
from vfmseg.recipe.probe import ProbeSet
from vfmseg.terminal import say_once
from vfmseg.training.probe import LabelledSet, Probe

MOST = 20_000
"""Cells of a split, at most: the classifier takes seconds, and more change no digit that a probe can tell."""


def probe_of(
    recipe: PretrainRecipe, model: Encoder, inputs: Inputs, scenes: Sequence[Scene], traces: Traces
) -> Probe | None:
    """What scores the encoder while it learns from `scenes`; None if the recipe has no probe.

    All labels and images of the sets are read once. DataError for a set that could not tell anything. `traces` is told
    of its scenes.
    """
    section = recipe.probe
    if section is None:
        return None
    sets = {name: _labelled_set(recipe, name, one, model, inputs, scenes, traces) for name, one in section.sets.items()}
    return Probe(model, sets, section.every, recipe.train.epochs, section.neighbours, recipe.train.batch_size)


def _labelled_set(
    recipe: PretrainRecipe,
    name: str,
    section: ProbeSet,
    model: Encoder,
    inputs: Inputs,
    pretrained: Sequence[Scene],
    traces: Traces,
) -> LabelledSet:
    place = f"probe.sets.{name}"
    mine = tuple(one for one in inputs if one.name in section.modalities())
    splits = {split: _scenes(recipe, section, split, f"{place}.{split}", mine) for split in ("train", "val")}
    disjoint(splits, f"{place}.")
    tell_shared_ground(splits, f"{place}.")
    _tell_pretrained(pretrained, splits["val"], f"{place}.val")
    ids = sorted(section.classes)
    names = [section.classes[i].name for i in ids]
    outside = [spec.name for spec in section.classes.values() if not spec.in_mean]
    cells: dict[str, Cells] = {}
    for split, found in splits.items():
        _require_tiles(found, recipe.data.tile, f"{place}.{split}")
        windows = CoverWindows(found, recipe.data.tile, bands_in(mine))
        cells[split] = cells_of(windows, model.reference.cells, model.strides[-1], MOST, traces)
        traces.split(f"{name}.{split}", found, "probe.sets.")
    _require_classes(cells, names, outside, place)
    counts = {split: len(one.labels) for split, one in cells.items()}
    say_once(f"{place}: {counts['train']} labelled cells to fit on, {counts['val']} to score on")
    return LabelledSet(cells["train"], cells["val"], names, outside)


def _scenes(recipe: PretrainRecipe, section: ProbeSet, split: str, place: str, inputs: Inputs) -> list[Scene]:
    """The scenes of a split, read as the scenes to pretrain on are."""
    names = [one.name for one in inputs]
    bands = bands_from({name: recipe.data.modalities[name] for name in names})
    labels = LabelMap(ids=tuple(sorted(section.classes)), ignore_index=section.ignore_index)
    scenes = [
        scene
        for key, source in section.sources(split).items()
        for scene in opened(source.in_order(names), place + key.removeprefix(split), bands, labels)
    ]
    for scene in scenes:
        scene.follow({one.name: one.said for one in inputs})
        for one in inputs:
            found = scene.bands()[one.name], scene.dtypes()[one.name]
            if found != (one.count, one.dtype):
                raise DataError(
                    f"{place}: {scene.name} has {found[0]} bands of {one.name} ({found[1]}), but the scenes to "
                    f"pretrain on have {one.count} ({one.dtype}); choose the same bands with "
                    f"data.modalities.{one.name}.bands, or convert the files to one type"
                )
    tell_notes(scenes)
    return scenes


def _require_tiles(scenes: Sequence[Scene], tile: int, place: str) -> None:
    """DataError for tiles that no scene fills."""
    height, width = max(((scene.grid.height, scene.grid.width) for scene in scenes), key=max)
    if tile > max(height, width):
        raise DataError(
            f"{place}: its largest scene has {height} x {width} px, but its tiles are of data.tile = {tile} px and "
            f"would be partly empty everywhere; expected a scene of {tile} px a side or more: give larger ones, or a "
            "smaller data.tile"
        )


def _require_classes(cells: dict[str, Cells], names: Sequence[str], outside: Sequence[str], place: str) -> None:
    """DataError where nothing can be told apart; classes that are nowhere are told."""
    for split, found in cells.items():
        counts = dict(zip(names, found.counts(len(names)), strict=True))
        there = [name for name in names if counts[name]]
        scored = [name for name in there if name not in outside]
        absent = ", ".join(name for name in names if not counts[name])
        remedy = "check classes and ignore_index of this set against the label files, and data.modalities.NAME.nodata"
        if not there:
            raise DataError(
                f"{place}.{split}: no cell of its scenes has a label where its images are valid; expected some of "
                f"{', '.join(names)}: {remedy}"
            )
        if len(there) == 1 or (split == "val" and len(scored) < min(2, len(names) - len(outside))):
            raise DataError(
                f"{place}.{split}: all its labelled cells are of {', '.join(scored or there)}, none of {absent}, so no "
                f"score could tell anything; expected two classes at least: {remedy}"
            )
        if absent:
            say_once(f"{place}.{split}: no cell is of class {absent}; {remedy}")


def _tell_pretrained(pretrained: Sequence[Scene], val: Sequence[Scene], place: str) -> None:
    """Say where cells that are scored were pretrained on, which flatters."""
    tell_shared_ground({"data.scenes": pretrained, place: val}, "")
    files = {file for scene in pretrained for file in scene.files}
    same = [scene.name for scene in val if files & set(scene.files) and not scene.grid.georeferenced]
    if same:
        say_once(
            f"{place}: {len(same)} of {len(val)} scenes are files of data.scenes (such as {same[0]}); scores there do "
            "not tell how well other places are known"
        )
