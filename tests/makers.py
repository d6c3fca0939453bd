"""Makers of small scenes, encoders and recipes for the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

from vfmseg.catalog import IMAGENET
from vfmseg.data.image import Image
from vfmseg.data.inputs import Input
from vfmseg.disk.digests import signed
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Window
from vfmseg.inference.contracts import Area, Tiles
from vfmseg.recipe import PretrainRecipe, Recipe, load_pretrain_recipe, load_recipe

if TYPE_CHECKING:
    from vfmseg.training.loop import RunState

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def write_raster(
    path: Path,
    array: np.ndarray,
    *,
    nodata: float | None = None,
    crs: str | None = "EPSG:32633",
    alpha: bool = False,
    origin: tuple[float, float] = (500000, 5000000),
    pixel: float = 10,
) -> Path:
    """Write (C, H, W) or (H, W) as a GeoTIFF with square pixels of `pixel` m, north-western corner at `origin`."""
    bands = array[None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": crs, "transform": from_origin(*origin, pixel, pixel)} if crs else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # some scenes shall have no place
        with rasterio.open(
            path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2],
            dtype=bands.dtype, nodata=nodata, **place,
        ) as target:  # fmt: skip
            target.write(bands)
    return path


def toy_scene(seed: int, height: int = 64, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A scene that can be learned in seconds: a bright, noisy disc on a dark ground; uint8 (3, H, W), labels 0/1."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    cy, cx = random.uniform(0.3, 0.7, 2) * (height, width)
    disc = (y - cy) ** 2 + (x - cx) ** 2 < (0.3 * min(height, width)) ** 2
    image = np.where(disc, 170, 70)[None] + random.normal(0, 20, (3, height, width))
    return image.clip(0, 255).astype(np.uint8), disc.astype(np.uint8)


def toy_folder(folder: Path, scenes: dict[str, int] | None = None, height: int = 64, width: int = 64) -> Path:
    """Folders train/val/test of image and label GeoTIFFs with equal stems."""
    for number, (split, count) in enumerate((scenes or {"train": 4, "val": 2, "test": 1}).items()):
        for i in range(count):
            image, labels = toy_scene(100 * number + i, height, width)
            write_raster(folder / split / "images" / f"s{i}_{split}.tif", image)
            write_raster(folder / split / "labels" / f"s{i}_{split}.tif", labels)
    return folder


def save_encoder(folder: Path, family: str, seed: int = 0) -> Path:
    """A small random encoder of a family, saved by transformers as published ones are."""
    torch.manual_seed(seed)
    if family == "dinov2":
        from transformers.models.dinov2 import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
        )
        Dinov2Model(config).save_pretrained(folder)
    elif family == "clip":
        from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        CLIPVisionModel(config).save_pretrained(folder)
    else:
        from transformers.models.sam import SamVisionConfig, SamVisionModel

        config = SamVisionConfig(
            hidden_size=32, output_channels=16, num_hidden_layers=3, num_attention_heads=2, image_size=64,
            patch_size=16,
            mlp_dim=64, window_size=2, global_attn_indexes=[2], num_pos_feats=8,
        )  # fmt: skip
        SamVisionModel(config).save_pretrained(folder)
    return folder


def recipe_dict(data: Path, encoder: Path | None, output: Path, family: str = "dinov2") -> dict:  # type: ignore[type-arg]
    """A complete recipe for a toy folder, as a dictionary to be changed by a test."""
    section = {"name": family, "checkpoint": str(encoder)} if encoder else {"name": "builtin"}
    sources = {
        split: {"rgb": f"{data}/{split}/images/*.tif", "labels": f"{data}/{split}/labels/*.tif"}
        for split in ("train", "val", "test")
    }
    return {
        "name": "toy",
        "data": {"classes": {0: "ground", 1: "disc"}, "modalities": {"rgb": {}}, "tile": 32, **sources},
        "model": {
            "encoder": section,
            "adapter": {"name": "lora", "rank": 2} if encoder else {"name": "full"},
            "decoder": {"name": "linear"},
        },
        "train": {"epochs": 2, "batch_size": 4, "optimizer": {"lr": 0.01}},
        "output_dir": str(output),
    }


def two_sensors(place: Path, split: str, has: dict[str, str]) -> None:
    """Toy scenes of a split in folders rgb, sar and labels; has {name: its modalities, such as "rgb sar" or "sar"}."""
    for number, (name, modalities) in enumerate(has.items()):
        image, labels = toy_scene(len(split) * 100 + number, 48, 56)
        arrays = {"rgb": image, "sar": (image[:1] / 255 * 20 - 25).astype(np.float32)}
        for modality in modalities.split():
            write_raster(place / split / modality / f"{name}.tif", arrays[modality])
        write_raster(place / split / "labels" / f"{name}.tif", labels)


def sensor_content(place: Path, **changes: object) -> dict:  # type: ignore[type-arg]
    """A recipe for `two_sensors`, in which either may be missing; changes such as data__tile=32."""
    encoder = place / "encoder"
    made = recipe_dict(place, encoder if encoder.exists() else None, place / "run")
    for split in ("train", "val", "test"):
        made["data"][split] = {name: f"{place}/{split}/{name}/*.tif" for name in ("rgb", "sar", "labels")}
    made["data"]["modalities"] = {"rgb": {"optional": True}, "sar": {"optional": True}}
    made["data"]["tile"] = 24
    made["model"]["fusion"] = {"name": "linear"}
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        at = made
        for step in section.split("__") if section else ():
            at = at[step]
        at[last] = value
    return made


def sensor_recipe(place: Path, **changes: object) -> Recipe:
    """The recipe of `sensor_content`, checked."""
    return load_recipe(write_recipe(place / "recipe.yaml", sensor_content(place, **changes)))


def finished_run(folder: Path) -> Path:
    """`folder`, with toy scenes in data/, an encoder in encoder/ and a finished run in run/."""
    from vfmseg.finetune import finetune
    from vfmseg.recipe import load_recipe

    toy_folder(folder / "data")
    save_encoder(folder / "encoder", "dinov2")
    recipe = recipe_dict(folder / "data", folder / "encoder", folder / "run")
    finetune(load_recipe(write_recipe(folder / "r.yaml", recipe)))
    return folder


NEW_ENCODER = {"name": "new", "patch": 8, "width": 16, "depth": 2, "heads": 2}
MAE_DECODER = {"width": 16, "depth": 1, "heads": 2}


def pretrain_recipe(place: Path, output: Path, epochs: int = 2, samples: int = 6, **changes: Any) -> PretrainRecipe:
    """A recipe of masked pretraining on place/rgb; changes such as model={...} replace a section."""
    content: dict[str, Any] = {
        "name": "toy",
        "data": {
            "modalities": {"rgb": {}},
            "scenes": {"rgb": f"{place}/rgb/*.tif"},
            "tile": 32,
            "samples_per_epoch": samples,
        },
        "model": {"encoder": NEW_ENCODER},
        "objectives": {"mae": {"decoder": MAE_DECODER}},
        "train": {"epochs": epochs, "batch_size": 2, "optimizer": {"lr": 0.003}},
        "output_dir": str(output),
    }
    file = output.parent / f"{output.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    return load_pretrain_recipe(write_recipe(file, content | changes))


def in_two_sittings(recipe: Any, after: int = 1, run: Callable[..., Any] | None = None) -> None:
    """Train as a recipe says, stopped when epoch `after` is saved, and gone on with; by `finetune`, or by `run`."""
    from vfmseg.finetune import finetune
    from vfmseg.training.keeper import Keeper

    class Stopped(Exception):
        pass

    original = Keeper.epoch

    def stop(self: Keeper, state: RunState, improved: bool) -> None:
        original(self, state, improved)
        if state.epoch == after:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Keeper, "epoch", stop)
        with pytest.raises(Stopped):
            (run or finetune)(recipe)
    later: list[int] = []

    def noted(self: Keeper, state: RunState, improved: bool) -> None:
        original(self, state, improved)
        later.append(state.epoch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Keeper, "epoch", noted)
        (run or finetune)(recipe, resume=True)
    # a run that began anew would end alike
    assert later == list(range(after + 1, recipe.train.epochs + 1))


def on_two_processes(script: Path, *arguments: object) -> None:
    """Run a script by torchrun on two processes of one thread, which find the package and what the tests share."""
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        + [str(one) for one in arguments],
        capture_output=True, text=True, timeout=240, check=False, cwd=script.parent,
        env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def image_and_heights(folder: Path) -> Path:
    """`folder` with SPLIT/rgb, dem and labels of toy scenes, heights from the image, a strip of each nodata."""
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for i in range(count):
            image, labels = toy_scene(10 * len(split) + i, 56, 72)
            heights = (image[0] * 0.5 + 300).astype(np.float32)
            image[:, :10], heights[-10:] = 0, -9999
            write_raster(folder / split / "rgb" / f"{i}.tif", image, nodata=0)
            write_raster(folder / split / "dem" / f"{i}.tif", heights, nodata=-9999)
            write_raster(folder / split / "labels" / f"{i}.tif", labels)
    return folder


def hear_ctrl_c() -> None:
    """For a child process: background jobs of a shell ignore Ctrl-C, and so would all that the tests start there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_recipe(path: Path, content: dict) -> Path:  # type: ignore[type-arg]
    """Write a recipe dictionary as YAML."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


_WATCHED: list[Path] = []
_KEPT: list[Path] = []


def _watch(event: str, words: tuple[object, ...]) -> None:
    """Copy the watched folder before each call that changes something in it."""
    if not _WATCHED or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    folder, kept = _WATCHED.pop(), _KEPT[-1]  # not while it is copied
    try:
        if folder.exists() and any(isinstance(word, str) and Path(word).is_relative_to(folder) for word in words):
            shutil.copytree(folder, kept / f"{len(list(kept.iterdir())):03d}")
    finally:
        _WATCHED.append(folder)


@contextmanager
def stopped_anywhere(folder: Path, kept: Path) -> Iterator[Path]:
    """`kept`, which then holds the folder as a kill at each file-system call of this block would leave it."""
    if not _KEPT:
        sys.addaudithook(_watch)  # it can never be removed
    kept.mkdir()
    _KEPT.append(kept)
    _WATCHED.append(folder)
    try:
        yield kept
    finally:
        _WATCHED.clear()
    seen = set()
    for copy in sorted(kept.iterdir()):
        content = tuple(sorted((str(p.relative_to(copy)), p.is_file() and p.read_bytes()) for p in copy.rglob("*")))
        if content in seen:
            shutil.rmtree(copy)
        seen.add(content)


def sign(folder: Path) -> None:
    """Make a segmenter folder that a test has changed one whose digests are right again."""
    record = json.loads((folder / "segmenter.json").read_text())
    (folder / "segmenter.json").write_text(json.dumps(signed(record, folder, set(record["files"]))))


def an_input(name: str = "rgb", count: int = 3, dtype: str = "uint8", mean: float = 0.0, std: float = 0.0) -> Input:
    """A modality as a model takes it; without mean and std those of ImageNet, for three 8-bit bands."""
    if std:
        return Input(name, Bands(), count, dtype, "dataset", (mean,) * count, (std,) * count)
    means, stds = ((255 * one for one in values) for values in IMAGENET)
    return Input(name, Bands(), count, dtype, "encoder", tuple(means), tuple(stds))


def apart(tiles: Tiles) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Pixels and masks of tiles, by modality."""
    return {n: i.pixels for n, i in tiles.images.items()}, {n: i.valid for n, i in tiles.images.items()}


def tiles_of(images: Mapping[str, torch.Tensor], valid: Mapping[str, torch.Tensor]) -> Tiles:
    """Pixels and masks as tiles that lie nowhere."""
    return Tiles(images_of(images, valid), (None,) * len(next(iter(valid.values()))))


def images_of(pixels: Mapping[str, torch.Tensor], valid: Mapping[str, torch.Tensor]) -> dict[str, Image]:
    """Pixels and masks by modality as images."""
    return {name: Image(pixels[name], valid[name]) for name in pixels}


def area_of(mask: np.ndarray) -> Area:
    """The part of a scene where a mask of its size is True; as ever, windows may reach beyond the scene."""

    def touches(window: Window) -> bool:
        inside = window.clip(*mask.shape)
        return bool(mask[inside.rows, inside.cols].any())

    return Area(touches, lambda window: mask[window.rows, window.cols])
