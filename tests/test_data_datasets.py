"""Published sets: folders, parquet files and hub ids of the Hugging Face `datasets` library as scenes."""

from __future__ import annotations

import json
import pickle
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from vfmseg.data.checks import disjoint
from vfmseg.data.dataset import CoverWindows, TrainingWindows
from vfmseg.data.from_datasets import scenes_from_dataset
from vfmseg.data.statistics import stream_statistics
from vfmseg.data.windows import Draw
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import Window

datasets = pytest.importorskip("datasets")

LABELS = LabelMap((1, 4), 0)
ROWS = 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def pixels(row: int) -> np.ndarray:
    """(24, 32, 3) uint8; the first band holds 10 + row."""
    array = np.random.default_rng(row).integers(1, 255, (24, 32, 3)).astype(np.uint8)
    array[..., 0] = 10 + row
    return array


def classes(row: int) -> np.ndarray:
    """(24, 32) uint8 of 0 (ignored), 1 and 4; its corner tells even rows from odd ones."""
    array = np.random.default_rng(100 + row).choice([0, 1, 4], (24, 32)).astype(np.uint8)
    array[0, 0] = (1, 4)[row % 2]
    return array


def table(rows: range = range(ROWS)) -> datasets.Dataset:
    """Rows with a picture, an array of one band, labels as PNG and as nested lists."""
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "height": datasets.Array2D((24, 32), "float32"),
            "mask": datasets.Image(),
            "ids": datasets.List(datasets.List(datasets.Value("int16"))),
            "kind": datasets.Value("string"),
            "words": datasets.List(datasets.List(datasets.Value("string"))),
            "times": datasets.List(datasets.List(datasets.Value("timestamp[ms]"))),
        }
    )
    content = {
        "photo": [Image.fromarray(pixels(i)) for i in rows],
        "height": [np.full((24, 32), i / 2, dtype=np.float32) for i in rows],
        "mask": [Image.fromarray(classes(i)) for i in rows],
        "ids": [classes(i).tolist() for i in rows],
        "kind": ["town"] * len(rows),
        "words": [[["roof"]]] * len(rows),
        "times": [[[0]]] * len(rows),
    }
    return datasets.Dataset.from_dict(content, features=features)


def open_set(path: object, split: str = "train", labels: str = "mask", rgb: str = "photo", **bands: object) -> list:
    return scenes_from_dataset(str(path), split, {"rgb": rgb}, labels, {"rgb": Bands(**bands)}, LABELS)


@pytest.mark.pitfall("P30")
def test_jpeg_cells_of_labels_are_refused(tmp_path: Path) -> None:
    encoded = BytesIO()
    Image.fromarray(classes(0)).save(encoded, "JPEG", quality=100)
    changed = table().remove_columns("mask").add_column("mask", [{"bytes": encoded.getvalue(), "path": None}] * ROWS)
    changed.cast_column("mask", datasets.Image()).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"column 'mask'.*is compressed as JPEG"):
        open_set(tmp_path / "set")[0].read_labels(Window(0, 0, 24, 32))


def check(scenes: list, rows: range = range(ROWS)) -> None:
    whole = Window(0, 0, 24, 32)
    assert len(scenes) == len(rows)
    for scene, row in zip(scenes, rows, strict=True):
        assert (scene.grid.height, scene.grid.width) == (24, 32)
        chip = scene.read(whole)["rgb"]
        assert (chip.pixels == pixels(row).transpose(2, 0, 1)).all()
        assert chip.valid.all()
        expected = np.select([classes(row) == 1, classes(row) == 4], [0, 1], IGNORE)
        assert (scene.read_labels(whole) == expected).all()


def test_set_saved_to_disk_with_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": table(), "test": table(range(5, 8))})
    both.save_to_disk(tmp_path / "set")
    check(open_set(tmp_path / "set"))
    check(open_set(tmp_path / "set", "test"), range(5, 8))
    check(open_set(tmp_path / "set", labels="ids"))
    scene = open_set(tmp_path / "set")[0]
    assert scene.bands() == {"rgb": 3}
    assert scene.dtypes() == {"rgb": "uint8"}
    assert not scene.grid.georeferenced


