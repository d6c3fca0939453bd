"""The image tower of CLIP (Radford et al. 2021), from transformers; the text tower is never built here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vfmseg.encoders.backbone import Family, add_to_patches, plain_norm


def model_class(model_type: str) -> Any:
    """The transformers class; imported here because it costs seconds."""
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    return CLIPVisionModel


def prefix(network: Any) -> int:
    """One class token."""
    return 1


def embed(network: Any, rgb: Tensor, extra: Tensor | None) -> Tensor:
    """Patch and class tokens with positions (upstream resizes the table by target size), then CLIP's first norm."""
    tokens = network.embeddings(rgb, interpolate_pos_encoding=True)
    return network.pre_layrnorm(add_to_patches(tokens, extra, 1))


def step(block: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """One block, nothing masked; positions live in the tokens, so the grid is not needed."""
    return block(tokens, None)


def window(block: Any) -> int:
    """Every block attends to all tokens."""
    return 0


def finish(network: Any, tokens: Tensor) -> Tensor:
    """CLIP trained its last norm on the class token alone, so patch tokens get a plain one."""
    return plain_norm(tokens)


def trim(network: Any, depth: int) -> None:
    """Drop later blocks and the norm of the class token."""
    network.encoder.layers = network.encoder.layers[:depth]
    network.post_layernorm = nn.Identity()


CLIP = Family(
    name="clip",
    model_class=model_class,
    # files of older transformers also store the index buffers of the position tables
    other_parts=(
        "text_model.",
        "text_projection.",
        "visual_projection.",
        "logit_scale",
        "vision_model.embeddings.position_ids",
        "embeddings.position_ids",
    ),
    blocks="encoder.layers",
    patch_kernel="embeddings.patch_embedding",
    prefix=prefix,
    embed=embed,
    step=step,
    window=window,
    finish=finish,
    trim=trim,
    any_patches=True,
)
