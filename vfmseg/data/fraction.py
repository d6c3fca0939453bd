"""A part of the labelled tiles of a split, as if no others had been labelled: how much do labels matter?

A scene of h x w pixels is cut into h // tile rows and w // tile columns of tiles, at least one, as equal as they come.
Of 600 x 300 px and tiles of 256 these are two of 300 x 300.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from vfmseg.data.scene import Scene, Scenes
from vfmseg.data.windows import Purpose, rng
from vfmseg.geo.classes import IGNORE
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.said import BandSaid
from vfmseg.geo.validity import Chip, Hidden


def some_of(scenes: Scenes, fraction: float, tile: int, seed: int) -> tuple[Scenes, int, int]:
    """Tiles that the seed draws, each as a scene of its own unless it is a whole one; how many, and of how many.

    Of each source round(fraction * tiles), at least one, so that sources keep their shares. A tile that is drawn for a
    fraction is drawn for each larger one too, so that scores at 5 % and 25 % differ by what was added.
    """
    found: list[list[Scene]] = []
    first = total = 0
    for source, count in enumerate(scenes.per_source):
        mine = scenes[first : first + count]
        first += count
        tiles = [(scene, window) for scene in mine for window in tiles_of(scene.grid, tile)]
        total += len(tiles)
        order = rng(Purpose.FRACTION, seed, source).permutation(len(tiles))
        drawn = sorted(order[: max(1, round(fraction * len(tiles)))])
        found.append([_part(*tiles[number]) for number in drawn])
    return Scenes(found), sum(map(len, found)), total


def tiles_of(grid: Grid, tile: int) -> list[Window]:
    """Windows that cover a grid without overlap, none smaller than a tile where the grid is not; row by row."""
    rows, columns = (
        pairwise(np.linspace(0, side, max(1, side // tile) + 1).round().astype(int).tolist())
        for side in (grid.height, grid.width)
    )
    across = list(columns)
    return [Window(top, left, bottom - top, right - left) for top, bottom in rows for left, right in across]


def _part(scene: Scene, window: Window) -> Scene:
    return scene if window.shape == (scene.grid.height, scene.grid.width) else PartOfScene(scene, window)


class PartOfScene:
    """A window of a scene as a scene: what lies outside it is neither seen nor labelled."""

    def __init__(self, scene: Scene, window: Window) -> None:
        self.scene = scene
        self.window = window

    @property
    def name(self) -> str:
        """That of the whole scene, and the window."""
        return f"{self.scene.name}, {self.window}"

    @property
    def grid(self) -> Grid:
        """The window's."""
        return self.scene.grid.crop(self.window)

    @property
    def files(self) -> tuple[str, ...]:
        """Those of the whole scene."""
        return self.scene.files

    def read(self, window: Window) -> dict[str, Chip]:
        """As the whole scene says, invalid beyond this part."""
        inside = self._inside(window)
        found = self.scene.read(self._moved(window))
        return {name: Chip(np.where(inside, chip.pixels, 0), chip.valid & inside) for name, chip in found.items()}

    def read_labels(self, window: Window) -> np.ndarray:
        """As the whole scene says, IGNORE beyond this part."""
        labels: np.ndarray = np.where(self._inside(window), self.scene.read_labels(self._moved(window)), IGNORE)
        return labels

    def bands(self) -> dict[str, int]:
        """Those of the whole scene."""
        return self.scene.bands()

    def dtypes(self) -> dict[str, str]:
        """Those of the whole scene."""
        return self.scene.dtypes()

    def said(self) -> dict[str, tuple[BandSaid, ...]]:
        """What its files say."""
        return self.scene.said()

    def follow(self, said: Mapping[str, Sequence[BandSaid]]) -> None:
        """Passed on to the whole scene, and so to all parts of it."""
        self.scene.follow(said)

    def notes(self) -> dict[tuple[str, str], str]:
        """Those of the whole scene."""
        return self.scene.notes()

    def hidden(self) -> dict[str, Hidden]:
        """Of all parts of the whole scene together."""
        return self.scene.hidden()

    def traces(self) -> dict[str, tuple[str, str]]:
        """Those of the whole scene."""
        return self.scene.traces()

    def _moved(self, window: Window) -> Window:
        return Window(window.row + self.window.row, window.col + self.window.col, window.height, window.width)

    def _inside(self, window: Window) -> np.ndarray:
        """Bool (h, w) of a window in this part's pixels: what of it lies in the part."""
        rows = np.arange(window.row, window.row + window.height)
        columns = np.arange(window.col, window.col + window.width)
        inside: np.ndarray = ((rows >= 0) & (rows < self.window.height))[:, None] & (
            (columns >= 0) & (columns < self.window.width)
        )
        return inside
