"""What a model takes: one record a modality, as it was when the model was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vfmseg.geo.bands import Bands
from vfmseg.geo.said import BandSaid


@dataclass(frozen=True)
class Input:
    """One modality. It is kept in segmenter.json, and scenes to be labelled are read by it.

    bands: which bands of a file, and how stored numbers become values; `bands.like` is what the training files said of
    them. count: how many the model takes, those that are derived if there are any. dtype: type of the stored numbers in
    training. mean, std: one of `count` each, in image units; by which values are normalised. normalize: whose they are,
    of the published encoder or of the training split. optional: whether the model has met samples without it in
    training; not kept, as the recipe tells it.
    """

    name: str
    bands: Bands
    count: int
    dtype: str
    normalize: Literal["encoder", "dataset"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    optional: bool = False

    @property
    def stored(self) -> int:
        """How many bands are read from files or arrays: derived ones are computed of one."""
        return 1 if self.bands.derive else self.count

    @property
    def said(self) -> tuple[BandSaid, ...]:
        """What the training files said of each band that is read."""
        return self.bands.like or (BandSaid(),) * self.stored

    @property
    def plain(self) -> bool:
        """Whether its values are the numbers that files store, neither scaled nor shifted."""
        return not any(band.scaled for band in self.said)


Inputs = tuple[Input, ...]
"""All modalities of a model, in the order of the recipe; the first one's grid is that of the labels."""


def bands_in(inputs: Inputs) -> dict[str, int]:
    """{modality: number of its bands}, in the order of the recipe."""
    return {one.name: one.count for one in inputs}
