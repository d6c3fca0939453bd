"""Reading ahead: a scene's rows in chunks along its own blocks, each pixel of a run decoded once.

A chunk is as high as the file's blocks (or a multiple), and its pieces are as wide as whole blocks, so no two reads
touch the same block. Tiles are cut from the chunks in memory. Values stay in the type that the file stores where that
loses nothing: a quarter or half of the memory of float32.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from vfmseg.data.image import Known, known
from vfmseg.data.raster_scene import RasterScene
from vfmseg.geo.grid import Grid, Slices, Window
from vfmseg.geo.validity import Chip
from vfmseg.inference.stages import Pipe, Stages

LEAST_ROWS = 64
"""Chunks of files with lower blocks: fewer calls, still little memory."""

PIECE = 1024
"""Least width of a piece in pixels."""


class SceneSource(Protocol):
    """Anything with a grid from which windows of all modalities can be read."""

    @property
    def grid(self) -> Grid:
        """The grid that labels are made on: that of the first modality."""
        ...

    def read(self, window: Window) -> dict[str, Chip]:
        """Pixels and validity of each modality; beyond the edge everything is invalid."""
        ...


@dataclass(frozen=True)
class Stored:
    """How a scene lies on the disk. block: rows and columns of the blocks of the first modality, in pixels.

    types: for each modality the type that holds its values without loss; float32 where it is left out.
    """

    block: tuple[int, int] = (256, 256)
    types: Mapping[str, np.dtype] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a run, as wide as it reads: what each modality holds in a window of the scene."""

    window: Window
    chips: dict[str, Chip]

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.window.row + self.window.height


def stored_as(scene: RasterScene) -> Stored:
    """Blocks of the first modality of a scene of rasters, and the type that holds each without loss."""
    first = next(iter(scene.rasters.values()))
    return Stored(first.block, {name: raster.compact for name, raster in scene.rasters.items()})


def chunk_rows(block_height: int, tile: int) -> int:
    """Height of the chunks: whole blocks, not much higher than needed; one block where blocks are high."""
    least = min(LEAST_ROWS, tile)
    if block_height >= least:
        return block_height
    return block_height * -(-least // block_height)


def chunks_of(top: int, bottom: int, height: int) -> Iterator[tuple[int, int]]:
    """(row, rows) of the chunks that cover rows top to bottom - 1, cut at multiples of `height`."""
    while top < bottom:
        end = min(bottom, (top // height + 1) * height)
        yield top, end - top
        top = end


def pieces_of(left: int, right: int, block_width: int, threads: int) -> list[tuple[int, int]]:
    """(column, columns) of at most `threads` pieces of about equal width, cut at multiples of the block's width."""
    count = max(1, min(threads, (right - left) // PIECE))
    cuts = [left]
    for i in range(1, count):
        cut = round((left + i * (right - left) / count) / block_width) * block_width
        if cuts[-1] < cut < right:
            cuts.append(cut)
    cuts.append(right)
    return [(a, b - a) for a, b in pairwise(cuts)]


class Readers:
    """Threads that read a scene's chunks ahead of who needs them. `scenes`: the same scene once for each thread.

    `wanted(window)`: whether any of it is needed; what is not is never read, and invalid.
    """

    def __init__(
        self,
        scenes: Sequence[SceneSource],
        stored: Stored,
        stages: Stages,
        wanted: Callable[[Window], bool] | None = None,
    ) -> None:
        self._stages = stages
        self._wanted = wanted
        self._stored = stored
        self._threads = len(scenes)
        self._free: queue.SimpleQueue[SceneSource] = queue.SimpleQueue()
        for scene in scenes:
            self._free.put(scene)

    def read(self, window: Window, height: int, pipe: Pipe[Chunk]) -> None:
        """Put the chunks of a window inside the scene into the pipe, top to bottom."""
        # where not all is wanted, small pieces leave more out
        most = self._threads if self._wanted is None else window.width
        pieces = pieces_of(window.col, window.col + window.width, self._stored.block[1], most)
        with ThreadPoolExecutor(min(len(pieces), self._threads), thread_name_prefix="vfmseg-read") as pool:
            for row, rows in chunks_of(window.row, window.row + window.height, height):
                places = [Window(row, col, rows, cols) for col, cols in pieces]
                chips = list(pool.map(self._piece, places)) if len(places) > 1 else [self._piece(places[0])]
                pipe.put(Chunk(Window(row, window.col, rows, window.width), _joined(chips)))

    def _piece(self, window: Window) -> dict[str, Chip]:
        scene = self._free.get()
        try:
            if self._wanted is None or self._wanted(window):
                chips = self._stages.timed("read", lambda: scene.read(window))
            else:
                chips = _nothing(scene, window)
        finally:
            self._free.put(scene)
        kept: dict[str, Chip] = {}
        for name, chip in chips.items():
            kind = self._stored.types.get(name, np.dtype(np.float32))
            kept[name] = Chip(chip.pixels.astype(kind, copy=False), chip.valid)
        return kept


def _joined(pieces: Sequence[dict[str, Chip]]) -> dict[str, Chip]:
    """Pieces of the same rows side by side, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return {
        name: Chip(
            np.concatenate([piece[name].pixels for piece in pieces], axis=2),
            np.concatenate([piece[name].valid for piece in pieces], axis=1),
        )
        for name in pieces[0]
    }


def _nothing(scene: SceneSource, window: Window) -> dict[str, Chip]:
    """What is not read: invalid pixels of as many bands as the scene has."""
    bands = {name: len(chip.pixels) for name, chip in scene.read(Window(window.row, window.col, 0, 0)).items()}
    return {
        name: Chip(np.zeros((count, *window.shape), dtype=np.float32), np.zeros(window.shape, dtype=bool))
        for name, count in bands.items()
    }


class Chunks:
    """The chunks that tiles still need. Feeds itself from a pipe."""

    def __init__(self, pipe: Pipe[Chunk], bottom: int, rule: Known) -> None:
        """`bottom`: row after the last that the pipe will bring. `rule`: where several modalities have an answer."""
        self._pipe = pipe
        self._bottom = bottom
        self._rule = rule
        self._chunks: deque[Chunk] = deque()

    def until(self, row: int) -> None:
        """Wait until all rows before `row` (or all there are) have come."""
        while (self._chunks[-1].end if self._chunks else -1) < min(row, self._bottom):
            self._chunks.append(self._pipe.get())

    def forget(self, row: int) -> None:
        """Drop the chunks that end at or before `row`."""
        while self._chunks and self._chunks[0].end <= row:
            self._chunks.popleft()

    def bands(self) -> dict[str, int]:
        """{modality: number of bands} of the chunks that have come."""
        return {name: len(chip.pixels) for name, chip in self._chunks[0].chips.items()}

    def valid(self, window: Window) -> np.ndarray:
        """Bool (h, w): where the modalities have an answer; False beyond the scene."""
        valid = np.zeros(window.shape, dtype=bool)
        for chunk, here, there in self._overlaps(window):
            valid[here] = known({n: Chip(c.pixels, c.valid[there]) for n, c in chunk.chips.items()}, self._rule)
        return valid

    def copy(self, window: Window, into: Mapping[str, Chip]) -> None:
        """Copy a window into chips of its size; beyond the scene they keep what they hold."""
        for chunk, here, there in self._overlaps(window):
            for name, chip in into.items():
                chip.pixels[(slice(None), *here)] = chunk.chips[name].pixels[(slice(None), *there)]
                chip.valid[here] = chunk.chips[name].valid[there]

    def _overlaps(self, window: Window) -> Iterator[tuple[Chunk, Slices, Slices]]:
        """Chunks that share pixels with a window; where these lie in the window, and in the chunk."""
        for chunk in self._chunks:
            if (both := window.shared(chunk.window)) is not None:
                yield chunk, *both
