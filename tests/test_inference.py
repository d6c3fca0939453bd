"""The streaming engine: the same ground gets the same answer, however the work was cut."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from makers import apart, area_of, tiles_of
from torch import Tensor

from vfmseg.data.given import open_scene
from vfmseg.data.raster_scene import RasterScene
from vfmseg.errors import DataError, MachineError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.validity import Chip
from vfmseg.inference.blend import BLENDS, OpenRows, profile
from vfmseg.inference.contracts import Area, Finished, Model, Report, Tiles
from vfmseg.inference.engine import label_run
from vfmseg.inference.job import Arrays, into, prepare
from vfmseg.inference.plan import Plan, share_of
from vfmseg.inference.products import Products
from vfmseg.inference.reading import SceneSource, Stored
from vfmseg.recipe.predict import PredictSection

CLASSES = 3


def pointwise(tiles: Tiles) -> Tensor:
    """A model that looks at one pixel at a time: the class is the value, its probability varies with the value."""
    images, _ = apart(tiles)
    values = images["x"][:, 0]
    return torch.stack([-((values - k) ** 2) for k in range(CLASSES)], dim=1).softmax(dim=1)


def identity(tiles: Tiles) -> Tensor:
    """A model that hands its input on, in other words twice more."""
    images, _ = apart(tiles)
    values = images["x"][:, 0]
    return torch.stack([values, 1 - values, values * 0.5], dim=1)


def by_place(tiles: Tiles) -> Tensor:
    """A model that answers differently at each place of a tile, so that overlapping tiles disagree."""
    images, valid = apart(tiles)
    side = images["x"].shape[-1]
    ramp = torch.linspace(0, 1, side)[:, None] * torch.linspace(0.2, 1, side)
    return pointwise(tiles_of({"x": images["x"] + ramp}, valid))


def everything(finished: Finished) -> dict[str, np.ndarray]:
    """Labels (-1 where invalid) and probabilities."""
    index = finished.sums.max(dim=0).indices.numpy()
    weights = torch.where(finished.weights > 0, finished.weights, 1.0)
    labels = np.where(finished.valid, index, -1)[None]
    return {"labels": labels, "probabilities": (finished.sums / weights).numpy().copy()}


class Once:
    """A sink that keeps arrays and insists that each pixel comes once."""

    def __init__(self, height: int, width: int) -> None:
        self.arrays = Arrays(height, width)
        self.times = np.zeros((height, width), dtype=int)

    def write(self, window: Window, arrays: Any) -> None:
        self.times[window.rows, window.cols] += 1
        self.arrays.write(window, arrays)

    @property
    def labels(self) -> np.ndarray:
        assert (self.times == 1).all()
        return self.arrays.kept["labels"][0]

    @property
    def probabilities(self) -> np.ndarray:
        return self.arrays.kept["probabilities"]


def label(
    scene: SceneSource,
    vote: Callable[..., Tensor],
    plan: Plan,
    blend: str,
    *,
    ranks: int = 1,
    block: tuple[int, int] = (256, 256),
    readers: int = 1,
    area: Area | None = None,
) -> tuple[Once, Report]:
    """Label a scene as so many processes would, one after the other."""
    sink, report = Once(scene.grid.height, scene.grid.width), Report()
    for rank in range(ranks):
        for run in plan.runs(share_of(plan.shards, rank, ranks)):
            scenes = [scene] * readers
            model = Model(vote, CLASSES)
            report.add(label_run(scenes, Stored(block), plan, run, model, blend, everything, sink, area=area))
    return sink, report


def scene_of(array: np.ndarray) -> RasterScene:
    return open_scene({"x": array}, {"x": Bands()})


def random_array(height: int, width: int, holes: bool) -> np.ndarray:
    rng = np.random.default_rng(height * 97 + width)
    array = rng.uniform(0, 2, (1, height, width)).astype(np.float32)
    if holes:
        array[0, rng.uniform(size=(height, width)) < 0.2] = np.nan
        array[0, : height // 2, : width // 2] = np.nan
    return array


# --- the answer does not depend on how the work was cut -------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    tile=st.integers(1, 17),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    blend=st.sampled_from(BLENDS),
    batch=st.integers(1, 5),
    holes=st.booleans(),
)
@example(17, 35, 10, 0.9, "gaussian", 1, False)  # a hundred tiles at a pixel: 1.2e-6 in float32
@pytest.mark.pitfall("P45")
def test_tiled_labels_equal_whole_scene_labels(
    height: int, width: int, tile: int, overlap: float, blend: str, batch: int, holes: bool
) -> None:
    array = random_array(height, width, holes) / 2
    valid = np.isfinite(array[0])
    pixels = torch.from_numpy(np.nan_to_num(array)[None])
    whole = identity(tiles_of({"x": pixels}, {"x": pixels[:, 0] > 0}))[0].numpy()
    sink, _ = label(scene_of(array), identity, Plan(height, width, tile, overlap, blend != "none", batch), blend)
    best = np.sort(whole, axis=0)
    clear = valid & (best[-1] - best[-2] > 1e-5)  # where two classes are equal but for rounding either may win
    np.testing.assert_array_equal(sink.labels[clear], whole.argmax(axis=0)[clear])
    assert (sink.labels[~valid] == -1).all()
    np.testing.assert_allclose(sink.probabilities[:, valid], whole[:, valid], atol=1e-6)
    if blend == "none":
        np.testing.assert_array_equal(sink.probabilities[:, valid], whole[:, valid])


@settings(max_examples=120, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    tile=st.integers(1, 17),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    blend=st.sampled_from(BLENDS),
    batch=st.integers(1, 4),
    widest=st.integers(1, 40),
    shard=st.integers(1, 40),
    ranks=st.integers(1, 4),
    block=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    holes=st.booleans(),
)
@example(60, 40, 16, 0.5, "none", 2, 20, 10, 3, (8, 8), False)
@example(60, 40, 16, 0.5, "hann", 2, 20, 10, 3, (8, 8), True)
def test_strips_shards_ranks_and_blocks_change_no_byte(
    height: int, width: int, tile: int, overlap: float, blend: str, batch: int, widest: int, shard: int, ranks: int,
    block: tuple[int, int], holes: bool,
) -> None:  # fmt: skip
    scene = scene_of(random_array(height, width, holes))
    whole = Plan(height, width, tile, overlap, blend != "none", batch, 10**6, 10**6)
    pieces = Plan(height, width, tile, overlap, blend != "none", batch, widest, shard)
    one, _ = label(scene, by_place, whole, blend)
    many, _ = label(scene, by_place, pieces, blend, ranks=ranks, block=block)
    assert one.labels.tobytes() == many.labels.tobytes()
    valid = one.labels >= 0
    assert one.probabilities[:, valid].tobytes() == many.probabilities[:, valid].tobytes()


@pytest.mark.pitfall("P32")
def test_any_number_of_readers_with_random_delays_gives_the_same_bytes() -> None:
    class Slow:
        """A scene whose reads take random times."""

        def __init__(self, scene: RasterScene) -> None:
            self.scene = scene
            self.grid = scene.grid
            self.random = np.random.default_rng(0)

        def read(self, window: Window) -> dict[str, Chip]:
            time.sleep(self.random.uniform(0, 0.004))
            return self.scene.read(window)

    array = random_array(150, 4100, True)
    plan = Plan(150, 4100, 32, 0.25, True, 3)
    answers = []
    for readers in (1, 4):
        sink, _ = label(Slow(scene_of(array)), by_place, plan, "hann", readers=readers, block=(16, 64))
        answers.append(sink.labels.tobytes() + sink.probabilities[:, sink.labels >= 0].tobytes())
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("height", "width"), [(90, 130), (77, 192), (16, 90), (96, 96), (61, 100)])
@pytest.mark.parametrize("batch", [4, 5, 7, 8])
def test_a_tile_keeps_its_place_in_the_batch_however_the_work_is_cut(height: int, width: int, batch: int) -> None:
    """Libraries may round by place in a batch; a model that answers by place shows whether places move."""

    def places(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        values = images["x"]
        slots = torch.arange(len(values)).reshape(-1, 1, 1, 1).expand(-1, CLASSES, *values.shape[-2:])
        return slots.float() / 7 + 0.01 + len(values) / 100

    scene = scene_of(random_array(height, width, True))
    one, _ = label(scene, places, Plan(height, width, 16, 0.25, True, batch, 10**6, 10**6), "average")
    many, report = label(scene, places, Plan(height, width, 16, 0.25, True, batch, 40, 20), "average", ranks=3)
    assert report.tiles > 0
    np.testing.assert_array_equal(one.probabilities, many.probabilities)


@pytest.mark.parametrize(("tiles_wide", "batch"), [(64, 8), (60, 4), (61, 8), (63, 8), (65, 3), (62, 16)])
def test_strips_fill_their_batches_whatever_the_width(tiles_wide: int, batch: int) -> None:
    """The part of a row that a strip holds must not always begin at the same place of a batch."""
    runs: list[int] = []

    def spy(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        runs.append(len(images["x"]))
        return pointwise(tiles)

    plan = Plan(240, 8 * tiles_wide, 8, 0.0, False, batch, widest=30 * 8)
    assert len(plan.strips) > 1
    _, report = label(scene_of(np.ones((1, 240, 8 * tiles_wide), np.float32)), spy, plan, "none")
    assert sum(runs) <= 1.06 * report.tiles


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 300), width=st.integers(1, 300), tile=st.integers(1, 64),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]), blended=st.booleans(), widest=st.integers(1, 200),
    shard=st.integers(1, 200),
)  # fmt: skip
@pytest.mark.pitfall("C17")
def test_shards_partition_the_scene_and_tiles_are_unique(
    height: int, width: int, tile: int, overlap: float, blended: bool, widest: int, shard: int
) -> None:
    plan = Plan(height, width, tile, overlap, blended, 4, widest, shard)
    times = np.zeros((height, width), dtype=int)
    for piece in plan.shards:
        times[piece.window.rows, piece.window.cols] += 1
    assert (times == 1).all()
    windows = [plan.tile_at(r, c).window for r in range(len(plan.rows)) for c in range(len(plan.cols))]
    assert len(set(windows)) == len(windows)
    assert [s for rank in range(5) for s in share_of(plan.shards, rank, 5)] == list(plan.shards)


# --- blending -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(5, 40), (33, 33), (64, 17)])
@pytest.mark.pitfall("P26")
def test_blend_weights_are_a_partition_of_unity(blend: str, size: tuple[int, int]) -> None:
    """A model that always answers 1 gets 1 everywhere, borders and corners included."""

    def ones(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        return torch.ones(len(images["x"]), CLASSES, *images["x"].shape[-2:])

    sink, _ = label(scene_of(np.ones((1, *size), np.float32)), ones, Plan(*size, 16, 0.4, blend != "none", 2), blend)
    np.testing.assert_allclose(sink.probabilities, 1.0, atol=1e-6)


@pytest.mark.parametrize("blend", ["hann", "gaussian", "average"])
@pytest.mark.pitfall("C18")
def test_weights_stay_positive_to_the_last_pixel(blend: str) -> None:
    weights = profile(blend, 512)
    assert weights.dtype == np.float32
    assert weights.min() > 1e-6
    np.testing.assert_array_equal(weights, weights[::-1])


def test_blended_votes_are_the_weighted_mean() -> None:
    """Two tiles side by side, answers 0 and 1: the seam follows the weights' closed form."""
    band = OpenRows(1, 4, 0, 6, 0, "hann", "cpu")
    plan = Plan(4, 6, 4, 0.5, True, 1)
    band.add(plan.tile_at(0, 0), torch.zeros(1, 4, 4))
    band.add(plan.tile_at(0, 1), torch.ones(1, 4, 4))
    sums, weights = band.finished(4)
    line = profile("hann", 4)
    share = line[:2] / (line[:2] + line[2:])
    np.testing.assert_allclose((sums / weights)[0, 0].numpy(), [0, 0, *share, 1, 1], atol=1e-6)


