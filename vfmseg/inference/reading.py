"""Reading ahead: threads read a scene's rows in chunks along its blocks, and tiles are cut from these in memory.

A raster file is stored in blocks, and a block is decoded as a whole whatever part of it is asked for. So chunks are as
high as the blocks (or a multiple), and what one thread reads of a chunk is as wide as whole blocks: each block of a run
is decoded once. Tiles of 512 px that step by 384, read one by one from blocks of 256, would decode each 2.8 times in
the mean. Values stay in the type that the file stores where that loses nothing: 1 or 2 bytes instead of 4 (float32).
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
"""Pixel rows of a chunk at least. Files may have blocks of one row; as many calls would cost more than the reading."""

LEAST_COLUMNS = 1024
"""Pixel columns that a thread reads of a chunk at least, for the same reason."""


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
    """How a scene lies on the disk. block: height and width in pixels of the blocks of the first modality.

    types: {modality: the type that holds its values without loss}; float32 for one that is left out.
    """

    block: tuple[int, int] = (256, 256)
    types: Mapping[str, np.dtype] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """What each modality holds in a window of the scene: some rows, as wide as all tiles of the run see.

    chips {modality: pixels (bands, h, w) in the type of `Stored`, valid bool (h, w)}.
    """

    window: Window
    chips: dict[str, Chip]

    @property
    def end(self) -> int:
        """The row of the scene after the last one of the chunk."""
        return self.window.row + self.window.height


def stored_as(scene: RasterScene) -> Stored:
    """How a scene of raster files is stored: the blocks of its first modality, the type of each."""
    first = next(iter(scene.rasters.values()))
    return Stored(first.block, {name: raster.compact for name, raster in scene.rasters.items()})


def chunk_rows(block_height: int, tile: int) -> int:
    """Pixel rows of a chunk: one block if that has LEAST_ROWS (or a tile's) at least, else as many as it takes.

    Blocks of 256 rows: 256. Blocks of 1 row: 64, for tiles of 16 px 16. Blocks of 48 rows: 96.
    """
    least = min(LEAST_ROWS, tile)
    if block_height >= least:
        return block_height
    return block_height * -(-least // block_height)


def chunks_of(top: int, bottom: int, height: int) -> Iterator[tuple[int, int]]:
    """(row, rows) of the chunks that cover rows top to bottom - 1, cut at multiples of `height`, where blocks end.

    Rows 100 to 599 in chunks of 256: (100, 156), (256, 256), (512, 88).
    """
    while top < bottom:
        end = min(bottom, (top // height + 1) * height)
        yield top, end - top
        top = end


def columns_of(left: int, right: int, block_width: int, most: int) -> list[tuple[int, int]]:
    """(column, columns) of at most `most` parts of columns left to right - 1, cut at multiples of the block's width.

    They are of about equal width, LEAST_COLUMNS at least. Columns 100 to 4999 in blocks of 256 for 4 threads:
    (100, 1180), (1280, 1280), (2560, 1280), (3840, 1160).
    """
    count = max(1, min(most, (right - left) // LEAST_COLUMNS))
    cuts = [left]
    for i in range(1, count):
        cut = round((left + i * (right - left) / count) / block_width) * block_width
        if cuts[-1] < cut < right:
            cuts.append(cut)
    cuts.append(right)
    return [(a, b - a) for a, b in pairwise(cuts)]


class Readers:
    """Threads that read a scene chunk by chunk, ahead of the batcher. `scenes`: the same scene once for each thread.

    `wanted(window)`: whether a tile that is run sees any of it. What none sees is not read, and comes as invalid.
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
        self._free: queue.SimpleQueue[SceneSource] = queue.SimpleQueue()  # no two threads may read from one file handle
        for scene in scenes:
            self._free.put(scene)

    def read(self, window: Window, height: int, pipe: Pipe[Chunk]) -> None:
        """Put the chunks of a window inside the scene into the pipe, top to bottom; `height`: their pixel rows.

        The threads share the columns of one chunk, so that chunks are complete in their order.
        """
        # where not all is wanted, narrow parts leave more out, also if there are more of them than threads
        most = self._threads if self._wanted is None else window.width
        parts = columns_of(window.col, window.col + window.width, self._stored.block[1], most)
        with ThreadPoolExecutor(min(len(parts), self._threads), thread_name_prefix="vfmseg-read") as pool:
            for row, rows in chunks_of(window.row, window.row + window.height, height):
                windows = [Window(row, col, rows, cols) for col, cols in parts]
                chips = list(pool.map(self._part, windows)) if len(windows) > 1 else [self._part(windows[0])]
                pipe.put(Chunk(Window(row, window.col, rows, window.width), _joined(chips)))

    def _part(self, window: Window) -> dict[str, Chip]:
        """{modality: what it holds in a window}, in the types that are stored; read by a scene that is free."""
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


def _joined(parts: Sequence[dict[str, Chip]]) -> dict[str, Chip]:
    """Parts of a chunk, left to right, as one."""
    if len(parts) == 1:
        return parts[0]
    return {
        name: Chip(
            np.concatenate([part[name].pixels for part in parts], axis=2),
            np.concatenate([part[name].valid for part in parts], axis=1),
        )
        for name in parts[0]
    }


def _nothing(scene: SceneSource, window: Window) -> dict[str, Chip]:
    """{modality: invalid pixels} for a window that is not read; a window of no rows tells the number of bands."""
    bands = {name: len(chip.pixels) for name, chip in scene.read(Window(window.row, window.col, 0, 0)).items()}
    return {
        name: Chip(np.zeros((count, *window.shape), dtype=np.float32), np.zeros(window.shape, dtype=bool))
        for name, count in bands.items()
    }


class Chunks:
    """The chunks that the next tiles are cut from, taken from a pipe as they are needed.

    A row of tiles of 512 px meets two chunks of 256 rows, or three where it does not begin with one.
    """

    def __init__(self, pipe: Pipe[Chunk], bottom: int, rule: Known) -> None:
        """`bottom`: the row after the last that the pipe brings. `rule`: must all modalities be valid, or any."""
        self._pipe = pipe
        self._bottom = bottom
        self._rule = rule
        self._chunks: deque[Chunk] = deque()

    def until(self, row: int) -> None:
        """Wait until all rows of the scene before `row` (or all that there are) have come."""
        while (self._chunks[-1].end if self._chunks else -1) < min(row, self._bottom):
            self._chunks.append(self._pipe.get())

    def forget(self, row: int) -> None:
        """Drop the chunks that end at or before `row`, so that their memory is free."""
        while self._chunks and self._chunks[0].end <= row:
            self._chunks.popleft()

    def bands(self) -> dict[str, int]:
        """{modality: number of bands}; there must be a chunk."""
        return {name: len(chip.pixels) for name, chip in self._chunks[0].chips.items()}

    def valid(self, window: Window) -> np.ndarray:
        """Bool (h, w): where the modalities have an answer by the rule; False beyond the scene."""
        valid = np.zeros(window.shape, dtype=bool)
        for chunk, here, there in self._overlaps(window):
            valid[here] = known({n: Chip(c.pixels, c.valid[there]) for n, c in chunk.chips.items()}, self._rule)
        return valid

    def copy(self, window: Window, into: Mapping[str, Chip]) -> None:
        """Copy a window into {modality: chip} of its size; beyond the scene these keep what they hold.

        Here the stored type becomes float32: only what is in a batch takes 4 bytes a value.
        """
        for chunk, here, there in self._overlaps(window):
            for name, chip in into.items():
                chip.pixels[(slice(None), *here)] = chunk.chips[name].pixels[(slice(None), *there)]
                chip.valid[here] = chunk.chips[name].valid[there]

    def _overlaps(self, window: Window) -> Iterator[tuple[Chunk, Slices, Slices]]:
        """(chunk, rows and columns in the window, those in the chunk) of the pixels that a window shares with each."""
        for chunk in self._chunks:
            if (both := window.shared(chunk.window)) is not None:
                yield chunk, *both
