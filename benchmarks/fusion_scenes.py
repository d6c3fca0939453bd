"""Scenes of which it is known what each modality alone can reach: the ground that fusions are compared on.

Every pixel has two properties that have nothing to do with each other, each true on half of the ground: `a` is a
brightness that only the image shows, `b` a height that only the elevation model shows. The class is 2 a + b. Who sees
one of them alone can do no better than guess the other. If b is said of a share q of the pixels whatever they are, a
class has IoU q / (1 + q) or (1 - q) / (2 - q); the mean over the four is largest at q = 1/2:

    q / (1 + q) = (1/2) / (3/2) = 1/3

So 1/3 is the most that any method can reach with one modality (more by luck alone, in few scenes). With both it is 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

CEILING = 1 / 3
"""Mean IoU that one modality alone can reach."""

CLASSES = {0: "dark low", 1: "dark high", 2: "bright low", 3: "bright high"}
STEP = 12.0  # grey levels and metres between the two states, as much as the noise


def halves(draws: np.random.Generator, side: int, size: int) -> np.ndarray:
    """Bool (side, side): blobs of about `size` pixels that cover half of it."""
    coarse = draws.normal(size=(side // size + 3, side // size + 3))
    at = (np.arange(side) + draws.uniform(0, size)) / size
    low = at.astype(int)
    part = (at - low) ** 2 * (3 - 2 * (at - low))
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    field = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    half: np.ndarray = field > np.median(field)
    return half


def scene(seed: int, side: int = 112, size: int = 24, shift: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 (3, side, side), heights float32 (side, side) and labels uint8 of one scene.

    `shift`: the heights lie that many pixels too far down and to the right.
    """
    draws = np.random.default_rng(seed)
    a, b = halves(draws, side, size), halves(draws, side + 2 * shift, size)
    image = 100 + STEP * a + draws.normal(0, STEP, (3, side, side))
    heights = 300 + STEP * b + draws.normal(0, STEP, b.shape)
    labels = 2 * a + b[shift : shift + side, shift : shift + side]
    return (
        image.round().clip(0, 255).astype(np.uint8),
        heights[:side, :side].astype(np.float32),
        labels.astype(np.uint8),
    )


def write_scenes(folder: Path, counts: dict[str, int], side: int = 112, shift: int = 0) -> Path:
    """`folder`/SPLIT/image, dem and labels of that many scenes a split; the folder."""
    for number, (split, count) in enumerate(counts.items()):
        for i in range(count):
            found = scene(1000 * number + i, side, shift=shift)
            for name, array in zip(("image", "dem", "labels"), found, strict=True):
                _write(folder / split / name / f"{i}.tif", array)
    return folder


def _write(path: Path, array: np.ndarray) -> None:
    bands = array[None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2], dtype=bands.dtype,
        crs="EPSG:32633", transform=from_origin(500000, 5000000, 1, 1),
    ) as target:  # fmt: skip
        target.write(bands)


def recipe(folder: Path, encoder: Path, output: Path) -> dict[str, object]:
    """The recipe that is trained on these scenes, for its `model` to be changed."""
    roles = ("image", "dem", "labels")
    return {
        "name": "constructed",
        "data": {
            "classes": CLASSES,
            "modalities": {"image": {"normalize": "dataset"}, "dem": {}},
            **{s: {role: f"{folder}/{s}/{role}/*.tif" for role in roles} for s in ("train", "val", "test")},
            "tile": 112,
        },
        "model": {
            "encoder": {"name": "dinov2", "checkpoint": str(encoder)},
            "adapter": {"name": "none"},
            "decoder": {"name": "fpn", "channels": 32},
        },
        "train": {"epochs": 6, "batch_size": 4, "optimizer": {"lr": 0.003}},
        "output_dir": str(output),
    }


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """A random encoder in the layout of Dinov2, 0.9 M parameters: what it has no weights for, no fusion can borrow."""
    import torch
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4, image_size=112, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder
