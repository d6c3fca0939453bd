"""Which windows are drawn, in which order and by whom; what a batch holds; the cover that scores count."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import DATA, write_raster
from torch.utils.data import DataLoader

from vfmseg.data.augment import Augment, Radiometry
from vfmseg.data.dataset import CoverWindows, TrainingWindows
from vfmseg.data.from_files import scenes_from_files
from vfmseg.data.from_table import scenes_from_table
from vfmseg.data.image import Image
from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.data.scene import Scene
from vfmseg.data.windows import Draw, Purpose, epoch_draws, epoch_order, rank_batches, rng
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.validity import Chip


class ArrayScene:
    """A scene in memory whose pixel values say where they are: 1000 * row + column (+ 1, so that 0 stays invalid)."""

    def __init__(self, height: int, width: int, labels: np.ndarray | None = None, name: str = "s") -> None:
        self.name, self.files = name, (name,)
        self.grid = Grid(None, IDENTITY, height, width)
        y, x = np.mgrid[:height, :width]
        self.values = (1000 * y + x + 1).astype(np.float32)
        self.valid = np.ones((height, width), dtype=bool)
        self.labels = (y + x) % 2 if labels is None else labels
        self.reads = self.label_reads = 0

    def _cut(self, array: np.ndarray, window: Window, beyond: float) -> np.ndarray:
        inside = window.clip(self.grid.height, self.grid.width)
        out = np.full(window.shape, beyond, dtype=array.dtype)
        out[: inside.height, : inside.width] = array[inside.rows, inside.cols]
        return out

    def read(self, window: Window) -> dict[str, Chip]:
        self.reads += 1
        valid = self._cut(self.valid, window, False)
        return {"rgb": Chip((self._cut(self.values, window, 0.0) * valid)[None], valid)}

    def read_labels(self, window: Window) -> np.ndarray:
        self.label_reads += 1
        return self._cut(self.labels, window, IGNORE).astype(np.int64)

    def bands(self) -> dict[str, int]:
        return {"rgb": 1}

    def dtypes(self) -> dict[str, str]:
        return {"rgb": "float32"}


def corner(sample: Sample) -> tuple[int, int]:
    """(row, column) of the window that a sample was cut from."""
    value = int(sample.images["rgb"].pixels[0, 0, 0]) - 1
    return value // 1000, value % 1000


def equal(one: Sample | Batch, two: Sample | Batch) -> bool:
    return (
        torch.equal(one.labels, two.labels)
        and all(torch.equal(one.images[k].pixels, two.images[k].pixels) for k in one.images)
        and all(torch.equal(one.images[k].valid, two.images[k].valid) for k in one.images)
    )


# ------------------------------------------------------------------------------------------------------- order


@pytest.mark.pitfall("P56")
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only() -> None:
    first = epoch_order(50, seed=3, epoch=1)
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    assert epoch_order(50, seed=3, epoch=1) == first
    assert sorted(first) == list(range(50))
    assert first != epoch_order(50, seed=3, epoch=2)
    assert first != epoch_order(50, seed=4, epoch=1)
    assert epoch_order(50, seed=-3, epoch=1) != first
    assert epoch_order(50, seed=3, epoch=1, source=1) != first


@pytest.mark.pitfall("C26")
def test_streams_of_random_numbers_do_not_overlap() -> None:
    keys = [(p, s, e, i) for p in Purpose for s in (0, 1, 2) for e in (0, 1, 2) for i in (0, 1, 2)]
    firsts = {int(rng(*key).integers(2**63)) for key in keys}
    assert len(firsts) == len(keys)


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(17, 2, 3), (12, 2, 3), (1, 4, 2), (5, 1, 4), (13, 4, 2), (7, 3, 1)]
)
@pytest.mark.pitfall("P54")
def test_ranks_share_an_epoch_without_repeats_and_keep_in_step(length: int, batch: int, world: int) -> None:
    order = epoch_order(length, 0, 4)
    ranks = [rank_batches(epoch_draws(length, length, 0, 4), batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen: list[int] = []
    for step in range(len(ranks[0])):
        here = [ranks[rank][step] for rank in range(world)]
        assert all(1 <= len(draws) <= batch for draws in here)
        real = [d.index for draws in here for d in draws if not d.filler]
        assert real == order[step * batch * world : (step + 1) * batch * world]  # the step of one process, cut up
        seen += real
    assert seen == order
    assert all(draw.epoch == 4 for batches in ranks for draws in batches for draw in draws)


@pytest.mark.parametrize(("length", "count"), [(7, 7), (3, 2), (2, 7), (11, 4), (1, 3)])
@pytest.mark.pitfall("P57")
def test_a_source_goes_round_and_its_laps_are_other_draws(length: int, count: int) -> None:
    """An epoch goes on where the one before has ended; a lap visits each sample once, in an order of its own."""
    epochs = [epoch_draws(length, count, 5, epoch, source=1) for epoch in range(length * 4)]
    assert {len(draws) for draws in epochs} == {count}
    walk = [draw for draws in epochs for draw in draws]
    for lap, start in enumerate(range(0, len(walk), length)):
        assert walk[start : start + length] == [Draw(lap, i) for i in epoch_order(length, 5, lap, source=1)]
    assert len(set(walk)) == len(walk)
    if length == count:
        assert all(draw.epoch == epoch for epoch, draws in enumerate(epochs) for draw in draws)


# ------------------------------------------------------------------------------------------------------ windows


@pytest.mark.pitfall("C20")
def test_every_offset_is_reachable_also_the_last_row_and_column() -> None:
    data = TrainingWindows([ArrayScene(10, 9)], 7, 0, None, "all")
    seen = {corner(data[Draw(epoch, i)]) for epoch in range(60) for i in range(len(data))}
    assert seen == {(row, col) for row in range(4) for col in range(3)}


@pytest.mark.pitfall("C20")
def test_scene_of_exactly_one_tile_works() -> None:
    data = TrainingWindows([ArrayScene(8, 8)], 8, 0, None, "all")
    assert len(data) == 1
    sample = data[Draw(0, 0)]
    assert corner(sample) == (0, 0)
    assert sample.images["rgb"].valid.all()
    assert (sample.labels != IGNORE).all()


def test_scene_smaller_than_the_tile_is_filled_with_invalid_and_ignore() -> None:
    for data, key in (
        (TrainingWindows([ArrayScene(5, 3)], 8, 0, None, "all"), Draw(0, 0)),
        (CoverWindows([ArrayScene(5, 3)], 8), 0),
    ):
        sample = data[key]
        assert sample.images["rgb"].pixels.shape == (1, 8, 8)
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[:5, :3] = True
        assert torch.equal(sample.images["rgb"].valid, inside)
        assert torch.equal(sample.labels != IGNORE, inside)
        assert (sample.images["rgb"].pixels[0][~inside] == 0).all()


def test_scenes_are_visited_by_their_area() -> None:
    scenes = [ArrayScene(16, 16), ArrayScene(8, 8), ArrayScene(9, 8)]  # 4, 1 and 2 visits
    for scene in scenes:
        scene.values[:] = scene.grid.height
    data = TrainingWindows(scenes, 8, 0, None, "all")
    heights = [int(data[Draw(0, i)].images["rgb"].pixels[0, 0, 0]) for i in range(len(data))]
    assert heights == [16] * 4 + [8] + [9] * 2


@pytest.mark.pitfall("P57")
def test_fewer_samples_than_scenes_still_see_every_scene_in_time() -> None:
    scenes = [ArrayScene(4, 4, name=str(i)) for i in range(12)]
    data = TrainingWindows(scenes, 4, 0, None, "all", samples_per_epoch=5)
    assert len(data) == 5
    for epoch in range(20):
        before = [scene.reads for scene in scenes]
        for i in range(5):
            data[Draw(epoch, i)]
        assert sum(s.reads > b for s, b in zip(scenes, before, strict=True)) == 5  # no scene twice in a short epoch
    assert all(scene.reads > 0 for scene in scenes)
    data = TrainingWindows(scenes, 4, 0, None, "all", samples_per_epoch=30)
    before = [scene.reads for scene in scenes]
    for i in range(30):
        data[Draw(0, i)]
    assert {s.reads - b for s, b in zip(scenes, before, strict=True)} == {2, 3}


def test_wholly_ignored_windows_are_drawn_again() -> None:
    labels = np.full((64, 64), IGNORE)
    labels[:32] = 1
    data = TrainingWindows([ArrayScene(64, 64, labels)], 16, 0, None, "all")
    # a quarter to a half of the windows has no label: without drawing again about 30 of 100 would be empty
    assert all((data[Draw(epoch, 0)].labels != IGNORE).any() for epoch in range(100))
    scene = ArrayScene(64, 64)
    scene.valid[:32] = False  # labels everywhere, imagery in the lower half only
    data = TrainingWindows([scene], 16, 0, None, "all")
    assert all(data[Draw(epoch, 0)].images["rgb"].valid.any() for epoch in range(100))


def test_all_pixels_ignored_scene_ends_after_ten_tries() -> None:
    scene = ArrayScene(64, 64, np.full((64, 64), IGNORE))
    sample = TrainingWindows([scene], 16, 0, None, "all")[Draw(0, 0)]
    assert (sample.labels == IGNORE).all()
    assert (scene.label_reads, scene.reads) == (10, 1)  # the images need not be read to know
    assert (collate([sample]).targets("all") == IGNORE).all()


@pytest.mark.pitfall("P54")
def test_labels_of_a_filler_count_nowhere() -> None:
    data = TrainingWindows([ArrayScene(16, 16)], 8, 0, Augment(), "all")
    assert (data[Draw(0, 1, filler=True)].labels == IGNORE).all()
    assert (data[Draw(0, 1)].labels != IGNORE).all()


def test_no_scenes_are_refused() -> None:
    with pytest.raises(DataError, match=r"data.train: there are no scenes; expected at least one"):
        TrainingWindows([], 8, 0, None, "all")


# --------------------------------------------------------------------------------------------------- randomness


def full_augment() -> Augment:
    return Augment(scale=(0.8, 1.25), rotate=10.0, radiometry={"rgb": Radiometry(0.2, 0.2)}, value_range={"rgb": 255.0})


def file_scenes(folder: Path, count: int = 3) -> list[Scene]:
    for i in range(count):
        noise = np.random.default_rng(i)
        write_raster(folder / "images" / f"s{i}.tif", noise.integers(1, 255, (3, 40, 48)).astype(np.uint8))
        write_raster(folder / "labels" / f"s{i}.tif", noise.integers(0, 2, (40, 48)).astype(np.uint8))
    return scenes_from_files(
        {"rgb": str(folder / "images/*.tif")},
        str(folder / "labels/*.tif"),
        {"rgb": Bands()},
        LabelMap((0, 1), 255),
        "x",
    )


@pytest.mark.pitfall("P57")
def test_crops_of_epoch_2_differ_from_those_of_epoch_1_and_reruns_agree() -> None:
    def run(epoch: int, seed: int = 0) -> list[tuple[int, int]]:
        data = TrainingWindows([ArrayScene(200, 200)], 16, seed, None, "all")
        return [corner(data[Draw(epoch, i)]) for i in range(20)]

    assert run(1) != run(2)
    assert sum(a == b for a, b in zip(run(1), run(2), strict=True)) <= 1
    assert run(1) == run(1)
    assert run(1) != run(1, seed=1)
    assert len(set(run(1))) > 15  # samples of one epoch differ from each other


@pytest.mark.pitfall("C26")
def test_augmentation_differs_between_epochs_and_samples() -> None:
    data = TrainingWindows(
        [ArrayScene(16, 16)], 16, 0, Augment(), "all"
    )  # one window only: what differs is the augmentation
    views = {tuple(data[Draw(epoch, 0)].labels.flatten().tolist()) for epoch in range(20)}
    corners = {float(data[Draw(epoch, 0)].images["rgb"].pixels[0, 0, 0]) for epoch in range(20)}
    assert len(corners) == 4
    assert len(views) >= 2


@pytest.mark.pitfall("P57")
def test_workers_do_not_change_the_samples(tmp_path: Path) -> None:
    data = TrainingWindows(file_scenes(tmp_path), 16, 5, full_augment(), "all")
    batches = rank_batches(epoch_draws(len(data), len(data), 5, 1), 4, 0, 1)

    def run(workers: int) -> list[Batch]:
        torch.manual_seed(workers)  # the global state is another one each time
        loader = DataLoader(
            data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
            multiprocessing_context=context if workers else None,
        )  # fmt: skip
        return list(loader)

    # forked workers inherit open files: they must not read on in them
    context = "fork" if sys.platform == "linux" else "spawn"
    alone, together = run(0), run(2)
    assert len(alone) == len(together) == len(batches)
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))
    copy = pickle.loads(pickle.dumps(data))  # what a spawned worker gets
    assert equal(copy[Draw(1, 3)], data[Draw(1, 3)])


@pytest.mark.pitfall("C26")
def test_ranks_draw_what_one_process_draws(tmp_path: Path) -> None:
    data = TrainingWindows(file_scenes(tmp_path), 16, 5, full_augment(), "all")
    draws = epoch_draws(len(data), len(data), 5, 2)
    (first, *_), (second, *_) = (rank_batches(draws, 3, rank, 2) for rank in range(2))
    (both, *_) = rank_batches(draws, 6, 0, 1)
    two = [data[d] for d in first + second]
    assert all(equal(a, b) for a, b in zip(two, [data[d] for d in both], strict=True))


@pytest.mark.pitfall("P57")
def test_reading_a_sample_leaves_the_global_random_states_alone(tmp_path: Path) -> None:
    data = TrainingWindows(file_scenes(tmp_path), 16, 0, full_augment(), "all", samples_per_epoch=4)
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    first = data[Draw(0, 1)]
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (np.random.get_state()[1].tolist(), random.getstate())
    torch.rand(3), np.random.rand(3), random.random()
    assert equal(first, data[Draw(0, 1)])


# ------------------------------------------------------------------------------------------------------- batches


@pytest.mark.pitfall("P58")
def test_batch_of_one_and_a_short_last_batch_keep_their_axes() -> None:
    data = TrainingWindows([ArrayScene(24, 24)], 8, 0, Augment(), "all")
    for size, lengths in ((1, [1] * 9), (4, [4, 4, 1])):
        loader = DataLoader(data, batch_sampler=rank_batches(epoch_draws(9, 9, 0, 0), size, 0, 1), collate_fn=collate)
        batches = list(loader)
        assert [len(b) for b in batches] == lengths
        for batch in batches:
            assert batch.images["rgb"].pixels.shape == (len(batch), 1, 8, 8)
            assert (
                batch.images["rgb"].valid.shape
                == batch.labels.shape
                == batch.targets("all").shape
                == (len(batch), 8, 8)
            )
            assert (batch.images["rgb"].pixels.dtype, batch.images["rgb"].valid.dtype) == (torch.float32, torch.bool)
            assert batch.labels.dtype == torch.int64


@pytest.mark.pitfall("P26")
def test_targets_are_ignore_wherever_any_modality_is_invalid() -> None:
    labels = torch.arange(4).reshape(1, 2, 2)
    valid = {"a": torch.tensor([[[True, True], [False, True]]]), "b": torch.tensor([[[True, False], [True, True]]])}
    batch = Batch({name: Image(torch.ones(1, 1, 2, 2), mask) for name, mask in valid.items()}, labels)
    assert batch.targets("all").tolist() == [[[0, IGNORE], [IGNORE, 3]]]
    assert batch.labels.tolist() == [[[0, 1], [2, 3]]]
    assert batch.to("cpu").targets("all").tolist() == batch.targets("all").tolist()


def test_samples_of_different_bands_are_refused() -> None:
    one = TrainingWindows([ArrayScene(8, 8)], 8, 0, None, "all")[Draw(0, 0)]
    two = Sample({"rgb": Image(one.images["rgb"].pixels.repeat(3, 1, 1), one.images["rgb"].valid)}, one.labels)
    with pytest.raises(DataError, match=r"rgb \(1, 8, 8\).* and rgb \(3, 8, 8\)"):
        collate([one, two])


# --------------------------------------------------------------------------------------------------------- cover


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(64, 64, 32), (65, 97, 32), (31, 33, 32), (7, 100, 16), (32, 32, 32), (1, 1, 8), (5, 3, 1)],
)
@pytest.mark.pitfall("P45")
def test_the_cover_counts_each_pixel_exactly_once(height: int, width: int, tile: int) -> None:
    scene = ArrayScene(height, width)
    cover = CoverWindows([scene, ArrayScene(3, 4)], tile)
    counts = np.zeros((height, width), dtype=int)
    small = 0
    for i in range(len(cover)):
        sample = cover[i]
        assert sample.labels.shape == (tile, tile)
        counted = (sample.labels != IGNORE).numpy()
        assert not (counted & ~sample.images["rgb"].valid.numpy()).any()
        if cover.place(i)[0] == 1:
            small += int(counted.sum())
            continue
        where = sample.images["rgb"].pixels[0].numpy()[counted].astype(int) - 1
        counts[where // 1000, where % 1000] += 1
        assert (sample.labels.numpy()[counted] == (where // 1000 + where % 1000) % 2).all()  # each label at its pixel
    assert (counts == 1).all()
    assert small == 12


@pytest.mark.pitfall("P45")
def test_a_confusion_over_the_cover_is_that_of_the_whole_map(tmp_path: Path) -> None:
    from vfmseg.metrics import Confusion

    labels = np.random.default_rng(0).integers(IGNORE, 2, (45, 70))
    scene = ArrayScene(45, 70, labels)
    tiled, whole = Confusion(2), Confusion(2)
    batch = collate([CoverWindows([scene], 32)[i] for i in range(len(CoverWindows([scene], 32)))])
    tiled.update((batch.images["rgb"].pixels[:, 0] % 3 > 1).long(), batch.targets("all"))
    whole.update(torch.from_numpy(scene.values % 3 > 1).long(), torch.from_numpy(labels))
    assert torch.equal(torch.as_tensor(tiled.matrix), torch.as_tensor(whole.matrix))


@pytest.mark.pitfall("P25", "C16")
def test_a_pixel_has_the_same_value_in_every_window_that_shows_it(tmp_path: Path) -> None:
    ramp = np.arange(60 * 60, dtype=np.uint16).reshape(1, 60, 60) * 13 + 1  # windows have very different extremes
    y, x = np.mgrid[:60, :60]
    labels = ((y // 3 + x // 5) % 2).astype(np.uint8)
    write_raster(tmp_path / "i.tif", ramp)
    write_raster(tmp_path / "l.tif", labels)
    (scene,) = scenes_from_files(
        {"dem": str(tmp_path / "i.tif")}, str(tmp_path / "l.tif"), {"dem": Bands(scale=0.5, offset=-3)},
        LabelMap((0, 1), 255), "x",
    )  # fmt: skip
    expected = torch.from_numpy(ramp[0] * 0.5 - 3.0).float()
    training = TrainingWindows([scene], 24, 0, None, "all")
    seen = set()
    for epoch in range(10):
        sample = training[Draw(epoch, 0)]
        got = sample.images["dem"].pixels[0]
        row, col = divmod(int((expected == got[0, 0]).flatten().nonzero()), 60)  # no value is there twice
        assert torch.equal(got, expected[row : row + 24, col : col + 24])
        assert np.array_equal(sample.labels, labels[row : row + 24, col : col + 24])
        seen.add((row, col))
    assert len(seen) > 5
    cover = CoverWindows([scene], 24)
    for i, (_, tile) in enumerate(map(cover.place, range(len(cover)))):
        assert torch.equal(cover[i].images["dem"].pixels[0], expected[tile.window.rows, tile.window.cols])


@pytest.mark.pitfall("C22")
def test_a_pure_colour_stays_in_its_band(tmp_path: Path) -> None:
    pure = np.stack([np.full((16, 16), v, dtype=np.uint8) for v in (250, 20, 5)])
    write_raster(tmp_path / "i.tif", pure)
    write_raster(tmp_path / "l.tif", np.ones((16, 16), dtype=np.uint8))

    def first(bands: Bands) -> list[float]:
        (scene,) = scenes_from_files(
            {"rgb": str(tmp_path / "i.tif")}, str(tmp_path / "l.tif"), {"rgb": bands}, LabelMap((0, 1), 255), "x"
        )
        data = TrainingWindows([scene], 16, 0, Augment(scale=(0.8, 1.2), rotate=9.0), "all")
        image = data[Draw(0, 0)].images["rgb"].pixels
        return [round(float(v), 2) for v in image[:, 8, 8]]

    assert first(Bands()) == [250, 20, 5]
    assert first(Bands(indexes=(3, 2, 1))) == [5, 20, 250]


@pytest.mark.pitfall("C23")
def test_two_passes_of_the_cover_are_bit_identical(tmp_path: Path) -> None:
    cover = CoverWindows(file_scenes(tmp_path), 32)
    first = [cover[i] for i in range(len(cover))]
    torch.rand(5), np.random.rand(5)
    assert all(equal(one, cover[i]) for i, one in enumerate(first))


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the project")
@pytest.mark.pitfall("P45")
def test_real_tiles_are_covered_and_drawn() -> None:
    scenes = scenes_from_table(
        DATA / "oam_buildings" / "split.csv",
        "val",
        "split",
        {"rgb": "image"},
        "label",
        {"rgb": Bands()},
        LabelMap((0, 1), 255),
    )
    cover = CoverWindows(scenes, 224)
    counted = sum(int((cover[i].labels != IGNORE).sum()) for i in range(len(cover)))
    whole = Window(0, 0, 256, 256)
    assert counted == sum(int((scene.read_labels(whole) != IGNORE).sum()) for scene in scenes)
    batch = collate([TrainingWindows(scenes, 128, 0, full_augment(), "all")[Draw(0, i)] for i in range(4)])
    assert batch.images["rgb"].pixels.shape == (4, 3, 128, 128)
    assert 0 <= batch.images["rgb"].pixels.min() < batch.images["rgb"].pixels.max() <= 255
