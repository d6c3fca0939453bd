"""Where a recipe meets what is learned beside segmentation, without labels: the stream of windows, and the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from vfmseg.build.data import open_split, require_alike, said_by
from vfmseg.build.pretraining import HIDES, masking_of, measure_targets, objectives_from
from vfmseg.build.training import augment_of
from vfmseg.build.unlabelled import open_scenes
from vfmseg.data.checks import require_valid
from vfmseg.data.inputs import Inputs, bands_in
from vfmseg.data.scene import Scene, Scenes
from vfmseg.data.traces import Traces
from vfmseg.data.unlabelled import UnlabelledWindows
from vfmseg.data.visits import Portion
from vfmseg.encoders.stem import Stem
from vfmseg.errors import DataError, RecipeError
from vfmseg.model import Network
from vfmseg.recipe import Recipe
from vfmseg.recipe.joint import PLACE
from vfmseg.recipe.unlabelled import UnlabelledSection
from vfmseg.terminal import say, say_once
from vfmseg.training.loop import Stream
from vfmseg.training.step import Objective

STREAM = "unlabelled"
"""Name of the source, which the objectives take their batches from."""


def joint_of(
    recipe: Recipe, train: Scenes, inputs: Inputs, model: Network, traces: Traces
) -> tuple[dict[str, Stream], dict[str, Objective]]:
    """The stream of windows without labels and the objectives that take them; both empty where nothing weighs anything.

    `train`: the training scenes; `inputs`: what the model takes of these. `traces` is told of other scenes. Nothing
    that segmentation draws at random is moved. RecipeError or DataError for what cannot be learned.
    """
    section = recipe.train.unlabelled
    mae, distill = (None, None) if section is None else section.learned()
    if section is None or (mae is None and distill is None):
        return {}, {}
    streams = _streams(model)
    _require_learning(model)
    names = set(chain.from_iterable(streams.values()))
    mine = tuple(one for one in inputs if one.name in names)
    scenes = train if section.scenes is None else _others(recipe, train, traces)
    _require_whole_stream(scenes, streams)
    masked = section.mae if mae or (distill and distill.masked) else None
    masking = masking_of(masked, model, recipe.data.tile, mine, f"{PLACE}.mae")
    weights = [source.weight for source in (section.sources() or recipe.data.sources("train")).values()]
    windows = UnlabelledWindows(
        scenes,
        recipe.data.tile,
        ~recipe.seed,  # no recipe's, so that windows are not turned as those with labels are
        augment_of(recipe.train.augment, inputs),
        section.scale,
        None,
        bands_in(mine),
        [Portion(count, weight) for count, weight in zip(scenes.per_source, weights, strict=True)],
        masking,
        PLACE,
    )
    hides = None if masking is None else HIDES[masking.kind]
    objectives = objectives_from(mae, distill, hides, mine, model, recipe.seed, PLACE)
    measure_targets(objectives, windows, PLACE)
    say(f"{PLACE}: {' and '.join(objectives)} beside segmentation, on windows of {len(scenes)} scenes without labels")
    return {STREAM: windows}, objectives


def _streams(model: Network) -> dict[str, tuple[str, ...]]:
    """{stream: its modalities}, of those that go through the shared encoder."""
    stems = {name: model.stem(name) for name in model.streams}
    return {name: tuple(stem.modalities) for name, stem in stems.items() if isinstance(stem, Stem)}


def _require_learning(model: Network) -> None:
    """RecipeError where only what is thrown away would learn."""
    stems = [stem for stem in map(model.stem, model.streams) if isinstance(stem, Stem)]
    shared = [model.backbone, *stems] + ([] if model.adapter is None else [model.adapter])
    if not any(parameter.requires_grad for module in shared for parameter in module.parameters()):
        raise RecipeError(
            f"{PLACE}: model.adapter = none lets nothing in the encoder learn, so that it would train only what is "
            "thrown away; take another adapter, such as {name: lora}, or drop the section"
        )


def _others(recipe: Recipe, train: Sequence[Scene], traces: Traces) -> Scenes:
    """The scenes that the section names, whose bands are found, and have to be, as in the training scenes."""
    section = recipe.train.unlabelled
    assert section is not None
    assert section.scenes is not None
    named = {name for source in section.sources().values() for name in source.images}
    of_all = UnlabelledSection(
        modalities={name: one for name, one in recipe.data.modalities.items() if name in named},
        scenes=section.scenes,
        tile=recipe.data.tile,
        scale=section.scale,
    )
    scenes = open_scenes(of_all, said_by(train), PLACE)
    require_alike([*train, *scenes], f"{PLACE}.scenes")
    require_valid(scenes, f"{PLACE}.scenes")
    traces.split(STREAM, scenes)
    _tell_scored(recipe, train, scenes)
    return scenes


def _require_whole_stream(scenes: Sequence[Scene], streams: Mapping[str, Sequence[str]]) -> None:
    """DataError for a scene of which nothing goes through the shared encoder."""
    for scene in scenes:
        if not any(set(names) <= set(scene.bands()) for names in streams.values()):
            needed = " or ".join(" + ".join(names) for names in streams.values())
            raise DataError(
                f"{PLACE}: scene {scene.name} has {', '.join(scene.bands())}; expected {needed}, which goes through "
                f"the shared encoder: name scenes with it in {PLACE}.scenes"
            )


def _tell_scored(recipe: Recipe, train: Sequence[Scene], scenes: Sequence[Scene]) -> None:
    """Say so where images that scores are of are learned from, though without their labels."""
    learned = {file for scene in scenes for file in scene.files}
    for split in ("val", "test"):
        found = open_split(recipe, split, said_by(train)) if recipe.data.sources(split) else []
        shared = sum(bool(learned & set(scene.files)) for scene in found)
        if shared:
            say_once(
                f"{PLACE}.scenes: {shared} of the {len(found)} scenes of data.{split} are among them; scores there do "
                "not tell how well images are labelled that the encoder has never seen"
            )
