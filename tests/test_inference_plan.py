"""Plans are computed, not listed: the same as a list would be, and as small for a scene of any size."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmseg.errors import MachineError
from vfmseg.geo.grid import Window
from vfmseg.inference.plan import WIDEST_STRIP, Plan


def listed(size: int, tile: int, overlap: int, blended: bool) -> tuple[list[int], list[int]]:
    """First pixels of all tiles, and edges of all cells."""
    last = size - tile
    starts = [*range(0, last, tile - overlap), last] if last > 0 else [0]
    seams = [(one + tile + two) // 2 for one, two in pairwise(starts)]
    return starts, [*(starts if blended else [0, *seams]), size]


def ranges(edges: list[int], widest: int) -> list[tuple[int, int]]:
    """Strips, as a list."""
    cells, wanted = len(edges) - 1, max(1, -(-edges[-1] // widest))
    while True:
        bounds = [round(i * cells / wanted) for i in range(wanted + 1)]
        found = [(a, b) for a, b in pairwise(bounds) if b > a]
        if wanted >= cells or all(edges[b] - edges[a] <= widest for a, b in found):
            return found
        wanted += 1


def groups(edges: list[int], pixel_rows: int) -> list[tuple[int, int]]:
    """Ranges of cell rows of shards, as a list."""
    found, first = [], 0
    for end in range(1, len(edges)):
        if edges[end] - edges[first] >= pixel_rows or end == len(edges) - 1:
            found.append((first, end))
            first = end
    return found


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 200), width=st.integers(1, 200), tile=st.integers(1, 64),
    overlap=st.floats(0, 0.99), blended=st.booleans(), widest=st.integers(1, 300), shard=st.integers(1, 300),
)  # fmt: skip
@pytest.mark.pitfall("F6")
def test_a_plan_that_is_computed_is_the_one_that_would_be_listed(
    height: int, width: int, tile: int, overlap: float, blended: bool, widest: int, shard: int
) -> None:
    plan = Plan(height, width, tile, overlap, blended, 4, widest, shard)
    rows, row_edges = listed(height, tile, int(tile * overlap), blended)
    cols, col_edges = listed(width, tile, int(tile * overlap), blended)
    assert [plan.rows.start(i) for i in range(len(plan.rows))] == rows
    assert [plan.cols.start(i) for i in range(len(plan.cols))] == cols
    assert [plan.rows.edge(i) for i in range(len(plan.rows) + 1)] == row_edges
    assert list(plan.strips) == ranges(col_edges, widest)
    expected = [
        (strip, number, (top, end), Window(
            row_edges[top], col_edges[left], row_edges[end] - row_edges[top], col_edges[right] - col_edges[left]
        ))
        for strip, (left, right) in enumerate(ranges(col_edges, widest))
        for number, (top, end) in enumerate(groups(row_edges, shard))
    ]  # fmt: skip
    assert [(s.strip, s.number, s.rows, s.window) for s in plan.shards] == expected
    assert [plan.shards[i] for i in range(len(plan.shards))] == list(plan.shards)
    for first, end in groups(row_edges, shard):
        seen = [i for i, start in enumerate(rows) if start < row_edges[end] and start + tile > row_edges[first]]
        if blended:
            assert list(plan.rows.tiles_of(first, end)) == seen
        else:
            assert list(plan.rows.tiles_of(first, end)) == list(range(first, end))


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 300), width=st.integers(1, 300), tile=st.integers(1, 32), blended=st.booleans(),
    place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999), st.floats(0, 1)),
)  # fmt: skip
def test_the_shards_across_a_window_are_those_that_touch_it(
    height: int, width: int, tile: int, blended: bool, place: tuple[float, float, float]
) -> None:
    plan = Plan(height, width, tile, 0.3, blended, 4, 3 * tile, 2 * tile)
    row, col = int(place[0] * height), int(place[1] * width)
    window = Window(row, col, 1, max(1, int(place[2] * (width - col))))
    touched = [
        s for s in plan.shards
        if s.window.row <= row < s.window.row + s.window.height
        and s.window.col < col + window.width and s.window.col + s.window.width > col
    ]  # fmt: skip
    assert plan.across(window) == touched


@pytest.mark.parametrize(("height", "width"), [(1, 2**31 - 1), (2**31 - 1, 1), (10**6, 10**6)])
@pytest.mark.pitfall("F6")
def test_a_plan_of_a_scene_of_billions_of_pixels_takes_no_memory(height: int, width: int) -> None:
    started = time.process_time()
    tracemalloc.start()
    plan = Plan(height, width, 512, 0.25, True, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    assert time.process_time() - started < 5
    assert sum(b - a for a, b in plan.strips) == len(plan.cols)
    assert plan.strip_columns(0)[1] <= WIDEST_STRIP


@pytest.mark.pitfall("F6")
def test_more_pieces_than_a_folder_holds_are_refused() -> None:
    with pytest.raises(MachineError, match=r"2147483647 x 2147483647 px would be written in [\d,]+ pieces"):
        Plan(2**31 - 1, 2**31 - 1, 512, 0.25, True, 4)