def test_windows_of_rows_are_those_of_arrays(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "set")
    scene = open_set(tmp_path / "set")[2]
    part = scene.read(Window(10, 20, 8, 6))["rgb"]
    assert (part.pixels == pixels(2).transpose(2, 0, 1)[:, 10:18, 20:26]).all()
    beyond = scene.read(Window(20, 30, 8, 8))["rgb"]
    assert beyond.valid.sum() == 4 * 2
    assert (beyond.pixels[:, ~beyond.valid] == 0).all()
    labels = scene.read_labels(Window(20, 30, 8, 8))
    assert (labels[4:] == IGNORE).all()
    assert (labels[:, 2:] == IGNORE).all()


def test_arrays_are_modalities_and_bands_are_chosen_and_scaled(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "set")
    bands = {"rgb": Bands(indexes=(2, 1), scale=2.0, offset=1.0), "dem": Bands(nodata=1.5)}
    scenes = scenes_from_dataset(
        str(tmp_path / "set"), "train", {"rgb": "photo", "dem": "height"}, "mask", bands, LABELS
    )
    chips = scenes[2].read(Window(0, 0, 24, 32))
    assert (chips["rgb"].pixels == pixels(2).transpose(2, 0, 1)[[1, 0]] * 2.0 + 1).all()
    assert (chips["dem"].pixels == 1.0).all()
    assert scenes[2].bands() == {"rgb": 2, "dem": 1}
    assert scenes[2].dtypes() == {"rgb": "uint8", "dem": "float32"}
    assert open_set(tmp_path / "set", rgb="ids")[0].dtypes() == {"rgb": "int16"}  # as stored, not widened on the way
    assert not scenes[3].read(Window(0, 0, 24, 32))["dem"].valid.any()  # 3 / 2 is its nodata
    assert stream_statistics([scenes[2], scenes[4]])["dem"] == ((1.5,), (0.5,))
    with pytest.raises(DataError, match=r"row 0, column 'photo' has 3 bands, but data\.modalities\.rgb\.bands asks"):
        open_set(tmp_path / "set", indexes=(4,))[0].read(Window(0, 0, 4, 4))


def test_parquet_file_and_folder_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    table().to_parquet(tmp_path / "one.parquet")
    table().to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    table(range(5, 7)).to_parquet(tmp_path / "folder" / "test-00000-of-00001.parquet")
    check(open_set(tmp_path / "one.parquet"))
    check(open_set(tmp_path / "folder"))
    check(open_set(tmp_path / "folder", "test"), range(5, 7))


