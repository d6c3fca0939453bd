"""Small runs end in exactly the weights, optimizer state and losses that were recorded once.

The digests in `same_state.json` were made before data, objectives and the model were taken apart; they do not depend
on the names of tensors. How numbers are rounded depends on the processor and on torch, so the file also holds the
digest of a small computation: where that comes out differently, the digests say nothing and the test is skipped.

    python tests/test_same_state.py     records anew what the code of now gives on this machine
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import recipe_dict, save_encoder, toy_scene, write_raster, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe

RECORD = Path(__file__).with_name("same_state.json")


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors as a set: by shape and bytes, whatever they are called and in whatever order they come."""
    digest = hashlib.sha256()
    for shape, content in sorted((tuple(t.shape), t.detach().contiguous().numpy().tobytes()) for t in tensors):
        digest.update(repr(shape).encode() + content)
    return digest.hexdigest()


def probe() -> str:
    """Digest of one training step with the operations that the runs use."""
    torch.manual_seed(7)
    convolution, upwards = nn.Conv2d(3, 16, 4, stride=4), nn.ConvTranspose2d(16, 8, 2, stride=2)
    tokens, norm, out = nn.Linear(16, 48), nn.LayerNorm(16), nn.Conv2d(8, 3, 3, padding=1)
    layers = nn.ModuleList([convolution, upwards, tokens, norm, out, nn.GroupNorm(4, 8)])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.01)
    for half in (False, False, True):
        found = convolution(torch.randn(4, 3, 32, 32))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            flat = norm(found.flatten(2).transpose(1, 2))
            q, k, v = tokens(flat).chunk(3, dim=-1)
            flat = flat + F.gelu(F.scaled_dot_product_attention(q, k, v)) + (q @ k.transpose(1, 2)).softmax(-1) @ v
            maps = layers[5](upwards(flat.transpose(1, 2).reshape(4, 16, 8, 8)))
            logits = F.interpolate(out(F.relu(maps)), size=(32, 32), mode="bilinear", align_corners=False)
        F.cross_entropy(logits.float(), torch.randint(0, 3, (4, 32, 32)), reduction="sum").backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return digest_of(layers.parameters())


def encoder(folder: Path, family: str) -> Path:
    """An encoder whose tensors are drawn here, so that they do not depend on how transformers begins."""
    save_encoder(folder, family)
    draws = np.random.default_rng(3)
    tensors = load_file(folder / "model.safetensors")
    drawn = {
        name: torch.from_numpy(draws.normal(0, 0.1, tuple(tensors[name].shape)).astype(np.float32))
        for name in sorted(tensors)
    }
    save_file(drawn, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_vit(folder: Path) -> Path:
    """The ViT of random numbers that `builtin` was when the digests were made."""
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, mlp_ratio=4, patch_size=16, image_size=256
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def scenes(folder: Path, modalities: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]) -> Path:
    """Three scenes to learn from and one to choose by; a strip of the labels is unknown."""
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for i in range(count):
            image, labels = toy_scene(10 * len(split) + i, 56, 72)
            draws = np.random.default_rng(i)
            for name, change in modalities.items():
                write_raster(folder / split / name / f"{split}{i}.tif", change(image, draws), nodata=0)
            labels[:, -5:] = 255
            write_raster(folder / split / "labels" / f"{split}{i}.tif", labels)
    return folder


def content_of(folder: Path, data: Path, family: str | None, modalities: tuple[str, ...]) -> dict[str, Any]:
    content = recipe_dict(data, encoder(folder / "encoder", family) if family else None, folder / "run", family or "")
    for split in ("train", "val", "test"):
        files = {name: f"{data}/{split}/{name}/*.tif" for name in (*modalities, "labels")}
        content["data"][split] = files
    content["data"]["modalities"] = {name: {} for name in modalities}
    content["train"]["epochs"] = 2
    return content


def whole_encoder(folder: Path) -> dict[str, Any]:
    """8-bit RGB, every tensor learns, encoder and head at rates of their own, all augmentation."""
    content = content_of(folder, scenes(folder, {"rgb": lambda image, _: image}), None, ("rgb",))
    section = {"name": "dinov2", "checkpoint": str(random_vit(folder / "encoder"))}
    content["model"] |= {"encoder": section, "decoder": {"name": "fpn", "channels": 16}}
    content["data"]["samples_per_epoch"] = 7
    content["train"]["optimizer"] = {"lr": 0.002, "encoder_lr": 0.0005, "warmup": 0.2}
    colours = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.1}
    content["train"]["augment"] = {"scale": [0.8, 1.3], "rotate": 10, "radiometry": {"rgb": colours}}
    return content


def two_modalities(folder: Path) -> dict[str, Any]:
    """RGB with a height model, LoRA with dropout, two batches a step, weighted classes."""

    def heights(image: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        found = image[0] * 0.5 + draws.normal(300, 10, image.shape[1:])
        return np.where(image[1] < 45, 0, found).astype(np.float32)

    data = scenes(folder, {"rgb": lambda image, _: image, "height": heights})
    content = content_of(folder, data, "dinov2", ("rgb", "height"))
    content["model"]["adapter"] = {"name": "lora", "rank": 3, "dropout": 0.1, "targets": ["q", "v", "mlp"]}
    content["model"]["decoder"] = {"name": "upernet", "channels": 16}
    content["train"] |= {"batch_size": 3, "accumulate": 2, "loss": {"focal": 1.0, "lovasz": 0.5}, "focal_gamma": 1.5}
    content["train"]["class_weights"] = {1: 3.0}
    return content


def sixteen_bits(folder: Path) -> dict[str, Any]:
    """Four bands of 16 bits, small networks beside the blocks, gradient checkpointing, no clipping."""

    def bands(image: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        red = image[:1].astype(np.uint16)
        return np.concatenate([image.astype(np.uint16) * 20, red * 31 + draws.integers(0, 99, red.shape, np.uint16)])

    content = content_of(folder, scenes(folder, {"image": bands}), "sam", ("image",))
    content["model"]["adapter"] = {"name": "adapter", "hidden": 8}
    content["train"] |= {"gradient_checkpointing": True, "clip": 0}
    content["seed"] = 5
    return content


def half_precision(folder: Path) -> dict[str, Any]:
    """As `two_modalities`, in bfloat16 where that is made for it."""
    content = two_modalities(folder)
    content["train"]["precision"] = "bf16"
    return content


RUNS = {run.__name__: run for run in (whole_encoder, two_modalities, sixteen_bits, half_precision)}


def digests(name: str, folder: Path) -> dict[str, str]:
    """What a run ends in: its weights, the two moments of each in AdamW, the loss of each step and all scores."""
    finetune(load_recipe(write_recipe(folder / "recipe.yaml", RUNS[name](folder))))
    state = torch.load(folder / "run" / "state.pt", weights_only=True)
    moments = [tensor for of_one in state["optimizer"]["state"].values() for tensor in of_one.values()]
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in state["state"]["records"]]
    return {
        "weights": digest_of(state["tensors"].values()),
        "optimizer": digest_of(moments),
        "records": hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest(),
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_in_the_state_that_was_recorded(name: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORD.read_text())
    if probe() != recorded["probe"]:
        pytest.skip("this processor or this torch rounds otherwise than where the digests were recorded")
    assert digests(name, tmp_path) == recorded["runs"][name]


def record() -> None:
    """Write the digests of the code of now."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"probe": probe(), "runs": {}}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found["runs"][name] = digests(name, Path(folder))
    RECORD.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    record()
