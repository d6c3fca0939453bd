"""GDAL's warper beside ours (`vfmseg/geo/warp.py`), in constructed cases: place, value, holes, windows and time.

    python benchmarks/warp.py             # half a minute on one core; nothing is read or written

Both resample three bands of float32, bilinearly, or by averaging where the source is finer than `FINER`. GDAL is fed
NaN wherever a pixel is hidden, and has its best settings: positions to 1e-9 pixel, and a kernel that is not widened
(XSCALE, YSCALE 1). Each figure is ours / GDAL's.

place: farthest from where PROJ says, in pixels of the source, of images that hold their own rows and columns.
value: mean difference from the truth in an image of noise from 0 to 100: bilinear in float64 at PROJ's positions, or
the mean of the source over the ground of a pixel. filled: share of the pixels whose ground is hidden (the source pixel
below the centre; when averaging, more than 60 % of the ground) that get a value all the same. cut: share of the pixels
that have other bits when the scene is read in windows of 64 px than when it is read at once. s/Mpx: seconds for a
million pixels of the target in windows of 512 px, one thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from rasterio.io import MemoryFile
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import Resampling, transform

from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.gridtransform import GridTransform
from vfmseg.geo.warp import FINER, Warp

HEIGHT, WIDTH = 600, 840
MARGIN = 8  # pixels of the source round the target, so that no border is met
EVERY = 20  # of how many rows and columns one is looked at where the truth is a mean
HOLE = 6  # pixels of the source along a side of what is hidden, of which 30 % are
TOLERANCE = 1e-9  # pixels of the source by which GDAL may simplify positions; by default 0.125
PARTS = 16  # places along a pixel for that truth

Reader = Callable[[Window], tuple[np.ndarray, np.ndarray]]
"""Values (bands, h, w) and validity (h, w) of a window of the target."""

METRES = Grid("EPSG:32633", (0.1, 0.0, 500010.0, 0.0, -0.1, 4999990.0), HEIGHT, WIDTH)
TURNED = Grid("EPSG:32633", (0.08, 0.06, 500010.0, 0.06, -0.08, 4999990.0), HEIGHT, WIDTH)
COUNTRY = Grid("EPSG:32633", (500.0, 0.0, 300000.0, 0.0, -500.0, 5500000.0), HEIGHT, WIDTH)

CASES = (
    # name, target, CRS and pixel size of the source
    ("5 x coarser, one system", METRES, "EPSG:32633", 0.5),
    ("5 x coarser, turned", TURNED, "EPSG:32633", 0.5),
    ("5 x coarser, next UTM zone", METRES, "EPSG:32632", 0.5),
    ("5 x coarser, degrees", METRES, "EPSG:4326", 5e-6),
    ("3 x coarser, a country in degrees", COUNTRY, "EPSG:4326", 0.015),
    ("1.25 x finer, one system", METRES, "EPSG:32633", 0.08),
    ("1.25 x finer, next UTM zone", METRES, "EPSG:32632", 0.08),
    ("4.3 x finer, one system", METRES, "EPSG:32633", 0.023),
    ("3.2 x finer, next UTM zone", METRES, "EPSG:32632", 0.031),
)


def positions(target: Grid, source: Grid, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Where positions (row, column) of the target lie in the source (2, ...), each by PROJ, in float64."""
    xs, ys = Affine(*target.transform) @ (cols.ravel(), rows.ravel())
    if target.crs != source.crs:
        xs, ys = map(np.asarray, transform(target.crs, source.crs, xs, ys))
    across, down = ~Affine(*source.transform) @ (xs, ys)
    return np.stack([down, across]).reshape(2, *rows.shape)


def source_of(target: Grid, crs: str, size: float) -> Grid:
    """A grid of square pixels that holds the target, on no common corner."""
    unit = Grid(crs, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 1, 1)
    ys, xs = positions(target, unit, *np.mgrid[0 : HEIGHT + 1 : 20, 0 : WIDTH + 1 : 20].astype(np.float64))
    left, top = xs.min() - (MARGIN + 0.37) * size, ys.max() + (MARGIN + 0.21) * size
    height, width = (int(np.ptp(v) / size) + 2 * MARGIN + 2 for v in (ys, xs))
    return Grid(crs, (size, 0.0, float(left), 0.0, -size, float(top)), height, width)


def by_ours(image: np.ndarray, shown: np.ndarray, source: Grid, target: Grid, average: bool) -> Reader:
    """Our warper, which asks for the windows of the source that it needs; it knows itself whether to average."""
    warp = Warp("source", source, target)

    def part(window: Window) -> tuple[np.ndarray, np.ndarray]:
        return image[:, window.rows, window.cols], shown[window.rows, window.cols]

    return lambda window: warp.read(window, len(image), part)


