"""Plans are computed, not listed: what each part of one promises, and that it is as small for a scene of any size."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmseg.errors import MachineError
from vfmseg.geo.grid import Window
from vfmseg.inference.plan import WIDEST_STRIP, Axis, Plan, Shard


def check_tiles(axis: Axis, tile: int, overlap: float) -> None:
    """Neighbours share the overlap in whole pixels, the last two more; no tile too many, none beyond the scene."""
    starts = [axis.start(i) for i in range(len(axis))]
    assert starts[0] == 0
    shared = [one + tile - two for one, two in pairwise(starts)]
    assert all(overlap * tile - 1 < common <= overlap * tile for common in shared[:-1])
    assert all(common > overlap * tile - 1 for common in shared)
    if len(starts) > 1:
        assert starts[-1] + tile == axis.size
        assert starts[-2] + tile < axis.size
    else:
        assert axis.size <= tile


def check_cells(axis: Axis, tile: int) -> None:
    """Cells partition the axis; blended, a tile is the last to see its cell, else it sees it from deepest inside."""
    starts, edges = [axis.start(i) for i in range(len(axis))], [axis.edge(i) for i in range(len(axis) + 1)]
    assert (edges[0], edges[-1]) == (0, axis.size)
    for cell, (first, end) in enumerate(pairwise(edges)):
        assert first < end
        for pixel in range(first, end):
            see = [i for i, start in enumerate(starts) if start <= pixel < start + tile]
            if axis.blended:
                assert see[-1] == cell
                continue
            # pixels to the nearest edge of a tile; beyond that of the scene there is nothing to be seen
            inside = {
                i: min(
                    pixel - starts[i] if i else axis.size,
                    starts[i] + tile - 1 - pixel if i < len(starts) - 1 else axis.size,
                )
                for i in see
            }
            assert inside[cell] >= max(inside.values()) - 1


def check_strips(plan: Plan, widest: int) -> None:
    """Cell columns in a row, evenly shared out, as wide as allowed but not one cell wider."""
    strips, edges = list(plan.strips), [plan.cols.edge(i) for i in range(len(plan.cols) + 1)]
    assert [first for first, _ in strips] == [0, *(end for _, end in strips[:-1])]
    assert strips[-1][1] == len(plan.cols)
    cells = [end - first for first, end in strips]
    assert 1 <= max(cells) <= min(cells) + 1
    assert max(cells) == 1 or max(edges[end] - edges[first] for first, end in strips) <= widest
    if widest > 3 * plan.tile:
        assert len(strips) <= 1 + plan.cols.size / (widest - 2 * plan.tile)


def check_shards(plan: Plan, shard_rows: int) -> None:
    """Each strip is cut into the same ranges of cell rows, each ended as soon as it is high enough."""
    edges = [plan.rows.edge(i) for i in range(len(plan.rows) + 1)]
    piles: dict[int, list[Shard]] = {}
    for shard in plan.shards:
        piles.setdefault(shard.strip, []).append(shard)
    assert list(piles) == list(range(len(plan.strips)))
    for strip, pile in piles.items():
        assert [shard.number for shard in pile] == list(range(len(pile)))
        assert [shard.rows[0] for shard in pile] == [0, *(shard.rows[1] for shard in pile[:-1])]
        assert pile[-1].rows[1] == len(plan.rows)
        assert [shard.rows for shard in pile] == [shard.rows for shard in piles[0]]
        left, right = (plan.cols.edge(cell) for cell in plan.strips[strip])
        for shard in pile:
            first, end = shard.rows
            assert shard.window == Window(edges[first], left, edges[end] - edges[first], right - left)
            assert edges[end] - edges[first] >= shard_rows or shard is pile[-1]
            assert end - first == 1 or edges[end - 1] - edges[first] < shard_rows


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 200), width=st.integers(1, 200), tile=st.integers(1, 64),
    overlap=st.floats(0, 0.99), blended=st.booleans(), widest=st.integers(1, 300), shard=st.integers(1, 300),
)  # fmt: skip
@pytest.mark.pitfall("F6")
def test_a_plan_that_is_computed_keeps_what_it_promises(
    height: int, width: int, tile: int, overlap: float, blended: bool, widest: int, shard: int
) -> None:
    plan = Plan(height, width, tile, overlap, blended, 4, widest, shard)
    for axis in (plan.rows, plan.cols):
        check_tiles(axis, tile, overlap)
        check_cells(axis, tile)
    check_strips(plan, widest)
    check_shards(plan, shard)
    assert [plan.shards[i] for i in range(len(plan.shards))] == list(plan.shards)
    starts = [plan.rows.start(i) for i in range(len(plan.rows))]
    for one in plan.shards:
        first, end = one.rows
        bottom = one.window.row + one.window.height
        seen = [i for i, start in enumerate(starts) if start < bottom and start + tile > one.window.row]
        assert list(plan.rows.tiles_of(first, end)) == (seen if blended else list(range(first, end)))


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
    with pytest.raises(MachineError, match=r"2147483647 x 2147483647 px .*gdal_translate -srcwin"):
        Plan(2**31 - 1, 2**31 - 1, 512, 0.25, True, 4)
