"""Numbers that no run means are refused with a message; small files that claim much take little."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from test_data_windows import ArrayScene
from test_recipe_errors import SMALL, complaint

from vfmseg.data.dataset import MOST_WINDOWS, CoverWindows, TrainingWindows
from vfmseg.data.given import open_scene
from vfmseg.data.windows import Draw
from vfmseg.errors import DataError, RecipeError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Grid
from vfmseg.inference.contracts import Model
from vfmseg.inference.job import prepare
from vfmseg.inference.products import Products
from vfmseg.inference.reading import stored_as
from vfmseg.recipe import load_recipe
from vfmseg.recipe.predict import PredictSection, settled

ABSURD = {
    "data.samples_per_epoch=1000000000": "data.samples_per_epoch = 1000000000 must be at most 1e+07; for example 500",
    "data.workers=100000": "data.workers = 100000 must be at most 256; the default is 0",
    "predict.readers=1000000000": "predict.readers = 1000000000 must be at most 256; the default is 2",
    "predict.batch_size=1000000000": "predict.batch_size = 1000000000 must be at most 4096; the default is 4",
    "predict.memory_limit=1000000000": "predict.memory_limit = 1000000000 must be at most 1.67772e+07; "
    "the default is 1024",
    "train.batch_size=1000000000": "train.batch_size = 1000000000 must be at most 4096; the default is 8",
    "train.accumulate=1000000000": "train.accumulate = 1000000000 must be at most 4096; the default is 1",
    "train.epochs=1000000000000": "train.epochs = 1000000000000 must be at most 1e+06; the default is 30",
    "train.optimizer.lr=1.0e300": "train.optimizer.lr = 1e+300 must be at most 100; the default is 0.0003",
    "train.optimizer.encoder_lr=1.0e300": "train.optimizer.encoder_lr = 1e+300 must be at most 100; for example 1e-05",
    "model.adapter.rank=1000000000": "model.adapter.rank = 1000000000 must be at most 8192; the default is 8",
    "model.adapter={name: adapter, hidden: 1000000000}": "model.adapter.hidden = 1000000000 must be at most 8192; "
    "the default is 64",
    "model.decoder.channels=1000000000": "model.decoder.channels = 1000000000 must be at most 8192; the default is 128",
    "model.encoder.upscale=1000000": "model.encoder.upscale = 1000000 must be at most 16; the default is 1.0",
    "model.encoder.layers=[1, 1000000000]": "model.encoder.layers.1 = 1000000000 must be at most 256; "
    "for example [3, 6, 9, 12]",
    f"predict.scales=[{', '.join(['8'] * 1000)}]": "must have 16 entries at most; the default is [1.0]",
    f"model.encoder.layers=[{', '.join(map(str, range(1, 999)))}]": "must be at most 256; for example [3, 6, 9, 12]",
    f"data.modalities.optical.bands=[{', '.join(map(str, range(1, 2000)))}]": "must have 1024 entries at most; "
    "for example [1, 2, 3]",
    f"data.classes={{{', '.join(f'{i}: c{i}' for i in range(5000))}}}": "must have 4096 entries at most; "
    "for example {0: 'land', 1: 'water'}",
}


@pytest.mark.parametrize("override", ABSURD, ids=lambda text: text[:40])
@pytest.mark.pitfall("F6")
def test_numbers_that_no_run_means_are_refused(tmp_path: Path, override: str) -> None:
    assert complaint(tmp_path, override)[0].endswith(ABSURD[override])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"readers": 10**9}, "predict: readers = 1000000000 must be at most 256"),
        ({"batch_size": 10**9}, "batch_size = 1000000000 must be at most 4096"),
        ({"memory_limit": 10**9}, "memory_limit = 1000000000 must be at most"),
        ({"tile": 10**9}, "tile = 1000000000 must be at most 65536"),
        ({"scales": (8.0,) * 1000}, r"scales = \[8.0, .*\.\.\. must have 16 entries at most"),
    ],
)
@pytest.mark.pitfall("F6")
def test_callers_are_held_to_the_bounds_of_the_recipe(tmp_path: Path, how: dict[str, Any], words: str) -> None:
    (tmp_path / "r.yaml").write_text(SMALL)
    recipe = load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=words) as caught:
        settled(recipe.predict, how)
    assert len(str(caught.value)) < 200


@pytest.mark.pitfall("F6")
def test_windows_far_larger_than_all_scenes_are_refused() -> None:
    scenes = [ArrayScene(96, 96), ArrayScene(64, 80)]
    with pytest.raises(DataError, match=r"data\.tile = 4096, but the longest side of a training scene is 96 px.*= 96$"):
        TrainingWindows(scenes, 4096, 0, None, "all")
    assert len(TrainingWindows(scenes, 256, 0, None, "all")) == 2  # the default tile, and small chips
    assert len(TrainingWindows([ArrayScene(1100, 8), ArrayScene(8, 8)], 2048, 0, None, "all")) == 2


class Vast:
    """A scene that claims the largest size there is."""

    grid = Grid(None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 2**31 - 1, 2**31 - 1)


@pytest.mark.pitfall("F6")
def test_windows_of_vast_scenes_are_counted_and_not_listed() -> None:
    tracemalloc.start()
    cover = CoverWindows([Vast(), Vast()], 256)  # type: ignore[list-item]
    assert len(cover) == 2 * (2**23) ** 2
    number, tile = cover.place(len(cover) - 1)
    assert (number, tile.window.row) == (1, 2**31 - 257)
    with pytest.raises(DataError, match=f"more than {MOST_WINDOWS:,}; set data.samples_per_epoch"):
        TrainingWindows([Vast()], 256, 0, None, "all")  # type: ignore[list-item]
    windows = TrainingWindows([Vast(), Vast()], 256, 0, None, "all", 100)  # type: ignore[list-item]
    slots = {windows.visits.slot(Draw(epoch, index)) for epoch in range(3) for index in range(100)}
    assert len(slots) == 300
    assert max(slots) >= (2**23) ** 2 > min(slots)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("height", "width"), [(1, 2**28), (2147483647, 1)])
@pytest.mark.pitfall("F6")
def test_a_small_file_that_claims_billions_of_pixels_is_planned_without_memory(
    tmp_path: Path, height: int, width: int
) -> None:
    file = tmp_path / "wide.vrt"
    file.write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">'
        '<VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'
    )
    scene = open_scene({"rgb": str(file)}, {"rgb": Bands(indexes=(1,))})
    tracemalloc.start()
    model = Model(lambda tiles: tiles.images["rgb"].pixels, 2)
    job = prepare([scene], stored_as(scene), {"rgb": 1}, model, Products((0, 1)), 1, PredictSection(tile=256))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    scene.close()
    assert sum(s.window.height * s.window.width for s in job.plan.shards) == height * width
