"""Where adapters go: the linear layers of an encoder's blocks, told by their role and not by one version's names."""

from __future__ import annotations

from typing import Literal

from torch import nn

from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import AdapterError, nearest

Role = Literal["q", "k", "v", "qkv", "o", "mlp"]

# last part of a layer's name -> role, over the names that transformers has used for ViTs
_LEAVES: dict[str, Role] = {
    "q_proj": "q", "query": "q", "to_q": "q", "q": "q",
    "k_proj": "k", "key": "k", "to_k": "k", "k": "k",
    "v_proj": "v", "value": "v", "to_v": "v", "v": "v",
    "qkv": "qkv", "qkv_proj": "qkv", "in_proj": "qkv", "query_key_value": "qkv",
    "o_proj": "o", "out_proj": "o", "proj": "o", "to_out": "o", "dense": "o",
}  # fmt: skip
_MLP_PARTS = {"mlp", "intermediate", "feed_forward", "ffn"}


def linear_sites(backbone: Backbone) -> dict[str, Role]:
    """{dotted name inside the upstream module: role}, for every linear layer of the blocks whose role is known.

    For example {"encoder.layer.0.attention.q_proj": "q", ..., "encoder.layer.0.mlp.fc1": "mlp"} of a DINOv2.
    """
    found: dict[str, Role] = {}
    for prefix, block in backbone.blocks:
        for name, module in block.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            role = _role(name, module)
            if role is not None:
                found[f"{prefix}.{name}"] = role
    return found


def _role(name: str, layer: nn.Linear) -> Role | None:
    parts = name.split(".")
    if _MLP_PARTS & set(parts):
        return "mlp"
    if parts[-1] == "dense" and not any("attention" in part for part in parts[:-1]):
        return "mlp"  # older ViTs call the second layer of their MLP output.dense
    role = _LEAVES.get(parts[-1])
    if role == "qkv" and layer.out_features != 3 * layer.in_features:
        return None
    return role


def chosen_sites(backbone: Backbone, targets: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Dotted name -> which of q, k and v are wanted of it (empty for o, mlp and whole layers).

    A fused qkv layer stands for whichever of q, k, v are among the targets. AdapterError if a target finds nothing
    in any of the blocks: an adapter in half of them would go unnoticed.
    """
    if not targets:
        raise AdapterError("model.adapter.targets names no layer; expected some of q, k, v, o, mlp; try [q, v]")
    sites = linear_sites(backbone)
    for target in targets:
        for prefix, block in backbone.blocks:
            if not any(target in _stands_for(role) for site, role in sites.items() if site.startswith(f"{prefix}.")):
                raise _lost(target, prefix, block, backbone.family.name)
    chosen: dict[str, tuple[str, ...]] = {}
    for name, role in sites.items():
        wanted = tuple(t for t in _stands_for(role) if t in targets)
        if wanted:
            chosen[name] = wanted if role == "qkv" else ()
    return chosen


def _stands_for(role: Role) -> tuple[str, ...]:
    return ("q", "k", "v") if role == "qkv" else (role,)


def _lost(target: str, prefix: str, block: nn.Module, family: str) -> AdapterError:
    layers = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({name.split(".")[-1] for name in layers})
    return AdapterError(
        f"model.adapter.targets: '{target}' matches no layer of {prefix} of this {family} encoder; its linear layers "
        f"are {', '.join(layers) or 'none'}; {nearest(target, leaves)}"
    )
