"""The streaming engine: the same ground gets the same answer, whatever tile it falls into."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmseg.geo.grid import cut
from vfmseg.geo.labels import IGNORE
from vfmseg.geo.reader import Bands, Chip
from vfmseg.inference.blend import BLENDS, profile, tile_weights
from vfmseg.inference.sources import OpenScene
from vfmseg.inference.stream import stream_rows

CLASSES = 3


def pointwise(chips: list[dict[str, Chip]]) -> np.ndarray:
    """A model that looks at one pixel at a time: class = value, with a probability that varies with the value."""
    values = np.stack([c["x"].pixels[0] for c in chips])
    scores = np.stack([-((values - k) ** 2) for k in range(CLASSES)], axis=1)
    exponentials = np.exp(scores)
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def label(array: np.ndarray, tile: int, overlap: float, blend: str, batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    scene = OpenScene({"x": array}, {"x": Bands()})
    rows = list(stream_rows(scene, pointwise, CLASSES, tile, overlap, blend, batch))
    assert [r.row for r in rows] == list(np.cumsum([0, *(len(r.labels) for r in rows)])[:-1])
    return np.concatenate([r.labels for r in rows]), np.concatenate([r.probabilities for r in rows], axis=1)


@settings(max_examples=120, deadline=None)
@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    tile=st.integers(1, 17),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    blend=st.sampled_from(BLENDS),
    batch=st.integers(1, 5),
)
def test_p45_tiled_labels_equal_whole_scene_labels(
    height: int, width: int, tile: int, overlap: float, blend: str, batch: int
) -> None:
    array = np.random.default_rng(height * 97 + width).uniform(0, 2, (1, height, width)).astype(np.float32)
    whole = pointwise([{"x": Chip(array, np.ones((height, width), bool))}])[0]
    labels, probabilities = label(array, tile, overlap, blend, batch)
    assert probabilities.shape == whole.shape
    np.testing.assert_allclose(probabilities, whole, atol=2e-6)
    assert (labels == whole.argmax(axis=0)).all()


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(5, 40), (33, 33), (64, 17)])
def test_p26_blend_weights_are_a_partition_of_unity(blend: str, size: tuple[int, int]) -> None:
    total = np.zeros(size)
    tiles = cut(*size, 16, 6)
    for t in tiles:
        weights = tile_weights(blend, t)
        inside = t.window.clip(*size)
        total[inside.rows, inside.cols] += weights[: inside.height, : inside.width]
    assert total.min() > 0
    share = np.zeros(size)
    for t in tiles:
        inside = t.window.clip(*size)
        part = tile_weights(blend, t)[: inside.height, : inside.width]
        share[inside.rows, inside.cols] += part / total[inside.rows, inside.cols]
    np.testing.assert_allclose(share, 1.0, atol=1e-6)


@pytest.mark.parametrize("blend", ["hann", "gaussian", "average"])
def test_c18_weights_stay_positive_to_the_last_pixel(blend: str) -> None:
    weights = profile(blend, 512)
    assert weights.dtype == np.float32
    assert weights.min() > 1e-6
    np.testing.assert_array_equal(weights, weights[::-1])


def test_c17_each_window_is_run_once() -> None:
    seen: list[bytes] = []

    def spy(chips: list[dict[str, Chip]]) -> np.ndarray:
        seen.extend(c["x"].pixels.tobytes() for c in chips)
        return pointwise(chips)

    array = (np.random.default_rng(1).uniform(0, 2, 40 * 56).astype(np.float32)).reshape(1, 40, 56)
    scene = OpenScene({"x": array}, {"x": Bands()})
    list(stream_rows(scene, spy, CLASSES, 16, 0.5, "hann", 1))
    assert len(seen) == len(set(seen)) == len(cut(40, 56, 16, 8))


def test_p26_invalid_pixels_come_out_as_nodata_and_do_not_spread() -> None:
    array = np.ones((1, 30, 30), np.float32)
    array[0, 10:13, 5:9] = np.nan
    labels, _ = label(array, 8, 0.25, "hann")
    expected = np.ones((30, 30), np.int64)
    expected[10:13, 5:9] = IGNORE
    np.testing.assert_array_equal(labels, expected)


def test_p33_tiles_without_a_valid_pixel_are_never_run() -> None:
    array = np.full((1, 64, 64), np.nan, np.float32)
    array[0, :10, :10] = 1
    runs = 0

    def spy(chips: list[dict[str, Chip]]) -> np.ndarray:
        nonlocal runs
        runs += 1
        return pointwise(chips)

    rows = list(stream_rows(OpenScene({"x": array}, {"x": Bands()}), spy, CLASSES, 16, 0.0, "none", 1))
    assert runs == 1
    assert (np.concatenate([r.labels for r in rows]) >= 0).sum() == 100


def test_p62_an_error_in_the_model_is_not_swallowed() -> None:
    def broken(chips: list[dict[str, Chip]]) -> np.ndarray:
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        list(stream_rows(OpenScene({"x": np.ones((1, 4, 4))}, {"x": Bands()}), broken, CLASSES, 4, 0, "none", 1))


def test_c35_every_batch_has_one_shape_and_batches_do_not_matter() -> None:
    sizes: set[int] = set()

    def spy(chips: list[dict[str, Chip]]) -> np.ndarray:
        sizes.add(len(chips))
        return pointwise(chips)

    array = np.random.default_rng(0).uniform(0, 2, (1, 40, 40)).astype(np.float32)
    scene = OpenScene({"x": array}, {"x": Bands()})
    one = np.concatenate([r.probabilities for r in stream_rows(scene, spy, CLASSES, 16, 0.5, "hann", 3)], axis=1)
    assert sizes == {3}  # 16 tiles: the last batch is filled up
    two = np.concatenate([r.probabilities for r in stream_rows(scene, pointwise, CLASSES, 16, 0.5, "hann", 1)], axis=1)
    np.testing.assert_array_equal(one, two)


def test_p34_memory_does_not_grow_with_height() -> None:
    """The band holds one tile of rows: traced memory at four times the height differs by less than a tenth."""
    import tracemalloc

    class Endless:
        def __init__(self, height: int) -> None:
            self.grid = OpenScene({"x": np.ones((1, 1, 1))}, {"x": Bands()}).grid
            self.grid = type(self.grid)(None, self.grid.transform, height, 256)

        def read(self, window):  # type: ignore[no-untyped-def]
            shape = (window.height, window.width)
            return {"x": Chip(np.ones((1, *shape), np.float32), np.ones(shape, bool))}

    peaks = []
    for height in (512, 2048):
        tracemalloc.start()
        for _ in stream_rows(Endless(height), pointwise, CLASSES, 64, 0.25, "hann", 4):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
