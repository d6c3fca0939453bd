"""Which files form a scene, which scenes form a split, and what is refused."""

from __future__ import annotations

import glob
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from makers import DATA, write_raster

from vfmseg.data.checks import disjoint, require_labels
from vfmseg.data.from_files import scenes_from_files
from vfmseg.data.from_table import scenes_from_table
from vfmseg.data.pairing import find
from vfmseg.data.raster_scene import RasterScene
from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.reader import Raster

LABELS = LabelMap((0, 1, 2), 255)
NAMES = ("tile_1", "tile_2", "tile_10", "tile_11", "a", "b")


def image(value: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full((1, *size), value, dtype=np.uint8)


def label(value: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full(size, value, dtype=np.uint8)


def twins(folder: Path, pattern: str = "{}.tif", labels: str = "{}.tif", names: tuple[str, ...] = NAMES) -> None:
    """Images that hold 10 + n and labels that hold n % 3, so that a wrong pair shows."""
    for number, name in enumerate(names):
        write_raster(folder / "images" / pattern.format(name), image(10 + number))
        write_raster(folder / "labels" / labels.format(name), label(number % 3))


def pairs_are_right(scenes: list[RasterScene]) -> bool:
    window = Window(0, 0, 8, 8)
    return all(
        int(s.read_labels(window)[0, 0]) == (int(s.read(window)["rgb"].pixels[0, 0, 0]) - 10) % 3 for s in scenes
    )


def from_globs(folder: Path, images: str = "images/*.tif", labels: str = "labels/*.tif") -> list:
    return scenes_from_files(
        {"rgb": str(folder / images)}, str(folder / labels), {"rgb": Bands()}, LABELS, "data.train"
    )


@pytest.mark.pitfall("P31")
def test_pairs_by_name_whatever_the_order(tmp_path: Path) -> None:
    # sorted by path the two lists do not agree: tile_1.tif < tile_10.tif, but tile_1_x.png > tile_10_x.png
    twins(tmp_path, "{}.tif", "{}_x.tif")
    scenes = from_globs(tmp_path, labels="labels/*_x.tif")
    assert len(scenes) == len(NAMES)
    assert pairs_are_right(scenes)
    assert [scene.name for scene in scenes] == sorted(NAMES)


@pytest.mark.pitfall("P31")
def test_list_order_does_not_matter(tmp_path: Path) -> None:
    twins(tmp_path)
    images = [str(tmp_path / "images" / f"{name}.tif") for name in NAMES]
    labels = [str(tmp_path / "labels" / f"{name}.tif") for name in reversed(NAMES)]
    scenes = scenes_from_files({"rgb": images}, labels, {"rgb": Bands()}, LABELS, "data.train")
    assert pairs_are_right(scenes)


@pytest.mark.pitfall("P31")
def test_exact_stems_win_over_what_the_stars_stand_for(tmp_path: Path) -> None:
    # the stars stand for "1" and "img_1": only the stems agree
    twins(tmp_path, "img_{}.tif", "img_{}.tif")
    assert pairs_are_right(from_globs(tmp_path, images="images/img_*.tif"))


@pytest.mark.pitfall("P31")
def test_exact_stems_win_also_where_the_stars_agree_on_other_pairs(tmp_path: Path) -> None:
    for folder, name, array in (
        ("A1", "x", image(10)), ("B2", "y", image(11)), ("C1", "y", label(1)), ("D2", "x", label(0))
    ):  # fmt: skip
        write_raster(tmp_path / folder / f"{name}.tif", array)
    images = [str(tmp_path / part) for part in ("A*/x.tif", "B*/y.tif")]
    labels = [str(tmp_path / part) for part in ("C*/y.tif", "D*/x.tif")]
    scenes = scenes_from_files({"rgb": images}, labels, {"rgb": Bands()}, LABELS, "data.train")
    assert pairs_are_right(scenes)


@pytest.mark.pitfall("P31")
def test_folders_that_the_stars_stand_for_stay_apart(tmp_path: Path) -> None:
    for number, place in enumerate(("north", "south", "west")):
        write_raster(tmp_path / place / "rgb" / "0001.tif", image(10 + number))
        write_raster(tmp_path / place / "label" / "0001.tif", label(number))
    scenes = from_globs(tmp_path, images="*/rgb/*.tif", labels="*/label/*.tif")
    assert [s.name for s in scenes] == ["north/0001", "south/0001", "west/0001"]
    assert pairs_are_right(scenes)
    assert pairs_are_right(from_globs(tmp_path, images="**/rgb/*.tif", labels="**/label/*.tif"))


@pytest.mark.pitfall("P31")
def test_same_stem_twice_is_refused(tmp_path: Path) -> None:
    twins(tmp_path)
    write_raster(tmp_path / "more" / "a.tif", image(1))
    entries = [str(tmp_path / "images"), str(tmp_path / "more" / "*.tif")]
    with pytest.raises(DataError, match=r"data\.train: rgb .*'a'"):
        scenes_from_files({"rgb": entries}, str(tmp_path / "labels"), {"rgb": Bands()}, LABELS, "data.train")


@pytest.mark.pitfall("P31")
def test_one_prefix_of_another_is_not_its_pair(tmp_path: Path) -> None:
    twins(tmp_path, names=("tile_1", "tile_10"))
    os.remove(tmp_path / "labels" / "tile_1.tif")
    with pytest.raises(DataError, match=r"images/tile_1\.tif"):
        from_globs(tmp_path)


@pytest.mark.parametrize("lost", ["images", "labels"])
@pytest.mark.pitfall("P31")
def test_unpaired_files_are_named(tmp_path: Path, lost: str) -> None:
    twins(tmp_path)
    (tmp_path / lost / "tile_2.tif").unlink()
    other = "labels" if lost == "images" else "images"
    with pytest.raises(DataError, match=rf"data\.train: 1 .*{other}/tile_2\.tif") as caught:
        from_globs(tmp_path)
    assert "tile_10" not in str(caught.value)


@pytest.mark.pitfall("P31")
def test_many_unpaired_files_name_five(tmp_path: Path) -> None:
    twins(tmp_path, names=tuple("abcdefgh"))
    for name in "abcdefg":
        (tmp_path / "labels" / f"{name}.tif").unlink()
    with pytest.raises(DataError, match="and 2 more") as caught:
        from_globs(tmp_path)
    assert "e.tif" in str(caught.value)
    assert "f.tif" not in str(caught.value)


def test_one_file_each_needs_no_common_name(tmp_path: Path) -> None:
    write_raster(tmp_path / "ortho.tif", image(1))
    write_raster(tmp_path / "truth.tif", label(2))
    (scene,) = from_globs(tmp_path, images="ortho.tif", labels="truth.tif")
    assert scene.read_labels(Window(0, 0, 1, 1)) == 2
    # but as patterns the names are all there is to go by
    with pytest.raises(DataError, match=r"data\.train: .*same name"):
        from_globs(tmp_path, images="orth*.tif", labels="tru*.tif")


def test_files_that_other_programs_leave_are_no_images(tmp_path: Path) -> None:
    twins(tmp_path)
    (tmp_path / "images" / "a.tif.aux.xml").write_text("<PAMDataset/>")
    (tmp_path / "images" / "a.tfw").write_text("1")
    assert len(from_globs(tmp_path, images="images/*")) == len(NAMES)
    assert len(from_globs(tmp_path, images="images")) == len(NAMES)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("images/*.png", r"images/\*\.png .*images holds a\.tif, b\.tif"),
        ("nowhere/*.tif", r"nowhere/\*\.tif "),
        ("images/c.tif", r"images/c\.tif .*a\.tif"),
        ("empty", "empty .*no image"),
    ],
)
def test_empty_glob_names_the_pattern_and_what_is_there(tmp_path: Path, entry: str, said: str) -> None:
    twins(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said) as caught:
        from_globs(tmp_path, images=entry)
    assert str(caught.value).startswith("data.train.rgb: ")


