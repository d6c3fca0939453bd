"""DINOv2, without and with register tokens (Oquab et al. 2023; Darcet et al. 2023), from transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmseg.encoders.backbone import Family, add_to_patches


def model_class(model_type: str) -> Any:
    """The transformers class that reads `model_type`; imported here because it costs seconds."""
    if model_type == "dinov2_with_registers":
        from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
            Dinov2WithRegistersModel,
        )

        return Dinov2WithRegistersModel
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    return Dinov2Model


def prefix(network: Any) -> int:
    """One CLS token, then the registers."""
    return 1 + int(network.config.to_dict().get("num_register_tokens", 0))


def embed(network: Any, rgb: Tensor, extra: Tensor | None) -> Tensor:
    """Upstream resizes the position table itself: by target size, and not at all at the size it was trained with."""
    return add_to_patches(network.embeddings(rgb), extra, prefix(network))


def step(block: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """One block; positions live in the tokens, so the grid is not needed."""
    return block(tokens)


def window(block: Any) -> int:
    """Every block attends to all tokens."""
    return 0


def finish(network: Any, tokens: Tensor) -> Tensor:
    """DINOv2's own final norm, for each layer: its authors use intermediate layers that way."""
    return network.layernorm(tokens)


def trim(network: Any, depth: int) -> None:
    """Drop later blocks and the mask token, which only masked pretraining uses."""
    network.encoder.layer = network.encoder.layer[:depth]
    network.embeddings.mask_token = None


DINOV2 = Family(
    name="dinov2",
    model_class=model_class,
    other_parts=("classifier.",),
    blocks="encoder.layer",
    patch_kernel="embeddings.patch_embeddings.projection",
    prefix=prefix,
    embed=embed,
    step=step,
    window=window,
    finish=finish,
    trim=trim,
    any_patches=True,
)
