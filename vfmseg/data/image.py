"""One modality of a place: its pixels, and which of them are valid, in one hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vfmseg.geo.validity import Chip

Known = Literal["all", "any"]
"""Where several modalities have an answer: where all of them are valid, or where any of them is."""

A = TypeVar("A", covariant=True)


class Seen(Protocol[A]):
    """Something with a mask: an `Image` of tensors, or a `Chip` of arrays."""

    @property
    def valid(self) -> A:
        """Bool (..., h, w)."""
        ...


@dataclass(frozen=True, eq=False)
class Image:
    """Pixels float32 (..., C, h, w) in image units (stored * scale + offset), and valid bool (..., h, w).

    Where `valid` is False the modality says nothing, and the pixels hold 0.
    """

    pixels: Tensor
    valid: Tensor

    @classmethod
    def of(cls, chip: Chip) -> Image:
        """The same window as tensors, which share the memory of its arrays where these lie in one piece."""
        return cls(
            torch.from_numpy(np.ascontiguousarray(chip.pixels)), torch.from_numpy(np.ascontiguousarray(chip.valid))
        )

    @classmethod
    def nothing(cls, bands: int, shape: tuple[int, ...]) -> Image:
        """An image of (C, h, w) pixels of which nothing is valid, for a modality that is missing."""
        return cls(torch.zeros(bands, *shape), torch.zeros(shape, dtype=torch.bool))

    def each(self, change: Callable[[Tensor], Tensor]) -> Image:
        """An image of both tensors changed alike: moved to a device, turned, stacked."""
        return Image(change(self.pixels), change(self.valid))


Images = Mapping[str, Image]
"""{modality: image}, in the order of the recipe."""


def known(images: Mapping[str, Seen[Any]], rule: Known) -> Any:
    """Bool (..., h, w), as an array or tensor like the masks: where the modalities together have an answer.

    The only place that says so: a pixel without an answer gets no label in a map, and reaches neither loss nor score.
    """
    return reduce(operator.and_ if rule == "all" else operator.or_, (image.valid for image in images.values()))