# --- what is run and what is not --------------------------------------------------------------------------------


@pytest.mark.pitfall("P33")
def test_tiles_without_a_valid_pixel_are_never_run() -> None:
    seen: list[int] = []

    def spy(tiles: Tiles) -> Tensor:
        _, valid = apart(tiles)
        seen.append(int(valid["x"].flatten(1).any(dim=1).sum()))
        return pointwise(tiles)

    array = np.full((1, 64, 64), np.nan, np.float32)
    array[0, :16, :16] = 1
    array[0, 40, 40] = 2
    sink, report = label(scene_of(array), spy, Plan(64, 64, 16, 0.0, False, 1), "none")
    assert seen == [1, 1]
    assert (report.tiles, report.skipped) == (2, 14)
    np.testing.assert_array_equal(sink.labels, np.where(np.isfinite(array[0]), np.nan_to_num(array[0]), -1))


@pytest.mark.pitfall("P33")
def test_an_area_in_one_corner_runs_the_tiles_of_that_corner() -> None:
    mask = np.zeros((64, 64), bool)
    mask[50:60, 3:9] = True
    area = area_of(mask)
    sink, report = label(
        scene_of(np.ones((1, 64, 64), np.float32)), pointwise, Plan(64, 64, 16, 0.0, False, 4), "none", area=area
    )
    assert (report.tiles, report.skipped) == (1, 15)
    np.testing.assert_array_equal(sink.labels, np.where(mask, 1, -1))


