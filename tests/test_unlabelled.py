"""Windows of unlabelled scenes: where they lie, how large they are, what is valid in them, and wrong data."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import write_raster
from pydantic import ValidationError
from test_data_windows import ArrayScene
from torch.utils.data import DataLoader

from vfmseg.build.training import augment_of
from vfmseg.build.unlabelled import Unlabelled, open_scenes, open_unlabelled, windows_of
from vfmseg.data.augment import Augment, Radiometry
from vfmseg.data.image import Image
from vfmseg.data.sample import Sample, collate
from vfmseg.data.statistics import stream_statistics
from vfmseg.data.traces import Traces
from vfmseg.data.unlabelled import LEAST_VALID, TRIES, UnlabelledWindows, resized
from vfmseg.data.visits import Portion
from vfmseg.data.windows import Draw, alike_together, epoch_draws
from vfmseg.errors import DataError
from vfmseg.geo.grid import Window
from vfmseg.recipe.base import Section
from vfmseg.recipe.messages import lines
from vfmseg.recipe.run import AugmentSection
from vfmseg.recipe.unlabelled import UnlabelledSection
from vfmseg.training.resume import changed_data

NOBODYS = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))  # mean and std "of an encoder"


class Place(ArrayScene):
    """Two bands, row and column of each pixel's centre; notes the windows that were read of it."""

    def __init__(self, height: int, width: int, name: str = "s") -> None:
        super().__init__(height, width, name=name)
        self.windows: list[Window] = []

    def read(self, window: Window) -> dict[str, Any]:
        self.windows.append(window)
        (chip,) = super().read(window).values()
        rows, cols = np.mgrid[window.row : window.row + window.height, window.col : window.col + window.width] + 0.5
        chip.pixels = (np.stack([rows, cols]) * chip.valid).astype(np.float32)
        return {"rgb": chip}

    def bands(self) -> dict[str, int]:
        return {"rgb": 2}


def same(one: Sample, two: Sample) -> bool:
    masks = [sample.mask for sample in (one, two)]
    return all(
        torch.equal(one.images[name].pixels, two.images[name].pixels)
        and torch.equal(one.images[name].valid, two.images[name].valid)
        for name in one.images
    ) and (torch.equal(*masks) if masks[0] is not None else masks == [None, None])


def half(sample: Sample, draws: np.random.Generator) -> Sample:
    """With a mask of 16 patches, half of which are hidden."""
    return replace(sample, mask=torch.from_numpy(draws.permutation(16) < 8).reshape(4, 4))


def section(scenes: Any, modalities: Any = None, **more: Any) -> UnlabelledSection:
    content = {"modalities": modalities or {"rgb": {}}, "scenes": scenes, "tile": 16, **more}
    return UnlabelledSection.model_validate(content)


def opened(scenes: Any, modalities: Any = None, **more: Any) -> Unlabelled:
    return open_unlabelled(section(scenes, modalities, **more), lambda name: NOBODYS)


def noise(seed: int, bands: int, height: int, width: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, (bands, height, width)).astype(dtype)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Optical scenes of three sizes and radar scenes; two of each show one place under one name."""
    for name, size in (("a", (64, 80)), ("b", (40, 40)), ("c", (90, 33))):
        write_raster(tmp_path / "rgb" / f"{name}.tif", noise(len(name), 3, *size))
    for name, size in (("a", (64, 80)), ("b", (40, 40))):
        write_raster(tmp_path / "sar" / f"{name}.tif", noise(7, 2, *size).astype(np.float32) / 10)
    return tmp_path


# ------------------------------------------------------------------------------------- which scenes, and where


def test_scenes_are_drawn_by_their_area() -> None:
    """Of 5 epochs of 400 draws the shares are exact but for the rest that a scene's list leaves: 2 %."""
    scenes = [Place(64, 64), Place(64, 192), Place(256, 192)]
    windows = UnlabelledWindows(scenes, 16, 0, samples_per_epoch=400)
    found = Counter(windows.visits.scene(Draw(epoch, index)) for epoch in range(5) for index in range(400))
    areas = [scene.grid.height * scene.grid.width for scene in scenes]
    for number, area in enumerate(areas):
        assert abs(found[number] / 2000 - area / sum(areas)) < 0.02


