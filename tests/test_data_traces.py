"""What a run remembers of its data: other data are told by name, a copy of the same data is the same."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import recipe_dict, save_encoder, toy_folder, toy_scene, write_raster, write_recipe

from vfmseg.build.data import open_training
from vfmseg.data.traces import Traces, bytes_trace
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import LabelMap
from vfmseg.recipe import load_recipe
from vfmseg.terminal import guarded


@pytest.fixture
def place(tmp_path: Path) -> Path:
    toy_folder(tmp_path / "data")
    save_encoder(tmp_path / "encoder", "dinov2")
    return tmp_path


def content_of(place: Path) -> dict[str, Any]:
    return recipe_dict(place / "data", place / "encoder", place / "run")


def run(place: Path, content: dict[str, Any] | None = None, **how: bool) -> dict[str, Any]:
    return finetune(load_recipe(write_recipe(place / "recipe.yaml", content or content_of(place))), **how)


@contextmanager
def stopped_in_the_second_epoch() -> Iterator[None]:
    from vfmseg.training import loop

    honest = loop.Loop._train_epoch

    def until(self: loop.Loop, number: int, tell: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        honest(self, number, tell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_train_epoch", until)
        with pytest.raises(KeyboardInterrupt):
            yield


def other_labels(path: Path) -> None:
    """One pixel of another class and one of that class less: the counts are the same."""
    with rasterio.open(path, "r+") as file:
        labels = file.read(1)
        one, two = (tuple(np.argwhere(labels == k)[0]) for k in (0, 1))
        labels[one], labels[two] = 1, 0
        file.write(labels, 1)


def other_image(path: Path) -> None:
    with rasterio.open(path, "r+") as file:
        file.write(255 - file.read())


@pytest.mark.parametrize(
    ("change", "path", "told"),
    [
        (other_labels, "train/labels/s1_train.tif", "s1_train.tif (labels of data.train, scene s1_train) has changed"),
        (other_image, "train/images/s2_train.tif", "s2_train.tif (rgb of data.train, scene s2_train) has changed"),
        (other_labels, "val/labels/s0_val.tif", "s0_val.tif (labels of data.val, scene s0_val) has changed"),
    ],
    ids=["labels", "image", "validation"],
)
@pytest.mark.pitfall("F17")
def test_a_run_goes_on_with_the_data_that_it_began_with(
    place: Path, capsys: pytest.CaptureFixture[str], change: Any, path: str, told: str
) -> None:
    with stopped_in_the_second_epoch():
        run(place)
    change(place / "data" / path)
    before = (place / "run" / "state.pt").read_bytes()
    assert guarded(lambda: run(place, resume=True) and None) == 2
    said = capsys.readouterr().err
    assert f"the data have changed since the run was started: {told}; go on with what there is now by" in said
    assert "--accept-changed-data; resume with the same, or start anew with --overwrite" in said
    assert (place / "run" / "state.pt").read_bytes() == before
    assert run(place, resume=True, accept_changed_data=True)["steps"] == 8
    assert f"it goes on with what there is now: {told}" in capsys.readouterr().err
    run(place, resume=True)  # these are its data now


@pytest.mark.pitfall("F17")
def test_a_copy_of_the_data_is_the_same(place: Path) -> None:
    with stopped_in_the_second_epoch():
        run(place)
    (place / "data").rename(place / "old")
    shutil.copytree(place / "old", place / "data", copy_function=shutil.copyfile)
    for path in (place / "data").rglob("*.tif"):
        os.utime(path, (1, 1))
    labels = place / "data" / "train" / "labels" / "s0_train.tif"
    with rasterio.open(place / "old" / "train" / "labels" / "s0_train.tif") as old:
        profile, pixels = old.profile | {"compress": "deflate"}, old.read()
    with rasterio.open(labels, "w", **profile) as new:
        new.write(pixels)
    assert run(place, resume=True)["steps"] == 8


@pytest.mark.pitfall("F17")
def test_scenes_that_came_or_went_are_told(place: Path) -> None:
    with stopped_in_the_second_epoch():
        run(place)
    for kind in ("images", "labels"):
        (place / "data" / "val" / kind / "s0_val.tif").rename(place / "data" / "val" / kind / "new.tif")
    told = (
        r"new\.tif \(labels of data\.val, scene new\) is new, s0_val\.tif .* is not there any more, new\.tif .*1 more;"
    )
    with pytest.raises(CheckpointError, match=told):
        run(place, resume=True)


@pytest.mark.pitfall("F17")
def test_states_of_before_know_no_data(place: Path) -> None:
    with stopped_in_the_second_epoch():
        run(place)
    state = torch.load(place / "run" / "state.pt", weights_only=True)
    del state["origin"]["data"]
    torch.save(state, place / "run" / "state.pt")
    other_labels(place / "data" / "train" / "labels" / "s1_train.tif")
    assert run(place, resume=True)["steps"] == 8


@pytest.mark.pitfall("F17")
def test_who_goes_on_with_other_images_normalises_them_as_before(place: Path) -> None:
    content = content_of(place)
    content["data"]["modalities"]["rgb"] = {"normalize": "dataset"}
    with stopped_in_the_second_epoch():
        run(place, content)
    then = torch.load(place / "run" / "state.pt", weights_only=True)["origin"]["inputs"]["rgb"]
    other_image(place / "data" / "train" / "images" / "s1_train.tif")
    run(place, content, resume=True, accept_changed_data=True)
    now = torch.load(place / "run" / "state.pt", weights_only=True)["origin"]["inputs"]["rgb"]
    assert now == then
    with pytest.raises(CheckpointError, match="mean and std"):  # of what there is now they are others
        run(place, content, resume=True)


@pytest.mark.pitfall("F17")
def test_accepting_is_about_going_on(place: Path) -> None:
    with pytest.raises(RecipeError, match="--accept-changed-data is about going on with a run: add --resume"):
        run(place, accept_changed_data=True)
    assert not (place / "run").exists()


def traces_of(place: Path) -> dict[str, str]:
    traces = Traces()
    open_training(load_recipe(write_recipe(place / "recipe.yaml", content_of(place))), traces)
    return traces.found


@pytest.mark.pitfall("F17")
def test_every_image_and_label_map_leaves_one_trace(tmp_path: Path) -> None:
    toy_folder(tmp_path / "data")
    found = traces_of(tmp_path)
    assert len(found) == 2 * (4 + 2)  # those of test are not looked at
    assert len(set(found.values())) == len(found)
    assert all(str(tmp_path) not in name for name in found)
    image = tmp_path / "data" / "train" / "images" / "s3_train.tif"
    with rasterio.open(image, "r+") as file:
        file.nodata = 0  # what decides how it is read
    changed = traces_of(tmp_path)
    assert [name for name in found if found[name] != changed[name]] == [
        "s3_train.tif (rgb of data.train, scene s3_train)"
    ]


@pytest.mark.pitfall("F17")
def test_a_trace_sees_every_byte_of_a_small_file_and_reads_little_of_a_large_one() -> None:
    small = bytes(range(256)) * 4
    whole = bytes_trace(io.BytesIO(small))
    assert bytes_trace(io.BytesIO(small)) == whole
    for at in range(0, len(small), 7):
        assert bytes_trace(io.BytesIO(small[:at] + bytes([small[at] ^ 1]) + small[at + 1 :])) != whole
    assert bytes_trace(io.BytesIO(small[:-1])) != whole

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            part = super().read(size)
            self.taken += len(part)
            return part

    large = bytearray(2**20)
    file = Counted(large)
    before = bytes_trace(file)
    assert file.taken <= 64 * 1024
    seen = 0
    for at in range(0, len(large), 2**14):
        other = bytearray(large)
        other[at : at + 2**14] = b"x" * 2**14
        seen += bytes_trace(io.BytesIO(other)) != before
    assert seen == 2 + 8  # both ends, and the places between
    for size in (1, 2**14, 2**15, 2**16 - 1, 2**16, 2**16 + 1):
        content = bytes(size)
        assert bytes_trace(io.BytesIO(content)) != bytes_trace(io.BytesIO(content[:-1] + b"x"))


@pytest.mark.parametrize("kind", ["image", "array"])
@pytest.mark.pitfall("F17")
def test_rows_of_a_published_set_leave_traces(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    from vfmseg.data.checks import require_labels
    from vfmseg.data.from_datasets import scenes_from_dataset

    def traced(images: list[np.ndarray], labels: list[np.ndarray]) -> list[str]:
        if kind == "image":
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        else:
            shape = datasets.Array3D((8, 8, 3), "uint8")
            features = datasets.Features({"image": shape, "label": datasets.Array2D((8, 8), "uint8")})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        datasets.Dataset.from_dict({"image": images, "label": labels}, features).save_to_disk(str(folder))
        label_map = LabelMap((0, 1), 255)
        scenes = scenes_from_dataset(str(folder), "train", {"rgb": "image"}, "label", {"rgb": Bands()}, label_map)
        traces = Traces()
        require_labels(scenes, "train", 2, "all", traces)
        traces.split("train", scenes)
        return list(traces.found.values())

    images, labels = (list(kinds) for kinds in zip(*(toy_scene(seed, 8, 8) for seed in range(2)), strict=True))
    images = [image.transpose(1, 2, 0) for image in images]
    before = traced(images, labels)
    assert len(set(before)) == 4
    assert traced(images, labels) == before
    assert [a == b for a, b in zip(traced([images[0], 255 - images[1]], labels), before, strict=True)] == [1, 1, 0, 1]
    assert [a == b for a, b in zip(traced(images, [1 - labels[0], labels[1]]), before, strict=True)] == [1, 0, 1, 1]


@pytest.mark.pitfall("F17")
def test_an_image_behind_a_path_of_gdal_is_told_by_its_pixels(tmp_path: Path) -> None:
    import zipfile

    from vfmseg.data.traces import raster_trace
    from vfmseg.geo.reader import Raster

    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = write_raster(tmp_path / f"{name}.tif", toy_scene(seed)[0])
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.write(path, "scene.tif")
        found.append(raster_trace(Raster(f"/vsizip/{tmp_path}/{name}.zip/scene.tif")))
    assert found[0] == found[1] != found[2]