@pytest.mark.pitfall("C35")
def test_batch_shapes_follow_from_the_scene_and_batches_only_round() -> None:
    shapes: set[tuple[int, ...]] = set()

    def spy(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        shapes.add(tuple(images["x"].shape))
        return by_place(tiles)

    scene = scene_of(random_array(50, 70, True))
    plan = Plan(50, 70, 16, 0.5, True, 5)
    left = len(plan.rows) * len(plan.cols) % 5
    five, _ = label(scene, spy, plan, "hann")
    assert left
    assert shapes == {(5, 1, 16, 16), (left, 1, 16, 16)}
    label(scene, spy, Plan(50, 70, 16, 0.5, True, 5, 20, 10), "hann", ranks=2)
    assert shapes == {(5, 1, 16, 16), (left, 1, 16, 16)}
    one, _ = label(scene, by_place, Plan(50, 70, 16, 0.5, True, 1), "hann")
    valid = one.labels >= 0
    np.testing.assert_allclose(one.probabilities[:, valid], five.probabilities[:, valid], atol=1e-6)


def test_full_batches_where_nothing_is_left_out() -> None:
    """No place of a batch stays empty, also not in the last one: empty places cost as much as full ones."""
    filled: list[int] = []

    def spy(tiles: Tiles) -> Tensor:
        images, valid = apart(tiles)
        assert valid["x"].flatten(1).any(dim=1).all()
        filled.append(len(images["x"]))
        return pointwise(tiles)

    plan = Plan(100, 132, 16, 0.25, True, 5)
    tiles = len(plan.rows) * len(plan.cols)
    assert tiles % 5
    _, report = label(scene_of(np.ones((1, 100, 132), np.float32)), spy, plan, "hann")
    assert filled == [5] * (tiles // 5) + [tiles % 5]
    assert sum(filled) == report.tiles == len(plan.rows) * len(plan.cols)


def test_time_spent_waiting_for_the_model_is_no_work_of_another_stage() -> None:
    def slow(tiles: Tiles) -> Tensor:
        time.sleep(0.02)
        return pointwise(tiles)

    _, report = label(scene_of(np.ones((1, 64, 400), np.float32)), slow, Plan(64, 400, 16, 0.25, True, 4), "hann")
    assert report.stages["model"] > 0.02 * report.tiles / 4
    assert sum(report.stages[name] for name in ("read", "cut", "wait", "blend", "write")) < report.stages["model"] / 2


def test_each_block_is_decoded_once() -> None:
    """With one strip, no two reads touch the same block of the file, whatever tile and overlap are."""
    touched = np.zeros((20, 25), dtype=int)

    class Blocks:
        """A scene of 500 x 800 px in blocks of 25 x 32 px that counts the blocks that each read touches."""

        grid = Grid(None, IDENTITY, 500, 800)

        def read(self, window: Window) -> dict[str, Chip]:
            inside = window.clip(500, 800)
            rows = slice(inside.row // 25, -(-(inside.row + inside.height) // 25))
            cols = slice(inside.col // 32, -(-(inside.col + inside.width) // 32))
            touched[rows, cols] += 1
            return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}

    label(Blocks(), pointwise, Plan(500, 800, 64, 0.5, True, 4), "hann", block=(25, 32))
    assert (touched == 1).all()


# --- memory -----------------------------------------------------------------------------------------------------


class Endless:
    """A scene of any height that is made as it is read."""

    def __init__(self, height: int, width: int = 256) -> None:
        self.grid = Grid(None, IDENTITY, height, width)

    def read(self, window: Window) -> dict[str, Chip]:
        return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}


class Forgets:
    """A sink that keeps nothing."""

    def write(self, window: Window, arrays: Any) -> None:
        pass


@pytest.mark.pitfall("P34")
def test_memory_stays_below_the_estimate_whatever_the_height() -> None:
    """The queues fill differently each time, so it is the bound that is tested; the whole scene's votes are 25 MB."""
    import tracemalloc

    estimates = set()
    for height in (512, 8192):
        settings = PredictSection(tile=64)
        job = prepare([Endless(height)], Stored((64, 256)), {"x": 1}, Model(pointwise, 3), everything, 20, settings)
        estimates.add(job.memory)
        tracemalloc.start()
        into(job, Forgets())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < job.memory < 6e6
    assert len(estimates) == 1


def test_wide_scenes_are_cut_into_strips_that_fit_the_limit() -> None:
    products = Products((0, 1, 2))

    def job(width: int, limit: int, tile: int = 64) -> Any:
        settings = PredictSection(tile=tile, memory_limit=limit)
        return prepare([Endless(110, width)], Stored((64, 64)), {"x": 1}, Model(pointwise, 3), products, 1, settings)

    narrow, wide = job(2000, 16), job(40000, 16)
    assert len(narrow.plan.strips) == 1
    assert len(wide.plan.strips) > 2
    assert wide.memory <= 16 * 2**20
    assert job(100000, 1024).plan.strip_columns(0)[1] <= 10240
    with pytest.raises(MachineError, match=r"predict\.memory_limit = 16 MiB .*at least \d+ MiB: raise it"):
        job(5000, 16, tile=512)
    kept = Arrays(110, 40000)
    into(wide, kept)
    assert (kept.kept["labels"] == 1).all()


@pytest.mark.pitfall("P34")
def test_sums_of_many_tiles_are_counted_only_where_tiles_are_summed() -> None:
    """test_inference_memory.py measures that they are enough; where tiles answer for their cores alone none is due."""

    def memory(overlap: float, blend: str) -> int:
        scene = Endless(100, 1000)
        settings = PredictSection(tile=32, overlap=overlap, blend=blend)
        return prepare([scene], Stored(), {"x": 1}, Model(pointwise, 3), everything, 8, settings).memory

    assert memory(0.7, "hann") > memory(0.6, "hann")
    assert memory(0.7, "none") == memory(0.6, "none")


def test_a_tile_is_no_larger_than_the_scene() -> None:
    """Beyond it there is only padding, which costs as much as ground."""
    sides: set[tuple[int, ...]] = set()

    def spy(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        sides.add(tuple(images["x"].shape))
        return pointwise(tiles)

    job = prepare([Endless(30, 50)], Stored(), {"x": 1}, Model(spy, 3), everything, 20, PredictSection(tile=4000))
    into(job, Forgets())
    assert sides == {(1, 1, 50, 50)}


# --- errors -----------------------------------------------------------------------------------------------------


class Fails:
    """A scene whose block at row 100 cannot be read."""

    grid = Grid(None, IDENTITY, 400, 64)

    def read(self, window: Window) -> dict[str, Chip]:
        if window.row <= 100 < window.row + window.height:
            raise DataError("scene.tif: rows 64 to 127 cannot be read")
        return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}


def broken(tiles: Tiles) -> Tensor:
    raise ArithmeticError("the model broke")


class FullDisk:
    """A sink that fails at its second portion."""

    def __init__(self) -> None:
        self.portions = 0

    def write(self, window: Window, arrays: Any) -> None:
        self.portions += 1
        if self.portions == 2:
            raise OSError("no space left")


@pytest.mark.parametrize(
    ("scene", "vote", "sink", "error", "message"),
    [
        (Fails(), pointwise, Forgets(), DataError, "rows 64 to 127 cannot be read"),
        (Endless(400, 64), broken, Forgets(), ArithmeticError, "the model broke"),
        (Endless(4000, 64), pointwise, FullDisk(), OSError, "no space left"),
    ],
    ids=["reader", "model", "writer"],
)
@pytest.mark.pitfall("P62")
def test_the_first_error_of_any_stage_ends_all_of_them(
    scene: Any, vote: Any, sink: Any, error: type[Exception], message: str
) -> None:
    before = threading.active_count()
    plan = Plan(scene.grid.height, 64, 32, 0.25, True, 2)
    (run, *_) = plan.runs(plan.shards)
    started = time.perf_counter()
    with pytest.raises(error, match=message):
        label_run([scene], Stored((64, 64)), plan, run, Model(vote, CLASSES), "hann", everything, sink)
    assert time.perf_counter() - started < 20
    assert threading.active_count() == before


@pytest.mark.pitfall("P62")
def test_an_interruption_of_the_model_ends_the_threads() -> None:
    def interrupted(tiles: Tiles) -> Tensor:
        raise KeyboardInterrupt

    before = threading.active_count()
    plan = Plan(4000, 64, 32, 0.25, True, 2)
    with pytest.raises(KeyboardInterrupt):
        label(Endless(4000, 64), interrupted, plan, "hann")
    assert threading.active_count() == before


@pytest.mark.pitfall("P62")
def test_a_lost_tile_is_an_error_never_class_0() -> None:
    """Here it is lost by an area that denies a tile and claims its pixels."""
    area = Area(lambda window: window.row not in (24, 32), lambda window: np.ones(window.shape, bool))
    with pytest.raises(RuntimeError, match=r"tile .*please report"):
        label(Endless(100, 64), pointwise, Plan(100, 64, 32, 0, False, 2), "none", area=area)
    with pytest.raises(RuntimeError, match=r"tile .*please report"):
        label(Endless(100, 64), pointwise, Plan(100, 64, 32, 0.25, True, 2), "hann", area=area)


@pytest.mark.parametrize("widest", [10240, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.pitfall("P60", "F11")
def test_an_answer_that_is_no_number_is_an_error_with_its_place_never_class_0(value: float, widest: int) -> None:
    array = np.ones((1, 100, 64), dtype=np.float32)
    array[0, 70, 40] = 3e36  # what no nodata value names

    def overflows(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        answer = pointwise(tiles)
        answer[(images["x"] > 1e36).any(dim=1)[:, None].expand(answer.shape)] = value
        return answer

    with pytest.raises(DataError, match=r"row 70, column 40: .*(NaN|infinity).*nodata value .*fp32"):
        label(scene_of(array), overflows, Plan(100, 64, 32, 0.25, True, 2, widest), "hann")


@pytest.mark.parametrize("part", ["top", "scattered"])
@pytest.mark.pitfall("P34")
def test_a_batch_that_never_fills_holds_nothing_up(part: str) -> None:
    """Where tiles are left out for long, rows are finished and written meanwhile, not kept until the end."""

    class Sparse:
        def __init__(self) -> None:
            self.grid = Grid(None, IDENTITY, 6400, 64)

        def read(self, window: Window) -> dict[str, Chip]:
            rows = np.arange(window.row, window.row + window.height)
            some = rows < 10 if part == "top" else rows % 1600 < 10
            valid = np.repeat(some[:, None], window.width, axis=1)
            return {"x": Chip(np.ones((1, *window.shape), np.float32), valid)}

    read_to = [0]
    behind = [0]

    class Watch:
        def write(self, window: Window, arrays: Any) -> None:
            behind[0] = max(behind[0], read_to[0] - window.row)

    class Reading(Sparse):
        def read(self, window: Window) -> dict[str, Chip]:
            read_to[0] = window.row + window.height
            return super().read(window)

    products = Products((0, 1, 2))
    model = Model(pointwise, 3)
    job = prepare([Reading()], Stored((32, 64)), {"x": 1}, model, products, 1, PredictSection(tile=32, batch_size=8))
    into(job, Watch())
    assert behind[0] < 1600


@pytest.mark.parametrize("blend", ["hann", "none"])
@pytest.mark.pitfall("P34")
def test_the_width_of_a_strip_counts_what_its_tiles_read_beside_it(blend: str) -> None:
    seen: list[tuple[int, int]] = []

    class Watch:
        grid = Grid(None, IDENTITY, 40, 300)

        def read(self, window: Window) -> dict[str, Chip]:
            seen.append((window.col, window.col + window.width))
            return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}

    plan = Plan(40, 300, 32, 0.5, blend != "none", 4, widest=100)
    assert len(plan.strips) > 2
    for run in plan.runs(plan.shards):
        seen.clear()
        label_run(
            [Watch()], Stored((32, 32)), plan, run, Model(pointwise, CLASSES), blend, lambda f: {}, Arrays(40, 300)
        )
        assert max(end for _, end in seen) - min(first for first, _ in seen) == plan.width_read(run.strip)