def test_image_and_label_of_different_size_are_refused(tmp_path: Path) -> None:
    write_raster(tmp_path / "images" / "a.tif", image(1, (8, 8)))
    write_raster(tmp_path / "labels" / "a.tif", label(1, (8, 9)))
    with pytest.raises(DataError, match=r"images/a\.tif and .*labels/a\.tif .*8 x 8 and 8 x 9 .*resample"):
        from_globs(tmp_path)


def test_image_and_label_of_different_places_are_refused(tmp_path: Path) -> None:
    write_raster(tmp_path / "images" / "a.tif", image(1))
    write_raster(tmp_path / "labels" / "a.tif", label(1), crs="EPSG:32634")
    with pytest.raises(DataError, match=r"images/a\.tif .*labels/a\.tif .*EPSG:32633 .*EPSG:32634.*warp"):
        from_globs(tmp_path)
    write_raster(tmp_path / "labels" / "a.tif", label(1), crs=None)
    assert len(from_globs(tmp_path)) == 1  # a label that says nothing of its place contradicts nothing


@pytest.mark.pitfall("P31")
def test_an_image_is_never_its_own_label(tmp_path: Path) -> None:
    twins(tmp_path)
    with pytest.raises(DataError, match=r"a\.tif: .*image and labels.*expected the labels"):
        from_globs(tmp_path, labels="images/*.tif")


@pytest.mark.pitfall("P31")
def test_folders_with_brackets_pair_like_any_other(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    home = tmp_path / "area [1]?"
    twins(home, "{}_ms.tif")
    scenes = scenes_from_files(
        {"rgb": os.path.join(glob.escape(str(home)), "images/*_ms.tif")}, str(home / "labels"), {"rgb": Bands()},
        LABELS, "data.train",
    )  # fmt: skip
    assert pairs_are_right(scenes)
    assert [scene.name for scene in scenes] == sorted(NAMES)
    assert not [warning for warning in recwarn if warning.category is FutureWarning]


@pytest.mark.parametrize(
    ("pattern", "wild"),
    [("[!x]*.tif", "t/ile_1"), ("til[e[]_*.tif", "e/1"), ("tile[!]_*.tif", None), ("tile[\\d_]*.tif", "_/1")],
)
@pytest.mark.pitfall("P31")
def test_sets_of_characters_stand_for_what_the_file_system_says(tmp_path: Path, pattern: str, wild: str | None) -> None:
    for name in ("tile_1.tif", "tile[!]_1.tif"):
        (tmp_path / name).touch()
    found = {Path(file.path).name: file.wild for file in find(f"{glob.escape(str(tmp_path))}/{pattern}", "here")}
    assert found.get("tile_1.tif") == wild


def test_hidden_files_and_folders_in_a_folder_are_no_images(tmp_path: Path) -> None:
    twins(tmp_path)
    (tmp_path / "images" / "._a.tif").write_bytes(b"written by another system beside every file")
    (tmp_path / "labels" / "old.img").mkdir()
    scenes = from_globs(tmp_path, "images", "labels")
    assert len(scenes) == len(NAMES)
    assert pairs_are_right(scenes)


def write_table(folder: Path, separator: str = ",", mark: str = "") -> Path:
    twins(folder)
    splits = dict(zip(NAMES, ("train", "train_extra", "test", "train", "val", "test"), strict=True))
    rows = [separator.join(("image", "label", "split", "name"))]
    for name in reversed(NAMES):
        rows.append(separator.join((f"images/{name}.tif", f"labels/{name}.tif", splits[name], name)))
    table = folder / "split.csv"
    table.write_text(mark + "\n".join(rows) + "\n", encoding="utf-8")
    return table


def from_table(table: Path, split: str = "train", images: str = "image", labels: str = "label", column: str = "split"):
    return scenes_from_table(table, split, column, {"rgb": images}, labels, {"rgb": Bands()}, LABELS)


@pytest.mark.parametrize(("separator", "mark"), [(",", ""), (";", "\ufeff"), ("\t", "")])
@pytest.mark.pitfall("P31")
def test_table_splits_are_exact_words(tmp_path: Path, separator: str, mark: str) -> None:
    table = write_table(tmp_path, separator, mark)
    scenes = from_table(table)
    assert [scene.name for scene in scenes] == ["tile_11", "tile_1"]  # not tile_2 of train_extra
    assert pairs_are_right(scenes)


@pytest.mark.pitfall("P31")
def test_table_templates_fill_in_columns(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    scenes = from_table(table, "test", "images/{name}.tif", "labels/{name}.tif")
    assert [scene.name for scene in scenes] == ["b", "tile_10"]
    assert pairs_are_right(scenes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "tran"}, r"split\.csv.*'tran'.*'train'"),
        ({"column": "splt"}, r"split\.csv.*'splt'.*'split'"),
        ({"images": "imagee"}, r"split\.csv.*'imagee'.*'image'"),
        ({"labels": "labels/{nam}.tif"}, r"split\.csv.*'nam'.*'name'"),
        ({"images": "images/{name}.png"}, r"split\.csv line 4: .*images/tile_11\.png'"),
    ],
)
def test_table_errors_name_table_line_and_remedy(tmp_path: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        from_table(write_table(tmp_path), **change)


def test_table_with_a_short_row_or_a_repeated_scene_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    text = table.read_text()
    table.write_text(text + "images/a.tif,labels/a.tif\n")
    with pytest.raises(DataError, match=r"split\.csv line 8: .*4 cells"):
        from_table(table)
    table.write_text(text + "images/tile_1.tif,labels/tile_1.tif,train,again\n")
    with pytest.raises(DataError, match=r"split\.csv.* line 8 .*line 7"):
        from_table(table)
    with pytest.raises(DataError, match=r"none\.csv: .*table"):
        from_table(tmp_path / "none.csv")


@pytest.mark.pitfall("P31")
def test_a_quotation_mark_left_open_swallows_no_scene(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    text = table.read_text()
    table.write_text(
        text.replace("images/tile_2.tif,labels/tile_2.tif,train_extra", '"images/tile_2.tif,l,train_extra')
    )
    with pytest.raises(DataError, match=r"split\.csv line 6: .*quotation marks"):
        from_table(table)
    table.write_text(text + '"' + "x" * 200_000 + '",l,train,x\n')
    with pytest.raises(DataError, match=r"split\.csv line 8: .*larger.*quotation marks"):
        from_table(table)


@pytest.mark.pitfall("P31")
def test_table_cells_may_hold_commas_quotes_and_any_letter(tmp_path: Path) -> None:
    name = 'a, "b"\u2028\x85 ü'
    twins(tmp_path, names=(name,))
    quoted = name.replace('"', '""')
    table = tmp_path / "split.csv"
    row = f'"images/{quoted}.tif","labels/{quoted}.tif",train'
    table.write_bytes(("\ufeffimage,label,split\r\n" + row + "\r\n\r\n,,\r\n").encode())
    assert [scene.name for scene in from_table(table)] == [name]


def test_table_with_two_columns_of_one_name_or_a_path_beyond_limits_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    text = table.read_text()
    table.write_text(text.replace("split,name", "split,image"))
    with pytest.raises(DataError, match=r"split\.csv: .*'image'.*each name once"):
        from_table(table)
    table.write_text(text + "x" * 5000 + ",labels/a.tif,train,a\n")
    with pytest.raises(DataError, match=r"split\.csv line 8: 'image' .*not exist"):
        from_table(table)


@pytest.mark.pitfall("P48")
def test_one_file_in_two_splits_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    splits = {name: from_table(table, name) for name in ("train", "val", "test")}
    disjoint(splits)
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "images" / "a.tif", tmp_path / "other" / "z.tif")  # the same file under another name
    os.symlink(tmp_path / "labels" / "b.tif", tmp_path / "other" / "y.tif")
    for linked, labels in (("z.tif", "labels/tile_1.tif"), ("../images/tile_1.tif", "other/y.tif")):
        extra = from_globs(tmp_path, images=f"other/{linked}", labels=labels)
        with pytest.raises(DataError, match=r"(a|b)\.tif .*data\.(val|test) .*data\.extra; .*remove"):
            disjoint({"val": splits["val"], "test": splits["test"], "extra": extra})


def test_all_pixels_ignored_is_said_before_training(tmp_path: Path) -> None:
    for name in "ab":
        write_raster(tmp_path / "images" / f"{name}.tif", image(1, (300, 20)))
        write_raster(tmp_path / "labels" / f"{name}.tif", label(255, (300, 20)))
    with pytest.raises(DataError, match=r"data\.train: .*2 scenes .*data\.ignore_index"):
        require_labels(from_globs(tmp_path), "train", 2, "all")
    labels = label(255, (300, 20))
    labels[299, 19] = 1
    write_raster(tmp_path / "labels" / "b.tif", labels)
    assert require_labels(from_globs(tmp_path), "train", 2, "all") == [0, 1]


@pytest.mark.pitfall("P26")
def test_a_split_whose_images_say_nothing_at_its_labels_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        array = image(1, (300, 20))
        array[:, 10:] = 0
        write_raster(tmp_path / "images" / f"{name}.tif", array, nodata=0)
        labels = label(255, (300, 20))
        labels[20:] = 1
        write_raster(tmp_path / "labels" / f"{name}.tif", labels)
    with pytest.raises(DataError, match=r"data\.val: .*2 scenes; .*data\.modalities\.NAME\.nodata"):
        require_labels(from_globs(tmp_path), "val", 2, "all")
    labels[9] = 0
    write_raster(tmp_path / "labels" / "b.tif", labels)
    assert require_labels(from_globs(tmp_path), "val", 2, "all") == [20, 2 * 280 * 20]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_hundreds_of_scenes_keep_few_files_open(tmp_path: Path) -> None:
    first = (
        write_raster(tmp_path / "images" / "s0.tif", image(10)),
        write_raster(tmp_path / "labels" / "s0.tif", label(0)),
    )
    for number in range(1, 150):
        for file in first:
            shutil.copy(file, file.with_name(f"s{number}.tif"))

    def open_here() -> int:
        links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and str(tmp_path) in os.readlink(link) for link in links)

    scenes = from_globs(tmp_path)
    assert len(scenes) == 150
    for _ in range(2):
        assert pairs_are_right(scenes)
        assert open_here() <= 64


def test_scenes_travel_to_workers_without_open_files(tmp_path: Path) -> None:
    twins(tmp_path)
    scenes = from_globs(tmp_path)
    assert pairs_are_right(scenes)
    copies = pickle.loads(pickle.dumps(scenes))
    assert pairs_are_right(copies)
    assert copies[0].grid == scenes[0].grid
    assert copies[0].bands() == {"rgb": 1}
    assert copies[0].dtypes() == {"rgb": "uint8"}


def test_file_scene_reads_beyond_the_edge_as_invalid(tmp_path: Path) -> None:
    rasters = {"rgb": Raster(str(write_raster(tmp_path / "i.tif", image(9))), Bands())}
    scene = RasterScene("i", rasters, LabelRaster(str(write_raster(tmp_path / "l.tif", label(1))), LABELS))
    chip = scene.read(Window(4, 4, 8, 8))["rgb"]
    assert chip.valid.sum() == 16
    assert (chip.pixels[0] == 9 * chip.valid).all()
    assert ((scene.read_labels(Window(4, 4, 8, 8)) == IGNORE) == ~chip.valid).all()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the project")
def test_real_tables_and_globs_open() -> None:
    counts = {}
    splits = {}
    for split in ("train", "val", "test"):
        splits[split] = scenes_from_table(
            DATA / "s2_india_rgb_ir" / "split.csv", split, "split",
            {"rgb": "{split}/rgb/{name}.png", "ir": "{split}/ir/{name}.png"}, "{split}/label/{name}.png",
            {"rgb": Bands(), "ir": Bands()}, LabelMap((1, 2, 3), 0),
        )  # fmt: skip
        counts[split] = len(splits[split])
    assert counts == {"train": 28, "val": 6, "test": 13}
    disjoint(splits)
    first = splits["train"][0]
    assert first.bands() == {"rgb": 3, "ir": 1}
    assert set(np.unique(first.read_labels(Window(0, 0, 320, 320)))) <= {IGNORE, 0, 1, 2}
    scenes = scenes_from_files(
        {"rgb": str(DATA / "aerial_multiclass/test/images/*.jpg")}, str(DATA / "aerial_multiclass/test/labels"),
        {"rgb": Bands()}, LabelMap((0, 1, 2, 3, 4), 255), "data.test",
    )  # fmt: skip
    assert len(scenes) == 68
