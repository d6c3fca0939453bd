"""Label a scene of any size tile by tile, holding only the rows that are still in flight.

Tiles are run in row-major order, in batches of one constant shape. Their probabilities are summed, weighted, in a
band as high as one tile; as soon as no later tile touches a row, the row is divided by its weights, turned into
labels and handed on. Memory: about 4 * (classes + 1) * tile * width bytes, whatever the height of the scene.
The order of the sums is the order of the tiles, so the result depends on size, tile and overlap alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vfmseg.geo.grid import Grid, Tile, Window, cut
from vfmseg.geo.labels import IGNORE
from vfmseg.geo.reader import Chip
from vfmseg.inference.blend import profile, tile_weights


class SceneSource(Protocol):
    """Anything with a grid from which windows of all modalities can be read."""

    @property
    def grid(self) -> Grid:
        """The grid that labels are made on: that of the first modality."""
        ...

    def read(self, window: Window) -> dict[str, Chip]:
        """Pixels and validity of each modality; beyond the edge everything is invalid."""
        ...


# (N, tile, tile) chips of one batch per modality -> probabilities float32 (N, K, tile, tile)
Predictor = Callable[[list[dict[str, Chip]]], np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Finished rows of a scene: `probabilities` (K, h, W) in 0..1, `labels` (h, W) int64 with IGNORE where invalid."""

    row: int
    probabilities: np.ndarray
    labels: np.ndarray


def stream_rows(
    scene: SceneSource,
    predictor: Predictor,
    classes: int,
    tile: int,
    overlap: float,
    blend: str,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Rows]:
    """Yield every row of the scene exactly once, top to bottom, in bands.

    `overlap` is the share of a tile that it shares with its neighbour, 0 <= overlap < 1. A pixel is valid if it
    is valid in every modality; a tile without any valid pixel is never run. `progress(done, total)` counts tiles.
    """
    grid = scene.grid
    tiles = cut(grid.height, grid.width, tile, int(tile * overlap))
    band = _Band(classes, tile, grid.width, grid.height, blend)
    for first in range(0, len(tiles), batch_size):
        batch = tiles[first : first + batch_size]
        chips = [scene.read(t.window) for t in batch]
        valid = [np.logical_and.reduce([chip.valid for chip in c.values()]) for c in chips]
        run = [i for i, mask in enumerate(valid) if mask.any()]
        outputs: dict[int, np.ndarray] = {}
        if run:
            # one constant batch shape: a short batch is filled up by repeating its last tile
            filled = [chips[i] for i in run] + [chips[run[-1]]] * (batch_size - len(run))
            results = predictor(filled)
            outputs = {i: results[k] for k, i in enumerate(run)}
        for i, tile_here in enumerate(batch):
            yield from band.finished_before(tile_here.window.row)
            band.add(tile_here, outputs.get(i), valid[i])
        if progress is not None:
            progress(min(first + batch_size, len(tiles)), len(tiles))
    yield from band.finished_before(grid.height)


class _Band:
    """The rows in flight: weighted sums (K, tile, W), weights (tile, W) and validity (tile, W) from row `top` on."""

    def __init__(self, classes: int, tile: int, width: int, height: int, blend: str) -> None:
        self.sums = np.zeros((classes, tile, width), dtype=np.float32)
        self.weights = np.zeros((tile, width), dtype=np.float32)
        self.valid = np.zeros((tile, width), dtype=bool)
        self.top = 0
        self.height = height
        self.blend = blend
        # every window of a blended scene has the same weights, so they are made once
        self.shared = None if blend == "none" else np.outer(profile(blend, tile), profile(blend, tile))

    def add(self, tile: Tile, probabilities: np.ndarray | None, valid: np.ndarray) -> None:
        """Add one tile; `probabilities` (K, tile, tile), or None if nothing in it was valid."""
        window = tile.window
        rows = min(window.height, self.height - window.row)
        cols = min(window.width, self.sums.shape[2] - window.col)
        here = (slice(window.row - self.top, window.row - self.top + rows), slice(window.col, window.col + cols))
        self.valid[here] |= valid[:rows, :cols]
        if probabilities is None:
            return
        weights = tile_weights(self.blend, tile) if self.shared is None else self.shared
        self.sums[(slice(None), *here)] += probabilities[:, :rows, :cols] * weights[:rows, :cols]
        self.weights[here] += weights[:rows, :cols]

    def finished_before(self, row: int) -> Iterator[Rows]:
        """Hand over the rows above `row`, to which no later tile adds, and move the band down."""
        done = row - self.top
        if done <= 0:
            return
        weights = self.weights[:done]
        if (self.valid[:done] & (weights <= 0)).any():
            raise RuntimeError(f"a tile between rows {self.top} and {row} was lost; please report this")
        probabilities = self.sums[:, :done] / np.where(weights > 0, weights, 1.0)
        labels = np.where(self.valid[:done], probabilities.argmax(axis=0), IGNORE)
        yield Rows(self.top, probabilities, labels.astype(np.int64))
        keep = self.sums.shape[1] - done
        for array in (self.sums, self.weights[None], self.valid[None]):
            array[:, :keep] = array[:, done:].copy()
            array[:, keep:] = 0
        self.top = row
