"""What training, statistics and scoring ask of a labelled scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.said import BandSaid
from vfmseg.geo.validity import Chip, Hidden


class Scene(Protocol):
    """One place: the images of its modalities on one grid, and labels. It may lack some modalities, but has one.

    `RasterScene` is one in files or arrays, `DatasetScene` one row of a published set.
    """

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def grid(self) -> Grid:
        """The grid of every modality and of the labels."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Where it comes from: full paths, or rows of a published set. Two scenes that share one are the same place.

        Files of modalities beside its first one are not among them: one elevation model may lie under all scenes.
        """
        ...

    def read(self, window: Window) -> dict[str, Chip]:
        """{modality it has: pixels (C, h, w) and valid (h, w)}; beyond the edge everything is invalid."""
        ...

    def read_labels(self, window: Window) -> np.ndarray:
        """Class indexes int64 (h, w); beyond the edge IGNORE."""
        ...

    def bands(self) -> dict[str, int]:
        """{modality: number of bands that are read}."""
        ...

    def dtypes(self) -> dict[str, str]:
        """{modality: type of the stored numbers, such as uint8}."""
        ...

    def said(self) -> dict[str, tuple[BandSaid, ...]]:
        """{modality: what its files say of the bands that are read, and the scale and offset by which they are}."""
        ...

    def follow(self, said: Mapping[str, Sequence[BandSaid]]) -> None:
        """Read the bands of which another scene says the same, in its order, and scale them if they are there."""
        ...

    def notes(self) -> dict[tuple[str, str], str]:
        """{(modality, kind): what a person should know of how its file is read, behind its name}."""
        ...

    def hidden(self) -> dict[str, Hidden]:
        """{modality: what has hidden how many of the pixels read so far}."""
        ...

    def traces(self) -> dict[str, tuple[str, str]]:
        """{modality, or "labels": its name and a cheap digest}; that of labels is made where they are read."""
        ...


class Scenes(list[Scene]):
    """The scenes of a split, those of one source after those of the one before.

    `per_source`: how many each source has given.
    """

    def __init__(self, sources: Sequence[Sequence[Scene]]) -> None:
        super().__init__(scene for scenes in sources for scene in scenes)
        self.per_source = tuple(len(scenes) for scenes in sources)


def speakers(scenes: Sequence[Scene]) -> dict[str, Scene]:
    """{modality: the first of the scenes that has it}, which speaks for all of them."""
    found: dict[str, Scene] = {}
    for scene in scenes:
        for name in scene.bands():
            found.setdefault(name, scene)
    return found
