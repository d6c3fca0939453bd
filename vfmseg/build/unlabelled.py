"""Where a recipe meets scenes without labels: opens them, and collects what a model to be pretrained must know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from vfmseg.build.data import bands_from, inputs_from, require_alike, said_by
from vfmseg.build.remarks import tell_notes, tell_portions, tell_survey
from vfmseg.data.augment import Augment
from vfmseg.data.checks import require_valid
from vfmseg.data.draw import BandDraw
from vfmseg.data.from_files import unlabelled_from_files
from vfmseg.data.inputs import Inputs, bands_in
from vfmseg.data.scene import Scene, Scenes
from vfmseg.data.statistics import BandStatistics
from vfmseg.data.survey import survey
from vfmseg.data.traces import Traces
from vfmseg.data.unlabelled import Masker, UnlabelledWindows
from vfmseg.data.visits import Portion
from vfmseg.errors import DataError, RecipeError
from vfmseg.geo.said import BandSaid
from vfmseg.recipe.unlabelled import UnlabelledSection

PIXELS = 2**26
"""Pixels that mean and std are computed of, about: seconds of reading, and far more than they need."""

SURVEYED = 256
"""Scenes that are looked at for what people should be told; thousands would take minutes."""

TOLD = 5
"""Scenes that cannot be read, named in full."""

LISTS = (".txt", ".csv", ".lst")
"""Endings of what people keep lists of files in."""


@dataclass(frozen=True)
class Unlabelled:
    """Scenes to pretrain on, what a model takes of them, and the sources that they are of, in their order."""

    scenes: Scenes
    inputs: Inputs
    portions: tuple[Portion, ...]


def open_unlabelled(
    section: UnlabelledSection, published: Callable[[str], BandStatistics], traces: Traces | None = None
) -> Unlabelled:
    """Everything that pretraining needs of its data; `traces` is told of all scenes.

    `published` {modality}: mean and std of red, green and blue in image units that its encoder was published with,
    asked for those that are normalised by them.
    """
    scenes = open_scenes(section)
    require_valid(scenes, "data.scenes")
    if traces is not None:
        traces.split("scenes", scenes)
    tell_survey("scenes", survey(scenes[:: -(-len(scenes) // SURVEYED)], 0, "any"), [])
    lacking = [name for name in section.modalities if not all(name in scene.bands() for scene in scenes)]
    inputs = inputs_from(section.modalities, scenes, published, lacking, "the scenes'", PIXELS)
    weights = [source.weight for source in section.sources().values()]
    portions = tuple(Portion(count, weight) for count, weight in zip(scenes.per_source, weights, strict=True))
    return Unlabelled(scenes, inputs, portions)


def open_scenes(
    section: UnlabelledSection, like: Mapping[str, Sequence[BandSaid]] | None = None, at: str = "data"
) -> Scenes:
    """The scenes of all sources; nothing of their pixels is read yet.

    `like` {modality: what other scenes say of their bands}: bands are found by it; left out, by what these say.
    `at`: the section of the scenes in the recipe, for messages. DataError that names all scenes that cannot be read.
    """
    bands = bands_from(section.modalities)
    optional = [name for name, modality in section.modalities.items() if modality.optional]
    found: list[list[Scene]] = []
    refused: list[str] = []
    for place, source in section.sources().items():
        opened, why_not = unlabelled_from_files(source.images, bands, f"{at}.{place}", optional)
        found.append(opened)
        refused += why_not
    _require_all(refused, sum(map(len, found)), f"{at}.scenes")
    scenes = Scenes(found)
    said = said_by(scenes) if like is None else like
    for scene in scenes:
        scene.follow(said)
    require_alike(scenes, f"{at}.scenes")
    tell_notes(scenes)
    return scenes


def windows_of(
    section: UnlabelledSection,
    opened: Unlabelled,
    seed: int,
    augment: Augment | None,
    mask: Masker | None = None,
    drawn: BandDraw | None = None,
) -> UnlabelledWindows:
    """The stream of random windows to pretrain on; the shares of several sources are told.

    `drawn`: which bands of a sample are shown; None: all.
    """
    windows = UnlabelledWindows(
        opened.scenes,
        section.tile,
        seed,
        augment,
        section.scale,
        section.samples_per_epoch,
        bands_in(opened.inputs if drawn is None else drawn.shown()),
        opened.portions,
        mask,
        bands_drawn=drawn,
    )
    if len(opened.portions) > 1:
        tell_portions(section.sources(), opened.scenes.per_source, windows.visits.shares)
    return windows


def band_draw_of(section: UnlabelledSection, inputs: Inputs) -> BandDraw | None:
    """Which bands of a sample are shown, of scenes with these inputs; None: all. RecipeError if it has too few."""
    for one in inputs:
        count = section.draw.get(one.name, 0)
        if count >= one.count:
            raise RecipeError(
                f"data.draw.{one.name} = {count} of the {one.count} bands of {one.name}; expected fewer than "
                "there are, or no such key to show them all"
            )
    return BandDraw(section.draw, inputs) if section.draw else None


def _require_all(refused: Collection[str], opened: int, place: str) -> None:
    """DataError for scenes that cannot be read, the first of them by name."""
    if not refused:
        return
    # of each the finding; what to do is the same for all
    named = "; ".join(text.partition("; ")[0] for text in list(refused)[:TOLD])
    more = f"; and {len(refused) - TOLD} more" if len(refused) > TOLD else ""
    lists = any(text.partition(": ")[0].lower().endswith(LISTS) for text in refused)
    written = "; a list of files is written into the recipe itself: [a.tif, b.tif]" if lists else ""
    raise DataError(
        f"{place}: {len(refused)} of {len(refused) + opened} scenes cannot be read: {named}{more}; leave them out "
        f"of the patterns, or replace them{written}"
    )