def test_folder_of_images_with_a_metadata_file(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "train"
    (folder / "m").mkdir(parents=True)
    lines = []
    for row in range(ROWS):
        Image.fromarray(pixels(row)).save(folder / f"p{row}.png")
        Image.fromarray(classes(row)).save(folder / "m" / f"q{9 - row}.png")
        lines.append(json.dumps({"file_name": f"p{row}.png", "mask_file_name": f"m/q{9 - row}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    scenes = open_set(tmp_path / "set", rgb="image", labels="mask")
    check(sorted(scenes, key=lambda scene: scene.read(Window(0, 0, 1, 1))["rgb"].pixels[0, 0, 0]))


@pytest.mark.pitfall("P48")
def test_parts_of_a_split_share_no_row_and_overlapping_ones_are_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(), "test": table()}).save_to_disk(tmp_path / "set")
    first, last = open_set(tmp_path / "set", "train[:60%]"), open_set(tmp_path / "set", "train[60%:]")
    check(first, range(3))
    check(last, range(3, 5))
    disjoint({"train": first, "val": last, "test": open_set(tmp_path / "set", "test")})
    with pytest.raises(DataError, match=r"#train#2 is in data\.train and in data\.val"):
        disjoint({"train": first, "val": open_set(tmp_path / "set", "train[2:]")})
    # a table without named splits is the same rows whatever the recipe calls them
    table().to_parquet(tmp_path / "one.parquet")
    with pytest.raises(DataError, match=r"is in data\.train and in data\.val"):
        disjoint({split: open_set(tmp_path / "one.parquet", split) for split in ("train", "val")})


@pytest.mark.pitfall("P29")
def test_palette_labels_keep_their_indexes_and_colours_are_refused(tmp_path: Path) -> None:
    palette = Image.fromarray(classes(0)).convert("P")
    palette.putdata(classes(0).flatten().tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0])
    colours = palette.convert("RGB")
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(), "colours": datasets.Image()})
    rows = {"photo": [Image.fromarray(pixels(0))], "mask": [palette], "colours": [colours]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    check(open_set(tmp_path / "set"), range(1))
    with pytest.raises(DataError, match=r"row 0, column 'colours' has 3 bands; expected one"):
        open_set(tmp_path / "set", labels="colours")[0].read_labels(Window(0, 0, 4, 4))
    # the other way round: a palette *image* is read in its colours
    scene = open_set(tmp_path / "set", rgb="mask")[0]
    assert scene.bands() == {"rgb": 3}
    assert scene.read(Window(0, 0, 24, 32))["rgb"].pixels.shape == (3, 24, 32)
    assert (scene.read(Window(0, 0, 24, 32))["rgb"].pixels == np.asarray(colours).transpose(2, 0, 1)).all()


@pytest.mark.pitfall("P26")
def test_alpha_is_validity_and_16_bit_stays_16_bit(tmp_path: Path) -> None:
    clear = np.dstack([pixels(0), np.full((24, 32), 255, dtype=np.uint8)])
    clear[:10, :, 3] = 0
    clear[10, :, 3] = 1
    ramp = (np.arange(24 * 32, dtype=np.uint16) * 80 + 1).reshape(24, 32)
    features = datasets.Features({"photo": datasets.Image(), "deep": datasets.Image(), "mask": datasets.Image()})
    rows = {
        "photo": [Image.fromarray(clear)], "deep": [Image.fromarray(ramp)], "mask": [Image.fromarray(classes(0))]
    }  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    whole = Window(0, 0, 24, 32)
    scene = open_set(tmp_path / "set")[0]
    chip = scene.read(whole)["rgb"]
    assert scene.bands() == {"rgb": 3}
    assert (chip.valid == (clear[..., 3] > 0)).all()
    assert (chip.pixels[:, :10] == 0).all()
    deep = open_set(tmp_path / "set", rgb="deep")[0]
    assert deep.dtypes() == {"rgb": "uint16"}
    assert (deep.read(whole)["rgb"].pixels[0] == ramp).all()


@pytest.mark.pitfall("F7")
def test_pictures_that_start_a_program_are_refused(tmp_path: Path) -> None:
    encoded = BytesIO()
    Image.fromarray(pixels(0)).save(encoded, "EPS")
    rows = {"photo": [{"bytes": encoded.getvalue(), "path": None}], "mask": [Image.fromarray(classes(0))]}
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"row 0.*is EPS, which another program has to draw"):
        open_set(tmp_path / "set")[0].read(Window(0, 0, 24, 32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rgb": "foto"}, "rgb: no column 'foto'; did you mean 'photo'"),
        ({"labels": "kind"}, "labels: column 'kind' holds .*expected an image, or an array"),
        ({"split": "tran"}, "there is no split 'tran'; did you mean 'train'"),
        ({"split": "train[:"}, r"there is no split 'train\[:'"),
        ({"split": "train[50:60]"}, r"train\[50:60\]\): the split has no rows"),
        ({"labels": "words"}, "labels: column 'words' holds .*expected an image, or an array"),
        ({"labels": "times"}, "labels: column 'times' holds .*expected an image, or an array"),
    ],
)
def test_wrong_columns_and_splits_are_named(tmp_path: Path, change: dict[str, str], said: str) -> None:
    datasets.DatasetDict({"train": table(), "test": table()}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=said):
        open_set(tmp_path / "set", **change)


def test_names_with_brackets_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "tiles [512]"
    folder.mkdir()
    table().to_parquet(folder / "a.parquet")
    check(open_set(folder / "a.parquet"))
    with pytest.raises(DataError, match=r"takes .* in the name of a folder for a pattern"):
        open_set(folder)


def test_sets_that_cannot_be_loaded_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_set(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be loaded .*expected a folder written by save_to_disk"):
        open_set(tmp_path / "empty")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").touch()
    with pytest.raises(DataError, match=r"script cannot be loaded .*scripts are no longer supported"):
        open_set(tmp_path / "script")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"broken\.parquet cannot be loaded"):
        open_set(tmp_path / "broken.parquet")


@pytest.mark.pitfall("P62")
def test_hub_id_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset someone/roofs cannot be loaded .* name the folder") as caught:
        open_set("someone/roofs")
    assert "\n" not in str(caught.value)