def by_gdal(image: np.ndarray, shown: np.ndarray, source: Grid, target: Grid, average: bool) -> Reader:
    """GDAL's warper, given the part of the source below a window, with a margin, as a file in memory."""
    known = np.where(shown, image, np.float32(np.nan))
    below = GridTransform(source, target)
    margin = 4 + 2 * math.ceil(max(below.pixels))
    method = Resampling.average if average else Resampling.bilinear
    scale = {} if average else {"XSCALE": 1, "YSCALE": 1}

    def read(window: Window) -> tuple[np.ndarray, np.ndarray]:
        rows, cols = (np.linspace(a, a + n, 9) for a, n in ((window.row, window.height), (window.col, window.width)))
        down, across = below.at(rows, cols)
        top, left = int(down.min()) - margin, int(across.min()) - margin
        reach = Window(top, left, int(down.max()) + margin - top, int(across.max()) + margin - left)
        part = reach.clip(source.height, source.width)
        with MemoryFile() as memory:
            with memory.open(
                driver="GTiff", count=len(image), dtype="float32", nodata=math.nan, height=part.height,
                width=part.width, crs=source.crs, transform=Affine(*source.crop(part).transform),
            ) as made:  # fmt: skip
                made.write(np.ascontiguousarray(known[:, part.rows, part.cols]))
            with memory.open() as stored, WarpedVRT(
                stored, crs=target.crs, transform=Affine(*target.crop(window).transform), width=window.width,
                height=window.height, tolerance=TOLERANCE, nodata=math.nan, num_threads=1, resampling=method, **scale,
            ) as warped:  # fmt: skip
                found = warped.read()
        valid = ~np.isnan(found).any(axis=0)
        return np.where(valid, found, np.float32(0)), valid

    return read


def in_windows(read: Reader, side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole target, read window by window."""
    values, valid = np.zeros((count, HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH), bool)
    for row in range(0, HEIGHT, side):
        for col in range(0, WIDTH, side):
            window = Window(row, col, side, side).clip(HEIGHT, WIDTH)
            values[:, window.rows, window.cols], valid[window.rows, window.cols] = read(window)
    return values, valid


def interpolated(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Bilinear values (bands, ...) at positions (2, ...), in float64."""
    rows, cols = at - 0.5
    i, j = np.floor(rows).astype(int), np.floor(cols).astype(int)
    down, across = rows - i, cols - j
    upper = image[:, i, j] * (1 - across) + image[:, i, j + 1] * across
    lower = image[:, i + 1, j] * (1 - across) + image[:, i + 1, j + 1] * across
    found: np.ndarray = upper * (1 - down) + lower * down
    return found


def row_of_table(name: str, target: Grid, crs: str, size: float) -> list[str]:
    """One line: the case, and each figure for ours and for GDAL."""
    source = source_of(target, crs, size)
    average = max(GridTransform(source, target).pixels) > FINER
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 100, (3, source.height, source.width)).astype(np.float32)
    coordinates = np.stack([*(np.mgrid[: source.height, : source.width] + 0.5), noise[0]]).astype(np.float32)
    everywhere = np.ones(noise.shape[1:], bool)
    blocks = rng.uniform(size=(source.height // HOLE + 1, source.width // HOLE + 1)) > 0.3
    shown = np.kron(blocks, np.ones((HOLE, HOLE), bool))[: source.height, : source.width]
    rows, cols = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    centres = positions(target, source, rows, cols)
    step = EVERY if average else 1
    if average:
        parts = (np.arange(PARTS) + 0.5) / PARTS - 0.5
        fine = [(v[::step, ::step, None, None] + p) for v, p in ((rows, parts[:, None]), (cols, parts[None, :]))]
        below = np.floor(positions(target, source, *np.broadcast_arrays(*fine))).astype(int)
        truth = noise[:, below[0], below[1]].astype(np.float64).mean(axis=(3, 4))
        hidden = (
            shown[below[0], below[1]].mean(axis=(2, 3)) < 0.4
        )  # by the rule half of them; near it the two count otherwise
    else:
        truth = interpolated(noise, centres)
        hidden = ~shown[tuple(np.floor(centres).astype(int))]
    figures: list[list[str]] = []
    whole = Window(0, 0, HEIGHT, WIDTH)
    for make in (by_ours, by_gdal):
        coordinates_read = make(coordinates, everywhere, source, target, average)(whole)[0]
        place = np.hypot(*(coordinates_read[:2] - centres)).max()
        filled = make(noise, shown, source, target, average)(whole)[1][::step, ::step][hidden].mean()
        read = make(noise, everywhere, source, target, average)
        values, _ = read(whole)
        value = np.abs(values[:, ::step, ::step] - truth).mean()
        other, _ = in_windows(read, 64, len(noise))
        cut = (other.view(np.uint32) != values.view(np.uint32)).any(axis=0).mean()
        started = time.perf_counter()
        in_windows(read, 512, len(noise))
        seconds = (time.perf_counter() - started) / (HEIGHT * WIDTH / 1e6)
        figures.append([f"{place:.4f}", f"{value:.3f}", f"{filled:.0%}", f"{cut:.1%}", f"{seconds:.2f}"])
    return [name, "average" if average else "bilinear", *(" / ".join(pair) for pair in zip(*figures, strict=True))]


def main() -> None:
    """Print the table, ours / GDAL's."""
    print("| source | resampling | place, px | value | filled | cut | s/Mpx |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        print("| " + " | ".join(row_of_table(*case)) + " |", flush=True)


if __name__ == "__main__":
    main()
