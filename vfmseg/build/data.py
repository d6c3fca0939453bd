"""Where a recipe meets the data: opens its sources as labelled scenes and collects what the model must know of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace

from vfmseg.build.model import normalization, published_in_image_units, rule_of
from vfmseg.build.remarks import (
    tell_absent,
    tell_implausible,
    tell_missing,
    tell_notes,
    tell_shared_ground,
    tell_survey,
)
from vfmseg.data.checks import disjoint, require_labels
from vfmseg.data.fraction import some_of
from vfmseg.data.from_datasets import scenes_from_dataset
from vfmseg.data.from_files import scenes_from_files
from vfmseg.data.from_table import scenes_from_table
from vfmseg.data.inputs import Input, Inputs
from vfmseg.data.scene import Scene, Scenes, speakers
from vfmseg.data.statistics import BandStatistics, stream_statistics
from vfmseg.data.survey import survey
from vfmseg.data.traces import Traces
from vfmseg.errors import DataError, RecipeError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.derived import LOCAL_RADIUS
from vfmseg.geo.ground import Ground
from vfmseg.geo.said import BandSaid, numbers_by_name
from vfmseg.recipe import Recipe
from vfmseg.recipe.data import ModalitySection
from vfmseg.recipe.splits import AnySource, FileSource, TableSource
from vfmseg.terminal import say_once


def bands_of(recipe: Recipe, trained: Recipe | None = None) -> dict[str, Bands]:
    """How each modality's stored numbers are read.

    `trained`: the recipe of the segmenter that reads them; bands that are other ones than there are meant for these
    very files, whatever those call them.
    """
    modalities = recipe.data.modalities
    if trained is None:
        return bands_from(modalities)
    known = trained.data.modalities
    return bands_from(
        modalities, [name for name in modalities if modalities[name].bands not in (None, known[name].bands)]
    )


def bands_from(modalities: Mapping[str, ModalitySection], chosen: Collection[str] = ()) -> dict[str, Bands]:
    """How each modality's stored numbers are read; `chosen`: those whose bands are meant for these very files."""
    return {
        name: Bands(
            indexes=m.bands, scale=m.scale, offset=m.offset, nodata=m.nodata, chosen=name in chosen,
            derive=m.derive, local_radius=LOCAL_RADIUS if m.local_radius is None else m.local_radius,
            pixel_size=m.pixel_size,
        )
        for name, m in modalities.items()
    }  # fmt: skip


def label_map_of(recipe: Recipe) -> LabelMap:
    """Class ids in files to indexes 0..K-1, in the order of the ids."""
    return LabelMap(ids=tuple(sorted(recipe.data.classes)), ignore_index=recipe.data.ignore_index)


def open_split(
    recipe: Recipe,
    split: str,
    like: Mapping[str, Sequence[BandSaid]] | None = None,
    trained: Recipe | None = None,
) -> Scenes:
    """Open the scenes of `train`, `val` or `test`, source by source; nothing of their pixels is read yet.

    Of `train` the tiles that `data.fraction` draws.

    `like` {modality: what the training files say of their bands}: bands are found by it; left out, by what these say.
    `trained`: as in `bands_of`.
    """
    sources = recipe.data.sources(split)
    if not sources:
        raise RecipeError(f"{recipe.name}: data.{split} is not in the recipe; add it, or choose another split")
    bands, labels = bands_of(recipe, trained), label_map_of(recipe)
    optional = [name for name, modality in recipe.data.modalities.items() if modality.optional]
    scenes = Scenes([opened(source, f"data.{place}", bands, labels, optional) for place, source in sources.items()])
    said = said_by(scenes) if like is None else like
    for scene in scenes:
        scene.follow(said)
    require_alike(scenes, f"data.{split}")
    tell_notes(scenes)
    if split == "train" and recipe.data.fraction < 1:
        scenes, drawn, tiles = some_of(scenes, recipe.data.fraction, recipe.data.tile, recipe.seed)
        say_once(f"data.fraction: {drawn} of {tiles} tiles of data.train, drawn by the seed {recipe.seed}")
    if not any(scene.grid.georeferenced for scene in scenes):
        say_once("the scenes carry no CRS: labels will have none either, pixels are matched by position")
    return scenes