def test_sources_are_drawn_by_their_weights() -> None:
    """Weights 3 and 1, whatever the areas: of 100 draws of an epoch 75 and 25."""
    scenes = [Place(32, 32), Place(128, 128), Place(128, 128)]
    portions = [Portion(1, 3.0), Portion(2, 1.0)]
    windows = UnlabelledWindows(scenes, 16, 0, samples_per_epoch=100, portions=portions)
    for epoch in range(3):
        found = Counter(windows.visits.scene(Draw(epoch, index)) for index in range(100))
        assert abs(found[0] - 75) <= 1
        assert abs(found[1] - found[2]) <= 12


@pytest.mark.pitfall("C20")
def test_windows_reach_every_edge_and_stay_inside() -> None:
    scene = Place(50, 90)
    windows = UnlabelledWindows([scene], 16, 0, scale=(0.5, 2.0), samples_per_epoch=1000)
    assert all(windows[Draw(0, index)].images["rgb"].valid.all() for index in range(1000))
    assert len(scene.windows) == 1000
    assert (min(w.row for w in scene.windows), min(w.col for w in scene.windows)) == (0, 0)
    assert max(w.row + w.height for w in scene.windows) == 50
    assert max(w.col + w.width for w in scene.windows) == 90


def test_sides_fill_the_range_evenly_in_their_logarithm() -> None:
    scene = Place(400, 400)
    windows = UnlabelledWindows([scene], 64, 0, scale=(0.5, 2.0), samples_per_epoch=800)
    for index in range(800):
        assert windows[Draw(0, index)].images["rgb"].pixels.shape == (2, 64, 64)
    sides = np.array([window.height for window in scene.windows])
    assert all(window.height == window.width for window in scene.windows)
    assert (sides.min(), sides.max()) == (32, 128)
    assert abs((sides < 64).mean() - 0.5) < 0.05  # half of the windows enlarge, half make smaller
    assert abs((sides < 45).mean() - 0.25) < 0.05


def test_of_small_scenes_windows_are_as_large_as_they_fit() -> None:
    scene = Place(40, 70)
    windows = UnlabelledWindows([scene], 32, 0, scale=(1.0, 2.0), samples_per_epoch=200)
    assert all(windows[Draw(0, index)].images["rgb"].valid.all() for index in range(200))
    assert {window.height for window in scene.windows} == set(range(32, 41))


# ------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("side", [24, 48, 67, 96])
def test_resizing_moves_nothing(side: int) -> None:
    """Where each pixel holds its own place, a resized window holds the places of its own centres."""
    rows, cols = np.mgrid[:side, :side] + 0.5
    image = Image(torch.tensor(np.stack([rows, cols]), dtype=torch.float32), torch.ones(side, side, dtype=torch.bool))
    small = resized(image, 48)
    centres = (torch.arange(48) + 0.5) * side / 48
    inner = slice(2, -2)  # at the edge there is nothing beyond to average with
    # the weights of an average over 1.4 pixels lie up to 0.07 px beside the middle
    close = 0.1 if side == 67 else 1e-4
    assert torch.allclose(small.pixels[0, inner, 5], centres[inner].float(), atol=close, rtol=0)
    assert torch.allclose(small.pixels[1, 5, inner], centres[inner].float(), atol=close, rtol=0)
    assert small.valid.all()
    if side == 48:
        assert small is image


def test_smaller_windows_are_averages() -> None:
    """Stripes of two pixels made four times smaller are grey; the two pixels round each centre alone are all black."""
    stripes = (torch.arange(64) % 4 % 3 == 0).float().expand(1, 64, 64) * 100
    small = resized(Image(stripes, torch.ones(64, 64, dtype=torch.bool)), 16).pixels
    assert (small[..., 1:-1] - 50).abs().max() < 15


@pytest.mark.parametrize("side", [20, 40, 56, 80])
@pytest.mark.pitfall("P26")
def test_a_resized_pixel_is_valid_only_if_all_it_is_made_from_is(side: int) -> None:
    """Changing what is invalid changes nothing that is valid, and what is valid has the value of the whole image."""
    random = np.random.default_rng(side)
    pixels = torch.from_numpy(random.uniform(50, 100, (2, side, side))).float()
    valid = torch.from_numpy(random.random((side, side)) > 0.01)
    image = resized(Image(torch.where(valid, pixels, 0.0), valid), 40)
    whole = resized(Image(pixels, torch.ones_like(valid)), 40)
    assert 0 < int((~image.valid).sum()) < 40 * 40
    assert torch.equal(image.pixels[:, image.valid], whole.pixels[:, image.valid])
    assert not image.pixels[:, ~image.valid].any()
    # and no more than those: what does not depend on an invalid pixel is valid
    moved = resized(Image(torch.where(valid, pixels, 1e6), torch.ones_like(valid)), 40)
    assert torch.equal(image.valid, (moved.pixels == whole.pixels).all(dim=0))


# --------------------------------------------------------------------------------------------------- nodata


def test_windows_that_are_mostly_nodata_are_drawn_again() -> None:
    """Two thirds of the scene are nodata: first tries would be mostly invalid in more than half of the draws."""
    scene = Place(120, 120)
    scene.valid[:, 40:] = False
    windows = UnlabelledWindows([scene], 16, 0, samples_per_epoch=300)
    shares = np.array([float(windows[Draw(0, index)].images["rgb"].valid.float().mean()) for index in range(300)])
    first = np.array([scene.valid[w.rows, w.cols].mean() for w in scene.windows])
    assert (first < LEAST_VALID).mean() > 0.5
    assert (shares >= LEAST_VALID).mean() > 0.94  # ten tries, each good in one of three
    assert len(scene.windows) <= 300 * TRIES


def test_of_a_scene_with_hardly_anything_the_best_window_is_taken_after_ten_tries() -> None:
    scene = Place(64, 64)
    scene.valid[:] = False
    scene.valid[10:14, 10:14] = True
    windows = UnlabelledWindows([scene], 16, 0, samples_per_epoch=40)
    for index in range(40):
        scene.windows.clear()
        share = float(windows[Draw(0, index)].images["rgb"].valid.float().mean())
        assert len(scene.windows) == TRIES
        assert share == max(scene.valid[w.rows, w.cols].mean() for w in scene.windows)


def test_a_scene_smaller_than_a_window_is_read_once() -> None:
    scene = Place(10, 10)
    windows = UnlabelledWindows([scene], 16, 0)
    assert int(windows[Draw(0, 0)].images["rgb"].valid.sum()) == 100
    assert len(scene.windows) == 1


def test_of_a_filler_nothing_is_valid_and_nothing_is_read() -> None:
    scene = Place(64, 64)
    windows = UnlabelledWindows([scene], 16, 0, Augment(), mask=half)
    filler, drawn = windows[Draw(0, 1, filler=True)], windows[Draw(0, 0)]
    assert len(scene.windows) == 1
    assert not filler.images["rgb"].valid.any()
    assert not filler.images["rgb"].pixels.any()
    assert len(collate([drawn, filler])) == 2  # one layout, mask included


# --------------------------------------------------------------------------------------------------- draws


@pytest.mark.pitfall("C26", "P57")
def test_a_draw_is_the_same_in_any_order_and_others_are_others() -> None:
    def made(seed: int = 4) -> UnlabelledWindows:
        augment = Augment(radiometry={"rgb": Radiometry(brightness=0.3)})
        return UnlabelledWindows([Place(90, 90)], 32, seed, augment, (0.5, 2.0), 30, mask=half)

    draws = [Draw(epoch, index) for epoch in range(2) for index in range(6)]
    forwards = {draw: made()[draw] for draw in draws}
    windows = made()
    torch.manual_seed(5), np.random.seed(5)
    backwards = {draw: windows[draw] for draw in reversed(draws)}
    assert all(same(forwards[draw], backwards[draw]) for draw in draws)
    assert not any(same(one, two) for i, one in enumerate(forwards.values()) for two in list(forwards.values())[:i])
    assert not any(same(forwards[draw], made(5)[draw]) for draw in draws)
    masks = {tuple(sample.mask.flatten().tolist()) for sample in forwards.values() if sample.mask is not None}
    assert len(masks) == len(draws)  # another for each draw and epoch
    places = [UnlabelledWindows([Place(900, 900)], 16, seed) for seed in (4, 5)]
    assert len({tuple(w[Draw(e, 0)].images["rgb"].pixels[:, 0, 0].tolist()) for w in places for e in range(3)}) == 6


@pytest.mark.pitfall("C26")
def test_masks_do_not_depend_on_what_else_is_drawn() -> None:
    plain = UnlabelledWindows([Place(90, 90)], 32, 4, None, (1.0, 1.0), 30, mask=half)
    rich = UnlabelledWindows([Place(90, 90)], 32, 4, Augment(), (0.5, 2.0), 30, mask=half)
    batch, other = (collate([windows[Draw(1, i)] for i in range(5)]) for windows in (plain, rich))
    assert batch.mask is not None
    assert other.mask is not None
    assert (batch.mask.shape, batch.mask.dtype) == ((5, 4, 4), torch.bool)
    assert torch.equal(batch.mask, other.mask)
    moved = batch.to("cpu").mask
    assert moved is not None
    assert torch.equal(moved, batch.mask)
    assert (batch.mask.sum(dim=(1, 2)) == 8).all()
    assert collate([UnlabelledWindows([Place(90, 90)], 32, 4)[Draw(0, 0)]]).mask is None


@pytest.mark.pitfall("P57")
def test_workers_and_pickles_give_the_same_samples(place: Path) -> None:
    chosen = section({"rgb": f"{place}/rgb"}, samples_per_epoch=12, scale=[0.5, 2.0])
    data = open_unlabelled(chosen, lambda name: NOBODYS)
    windows = windows_of(chosen, data, 3, augment_of(AugmentSection(), data.inputs), half)
    draws = epoch_draws(12, 12, 3, 0)
    alone = [windows[draw] for draw in draws]
    again = pickle.loads(pickle.dumps(windows))
    assert all(same(one, again[draw]) for one, draw in zip(alone, draws, strict=True))
    loader = DataLoader(
        windows, batch_sampler=[draws[:6], draws[6:]], collate_fn=list, num_workers=1, multiprocessing_context="spawn"
    )
    assert all(same(one, two) for one, two in zip(alone, [s for part in loader for s in part], strict=True))


def test_windows_are_turned_and_mirrored_and_nothing_else() -> None:
    """Rows and columns of a window that was turned by quarters are still whole pixels, in any of eight orders."""
    windows = UnlabelledWindows([Place(64, 64)], 16, 0, Augment(), samples_per_epoch=60)
    ways = set()
    for index in range(60):
        sample = windows[Draw(0, index)]
        rows, cols = sample.images["rgb"].pixels
        assert torch.equal(rows % 1, torch.full((16, 16), 0.5))
        ways.add((int(rows[0, 0] - rows[1, 0]), int(cols[0, 0] - cols[1, 0]), int(cols[0, 0] - cols[0, 1])))
        assert sample.labels is None
    assert len(ways) == 6  # rows along either axis either way, and then columns either way: three numbers tell six


# ---------------------------------------------------------------------------------------------- several sensors


def test_batches_of_several_sensors_are_of_one_kind(place: Path) -> None:
    chosen = section(
        [{"rgb": f"{place}/rgb", "weight": 1}, {"sar": f"{place}/sar", "weight": 1}],
        {"rgb": {}, "sar": {}}, samples_per_epoch=24,
    )  # fmt: skip
    data = open_unlabelled(chosen, lambda name: NOBODYS)
    assert [one.optional for one in data.inputs] == [True, True]
    assert [portion.scenes for portion in data.portions] == [3, 2]
    windows = windows_of(chosen, data, 0, None)
    draws = alike_together(epoch_draws(24, 24, 0, 0), 4, windows.kind)
    batches = [collate([windows[draw] for draw in draws[i : i + 4]]) for i in range(0, 24, 4)]
    assert Counter(tuple(batch.present()) for batch in batches) == {("rgb",): 3, ("sar",): 3}
    for batch in batches:
        assert list(batch.images) == ["rgb", "sar"]  # one layout
        assert [image.pixels.shape[1] for image in batch.images.values()] == [3, 2]
        assert len(batch.absent) == 1


