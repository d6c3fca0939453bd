"""Tile algebra against brute force, and grids that know where they are."""

from __future__ import annotations

import tracemalloc
from bisect import bisect_right
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine, xy

from vfmseg.errors import DataError
from vfmseg.geo.grid import IDENTITY, Grid, Spans, Tile, Window, cut

UTM = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 100, 200)
TURNED = Grid("EPSG:32631", (-0.03, 2.5, 593124.0, 2.5, 0.03, 5749208.0), 40, 30)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """height, width (each 1 to 3 tiles), tile, overlap."""
    tile = draw(st.integers(1, 20))
    sides = st.integers(1, 3 * tile)
    return draw(sides), draw(sides), tile, draw(st.integers(0, tile - 1))


def starts(size: int, tile: int, overlap: int) -> list[int]:
    return [first for first, _, _ in Spans(size, tile, overlap)]


def inside(one: Window, two: Window) -> bool:
    return (
        one.row >= two.row
        and one.col >= two.col
        and one.row + one.height <= two.row + two.height
        and one.col + one.width <= two.col + two.width
    )


@settings(max_examples=150, deadline=None)
@given(scenes())
@pytest.mark.pitfall("P45")
def test_cores_partition_the_scene(scene: tuple[int, int, int, int]) -> None:
    height, width, tile, overlap = scene
    answered = np.zeros((height, width), dtype=int)
    for piece in cut(height, width, tile, overlap):
        assert inside(piece.core, Window(0, 0, height, width))
        assert min(piece.core.shape) >= 1
        answered[piece.core.rows, piece.core.cols] += 1
    assert (answered == 1).all()


