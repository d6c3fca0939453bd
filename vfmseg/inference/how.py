"""How a scene is labelled: what the caller says, and where the caller is silent, what the recipe says."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from vfmseg.errors import RecipeError, nearest, show
from vfmseg.inference.job import MEBI, Settings
from vfmseg.recipe import Recipe
from vfmseg.recipe.data import LARGEST_TILE
from vfmseg.recipe.train import (
    LARGEST_BATCH,
    LARGEST_LIMIT,
    LARGEST_SCALE,
    MOST_READERS,
    MOST_SCALES,
    PredictSection,
)


@dataclass(frozen=True)
class How:
    """How a scene is labelled; None = as in the recipe.

    tile: pixels. overlap: share of a tile, 0 <= overlap < 1. blend: hann, gaussian, average or none. average: whether
    probabilities or logits are averaged where tiles overlap. tta: none, flips or d4; scales: sizes of the tile at which
    the model looks. readers: threads that read files. memory_limit: MiB for the engine's buffers. bands {modality:
    1-based numbers}: which bands of the scene's files are those that the model was trained on, in its order.
    """

    tile: int | None = None
    overlap: float | None = None
    blend: str | None = None
    batch_size: int | None = None
    average: str | None = None
    tta: str | None = None
    scales: tuple[float, ...] | None = None
    readers: int | None = None
    memory_limit: int | None = None
    bands: Mapping[str, Sequence[int]] | None = None


@dataclass(frozen=True)
class Settled:
    """Every question answered."""

    settings: Settings
    logits: bool  # logits are averaged, not probabilities
    tta: str
    scales: tuple[float, ...]
    readers: int
    bands: dict[str, tuple[int, ...]]


def settle(how: How, recipe: Recipe) -> Settled:
    """Fill what `how` leaves open; RecipeError for a value that is out of range."""
    section = recipe.predict
    overlap = section.overlap if how.overlap is None else how.overlap
    if not 0 <= overlap < 1:
        raise RecipeError(f"overlap = {overlap}; expected a share of the tile, at least 0 and below 1, such as 0.25")
    scales = section.scales if how.scales is None else how.scales
    if not 0 < len(scales) <= MOST_SCALES or not all(0 < scale <= LARGEST_SCALE for scale in scales):  # NaN is neither
        expected = f"numbers above 0 and at most {LARGEST_SCALE:g}, {MOST_SCALES} in all, such as 0.75, 1, 1.5"
        raise RecipeError(f"scales = {show(list(scales))}; expected {expected}")
    settings = Settings(
        tile=_positive("tile", how.tile, section.tile or recipe.data.tile, LARGEST_TILE),
        overlap=float(overlap),
        blend=_known("blend", how.blend, section),
        batch_size=_positive("batch_size", how.batch_size, section.batch_size, LARGEST_BATCH),
        memory_limit=_positive("memory_limit", how.memory_limit, section.memory_limit, LARGEST_LIMIT) * MEBI,
    )
    return Settled(
        settings,
        _known("average", how.average, section) == "logits",
        _known("tta", how.tta, section),
        tuple(float(scale) for scale in scales),  # a NumPy number cannot be written as JSON
        _positive("readers", how.readers, section.readers, MOST_READERS),
        _bands(how.bands or {}, recipe),
    )


def _bands(given: Mapping[str, Sequence[int]], recipe: Recipe) -> dict[str, tuple[int, ...]]:
    chosen = {}
    for name, numbers in given.items():
        if name not in recipe.data.modalities:
            raise RecipeError(
                f"bands: '{name}' is no modality of this segmenter; {nearest(name, recipe.data.modalities)}"
            )
        chosen[name] = tuple(_positive(f"bands of {name}", number, 1, 65535) for number in numbers)
        if not chosen[name] or len(set(chosen[name])) < len(chosen[name]):
            raise RecipeError(f"bands of {name} = {list(chosen[name])}; expected numbers of bands, each once")
    return chosen


def _known(name: str, value: str | None, section: PredictSection) -> str:
    if value is None:
        return str(getattr(section, name))
    known = get_args(type(section).model_fields[name].annotation)
    if value not in known:
        raise RecipeError(f"{name} = {value!r}; {nearest(value, known)}")
    return value


def _positive(name: str, value: Any, otherwise: int, most: int) -> int:
    chosen = otherwise if value is None else value
    try:
        number = 0 if isinstance(chosen, bool) else operator.index(chosen)  # whole numbers of NumPy are some as well
    except TypeError:
        number = 0
    if not 1 <= number <= most:
        raise RecipeError(f"{name} = {chosen}; expected a whole number of at least 1 and at most {most}")
    return number