def test_images_of_one_place_are_paired_by_name_and_some_may_lack_one(place: Path) -> None:
    both = {"rgb": f"{place}/rgb", "sar": f"{place}/sar"}
    modalities: dict[str, Any] = {"rgb": {}, "sar": {"optional": True}}
    scenes = open_scenes(section(both, modalities))
    assert [(scene.name, list(scene.bands())) for scene in scenes] == [
        ("a", ["rgb", "sar"]), ("b", ["rgb", "sar"]), ("c", ["rgb"])
    ]  # fmt: skip
    (place / "rgb" / "a.tif").unlink()
    with pytest.raises(DataError, match=r"data\.scenes: 1 of sar without a file of the same name in rgb: .*a\.tif"):
        open_scenes(section(both, modalities))
    modalities["rgb"]["optional"] = True
    scenes = open_scenes(section(both, modalities))
    assert [list(scene.bands()) for scene in scenes] == [["sar"], ["rgb", "sar"], ["rgb"]]


# ------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_all_scenes_and_the_encoders_where_they_are_asked_for(place: Path) -> None:
    found = opened({"rgb": f"{place}/rgb"}, {"rgb": {"normalize": "dataset"}}).inputs[0]
    pixels = []
    for name in "abc":
        with rasterio.open(place / "rgb" / f"{name}.tif") as file:
            pixels.append(file.read().reshape(3, -1).astype(np.float64))
    assert np.allclose(found.mean, np.concatenate(pixels, axis=1).mean(axis=1), rtol=1e-9)
    assert np.allclose(found.std, np.concatenate(pixels, axis=1).std(axis=1), rtol=1e-9)
    assert (opened({"rgb": f"{place}/rgb"}).inputs[0].mean) == NOBODYS[0]  # 8-bit RGB


def test_statistics_of_very_large_scenes_are_those_of_a_part() -> None:
    """A twentieth of the pixels, spread over the scene, in which both bands are a ramp."""
    scene = Place(2000, 1000)
    mean, std = stream_statistics([scene], tile=16, most=100_000)["rgb"]
    read = sum(window.height * window.width for window in scene.windows)
    assert 80_000 < read < 120_000
    assert len(set(scene.windows)) == len(scene.windows)
    assert np.allclose(mean, (1000, 500), rtol=0.06)
    assert np.allclose(std, (577.4, 288.7), rtol=0.06)
    scene.windows.clear()
    stream_statistics([scene], tile=500, most=2_000_000)
    assert sum(window.height * window.width for window in scene.windows) == 2_000_000  # not more than asked for: all


def test_a_scene_larger_than_memory_is_not_read_whole(tmp_path: Path) -> None:
    """A scene of 90 billion pixels (270 GB), of which a corner is written."""
    with rasterio.open(
        tmp_path / "vast.tif", "w", driver="GTiff", count=3, height=300_000, width=300_000, dtype="uint8", tiled=True,
        blockxsize=512, blockysize=512, sparse_ok=True, bigtiff="yes", compress="deflate", crs="EPSG:32633",
        transform=rasterio.transform.from_origin(500000, 5000000, 1, 1), interleave="pixel",
    ) as target:  # fmt: skip
        target.write(noise(0, 3, 1024, 1024), window=rasterio.windows.Window(0, 0, 1024, 1024))
    chosen = section({"rgb": f"{tmp_path}/vast.tif"}, tile=64, samples_per_epoch=100)
    data = open_unlabelled(chosen, lambda name: NOBODYS)
    windows = windows_of(chosen, data, 0, None)
    before = data.scenes[0].hidden()["rgb"].pixels
    assert before < 2 * 2**23
    samples = [windows[Draw(0, index)] for index in range(100)]
    assert data.scenes[0].hidden()["rgb"].pixels - before <= 100 * TRIES * 128**2
    assert all(sample.images["rgb"].pixels.shape == (3, 64, 64) for sample in samples)


