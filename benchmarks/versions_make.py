"""What versions.py gives to both versions: small scenes of four kinds, an encoder folder and a recipe for each kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.transform import from_origin

SIDE = 64  # of the scenes to learn from, pixels
SCENE = (300, 411)  # rows and columns of the scene to label
PUBLISHED = {"name": "dinov2", "checkpoint": "encoder"}
NOTHING = -9999.0  # nodata of the heights


@dataclass(frozen=True)
class Kind:
    """A kind of scene, the model that learns from it, and how its scene is labelled."""

    model: dict[str, Any]
    train: dict[str, Any]
    predict: tuple[str, ...] = ()
    heights: bool = False  # a second modality, on a grid of its own


KINDS = {
    "rgb8": Kind(
        {"encoder": PUBLISHED, "adapter": {"name": "full"}, "decoder": {"name": "fpn", "channels": 16}},
        {"optimizer": {"lr": 0.001, "encoder_lr": 0.0003}},
        ("--tta", "flips"),
    ),
    "u16": Kind(
        {
            "encoder": PUBLISHED | {"input": "widen"},
            "adapter": {"name": "lora", "rank": 2, "dropout": 0.1},
            "decoder": {"name": "upernet", "channels": 16},
        },
        {"accumulate": 2},
        ("--scales", "0.75,1"),
    ),
    "f32": Kind(
        {"encoder": PUBLISHED, "adapter": {"name": "adapter", "hidden": 8}, "decoder": {"name": "linear"}},
        {"loss": {"cross_entropy": 1.0, "dice": 0.5}},
        ("--blend", "none"),
    ),
    "two": Kind(
        {
            "encoder": PUBLISHED | {"input": "project"},
            "adapter": {"name": "lora", "rank": 2, "targets": ["q", "v", "mlp"]},
            "decoder": {"name": "fpn", "channels": 16},
        },
        {},
        ("--average", "logits"),
        heights=True,
    ),
}


def picture(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on dark ground: uint8 (3, H, W), and its labels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = (y - height * random.uniform(0.3, 0.7)) ** 2 + (x - width * random.uniform(0.3, 0.7)) ** 2 < height**2 / 12
    image = np.where(disc, 170, 70)[None] + random.normal(0, 20, (3, height, width))
    return image.clip(1, 254).astype(np.uint8), disc.astype(np.uint8)


def stored(kind: str, image: np.ndarray) -> tuple[np.ndarray, float | None]:
    """The picture in one of the kinds, and its nodata value."""
    if kind == "u16":
        wide = np.concatenate([image, image[:1]]).astype(np.uint16) * 40
        wide[:, :5] = 0
        return wide, 0
    if kind == "f32":
        real = image.astype(np.float32) / 7
        real[0, :4] = np.nan
        return real, None
    return image, None


def heights(seed: int, height: int, width: int) -> np.ndarray:
    """float32 (1, H / 2 + 6, W / 2 + 6): metres on pixels twice as large, a margin round the picture, and a hole."""
    rows, cols = height // 2 + 6, width // 2 + 6
    found = 300 + np.random.default_rng(seed).normal(0, 8, (rows, cols)) + np.arange(cols) / 3
    found[rows // 3 : rows // 3 + 4, cols // 3 : cols // 3 + 5] = NOTHING
    return found.astype(np.float32)[None]


def save(
    path: Path,
    array: np.ndarray,
    place: int,
    nodata: float | None = None,
    pixel: float = 10,
    shift: tuple[float, float] = (0, 0),
) -> None:
    """Write a GeoTIFF at a place of its own; `pixel` and `shift` (east, north) in metres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = array[None] if array.ndim == 2 else array
    corner = (500000 + 10000 * place + shift[0], 5000000 + shift[1])
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2], dtype=bands.dtype,
        crs="EPSG:32633", transform=from_origin(*corner, pixel, pixel), nodata=nodata,
    ) as file:  # fmt: skip
        file.write(bands)


def save_heights(path: Path, place: int, height: int, width: int) -> None:
    """The heights of a scene, on pixels of 20 m that begin elsewhere than those of the scene."""
    save(path, heights(place, height, width), place, NOTHING, 20, (-35, 55))


def save_encoder(folder: Path, width: int = 32, layers: int = 4, heads: int = 2) -> None:
    """A small random DINOv2, as transformers saves published ones."""
    import torch
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "mlp_ratio": 4}
    Dinov2Model(Dinov2Config(image_size=224, patch_size=14, **size)).save_pretrained(folder)


def recipe(kind: str) -> dict[str, Any]:
    """What both versions read; paths are those beside the recipe."""
    one = KINDS[kind]
    modalities = ["rgb", "dem"] if one.heights else ["rgb"]
    sources = {
        split: {name: f"{kind}/{split}/{name}/*.tif" for name in (*modalities, "labels")} for split in ("train", "val")
    }
    return {
        "name": kind,
        "data": {
            "classes": {0: "ground", 1: "disc"},
            "modalities": {name: {} for name in modalities},
            "tile": 32,
            "samples_per_epoch": 14,
            **sources,
        },
        "model": one.model,
        "train": {"epochs": 2, "batch_size": 4, **one.train},
        "output_dir": f"run-{kind}",
    }


def make(folder: Path) -> None:
    """All kinds: two scenes to train on, one to choose by, one to label, and the recipe."""
    save_encoder(folder / "encoder")
    for kind, one in KINDS.items():
        for number, split in enumerate(("train", "train", "val")):
            image, labels = picture(number, SIDE, SIDE)
            array, nodata = stored(kind, image)
            save(folder / kind / split / "rgb" / f"s{number}.tif", array, number, nodata)
            save(folder / kind / split / "labels" / f"s{number}.tif", labels, number)
            if one.heights:
                save_heights(folder / kind / split / "dem" / f"s{number}.tif", number, SIDE, SIDE)
        array, nodata = stored(kind, picture(9, *SCENE)[0])
        save(folder / kind / "scene.tif", array, 9, nodata)
        if one.heights:
            save_heights(folder / kind / "dem.tif", 9, *SCENE)
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(recipe(kind), sort_keys=False), encoding="utf-8")


def make_step(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """(what, recipe, images of an epoch) of the trainings whose steps are measured: 224 px, batches of eight."""
    save_encoder(folder / "encoder", 192, 12, 3)
    for number in range(3):
        image, labels = picture(number, 512, 512)
        save(folder / "rgb" / f"s{number}.tif", image, number)
        save(folder / "labels" / f"s{number}.tif", labels, number)
    for adapter in ("full", "lora"):
        content = {
            "name": adapter,
            "data": {
                "classes": {0: "ground", 1: "disc"},
                "modalities": {"rgb": {}},
                "tile": 224,
                "samples_per_epoch": 16,
                "train": {"rgb": "rgb/*.tif", "labels": "labels/*.tif"},
            },
            "model": {"encoder": PUBLISHED, "adapter": {"name": adapter}, "decoder": {"name": "fpn", "channels": 32}},
            "train": {"epochs": 4, "batch_size": 8},
            "output_dir": f"run-{adapter}",
        }
        path = folder / f"{adapter}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        yield f"{adapter} on a ViT of 12 x 192", path, 16