def opened(
    source: AnySource, place: str, bands: Mapping[str, Bands], labels: LabelMap, optional: Collection[str] = ()
) -> list[Scene]:
    """The scenes of one labelled source; `place`: its key in the recipe. `optional`: what a scene may lack."""
    if isinstance(source, FileSource):
        return scenes_from_files(source.images, source.labels, bands, labels, place, optional)
    if isinstance(source, TableSource):
        return scenes_from_table(
            source.table, source.split, source.split_column, source.images, source.labels, bands, labels, optional
        )
    return scenes_from_dataset(
        source.dataset,
        source.split,
        source.images,
        source.labels,
        bands,
        labels,
        config=source.config,
        revision=source.revision,
        optional=optional,
    )


def open_training(recipe: Recipe, traces: Traces | None = None) -> dict[str, Scenes]:
    """The scenes of `train` and, if the recipe has it, `val`; `test` is opened only to see that it shares no file.

    `traces` is told of all of them.
    """
    splits = {"train": open_split(recipe, "train")}
    _require_each(recipe, splits["train"])
    like = said_by(splits["train"])
    splits |= {name: open_split(recipe, name, like) for name in ("val", "test") if recipe.data.sources(name)}
    disjoint(splits)
    tell_shared_ground(splits)
    for name, scenes in splits.items():
        tell_missing(recipe, name, scenes)
        if name != "train":
            require_alike([*splits["train"], *scenes], f"data.{name}")
    training: dict[str, Scenes] = {name: splits[name] for name in ("train", "val") if name in splits}
    ids = sorted(recipe.data.classes)
    for name, scenes in training.items():
        counts = require_labels(scenes, name, len(ids), rule_of(recipe), traces)
        if traces is not None:
            traces.split(name, scenes)
        pixels = sum(scene.grid.height * scene.grid.width for scene in scenes)
        tell_absent(recipe, name, dict(zip(ids, counts, strict=True)), pixels)
        tell_survey(name, survey(scenes, len(ids), rule_of(recipe)), [recipe.data.classes[i].name for i in ids])
    return training


def metres_of(train: Sequence[Scene]) -> float | None:
    """Metres on the ground of a pixel of the first scene that has a CRS: the mean of both axes; None if none has."""
    for scene in train:
        if scene.grid.crs is not None:
            return sum(Ground(scene.grid).pixel) / 2
    return None


def inputs_of(recipe: Recipe, train: Sequence[Scene]) -> Inputs:
    """What the model will take, as the training scenes are: bands, stored types, and mean and std of each modality."""
    modalities = recipe.data.modalities
    met_without = recipe.train.dropout_of(modalities)
    optional = [name for name, section in modalities.items() if section.optional or name in met_without]

    def published(name: str) -> BandStatistics:
        return published_in_image_units(recipe, name)

    return inputs_from(modalities, train, published, optional, "the training split's")


def inputs_from(
    modalities: Mapping[str, ModalitySection],
    scenes: Sequence[Scene],
    published: Callable[[str], BandStatistics],
    optional: Collection[str],
    whose: str,
    most: int | None = None,
) -> Inputs:
    """One `Input` for each modality, as the scenes are.

    `published`: mean and std of red, green and blue in image units that the encoder of a modality was published with.
    `optional`: the modalities that the model will meet samples without. `whose`: the scenes' mean and std are, in
    words. `most`: about how many pixels are read for these, at most; left out: all.
    """
    first, said, bands = speakers(scenes), said_by(scenes), bands_from(modalities)
    counts = {name: first[name].bands()[name] for name in modalities}
    dtypes = {name: first[name].dtypes()[name] for name in modalities}
    chosen = {
        name: normalization(
            section.normalize, name, counts[name], dtypes[name], not any(band.scaled for band in said[name])
        )
        for name, section in modalities.items()
    }
    by_dataset = [name for name in modalities if chosen[name] == "dataset"]
    statistics = stream_statistics(scenes, most=most) if by_dataset else {}
    tell_implausible({name: statistics[name] for name in by_dataset})
    for name, count in counts.items():
        source = "the encoder's own" if chosen[name] == "encoder" else whose
        derived = "".join(f", {band}" for band in modalities[name].derive)
        say_once(f"{name}: {count} bands ({dtypes[name]}{derived}), normalised by {source} mean and std")
    return tuple(
        Input(
            name,
            replace(bands[name], like=said[name]),
            counts[name],
            dtypes[name],
            chosen[name],
            *(statistics[name] if chosen[name] == "dataset" else published(name)),
            optional=name in optional,
        )
        for name in modalities
    )