# --------------------------------------------------------------------------------------------------- resume


@pytest.mark.pitfall("F17")
def test_another_list_of_scenes_is_told(place: Path) -> None:
    def traced() -> dict[str, str]:
        traces = Traces()
        open_unlabelled(section({"rgb": f"{place}/rgb"}), lambda name: NOBODYS, traces)
        return traces.found

    then = traced()
    assert len(then) == 3
    assert changed_data(then, traced()) == ""
    write_raster(place / "rgb" / "d.tif", noise(9, 3, 40, 40))
    assert changed_data(then, traced()) == "d.tif (rgb of data.scenes, scene d) is new"
    (place / "rgb" / "b.tif").unlink()
    assert "b.tif (rgb of data.scenes, scene b) is not there any more" in changed_data(then, traced())
    write_raster(place / "rgb" / "a.tif", noise(10, 3, 64, 80))
    assert "a.tif (rgb of data.scenes, scene a) has changed" in changed_data(then, traced())


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.pitfall("P62")
def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.scenes\.rgb: the folder .*empty holds no image; expected"):
        opened({"rgb": f"{tmp_path}/empty"})
    write_raster(tmp_path / "rgb" / "a.tif", noise(0, 3, 20, 20))
    with pytest.raises(DataError, match=r"data\.scenes\.1\.rgb: the pattern .* matches no file"):
        opened([{"rgb": f"{tmp_path}/rgb"}, {"rgb": f"{tmp_path}/*.tif"}])


