"""The encoder that needs no download: a small ViT of DINOv2's architecture, random from a seed.

Twelve blocks of width 192 on patches of 16 pixels, about 5.5 million parameters, made for images of 256 pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vfmseg.encoders.dinov2 import DINOV2

BUILTIN_CONFIG: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "mlp_ratio": 4,
    "patch_size": 16,
    "image_size": 256,
}

BUILTIN = replace(DINOV2, name="builtin")