@settings(max_examples=150, deadline=None)
@given(scenes())
@pytest.mark.pitfall("P34")
def test_every_window_is_exactly_one_tile_around_its_core(scene: tuple[int, int, int, int]) -> None:
    height, width, tile, overlap = scene
    for piece in cut(height, width, tile, overlap):
        assert piece.window.shape == (tile, tile)
        assert inside(piece.core, piece.window)
        if height >= tile:
            assert 0 <= piece.window.row <= height - tile
        else:
            assert (piece.window.row, piece.core.row, piece.core.height) == (0, 0, height)
        if width >= tile:
            assert 0 <= piece.window.col <= width - tile
        else:
            assert (piece.window.col, piece.core.col, piece.core.width) == (0, 0, width)


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 8])
@pytest.mark.pitfall("C17")
def test_starts_cover_without_repeats_for_every_size_and_overlap(tile: int) -> None:
    for size in range(1, 3 * tile + 1):
        for overlap in range(tile):
            first = starts(size, tile, overlap)
            assert first == sorted(set(first))
            assert set().union(*(range(s, s + tile) for s in first)) >= set(range(size))
            # as few tiles as the overlap allows, and never a smaller overlap than asked for
            steps = np.diff(first)
            assert (steps <= tile - overlap).all()
            assert len(first) == 1 + max(0, -(-(size - tile) // (tile - overlap)))


@settings(max_examples=100, deadline=None)
@given(scenes())
def test_cores_stay_half_an_overlap_away_from_inner_edges(scene: tuple[int, int, int, int]) -> None:
    height, width, tile, overlap = scene
    for piece in cut(height, width, tile, overlap):
        if piece.window.row > 0:
            assert piece.core.row - piece.window.row >= overlap // 2
        if piece.window.row + tile < height:
            assert piece.window.row + tile - piece.core.row - piece.core.height >= overlap // 2
        if piece.window.col > 0:
            assert piece.core.col - piece.window.col >= overlap // 2
        if piece.window.col + tile < width:
            assert piece.window.col + tile - piece.core.col - piece.core.width >= overlap // 2


@settings(max_examples=300, deadline=None)
@given(scenes())
@pytest.mark.pitfall("F6")
def test_spans_that_are_computed_are_those_that_would_be_listed(scene: tuple[int, int, int, int]) -> None:
    size, _, tile, overlap = scene
    last = size - tile
    firsts = [*range(0, last, tile - overlap), last] if last > 0 else [0]
    seams = [(one + tile + two) // 2 for one, two in pairwise(firsts)]
    spans = Spans(size, tile, overlap)
    assert list(spans) == list(zip(firsts, [0, *seams], [*seams, size], strict=True))
    assert [spans.up_to(pixel) for pixel in range(-3, size)] == [bisect_right(firsts, p) for p in range(-3, size)]


@pytest.mark.pitfall("F6")
def test_tiles_of_a_scene_without_end_are_counted_and_not_listed() -> None:
    tracemalloc.start()
    tiles = cut(2**31 - 1, 2**31 - 1, 512, 128)
    assert len(tiles) == 5592405**2
    assert tiles[len(tiles) - 1].window == Window(2**31 - 513, 2**31 - 513, 512, 512)
    assert tracemalloc.get_traced_memory()[1] < 2**16
    tracemalloc.stop()


def test_tiles_come_row_by_row() -> None:
    windows = [piece.window for piece in cut(50, 70, 20, 5)]
    assert windows == sorted(windows)
    assert len(windows) == len(starts(50, 20, 5)) * len(starts(70, 20, 5))


@pytest.mark.pitfall("C20")
def test_a_scene_of_exactly_one_tile_is_one_tile() -> None:
    whole = Window(0, 0, 64, 64)
    assert list(cut(64, 64, 64)) == [Tile(whole, whole)]
    assert starts(64, 64, 63) == [0]
    assert starts(65, 64, 0) == [0, 1]


@pytest.mark.parametrize(("tile", "overlap"), [(64, 64), (64, 65), (64, -1), (0, 0), (-3, 0)])
def test_overlap_that_leaves_no_step_is_refused(tile: int, overlap: int) -> None:
    with pytest.raises(DataError, match=f"{tile}"):
        cut(100, 100, tile, overlap)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(-12, 12),
    st.integers(-12, 12),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_window_clip_is_the_intersection(
    row: int, col: int, height: int, width: int, scene_height: int, scene_width: int
) -> None:
    window = Window(row, col, height, width)
    wanted = {
        (r, c)
        for r in range(row, row + height)
        for c in range(col, col + width)
        if 0 <= r < scene_height and 0 <= c < scene_width
    }
    part = window.clip(scene_height, scene_width)
    covered = {(r, c) for r in range(part.row, part.row + part.height) for c in range(part.col, part.col + part.width)}
    assert covered == wanted
    canvas = np.zeros((scene_height, scene_width), dtype=bool)
    canvas[part.rows, part.cols] = True
    assert set(zip(*map(tuple, np.nonzero(canvas)), strict=True)) == wanted


@pytest.mark.parametrize("grid", [UTM, TURNED], ids=["north up", "turned"])
@pytest.mark.pitfall("P34")
def test_places_of_pixels_are_those_of_the_transform(grid: Grid) -> None:
    for row, col in [(0, 0), (0.5, 0.5), (3, 0), (0, 4), (19.5, -4.5)]:
        assert grid.point(row, col) == pytest.approx(xy(Affine(*grid.transform), row, col, offset="ul"))


@pytest.mark.parametrize("grid", [UTM, TURNED], ids=["north up", "turned"])
@pytest.mark.pitfall("P34")
def test_a_crop_keeps_every_pixel_where_it_was(grid: Grid) -> None:
    part = grid.crop(Window(7, -3, 20, 30))
    assert (part.height, part.width, part.crs) == (20, 30, grid.crs)
    for row, col in [(0, 0), (0.5, 0.5), (19.5, 4.5), (3, 29)]:
        assert part.point(row, col) == pytest.approx(grid.point(row + 7, col - 3), abs=1e-6)
    assert part.crop(Window(1, 2, 5, 5)).same_place(grid.crop(Window(8, -1, 5, 5)))


def moved(grid: Grid, pixels: float) -> Grid:
    a, b, c, d, e, f = grid.transform
    return Grid(grid.crs, (a, b, c + pixels * a, d, e, f + pixels * d), grid.height, grid.width)


@pytest.mark.pitfall("P34")
def test_same_place_allows_rounding_and_nothing_more() -> None:
    for grid in (UTM, TURNED):
        assert grid.same_place(grid)
        assert grid.same_place(moved(grid, 0.01))
        assert not grid.same_place(moved(grid, 0.5))
        assert not grid.same_place(moved(grid, 1))
    a, b, c, d, e, f = UTM.transform
    assert not UTM.same_place(Grid(UTM.crs, (a * 1.01, b, c, d, e, f), 100, 200))  # same corner, other pixel size
    assert not UTM.same_place(Grid(UTM.crs, UTM.transform, 100, 201))
    assert not UTM.same_place(Grid("EPSG:32632", UTM.transform, 100, 200))


def test_same_place_takes_one_crs_written_in_two_ways() -> None:
    from rasterio.crs import CRS

    wkt = CRS.from_epsg(32633).to_wkt()
    assert UTM.same_place(Grid(wkt, UTM.transform, 100, 200))
    assert not UTM.same_place(Grid(CRS.from_epsg(32634).to_wkt(), UTM.transform, 100, 200))


def test_a_file_that_says_no_place_contradicts_nothing() -> None:
    plain = Grid(None, IDENTITY, 100, 200)
    assert UTM.same_place(plain)
    assert plain.same_place(UTM)
    assert not plain.same_place(Grid(None, IDENTITY, 200, 100))
    assert not UTM.same_place(Grid(None, moved(UTM, 5).transform, 100, 200))


def test_georeferenced_needs_crs_and_transform() -> None:
    assert UTM.georeferenced
    assert not Grid(None, UTM.transform, 5, 5).georeferenced
    assert not Grid("EPSG:4326", IDENTITY, 5, 5).georeferenced


def test_window_says_its_rows_and_columns() -> None:
    assert str(Window(3, 10, 2, 5)) == "rows 3 to 4, columns 10 to 14"


@given(*(st.tuples(*(st.integers(-9, 9),) * 2, *(st.integers(0, 9),) * 2) for _ in range(2)))
def test_shared_pixels_of_two_windows_are_the_same_places_in_both(
    one: tuple[int, int, int, int], two: tuple[int, int, int, int]
) -> None:
    first, second = Window(*one), Window(*two)
    # every pixel holds the number of its place, so that equal numbers are equal places
    numbers = np.arange(40 * 40).reshape(40, 40)
    of_first, of_second = (
        numbers[w.row + 10 : w.row + 10 + w.height, w.col + 10 : w.col + 10 + w.width] for w in (first, second)
    )
    both = first.shared(second)
    common = set(of_first.ravel().tolist()) & set(of_second.ravel().tolist())
    if both is None:
        assert not common
        return
    here, there = both
    np.testing.assert_array_equal(of_first[here], of_second[there])
    assert set(of_first[here].ravel().tolist()) == common