@pytest.mark.pitfall("P62")
def test_all_files_that_cannot_be_read_are_named_in_one_message(place: Path) -> None:
    for name in ("x", "y"):
        (place / "rgb" / f"{name}.tif").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"^data\.scenes: 2 of 5 scenes cannot be read: .*x\.tif: .*; .*y\.tif: "):
        opened({"rgb": f"{place}/rgb"})
    for number in range(7):
        (place / "rgb" / f"z{number}.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"9 of 12 scenes .*and 4 more"):
        opened({"rgb": f"{place}/rgb"})


@pytest.mark.pitfall("P62")
def test_scenes_of_other_bands_are_named(place: Path) -> None:
    write_raster(place / "rgb" / "d.tif", noise(0, 5, 40, 40))
    with pytest.raises(DataError, match=r"data\.scenes: d has bands \{'rgb': 5\}, but a has \{'rgb': 3\}; choose"):
        opened({"rgb": f"{place}/rgb"})


@pytest.mark.parametrize("name", ["a_label", "_label"])
@pytest.mark.pitfall("F16", "P62")
def test_labels_among_the_images_do_not_take_bands_away_from_them(place: Path, name: str) -> None:
    """A glob that is too wide: one grey file would have had all others read as one band, their red."""
    write_raster(place / "rgb" / f"{name}.tif", noise(0, 1, 64, 80))
    words = "rgb.: 1.*but .*rgb.: 3|rgb.: 3.*but .*rgb.: 1"
    with pytest.raises(
        DataError, match=rf"data\.scenes: .*({words}).*leave out those that are no such images .*labels"
    ):
        opened({"rgb": f"{place}/rgb/*.tif"})


@pytest.mark.pitfall("F19")
def test_scenes_of_one_name_are_told_apart_by_their_files(place: Path) -> None:
    write_raster(place / "deep" / "a.tif", noise(0, 3, 40, 40, "uint16"))
    with pytest.raises(DataError, match=r"deep/a\.tif has stored types .*, but .*rgb/a\.tif has"):
        opened([{"rgb": f"{place}/rgb"}, {"rgb": f"{place}/deep"}])


@pytest.mark.pitfall("F19")
def test_a_text_file_that_lists_images_is_told_how_to_write_it(place: Path) -> None:
    (place / "list.txt").write_text(f"{place}/rgb/a.tif")
    with pytest.raises(DataError, match=r"list\.txt: .*; a list of files is written into the recipe itself: \[a\.tif"):
        opened({"rgb": f"{place}/list.txt"})
    assert len(opened({"rgb": [f"{place}/rgb/a.tif", f"{place}/rgb/b.tif"]}).scenes) == 2


@pytest.mark.parametrize("normalize", ["encoder", "dataset"])
@pytest.mark.pitfall("P62")
def test_scenes_without_a_valid_pixel_are_refused(tmp_path: Path, normalize: str) -> None:
    for name in "ab":
        write_raster(tmp_path / f"{name}.tif", np.zeros((3, 40, 40), np.uint8), nodata=0)
    with pytest.raises(DataError, match=r"data\.scenes: rgb is invalid .* in its 2 scenes; .*nodata"):
        opened({"rgb": f"{tmp_path}/*.tif"}, {"rgb": {"normalize": normalize}})
    some = np.zeros((3, 700, 700), np.uint8)
    some[:, 650:, 650:] = 9
    write_raster(tmp_path / "c.tif", some, nodata=0)
    assert len(opened({"rgb": f"{tmp_path}/*.tif"}).scenes) == 3


@pytest.mark.pitfall("P62")
def test_a_range_of_scales_beyond_the_scenes_is_refused() -> None:
    scenes = [Place(50, 60), Place(40, 40)]
    assert len(UnlabelledWindows(scenes, 60, 0, scale=(0.5, 2.0))) == 2
    words = r"data\.scale = \[0\.5, 2\.1\] of data\.tile = 60 makes windows of up to 126 px .* 60 px; .* = \[0\.5, 1\]"
    with pytest.raises(DataError, match=words):
        UnlabelledWindows(scenes, 60, 0, scale=(0.5, 2.1))


class Root(Section):
    """A recipe of nothing but data, so that messages name keys as they will."""

    data: UnlabelledSection


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"scenes": {}}, "data.scenes names no images; add one key for every modality"),
        ({"scenes": [{"rgb": "a"}, {"weight": 3}]}, "data.scenes.1 names no images"),
        ({"scenes": {"rbg": "a"}}, "data.scenes.rbg is not one of data.modalities; did you mean 'rgb'?"),
        ({"scenes": {"rgb": "a", "labels": "b"}}, "data.scenes.labels is not a key of scenes to pretrain on"),
        ({"scenes": "a/*.tif"}, "data.scenes = 'a/*.tif' must be a mapping (keys: weight); for example {rgb:"),
        ({"scenes": []}, "data.scenes = [] must have 1 or more entries"),
        ({"scenes": {"rgb": "a", "weight": 2}}, "data.scenes.weight is not used: there is only one source"),
        ({"scenes": {"rgb": "a"}, "scale": [2, 1]}, "data.scale = [2.0, 1.0] must be [smallest, largest]"),
        ({"scenes": {"rgb": "a"}, "scale": [1, 1000]}, "makes windows of 224 to 224000 px a side; expected 1 to 65536"),
        ({"scenes": {"rgb": "a"}, "scale": [0, 1]}, "data.scale.0 = 0 must be above 0"),
        ({"modalities": {"rgb": {}, "s2": {}}, "scenes": {"rgb": "a"}}, "data.modalities.s2 is in no source"),
        ({"modalities": {"8bit": {}}, "scenes": {"8bit": "a"}}, "data.modalities.8bit must be a plain name"),
        ({"scenes": {"rgb": "a"}, "classes": 2}, "data.classes is not a key here"),
    ],
)
@pytest.mark.pitfall("P62")
def test_a_wrong_section_is_told_by_its_key(content: Any, words: str) -> None:
    written = {"data": {"modalities": {"rgb": {}}, **content}}
    with pytest.raises(ValidationError) as caught:
        Root.model_validate(written)
    found = lines(caught.value.errors(include_url=False), Root, written, "r.yaml", {})
    assert any(words in line for line in found), found


def test_images_of_a_source_come_in_the_order_of_the_modalities() -> None:
    chosen = section({"sar": "b", "rgb": "a"}, {"rgb": {}, "sar": {}})
    assert list(chosen.sources()["scenes"].images) == ["rgb", "sar"]
    assert list(section([{"rgb": "a"}, {"rgb": "b"}]).sources()) == ["scenes.0", "scenes.1"]
