"""What is written: class ids, and how sure the model is, against arithmetic in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.validity import Chip
from vfmseg.geo.writer import MapWriter
from vfmseg.inference.contracts import Finished, Model, Tiles
from vfmseg.inference.job import Arrays, into, prepare
from vfmseg.inference.products import EXTRAS, NODATA, STEPS, Products
from vfmseg.inference.reading import Stored
from vfmseg.recipe.predict import PredictSection

IDS = (3, 7, 40, 41)
SHAPE = (9, 13)


def finished(logits: bool = False, classes: int = 4) -> tuple[Finished, np.ndarray]:
    """Random votes that were summed with random weights, holes included; and the float64 means (K, h, w)."""
    rng = np.random.default_rng(0)
    means = rng.normal(0, 3, (classes, *SHAPE)) if logits else rng.dirichlet(np.full(classes, 0.3), SHAPE)
    means = means if logits else means.transpose(2, 0, 1)
    weights = rng.uniform(1e-4, 5, SHAPE)
    valid = rng.uniform(size=SHAPE) > 0.2
    skipped = ~valid & (rng.uniform(size=SHAPE) > 0.5)  # no tile was run there
    sums = np.where(skipped, 0, means * weights)
    weights = np.where(skipped, 0, weights)
    tensors = [torch.from_numpy(a.astype(np.float32)) for a in (sums, weights)]
    return Finished(tensors[0], tensors[1], valid), means


def probabilities(means: np.ndarray, logits: bool) -> np.ndarray:
    if not logits:
        return means
    raised = np.exp(means - means.max(axis=0))
    shares: np.ndarray = raised / raised.sum(axis=0)
    return shares


def values(stored: np.ndarray) -> np.ndarray:
    assert stored.dtype == np.uint8
    return stored / STEPS


HALF_A_STEP = 0.5 / STEPS + 2e-6


@pytest.mark.parametrize("logits", [False, True], ids=["probabilities", "logits"])
def test_extras_are_quantised_to_half_a_step(logits: bool) -> None:
    given, means = finished(logits)
    arrays = Products(IDS, EXTRAS, logits)(given)
    shares = probabilities(means, logits)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=0) / np.log(4)
    valid = given.valid
    assert {name: array.shape for name, array in arrays.items()} == {
        "labels": (1, *SHAPE), "confidence": (1, *SHAPE), "uncertainty": (1, *SHAPE), "probabilities": (4, *SHAPE),
    }  # fmt: skip
    for name, expected in {"confidence": shares.max(axis=0)[None], "uncertainty": entropy[None],
                           "probabilities": shares}.items():  # fmt: skip
        np.testing.assert_allclose(values(arrays[name])[:, valid], expected[:, valid], atol=HALF_A_STEP, err_msg=name)
        assert (arrays[name][:, ~valid] == NODATA).all()
        assert (arrays[name][:, valid] != NODATA).all()
    np.testing.assert_array_equal(arrays["labels"][0], np.where(valid, np.array(IDS)[shares.argmax(axis=0)], 255))


def test_probabilities_and_logits_are_averaged_differently() -> None:
    """Two tiles of equal weight: one is certain of class 1, the other leans to class 0."""
    votes = np.array([[-10.0, 10.0], [2.0, 0.0]])
    shares = np.exp(votes) / np.exp(votes).sum(axis=1, keepdims=True)
    for logits, sums in ((False, shares.sum(axis=0)), (True, votes.sum(axis=0))):
        one = Finished(
            torch.tensor(sums, dtype=torch.float32).reshape(2, 1, 1),
            torch.full((1, 1), 2.0),
            np.ones((1, 1), bool),
        )
        arrays = Products((0, 1), ("confidence",), logits)(one)
        expected = shares.mean(axis=0) if not logits else np.exp([-4.0, 5.0]) / np.exp([-4.0, 5.0]).sum()
        assert arrays["confidence"][0, 0, 0] == round(expected.max() * STEPS)
    assert round(shares.mean(axis=0).max() * STEPS) < 150


def test_certain_and_undecided_are_the_ends_of_the_scale() -> None:
    for shares, confidence, uncertainty in (((1.0, 0, 0, 0), STEPS, 0), ((0.25,) * 4, round(STEPS / 4), STEPS)):
        sums = torch.tensor(shares).reshape(4, 1, 1) * 3
        one = Finished(sums, torch.full((1, 1), 3.0), np.ones((1, 1), bool))
        arrays = Products(IDS, EXTRAS)(one)
        assert arrays["confidence"].item() == pytest.approx(confidence, abs=1)
        assert arrays["uncertainty"].item() == uncertainty
    single = Finished(torch.ones(1, 1, 1), torch.ones(1, 1), np.ones((1, 1), bool))
    assert Products((5,), EXTRAS)(single)["uncertainty"].item() == 0


@pytest.mark.parametrize(
    ("ids", "dtype", "nodata"),
    [
        ((0, 1, 2, 3), "uint8", 255),
        ((3, 7, 40, 254), "uint8", 255),
        ((3, 255, 40, 41), "uint16", 65535),
        ((1000, 2, 60000, 300), "uint16", 65535),
        ((-1, 0, 300, 7), "int16", -32768),
        ((0, 1, 2, 100000), "int32", -(2**31)),
    ],
)
@pytest.mark.pitfall("P36")
def test_ids_of_any_kind_keep_their_class_and_are_never_nodata(ids: tuple[int, ...], dtype: str, nodata: int) -> None:
    given, means = finished()
    labels = Products(ids)(given)["labels"]
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels[0], np.where(given.valid, np.array(ids)[means.argmax(axis=0)], nodata))
    layers = Products(ids).layers(["a"] * 4, [(0, 0, 0)] * 4, {})
    assert (layers["labels"].dtype, layers["labels"].nodata) == (dtype, nodata)
    assert nodata not in ids


@pytest.mark.pitfall("P26")
def test_where_nothing_was_run_there_is_no_class_and_no_warning() -> None:
    nothing = Finished(torch.zeros(4, *SHAPE), torch.zeros(SHAPE), np.zeros(SHAPE, bool))
    for logits in (False, True):
        with np.errstate(all="raise"):
            arrays = Products(IDS, EXTRAS, logits)(nothing)
        assert all((array == NODATA).all() for array in arrays.values())


def test_layers_describe_what_is_written(tmp_path: Path) -> None:
    """Written and read back by somebody who knows only the file: number x scale, masked, is the value."""
    given, means = finished()
    products = Products(IDS, EXTRAS)
    names, colors = ["land", "water", "Fluß", "road"], [(i, 2 * i, 3 * i) for i in range(4)]
    arrays = products(given)
    layers = products.layers(names, colors, {"vfmseg_recipe": "flood"})
    assert set(layers) == set(arrays)
    grid = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), *SHAPE)
    for name, array in arrays.items():
        with MapWriter(tmp_path / f"{name}.tif", grid, layers[name]) as target:
            target.write(0, array)
    with rasterio.open(tmp_path / "labels.tif") as source:
        assert source.tags()["CLASS_40"] == "Fluß"
        assert source.colormap(1)[41][:3] == (3, 6, 9)
        assert source.scales == (1.0,)
    with rasterio.open(tmp_path / "probabilities.tif") as source:
        assert source.descriptions == tuple(names)
        read = source.read(masked=True) * np.array(source.scales)[:, None, None]
        assert source.tags()["vfmseg_recipe"] == "flood"
    np.testing.assert_array_equal(read.mask, np.broadcast_to(~given.valid, means.shape))
    np.testing.assert_allclose(read.filled(0)[:, given.valid], means[:, given.valid], atol=HALF_A_STEP)
    for name in ("confidence", "uncertainty"):
        with rasterio.open(tmp_path / f"{name}.tif") as source:
            assert (source.nodata, source.scales, bool(source.descriptions[0])) == (255, (1 / 254,), True)


def test_only_what_is_asked_for_is_made() -> None:
    given, _ = finished()
    assert set(Products(IDS)(given)) == {"labels"}
    assert set(Products(IDS, ("uncertainty",))(given)) == {"labels", "uncertainty"}
    assert set(Products(IDS, ("uncertainty",)).layers(["a"] * 4, [(0, 0, 0)] * 4, {})) == {"labels", "uncertainty"}


class Even:
    """A scene that is the same everywhere."""

    grid = Grid(None, IDENTITY, 40, 50)

    def read(self, window: Window) -> dict[str, Chip]:
        return {"x": Chip(np.ones((1, *window.shape), np.float32), np.ones(window.shape, bool))}


@pytest.mark.parametrize("size", [1e37, 3e38])
@pytest.mark.pitfall("F11")
def test_huge_finite_logits_are_labelled(size: float) -> None:
    """Their total is beyond all numbers where each is one; what is none has a message (test_inference.py)."""

    def huge(tiles: Tiles) -> torch.Tensor:
        votes = torch.full((len(tiles.windows), 3, 16, 16), size)
        votes[:, 1] = 0.9 * size
        assert not torch.isfinite(votes.sum())
        return votes

    products = Products((4, 5, 6), EXTRAS, logits=True)
    settings = PredictSection(tile=16, blend="none")
    job = prepare([Even()], Stored(), {"x": 1}, Model(huge, 3), products, products.bytes_a_pixel, settings)
    made = Arrays(40, 50)
    into(job, made)
    assert (made.kept["labels"] == 4).all()
    assert made.kept["confidence"].max() <= STEPS
