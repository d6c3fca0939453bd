"""Small random encoders in the layout of published ones, adapters on them, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmseg.adapters.attach import ADAPTERS, attach_none
from vfmseg.adapters.attached import Attached
from vfmseg.catalog import FAMILIES
from vfmseg.data.image import Image
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.build import ENCODERS, build_backbone, build_stem
from vfmseg.encoders.tokens import Features
from vfmseg.model import Network

DEPTH = 3
NATIVE = {"dinov2": 56, "registers": 56, "clip": 48, "clip-vision": 48, "sam": 64, "sam-vision": 64}
PATCH = {"dinov2": 14, "registers": 14, "clip": 16, "clip-vision": 16, "sam": 16, "sam-vision": 16}
KINDS = tuple(NATIVE)
ALL = ("q", "k", "v", "o", "mlp")
MODELS = ("dinov2", "registers", "clip", "sam")
LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ("q", "v")}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {},
    "lora": LORA,
    "adapter": {"hidden": 4, "scale": 0.5},
    "mm_lora": {"rank": 2, "alpha": None, "dropout": 0.0, "targets": ("q", "v", "mlp"), "mix": True},
    "mm_adapter": {"ratio": 0.25},
}


def family(kind: str) -> str:
    return "dinov2" if kind == "registers" else kind.removesuffix("-vision")


def vision_config(kind: str, **changes: Any) -> Any:
    common: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    common["image_size"], common["patch_size"] = NATIVE[kind], PATCH[kind]
    common.update(changes)
    if kind == "dinov2":
        from transformers.models.dinov2 import Dinov2Config

        return Dinov2Config(mlp_ratio=2, **common)
    if kind == "registers":
        from transformers.models.dinov2_with_registers import Dinov2WithRegistersConfig

        return Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=2, **common)
    if kind.startswith("clip"):
        from transformers.models.clip import CLIPVisionConfig

        return CLIPVisionConfig(intermediate_size=64, **common)
    from transformers.models.sam import SamVisionConfig

    # two windowed blocks and a global one; 4 x 4 tokens, so windows of 3 must pad
    settings = {"output_channels": 8, "mlp_dim": 64, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 4}
    return SamVisionConfig(**{**settings, **common})


def upstream(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A transformers model, whole as published, with every tensor random (upstream starts some at zero)."""
    config = vision_config(kind, **changes)
    if kind == "clip":
        from transformers.models.clip import CLIPConfig, CLIPModel

        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 20}, vision_config=config.to_dict()))
    elif kind == "sam":
        from transformers.models.sam import SamConfig, SamModel

        prompt = {"hidden_size": 8, "image_embedding_size": 4, "image_size": 64, "mask_input_channels": 4}
        mask = {"hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        whole = {"prompt_encoder_config": prompt, "mask_decoder_config": {**mask, "iou_head_hidden_dim": 8}}
        model = SamModel(SamConfig(vision_config=config.to_dict(), **whole))
    else:
        model = ENCODERS[family(kind)].model_class(config.model_type)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def vision_part(kind: str, model: Any) -> Any:
    return {"clip": lambda m: m.vision_model, "sam": lambda m: m.vision_encoder}.get(kind, lambda m: m)(model)


def save_all(root: Path) -> dict[str, Path]:
    """A folder for each kind, as transformers saves it."""
    for kind in KINDS:
        upstream(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


class Encoder(Network):
    """A network without a decoder: images (B, C, H, W) and their masks -> features. Each band is a modality."""

    def forward(self, images: Tensor, valid: Tensor) -> Features:  # type: ignore[override]
        bands = {f"b{i}": Image(images[:, i : i + 1], valid[:, i]) for i in range(images.shape[1])}
        return self.encode(bands)["image"]

    @property
    def image_stem(self) -> Any:
        return self.stem("image")

    def prepare(self, images: Tensor, valid: Tensor) -> Tensor:
        """What three bands are when they reach the patch kernel."""
        bands = {f"b{i}": Image(images[:, i : i + 1], valid[:, i]) for i in range(images.shape[1])}
        return self.image_stem(bands)[0]


def encoder_of(
    backbone: Backbone,
    in_channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    upscale: float = 1.0,
    input: str | None = None,
) -> Encoder:
    """The features of a backbone; without mean and std those that 8-bit images of its family have."""
    if mean is None or std is None:
        mean, std = ([255 * value for value in values] for values in FAMILIES[backbone.family.name].statistics)
    modalities = {f"b{i}": 1 for i in range(in_channels)}
    stem = build_stem(backbone, modalities, mean, std, upscale, input)
    return Encoder(backbone, {"image": stem}, attach_none(backbone, ("image",)), None, nn.Identity(), 2)


def build_encoder(
    name: str, checkpoint: str | None, in_channels: int = 3, of_stem: Mapping[str, Any] = {}, **settings: Any
) -> Encoder:
    return encoder_of(build_backbone(name, checkpoint, **settings), in_channels, **of_stem)


def build(folders: dict[str, Path], kind: str, in_channels: int = 3, **settings: Any) -> Encoder:
    of_stem = {key: settings.pop(key) for key in ("mean", "std", "upscale", "input") if key in settings}
    if in_channels != 3:
        of_stem = {"mean": [100.0] * in_channels, "std": [50.0] * in_channels, **of_stem}
    return build_encoder(family(kind), str(folders[kind]), in_channels, of_stem, **settings)


def picture(height: int, width: int, bands: int = 3, batch: int = 1) -> tuple[Tensor, Tensor]:
    images = 255 * torch.rand(batch, bands, height, width, generator=torch.Generator().manual_seed(7))
    return images, torch.ones_like(images, dtype=torch.bool)


def attach(encoder: Encoder, name: str, **changes: Any) -> Attached:
    encoder.attached = ADAPTERS[name].attach(encoder.backbone, encoder.streams, **{**SETTINGS[name], **changes})
    encoder.train(encoder.training)
    return encoder.attached


def last_map(encoder: Encoder) -> Tensor:
    # H and W differ, and are multiples of no patch
    return encoder(*picture(50, 70, bands=len(encoder.image_stem.modalities))).maps[-1]


def backward(encoder: Encoder) -> None:
    """Gradient of a fixed random sum over all maps (their squares are constant, as maps are normed)."""
    generator = torch.Generator().manual_seed(3)
    maps = encoder(*picture(50, 70, bands=len(encoder.image_stem.modalities))).maps
    torch.stack([(m * torch.randn(m.shape, generator=generator)).sum() for m in maps]).sum().backward()


def train(encoder: Encoder, steps: int = 3) -> None:
    learning = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.02, weight_decay=0.1)
    encoder.train()
    for _ in range(steps):
        optimizer.zero_grad()
        backward(encoder)
        optimizer.step()
    encoder.eval()
