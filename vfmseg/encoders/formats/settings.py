"""What of an encoder's config.json reaches transformers: plain settings that its class declares, each plausible.

A config may come from a stranger. Left to transformers it also chooses code (`_attn_implementation: owner/kernel`
fetches a kernel from the hub), adds attributes of any name, and claims sizes that no memory holds; here nothing but
checked numbers, flags and known words passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vfmseg.errors import CheckpointError, show

ATTENTION = ("eager", "sdpa")
"""Implementations of attention that come with torch; all others are packages or code from the hub."""

_ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
_ACTIVATIONS = (
    "gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "mish", "quick_gelu", "relu", "silu", "swish",
    "tanh",
)  # fmt: skip

BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 16384),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 2**17),
    "mlp_dim": (1, 2**17),
    "mlp_ratio": (0.01, 64),
    "image_size": (1, 2**14),
    "patch_size": (1, 512),
    "num_channels": (3, 3),
    "num_register_tokens": (0, 1024),
    "window_size": (0, 1024),
    "output_channels": (1, 16384),
    "num_pos_feats": (1, 2**16),
    "projection_dim": (1, 2**16),
    "layer_norm_eps": (1e-30, 1),
    "hidden_dropout_prob": (0, 0.99),
    "attention_probs_dropout_prob": (0, 0.99),
    "attention_dropout": (0, 0.99),
    "drop_path_rate": (0, 0.99),
    "initializer_range": (0, 100),
    "initializer_factor": (0, 100),
    "layerscale_value": (-100, 100),
}
"""Least and largest plausible value of the settings of published image encoders, several times those of the largest."""

MOST_PARAMETERS = 8e9
"""Of an encoder whose weights are not here yet; the largest published one of these families has 1.8e9."""

HARMLESS = 1e7
"""Parameters that any machine has room for, whatever the weights turn out to be."""


def plain_settings(
    config_class: Any, config: Mapping[str, Any], place: str, most: float = MOST_PARAMETERS, blocks: int | None = None
) -> Any:
    """The `config_class` of a config of it, or of a model of which it is the image encoder; CheckpointError if wrong.

    `most`: parameters that the weights can hold, of all blocks or the first `blocks`; a config that claims more is
    refused before anything is built.
    """
    own = config
    if config.get("model_type") != config_class.model_type:
        own = config.get(config_class.base_config_key, {})
        if not isinstance(own, Mapping):
            raise CheckpointError(
                f"{place}: {config_class.base_config_key} = {show(own)}; expected the settings of the image "
                "encoder; copy it again"
            )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{place}: holds quantised weights (quantization_config); use the checkpoint as published"
        )
    declared = {field.name for field in fields(config_class)} - {field.name for field in fields(_base())}
    chosen = {
        key: _checked(key, value, place)
        for key, value in own.items()
        if key in declared and not key.startswith("_") and value is not None
    }
    attention = _attention(own, place) or _attention(config, place)
    try:
        settings = config_class(**chosen, **({"attn_implementation": attention} if attention else {}))
    except Exception as error:  # what transformers raises for a wrong value has no class of its own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{place}: is no configuration of this encoder ({reason}); copy it again") from None
    _require_shapes(settings.to_dict(), place, most, blocks)
    return settings


def _base() -> Any:
    from transformers.configuration_utils import PreTrainedConfig

    return PreTrainedConfig


def _attention(config: Mapping[str, Any], place: str) -> str | None:
    found = [config[key] for key in _ATTENTION_KEYS if config.get(key) is not None]
    for value in found:
        if value not in ATTENTION:
            raise CheckpointError(
                f"{place}: asks for the attention implementation {show(value)}, which may be code from elsewhere; "
                f"expected {' or '.join(ATTENTION)}: correct it, or delete the line"
            )
    return str(found[0]) if found else None


def _checked(key: str, value: Any, place: str) -> Any:
    """A plain value: within its bounds if it is a known number, short otherwise."""
    if isinstance(value, list) and len(value) <= BOUNDS["num_hidden_layers"][1]:
        return [_checked(key, item, place) for item in value if not isinstance(item, list)]
    if isinstance(value, str) and key == "hidden_act":
        if value in _ACTIVATIONS:
            return value
        raise CheckpointError(f"{place}: hidden_act = {show(value)}; expected one of {', '.join(_ACTIVATIONS)}")
    least, most = BOUNDS.get(key, (-(2**31), 2**31))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and least <= value <= most:
        return value
    if key not in BOUNDS and (isinstance(value, bool) or (isinstance(value, str) and len(value) <= 64)):
        return value
    raise CheckpointError(f"{place}: {key} = {show(value)}; expected {_range(least, most)}; copy it again")


def _range(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"a number from {least:g} to {most:g}"


def _require_shapes(settings: Mapping[str, Any], place: str, most: float, blocks: int | None) -> None:
    """What the blocks divide must divide, and the weights must be no more than can be there."""
    width, heads, depth = (settings[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    image, patch = _sides(settings["image_size"]), _sides(settings["patch_size"])
    wrong = ""
    if width % heads:
        wrong = f"hidden_size = {width} is no multiple of num_attention_heads = {heads}"
    elif len(image) > 2 or len(patch) > 2 or len(set(patch)) != 1 or min(image, default=0) < patch[0]:
        wrong = f"image_size = {list(image)} and patch_size = {list(patch)} are no image of square patches"
    if wrong:
        raise CheckpointError(f"{place}: {wrong}; copy it again")
    hidden = settings.get("intermediate_size") or settings.get("mlp_dim") or width * settings.get("mlp_ratio", 4)
    positions = math.prod(side // patch[0] for side in (image * 2)[:2])
    claimed = min(depth, blocks or depth) * width * (4 * width + 2 * hidden) + width * (positions + 3 * patch[0] ** 2)
    if claimed > max(most, HARMLESS):
        raise CheckpointError(
            f"{place}: claims about {claimed:.2g} parameters ({depth} blocks of width {width}, {positions} positions), "
            f"more than its weights can hold ({max(most, HARMLESS):.2g}); copy it again"
        )


def _sides(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
