"""Band statistics: valid pixels only, each once, of the scenes that are given and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import write_raster

from vfmseg.data.from_files import scenes_from_files
from vfmseg.data.statistics import stream_statistics
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.validity import Chip


class Spied:
    """A scene in memory that counts how often each pixel is read."""

    def __init__(self, pixels: np.ndarray, valid: np.ndarray | None = None, name: str = "s") -> None:
        self.name, self.files = name, (name,)
        self.pixels = pixels.astype(np.float32)
        self.grid = Grid(None, IDENTITY, *pixels.shape[1:])
        self.valid = np.ones(pixels.shape[1:], dtype=bool) if valid is None else valid
        self.seen = np.zeros(pixels.shape[1:], dtype=int)

    def read(self, window: Window) -> dict[str, Chip]:
        self.seen[window.rows, window.cols] += 1
        valid = self.valid[window.rows, window.cols]
        pixels = self.pixels[:, window.rows, window.cols]
        assert valid.shape == window.shape  # nothing beyond the edge is asked for
        return {"x": Chip(np.where(valid, pixels, np.float32(0)), valid)}

    def read_labels(self, window: Window) -> np.ndarray:
        return np.full(window.shape, IGNORE)

    def bands(self) -> dict[str, int]:
        return {"x": len(self.pixels)}

    def dtypes(self) -> dict[str, str]:
        return {"x": "float32"}


def noise(seed: int, shape: tuple[int, int, int] = (3, 37, 53), mean: float = 5.0, std: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, shape)


def test_statistics_are_those_of_all_pixels_at_once() -> None:
    scenes = [Spied(noise(0)), Spied(noise(1, (3, 8, 90), mean=-40, std=9)), Spied(noise(2, (3, 1, 1)))]
    mean, std = stream_statistics(scenes, tile=16)["x"]
    together = np.concatenate([s.pixels.reshape(3, -1).astype(np.float64) for s in scenes], axis=1)
    assert mean == pytest.approx(together.mean(axis=1), rel=1e-9)
    assert std == pytest.approx(together.std(axis=1), rel=1e-9)
    assert all((scene.seen == 1).all() for scene in scenes)  # also where the last tile of a row is pulled back


@settings(max_examples=25, deadline=None)
@given(tile=st.integers(1, 80), height=st.integers(1, 70), width=st.integers(1, 70))
def test_statistics_do_not_depend_on_the_tile(tile: int, height: int, width: int) -> None:
    scene = Spied(noise(0, (2, height, width)))
    mean, std = stream_statistics([scene], tile)["x"]
    assert (scene.seen == 1).all()
    assert mean == pytest.approx(scene.pixels.astype(np.float64).mean(axis=(1, 2)), rel=1e-9)
    if height * width > 1:
        assert std == pytest.approx(scene.pixels.astype(np.float64).std(axis=(1, 2)), rel=1e-6)


@pytest.mark.pitfall("P26")
def test_invalid_pixels_are_never_counted() -> None:
    valid = np.random.default_rng(3).random((37, 53)) < 0.4
    whole = noise(0)
    mean, std = stream_statistics([Spied(whole, valid), Spied(noise(1), np.zeros((37, 53), dtype=bool))], 20)["x"]
    kept = whole.astype(np.float32).astype(np.float64)[:, valid]
    assert mean == pytest.approx(kept.mean(axis=1), rel=1e-9)
    assert std == pytest.approx(kept.std(axis=1), rel=1e-9)


@pytest.mark.pitfall("P26")
def test_nodata_and_nan_of_files_are_never_counted(tmp_path: Path) -> None:
    pixels = noise(0, (2, 30, 40), mean=100).astype(np.float32)
    frame = np.zeros((30, 40), dtype=bool)
    frame[:8], frame[:, -5:], frame[20, 20] = True, True, True
    stored = np.where(frame, -9999.0, pixels).astype(np.float32)
    stored[0, 20, 20] = np.nan
    stored[1, 20, 20] = 7e8
    write_raster(tmp_path / "i.tif", stored, nodata=-9999)
    write_raster(tmp_path / "l.tif", np.ones((30, 40), dtype=np.uint8))
    scenes = scenes_from_files(
        {"x": str(tmp_path / "i.tif")}, str(tmp_path / "l.tif"), {"x": Bands(scale=0.1, offset=2)},
        LabelMap((0, 1), 255), "x",
    )  # fmt: skip
    mean, std = stream_statistics(scenes, 16)["x"]
    kept = pixels.astype(np.float64)[:, ~frame] * 0.1 + 2
    assert mean == pytest.approx(kept.mean(axis=1), rel=1e-5)
    assert std == pytest.approx(kept.std(axis=1), rel=1e-5)


def test_large_means_keep_their_variance() -> None:
    # sums of squares in float32, or even a difference of two float64 sums, would lose a deviation this small
    scene = Spied(noise(0, (1, 200, 200), mean=30000, std=0.05))
    mean, std = stream_statistics([scene], 32)["x"]
    exact = scene.pixels.astype(np.float64)
    assert std[0] == pytest.approx(exact.std(), rel=1e-6)
    assert mean[0] == pytest.approx(exact.mean(), rel=1e-12)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 1.0), (12345.678, 12345.678), (-3.0, 3.0), (0.1, 1.0)])
def test_constant_bands_get_a_divisor_that_cannot_blow_up(value: float, expected: float) -> None:
    mean, std = stream_statistics([Spied(np.full((1, 50, 70), value))], 16)["x"]
    assert mean[0] == pytest.approx(value, rel=1e-6)
    assert std[0] == pytest.approx(expected, rel=1e-6)


def test_nothing_valid_and_nothing_at_all_are_errors() -> None:
    with pytest.raises(DataError, match=r"x: .*2 scenes .*data\.modalities\.x\.nodata"):
        stream_statistics([Spied(noise(0), np.zeros((37, 53), dtype=bool))] * 2)
    with pytest.raises(DataError, match="no scenes"):
        stream_statistics([])
    with pytest.raises(DataError, match=r"b: x .*2 bands, .*3; .*data\.modalities\.x\.bands"):
        stream_statistics([Spied(noise(0)), Spied(noise(0, (2, 4, 4)), name="b")])


@pytest.mark.pitfall("C25")
def test_statistics_touch_the_scenes_given_and_change_with_no_other() -> None:
    train, test = [Spied(noise(0))], [Spied(noise(1, mean=1e6))]
    alone = stream_statistics(train)
    assert (train[0].seen == 1).all()
    assert (test[0].seen == 0).all()
    assert stream_statistics(train + test) != alone
