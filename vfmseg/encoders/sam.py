"""The image encoder of Segment Anything (Kirillov et al. 2023), from transformers, at any size.

Upstream takes its own input size only. Here the absolute position table is resized to the grid of patches; the
relative tables of global blocks are resized by upstream's attention itself, those of windowed blocks never change.
Windowed blocks pad the grid to whole windows with zeros (after their norm) and attend to them, as in pretraining.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.encoders.backbone import Family, plain_norm


def model_class(model_type: str) -> Any:
    """The transformers class; imported here because it costs seconds."""
    from transformers.models.sam.modeling_sam import SamVisionModel

    return SamVisionModel


def prefix(network: Any) -> int:
    """SAM has patch tokens only."""
    return 0


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h, w, D) -> (1, rows, columns, D), bicubic in float32; the table itself where the size is the same."""
    if table.shape[1:3] == grid:
        return table
    # by target size, never by a factor: rounding would lose a row (dino#8)
    channels_first = table.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).to(table.dtype)


def embed(network: Any, rgb: Tensor, extra: Tensor | None) -> Tensor:
    """Patch tokens with absolute positions; the convolution is called directly, as upstream insists on one size."""
    encoder = network.vision_encoder
    tokens = encoder.patch_embed.projection(rgb).permute(0, 2, 3, 1)  # (B, rows, columns, D)
    if encoder.pos_embed is not None:
        tokens = tokens + resize_positions(encoder.pos_embed, tuple(tokens.shape[1:3]))
    tokens = tokens.flatten(1, 2)
    return tokens if extra is None else tokens + extra


def step(block: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """One block on the grid of tokens."""
    return block(tokens.unflatten(1, grid)).flatten(1, 2)


def window(block: Any) -> int:
    """14 as published, in most blocks; a few are global."""
    return int(block.window_size)


def finish(network: Any, tokens: Tensor) -> Tensor:
    """SAM's blocks end without a norm (its neck has one of its own), so tokens get a plain one."""
    return plain_norm(tokens)


def trim(network: Any, depth: int) -> None:
    """Drop later blocks and the neck, which serves SAM's mask decoder."""
    encoder = network.vision_encoder
    encoder.layers = encoder.layers[:depth]
    encoder.neck = nn.Identity()


SAM = Family(
    name="sam",
    model_class=model_class,
    other_parts=("mask_decoder.", "prompt_encoder.", "shared_image_embedding."),
    blocks="vision_encoder.layers",
    patch_kernel="vision_encoder.patch_embed.projection",
    prefix=prefix,
    embed=embed,
    step=step,
    window=window,
    finish=finish,
    trim=trim,
)