def test_unknown_ids_sizes_and_damaged_images_name_the_row(tmp_path: Path) -> None:
    features = datasets.Features(
        {"photo": datasets.Image(), "mask": datasets.Image(), "chw": datasets.Array3D((3, 24, 32), "uint8")}
    )
    strange = classes(1)
    strange[0, :7] = 9
    rows = {
        "photo": [Image.fromarray(pixels(0)), Image.fromarray(pixels(1)), Image.fromarray(pixels(2)[:20])],
        "mask": [Image.fromarray(classes(0)), Image.fromarray(strange), Image.fromarray(classes(2))],
        "chw": [pixels(i).transpose(2, 0, 1) for i in range(3)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    scenes = open_set(tmp_path / "set")
    with pytest.raises(DataError, match=r"row 1, column 'mask': unknown label ids 9 \(7 pixels\)"):
        scenes[1].read_labels(Window(0, 0, 24, 32))
    with pytest.raises(DataError, match=r"row 2: 'photo' has 20 x 32 pixels and 'mask' 24 x 32"):
        _ = scenes[2].grid
    with pytest.raises(DataError, match="with the bands last"):
        _ = open_set(tmp_path / "set", rgb="chw")[0].grid
    cut_off = {"bytes": _png(pixels(0))[:400], "path": None}
    broken = datasets.Dataset.from_dict(
        {"photo": [cut_off, None], "mask": [Image.fromarray(classes(0))] * 2},
        features=datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()}),
    )
    broken.save_to_disk(tmp_path / "broken")
    first, second = open_set(tmp_path / "broken")
    with pytest.raises(DataError, match=r"row 0, column 'photo': the image is damaged"):
        first.read(Window(0, 0, 4, 4))
    with pytest.raises(DataError, match=r"row 1, column 'photo': the cell is empty"):
        _ = second.grid


def _png(array: np.ndarray) -> bytes:
    from io import BytesIO

    stream = BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def test_rotated_pictures_are_turned_before_they_are_measured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    upright = Image.fromarray(pixels(0))
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    rows = {"photo": [str(tmp_path / "turned.png")], "mask": [Image.fromarray(classes(0))]}
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    check(open_set(tmp_path / "set"), range(1))


def test_rows_travel_to_workers_and_become_samples(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "set")
    scenes = open_set(tmp_path / "set")
    assert {scene.grid.width for scene in scenes} == {32}
    before = len(pickle.dumps(scenes))
    check(scenes)
    assert len(pickle.dumps(scenes)) < before + 100  # the decoded pixels stay here, only counts travel
    check(pickle.loads(pickle.dumps(scenes)))
    sample = TrainingWindows(scenes, 16, 0, None, "all")[Draw(0, 3)]
    assert sample.images["rgb"].pixels.shape == (3, 16, 16)
    cover = CoverWindows(scenes, 16)
    counted = sum(int((cover[i].labels != IGNORE).sum()) for i in range(len(cover)))
    assert counted == sum(int((classes(row) != 0).sum()) for row in range(ROWS))


@pytest.mark.filterwarnings("error")
@pytest.mark.pitfall("P26")
def test_gaps_in_whole_numbers_are_unlabelled_and_invalid_never_0(tmp_path: Path) -> None:
    """Arrow hands whole numbers with gaps over as float; turned back into uint8, a gap would be 0, a class."""
    labels = [[0, 1, None], [1, None, 0]]
    stored = [[5, None, 7], [5, 6, 7]]
    whole = datasets.List(datasets.List(datasets.Value("uint8")))
    rows = datasets.Dataset.from_dict({"photo": [stored], "mask": [labels]}, datasets.Features(photo=whole, mask=whole))
    rows.to_parquet(tmp_path / "one.parquet")
    (scene,) = scenes_from_dataset(
        str(tmp_path / "one.parquet"), "train", {"rgb": "photo"}, "mask", {"rgb": Bands()}, LabelMap((0, 1), 255)
    )
    assert scene.read_labels(Window(0, 0, 2, 3)).tolist() == [[0, 1, IGNORE], [1, IGNORE, 0]]
    chip = scene.read(Window(0, 0, 2, 3))["rgb"]
    assert chip.valid.tolist() == [[True, False, True], [True, True, True]]
    assert chip.pixels[0].tolist() == [[5, 0, 7], [5, 6, 7]]
    assert scene.dtypes() == {"rgb": "uint8"}


@pytest.mark.parametrize("bands", [2, 3, 4])
@pytest.mark.pitfall("P24")
def test_16_bit_colours_are_refused_never_cut_to_8(tmp_path: Path, bands: int) -> None:
    deep = np.arange(bands * 24 * 32, dtype=np.uint16).reshape(bands, 24, 32) * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            tmp_path / "deep.png", "w", driver="PNG", count=bands, height=24, width=32, dtype="uint16"
        ) as target:
            target.write(deep)
    cell = {"bytes": (tmp_path / "deep.png").read_bytes(), "path": None}
    rows = {"photo": [cell], "mask": [Image.fromarray(classes(0))]}
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"row 0, column 'photo': holds 16 bits a band .*store it as an array"):
        _ = open_set(tmp_path / "set")[0].grid


@pytest.mark.pitfall("P62")
def test_a_picture_cut_short_names_its_row_already_when_it_is_measured(tmp_path: Path) -> None:
    cell = {"bytes": _png(pixels(0))[:60], "path": None}
    rows = {"photo": [cell], "mask": [Image.fromarray(classes(0))]}
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"row 0, column 'photo': the image is damaged"):
        _ = open_set(tmp_path / "set")[0].grid


def test_a_picture_beyond_the_limit_of_pil_names_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(range(1)).save_to_disk(tmp_path / "set")
    (scene,) = open_set(tmp_path / "set")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"row 0, column 'photo': cannot be read as an image .*exceeds limit"):
        _ = scene.grid


@pytest.mark.pitfall("P26")
def test_bands_derived_of_elevation_in_a_set(tmp_path: Path) -> None:
    """Rows as arrays, and as pictures whose alpha hides a peak: that must not reach the slope beside it."""
    rising = np.arange(32, dtype=np.float32) * np.ones((24, 1), np.float32)
    peak = rising.astype(np.uint8)
    peak[10:13, 10:13] = 255
    shown = np.where(peak == 255, 0, 255).astype(np.uint8)
    content = {
        "height": [rising],
        "hidden": [Image.merge("LA", [Image.fromarray(peak), Image.fromarray(shown)])],
        "mask": [Image.fromarray(classes(0))],
    }
    features = datasets.Features(
        {"height": datasets.Array2D((24, 32), "float32"), "hidden": datasets.Image(), "mask": datasets.Image()}
    )
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "set")
    bands = Bands(derive=("slope", "height"))
    (scene,) = scenes_from_dataset(
        str(tmp_path / "set"), "train", {"a": "height", "b": "hidden"}, "mask", {"a": bands, "b": bands}, LABELS
    )
    assert (scene.bands(), scene.dtypes()) == ({"a": 2, "b": 2}, {"a": "float32", "b": "float32"})
    assert {name: len(said) for name, said in scene.said().items()} == {"a": 1, "b": 1}
    chips = scene.read(Window(0, 0, 24, 32))
    np.testing.assert_array_equal(chips["b"].valid, shown > 0)
    for chip in chips.values():
        assert set(np.unique(chip.pixels[0][chip.valid])) == {np.float32(45)}  # a metre up in each pixel


def test_a_null_cell_is_a_scene_without_that_modality(tmp_path: Path) -> None:
    whole = table()
    content = {name: list(whole[name]) for name in ("photo", "height", "ids")}
    content["photo"][1] = content["height"][0] = content["height"][3] = None
    features = datasets.Features({name: whole.features[name] for name in content})
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "d.parquet")
    images, bands = {"rgb": "photo", "dem": "height"}, {"rgb": Bands(), "dem": Bands()}
    arguments = (str(tmp_path / "d.parquet"), "train", images, "ids", bands, LABELS)
    scenes = scenes_from_dataset(*arguments, optional=("dem", "rgb"))
    assert [" ".join(scene.bands()) for scene in scenes] == ["rgb", "dem", "rgb dem", "rgb", "rgb dem"]
    for row, scene in enumerate(scenes):
        scene.follow(scene.said())
        chips = scene.read(Window(0, 0, 24, 32))
        assert list(chips) == list(scene.said()) == list(scene.dtypes()) == list(scene.bands())
        if "dem" in chips:
            assert (chips["dem"].pixels == row / 2).all()
        if "rgb" in chips:
            assert (chips["rgb"].pixels[0] == 10 + row).all()
        assert set(scene.traces()) == {*chips, "labels"}
    assert len(pickle.loads(pickle.dumps(scenes[0])).read(Window(0, 0, 4, 4))) == 1
    with pytest.raises(DataError, match="row 1, column 'photo': the cell is empty"):
        scenes_from_dataset(*arguments, optional=("dem",))[1].grid  # noqa: B018
    content["height"][1] = None
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"row 1: the cells of all modalities \(rgb, dem\) are null"):
        scenes_from_dataset(str(tmp_path / "e.parquet"), *arguments[1:], optional=("dem", "rgb"))