def _require_each(recipe: Recipe, train: Sequence[Scene]) -> None:
    """DataError if no training scene has some modality."""
    there = speakers(train)
    for name in recipe.data.modalities:
        if name not in there:
            raise DataError(
                f"data.modalities.{name}: no scene of data.train has it; expected some, or nothing can be learned "
                "of it: name its images in data.train, or drop the modality"
            )


def _first_said(scenes: Sequence[Scene]) -> dict[str, tuple[BandSaid, ...]]:
    """{modality: what the first scene that names its bands says of them, else the first one that has it}."""
    told: dict[str, list[tuple[BandSaid, ...]]] = {}
    for scene in scenes:
        for name, bands in scene.said().items():
            told.setdefault(name, []).append(bands)
    return {
        name: next((said for said in found if numbers_by_name(said, said) is not None), found[0])
        for name, found in told.items()
    }


def said_by(scenes: Sequence[Scene]) -> dict[str, tuple[BandSaid, ...]]:
    """{modality: what the files of scenes say of the bands}: names of the first that has some; None: scales differ."""
    merged = _first_said(scenes)
    for said in (scene.said() for scene in scenes):
        for name, bands in said.items():
            both = tuple(
                one if (one.scale, one.offset) == (two.scale, two.offset) else replace(one, scale=None, offset=None)
                for one, two in zip(merged[name], bands, strict=False)
            )
            # a file of fewer bands takes none away from the others: they would be read without them
            merged[name] = both + merged[name][len(both) :]
    return merged


def require_same_task(recipe: Recipe, trained: Recipe) -> None:
    """RecipeError if a segmenter of the recipe `trained` cannot be scored on another; how that reads bands is told."""
    classes, known = ({i: of.data.classes[i].name for i in sorted(of.data.classes)} for of in (recipe, trained))
    if classes != known:
        raise RecipeError(
            f"{recipe.name}: data.classes are {classes}, but the segmenter knows {known}; evaluate on a recipe with "
            "the same classes"
        )
    bands, before = bands_of(recipe), bands_of(trained)
    if set(bands) != set(before):
        raise RecipeError(
            f"{recipe.name}: data.modalities are {', '.join(bands)}, but the segmenter needs {', '.join(before)}"
        )
    for name in before:
        if bands[name].derive != before[name].derive:
            raise RecipeError(
                f"{recipe.name}: data.modalities.{name}.derive is {list(bands[name].derive)}, but the segmenter was "
                f"trained on {list(before[name].derive)}; evaluate on a recipe with the same"
            )
        changed = [
            f"{'bands' if key == 'indexes' else key} = {value} instead of {_shown(was)}"
            for (key, value), was in zip(asdict(bands[name]).items(), asdict(before[name]).values(), strict=True)
            if value != was and (key, value, was) not in (("scale", None, 1.0), ("offset", None, 0.0))
        ]
        if changed:
            say_once(
                f"data.modalities.{name}: read with {', '.join(changed)} as in training; scores mean "
                "something only if the values mean the same"
            )


def _shown(value: object) -> object:
    return "the files' own" if value is None else value


def value_ranges(inputs: Inputs) -> dict[str, float]:
    """255 for modalities that hold 8-bit values as stored, 0 (unknown) for the others."""
    return {one.name: 255.0 if one.dtype == "uint8" and one.plain else 0.0 for one in inputs}


def require_alike(scenes: Sequence[Scene], place: str) -> None:
    """DataError unless a modality has the same bands and types in all scenes that have it.

    `place`: the key of the scenes in the recipe.
    """
    first = speakers(scenes)
    for scene in scenes:
        for name in scene.bands():
            other = first[name]
            for what, found, expected in (
                ("bands", scene.bands(), other.bands()),
                ("stored types", scene.dtypes(), other.dtypes()),
            ):
                if found[name] != expected[name]:
                    one, two = _told_apart(scene, other)
                    raise DataError(
                        f"{place}: {one} has {what} {found}, but {two} has {expected}; choose the same bands with "
                        f"data.modalities.{name}.bands, convert the files to one type, or leave out those that are "
                        "no such images (masks and labels among them)"
                    )


def _told_apart(*scenes: Scene) -> list[str]:
    """What messages call scenes: their names, or their files where the names are the same."""
    names = [scene.name for scene in scenes]
    files = [next(iter(scene.files), scene.name) for scene in scenes]
    return names if len(set(names)) == len(names) else files
