"""The `predict` section: how a scene is labelled, declared and checked once for recipes, command line and Python."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from vfmseg.errors import RecipeError
from vfmseg.recipe.base import Number, Section, Whole
from vfmseg.recipe.data import TileSide
from vfmseg.recipe.messages import lines
from vfmseg.recipe.run import LARGEST_BATCH

LARGEST_SCALE = 8.0  # of a tile at prediction: it then takes 64 times the memory
MOST_SCALES = 16  # of one prediction; each is another run of the model
MOST_READERS = 256  # threads, each with files open
LARGEST_LIMIT = 2**24  # MiB: 16 TiB


class PredictSection(Section):
    """How a scene is labelled: overlapping tiles, blended."""

    tile: TileSide | None = Field(default=None, examples=[512])
    """Side of a tile in pixels; left out: data.tile."""
    overlap: Annotated[Number, Field(ge=0, lt=0.9)] = 0.25
    """Share of a tile that it has in common with its neighbour."""
    blend: Literal["hann", "gaussian", "average", "none"] = "hann"
    """Weight of a tile's pixels where tiles overlap; none: each tile answers for its core alone."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged where tiles overlap."""
    batch_size: Annotated[Whole, Field(ge=1, le=LARGEST_BATCH)] = 4
    """Tiles in one call of the model."""
    tta: Literal["none", "flips", "d4"] = "none"
    """Test-time augmentation: the mean over 1, 4 or all 8 symmetries of the square."""
    scales: Annotated[
        tuple[Annotated[Number, Field(gt=0, le=LARGEST_SCALE)], ...], Field(min_length=1, max_length=MOST_SCALES)
    ] = (1.0,)
    """Sizes of the tile, relative to itself, at which the model looks; the mean over all."""
    readers: Annotated[Whole, Field(ge=1, le=MOST_READERS)] = 2
    """Threads that read files."""
    memory_limit: Annotated[Whole, Field(ge=16, le=LARGEST_LIMIT)] = 1024
    """MiB for the buffers of a strip; a wider scene is labelled strip by strip."""


def settled(section: PredictSection, given: Mapping[str, Any]) -> PredictSection:
    """The section with other values for some of its keys; None leaves a key as it is.

    `given` {key of the section: value}, as callers say it: options of the command line, arguments in Python; numbers
    may be NumPy's. RecipeError, in the words of a recipe, for a key or value that a recipe may not have either.
    """
    chosen = {key: _plain(value) for key, value in given.items() if value is not None}
    if not chosen:
        return section
    mapping = section.model_dump() | chosen
    try:
        return PredictSection.model_validate(mapping)
    except ValidationError as error:
        found = lines(error.errors(include_url=False), PredictSection, mapping, "predict", {})
        raise RecipeError("\n".join(found)) from None


def _plain(value: Any) -> Any:
    """The same number or list of numbers without NumPy's types, which pydantic does not know."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
