"""Votes of any kind label scenes: here one that says the same everywhere, without recipe, folder or torch model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import write_raster
from torch import Tensor

from vfmseg.data.image import Known
from vfmseg.data.inputs import Input
from vfmseg.errors import DataError, RecipeError
from vfmseg.geo.bands import Bands
from vfmseg.inference.contracts import Tiles
from vfmseg.inference.output import Output
from vfmseg.labeller import Labeller
from vfmseg.recipe.data import ClassSpec
from vfmseg.recipe.predict import PredictSection

NONE = (0.0,)
RGB = Input("rgb", Bands(), 3, "uint8", "encoder", NONE * 3, (1.0,) * 3)
DEM = Input("dem", Bands(), 1, "float32", "dataset", NONE, (1.0,))


class Constant:
    """Says `winner` of every pixel, or breaks off at its call number `ends_at`; remembers where tiles lay."""

    def __init__(self, winner: int, ends_at: int = 0, inputs: tuple[Input, ...] = (RGB,), known: Known = "all") -> None:
        self.classes: Mapping[int, ClassSpec] = {3: ClassSpec(name="field"), 7: ClassSpec(name="road")}
        self.inputs = inputs
        self.device = torch.device("cpu")
        self.known = known
        self.identity = {"made_by": "a constant", "answer": str(winner)}
        self.runs_on: dict[str, Any] = {}
        self.one_batch_size = False
        self.winner, self.ends_at, self.calls = winner, ends_at, 0
        self.seen: set[tuple[int, int]] = set()

    def __call__(self, tiles: Tiles) -> Tensor:
        self.calls += 1
        if self.calls == self.ends_at:
            raise ArithmeticError
        self.seen |= {(window.row, window.col) for window in tiles.windows if window is not None}
        batch, height, width = next(iter(tiles.images.values())).valid.shape
        votes = torch.zeros(batch, len(self.classes), height, width)
        votes[:, sorted(self.classes).index(self.winner)] = 5.0
        return votes


def labeller(*arguments: Any, **options: Any) -> Labeller:
    return Labeller(Constant(*arguments, **options), PredictSection(tile=32, overlap=0.0, batch_size=2))


def scene(folder: Path) -> Path:
    image = np.full((3, 300, 90), 40, dtype=np.uint8)
    image[:, 100:110, 20:30] = 0
    return write_raster(folder / "scene.tif", image, nodata=0)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as stored:
        return stored.read(1)


def test_a_constant_labels_arrays_and_files(tmp_path: Path) -> None:
    made = labeller(7)
    path = scene(tmp_path)
    labels = made.predict(path)
    assert isinstance(labels, np.ndarray)
    hole = np.zeros((300, 90), dtype=bool)
    hole[100:110, 20:30] = True
    np.testing.assert_array_equal(labels, np.where(hole, made.nodata, 7))
    assert made.classes == {3: "field", 7: "road"}
    made.label(path, Output(tmp_path / "m.tif", extras=("confidence",)))
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), labels)
    with rasterio.open(tmp_path / "m.tif") as stored:
        assert {"made_by": "a constant", "answer": "7"}.items() <= stored.tags().items()
        assert "vfmseg_modalities" not in stored.tags()  # there is only one
    sure = 1 / (1 + np.exp(-5.0))  # softmax of 0 and 5
    assert made.probabilities(path)[1, 0, 0] == pytest.approx(sure, abs=1e-6)


def test_votes_are_told_where_each_tile_lies(tmp_path: Path) -> None:
    votes = Constant(3)
    Labeller(votes, PredictSection(tile=32, overlap=0.0)).predict(scene(tmp_path))
    rows, cols = [*range(0, 268, 32), 268], [0, 32, 58]
    assert votes.seen == {(row, col) for row in rows for col in cols}


@pytest.mark.pitfall("P35")
def test_an_interrupted_labelling_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    path = scene(tmp_path)
    labeller(7).label(path, tmp_path / "whole.tif")
    target = tmp_path / "labels.tif"
    with pytest.raises(ArithmeticError):
        labeller(7, ends_at=12).label(path, target)
    assert not target.exists()
    going_on = labeller(7)
    done = going_on.label(path, Output(target, resume=True))
    assert 0 < done.report.pixels < 300 * 90  # the rest alone
    np.testing.assert_array_equal(read(target), read(tmp_path / "whole.tif"))
    assert going_on.label(path, Output(target, resume=True)).before


@pytest.mark.pitfall("F1")
def test_other_votes_are_told_apart_by_their_identity(tmp_path: Path) -> None:
    path, target = scene(tmp_path), tmp_path / "labels.tif"
    with pytest.raises(ArithmeticError):
        labeller(7, ends_at=12).label(path, target)
    with pytest.raises(DataError, match=r"pieces here are of other work \(answer was 7, is 3"):
        labeller(3).label(path, Output(target, resume=True))
    labeller(7).label(path, Output(target, resume=True))
    with pytest.raises(DataError, match="exists already"):
        labeller(3).label(path, Output(target, resume=True))
    assert (read(target)[:100] == 7).all()


@pytest.mark.parametrize("known", ["all", "any"])
@pytest.mark.pitfall("P26")
def test_votes_say_where_several_modalities_have_an_answer(tmp_path: Path, known: Known) -> None:
    image, dem = np.full((3, 40, 50), 40, dtype=np.uint8), np.ones((1, 40, 50), dtype=np.float32)
    image[:, :10], dem[:, :, :20] = 0, np.nan
    given = {
        "rgb": str(write_raster(tmp_path / "i.tif", image, nodata=0)),
        "dem": str(write_raster(tmp_path / "d.tif", dem)),
    }
    labels = labeller(7, inputs=(RGB, DEM), known=known).predict(given)
    by_rgb, by_dem = np.ones((40, 50), dtype=bool), np.ones((40, 50), dtype=bool)
    by_rgb[:10], by_dem[:, :20] = False, False
    expected = by_rgb & by_dem if known == "all" else by_rgb | by_dem
    np.testing.assert_array_equal(labels == 7, expected)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"overlap": 0.95}, "overlap = 0.95 must be below 0.9"),
        ({"memory_limit": 4}, "memory_limit = 4 must be at least 16"),
        ({"batch_size": True}, "batch_size = true must be a whole number"),
        ({"overlap": np.float32("nan")}, "overlap = nan must be a finite number"),
        ({"tiel": 64}, "tiel is not a key here; did you mean 'tile'"),
    ],
)
@pytest.mark.pitfall("P62")
def test_settings_are_held_to_the_recipes_own_bounds(tmp_path: Path, how: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        labeller(7).label(scene(tmp_path), tmp_path / "m.tif", how)
    assert not (tmp_path / "m.tif").exists()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    how = {"tile": np.array(48), "batch_size": np.int64(3), "overlap": np.float32(0.5), "scales": np.array([1.0])}
    np.testing.assert_array_equal(labeller(7).probabilities(scene(tmp_path), how).argmax(axis=0), 1)


@pytest.mark.parametrize("given", [PredictSection(tile=48), [("tile", 48)], "tile=48"])
def test_settings_of_a_call_are_named(tmp_path: Path, given: Any) -> None:
    with pytest.raises(RecipeError, match=r"how is a \w+; expected keys of predict with values"):
        labeller(7).label(scene(tmp_path), tmp_path / "m.tif", given)


@pytest.mark.parametrize("given", [[3, 2, 1], "321", 3])
def test_bands_are_named_by_their_modality(tmp_path: Path, given: Any) -> None:
    with pytest.raises(RecipeError, match=r"bands = .*; expected numbers by modality, such as \{'rgb'"):
        labeller(7).predict(scene(tmp_path), bands=given)


@pytest.mark.parametrize("suffix", ["", ".", "gpkg", "./m.gpkg", "../m.gpkg", ".\\m.gpkg"])
def test_polygons_are_asked_for_by_a_suffix(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(RecipeError, match="expected a suffix with its dot"):
        labeller(7).label(scene(tmp_path), Output(tmp_path / "m.tif", polygons=suffix))
    assert [file.name for file in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ({"polygons": ".gpkg"}, r"m\.gpkg: exists already"),
        ({"polygons": ".gpkg", "resume": True}, r"m\.gpkg: exists already"),  # and is none of ours
        ({"polygons": ".shp"}, r"polygons cannot be written as '\.shp'"),
        ({"polygons": ".gpkg", "overwrite": True, "min_area": -1.0}, "min_area -1.0"),
        ({"target": "."}, "is a folder; expected the name of a GeoTIFF"),
        ({"target": ".", "extras": ("confidence",)}, "is a folder; expected the name of a GeoTIFF"),
    ],
)
@pytest.mark.pitfall("P62")
def test_what_cannot_be_written_is_told_before_anything_is(tmp_path: Path, output: dict[str, Any], words: str) -> None:
    pytest.importorskip("pyogrio")
    path = scene(tmp_path)
    (tmp_path / "m.gpkg").write_text("somebody's own")
    with pytest.raises(DataError, match=words):
        labeller(7).label(path, Output(**{"target": tmp_path / "m.tif"} | output))
    assert {file.name for file in tmp_path.iterdir()} == {"m.gpkg", "scene.tif"}
    assert (tmp_path / "m.gpkg").read_text() == "somebody's own"


def test_a_labeller_knows_the_side_of_its_tiles() -> None:
    with pytest.raises(RecipeError, match="tile is missing; expected the side of a tile in pixels"):
        Labeller(Constant(7), PredictSection())
