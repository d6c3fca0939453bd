"""LoRA (Hu et al. 2022) by peft: y = W x + (alpha / rank) B A x, of which A and B learn and W is frozen.

    W  (out, in)     as published
    A  (rank, in)    random at the start
    B  (out, rank)   zero at the start, so that a fresh adapter changes nothing

A layer of 768 x 768 weights gets 2 * 8 * 768 = 12,288 parameters at rank 8, 2 % of its own 589,824.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.adapters.attached import Attached
from vfmseg.adapters.sites import chosen_sites
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.tensors import require_tensors
from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import AdapterError, CheckpointError, show

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def require_lora(rank: int, alpha: float, dropout: float) -> None:
    """AdapterError for numbers that no LoRA can have."""
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise AdapterError(
            f"model.adapter: rank = {rank}, alpha = {alpha}, dropout = {dropout}; expected a rank of at least 1, "
            "an alpha above 0 and a dropout from 0 to below 1"
        )


def attach(
    backbone: Backbone, streams: tuple[str, ...], rank: int, alpha: float, dropout: float, targets: tuple[str, ...]
) -> Attached:
    """What was attached, after peft has put its layers on the linear layers `targets` of every block.

    All streams have the same A and B.

    `targets`: some of q, k, v, o, mlp; peft freezes everything else. Where q, k and v are one fused layer (SAM), peft
    can only adapt the whole of it; the rows of B of those that are not wanted then stay zero (`SomeThirds`), so the
    file remains plain peft and loads anywhere.
    """
    from peft import LoraConfig, get_peft_model

    require_lora(rank, alpha, dropout)
    sites = chosen_sites(backbone, targets)
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=list(sites),
    )  # fmt: skip
    with warnings.catch_warnings():
        # peft asks transformers for attributes that are about to be renamed; nothing a user could act on
        warnings.simplefilter("ignore", FutureWarning)
        wrapper: Any = get_peft_model(backbone.network, settings)
    wrapper.eval()
    # peft shortens a long list of targets to suffixes that suffice for this backbone; upstream's whole model has more
    # blocks, which those suffixes would hit too
    settings.target_modules = list(sites)
    settings.base_model_name_or_path = backbone.base.id
    settings.revision = backbone.base.revision
    modes: list[nn.Module] = []
    for name, thirds in sites.items():
        layer: Any = backbone.network.get_submodule(name)
        modes += list(layer.lora_dropout.values())
        if thirds and set(thirds) != {"q", "k", "v"}:
            layer.lora_B["default"] = SomeThirds(layer.lora_B["default"].weight, thirds)
    return Attached(
        "lora",
        sites=tuple(sites),
        added=tuple(parameter for parameter in backbone.network.parameters() if parameter.requires_grad),
        moving=tuple(modes),
        save=partial(_save, wrapper),
        load=partial(_load, backbone, rank=rank, alpha=alpha, sites=sites),
    )


class SomeThirds(nn.Module):
    """B of a fused qkv layer of which only some thirds count; the other rows are read as zero, and never learn.

    A fused layer of width D answers with 3 D numbers: rows 0 to D - 1 of B are q's, D to 2 D - 1 k's, 2 D to 3 D - 1
    v's. For thirds ("q", "v") and D = 2 the rows 2 and 3 count as zero. They are set to zero in each forward pass: a
    hook on the gradient would be lost when the parameter is copied, and weight decay would reach them.
    """

    def __init__(self, weight: nn.Parameter, thirds: tuple[str, ...]) -> None:
        """`weight`: (3 D, rank), rows of q, k and v in this order; `thirds`: which of them count."""
        super().__init__()
        self.weight = weight
        self.thirds = thirds

    def forward(self, x: Tensor) -> Tensor:
        """(..., rank) -> (..., 3 D)."""
        rows = zip("qkv", self.weight.chunk(3), strict=True)
        return F.linear(x, torch.cat([w if part in self.thirds else torch.zeros_like(w) for part, w in rows]))


def _save(wrapper: PeftModel, folder: Path) -> None:
    """Write peft's own two files; its README says nothing that the segmenter's does not."""
    folder.mkdir(parents=True)
    # peft would ask the hub whether the vocabulary has grown; an image encoder has none
    wrapper.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()


def _load(backbone: Backbone, folder: Path, rank: int, alpha: float, sites: Mapping[str, tuple[str, ...]]) -> None:
    """Fill the attached layers from a folder; CheckpointError if its tensors are not exactly those that are needed."""
    _fill(backbone, read_fitting(backbone, folder, rank, alpha, sites), sites)


def _fill(backbone: Backbone, tensors: Mapping[str, Tensor], sites: Iterable[str]) -> None:
    with torch.no_grad():
        for name in sites:
            layer: Any = backbone.network.get_submodule(name)
            layer.lora_A["default"].weight.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B["default"].weight.copy_(tensors[f"{name}.lora_B.weight"])


def start_lora(backbone: Backbone, folder: Path, rank: int, sites: Sequence[str]) -> None:
    """Fill the layers attached at `sites` from a folder; it may have more, of blocks that this backbone leaves out.

    CheckpointError for tensors that are missing or of another shape, and for what is no plain LoRA.
    """
    config, tensors = read_adapter(folder)
    _require_plain(folder, config)
    wanted = expected_shapes(backbone, rank, sites)
    require_tensors(folder / WEIGHTS, {name: tensors[name] for name in wanted if name in tensors}, wanted)
    _fill(backbone, tensors, sites)


def merge(backbone: Backbone, folder: Path, rank: int, alpha: float, dropout: float, targets: tuple[str, ...]) -> None:
    """Add (alpha / rank) B A into the frozen weights: the same function, faster, and without importing peft.

    `dropout` is of training alone, and changes nothing here.
    """
    sites = chosen_sites(backbone, targets)
    tensors = read_fitting(backbone, folder, rank, alpha, sites)
    with torch.no_grad():
        for name in sites:
            layer: Any = backbone.network.get_submodule(name)
            update = tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
            layer.weight += (alpha / rank) * update.to(layer.weight)


def read_fitting(
    backbone: Backbone, folder: Path, rank: int, alpha: float, sites: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """Tensors of a peft folder, without peft's prefix, if they are the plain LoRA of this rank, alpha and sites."""
    config, tensors = read_adapter(folder)
    _require_plain(folder, config)
    if config.get("r") != rank or config.get("lora_alpha") != alpha:
        raise CheckpointError(
            f"{folder / CONFIG}: rank {show(config.get('r'))} and alpha {show(config.get('lora_alpha'))}, but "
            f"recipe.yaml says {rank} and {alpha}; the folder mixes two checkpoints"
        )
    require_tensors(folder / WEIGHTS, tensors, expected_shapes(backbone, rank, sites))
    named = config.get("target_modules") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(
            f"{folder / CONFIG}: target_modules = {show(named)}; expected the list that vfmseg writes"
        )
    foreign = sorted(set(named) ^ set(sites))
    for name, wanted in sites.items():
        parts = zip("qkv", tensors[f"{name}.lora_B.weight"].chunk(3), strict=True) if wanted else ()
        foreign += [f"{part} of {name}" for part, rows in parts if part not in wanted and rows.any()]
    if foreign:
        some = ", ".join(name[:80] for name in foreign[:3])
        raise CheckpointError(
            f"{folder}: the adapter was trained on other targets than recipe.yaml names ({some}); the folder mixes two "
            "checkpoints"
        )
    return tensors


def _require_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError for settings of an adapter that is no plain LoRA."""
    variants = [
        key
        for key in (
            "use_rslora",
            "use_dora",
            "use_qalora",
            "lora_bias",
            "fan_in_fan_out",
            "rank_pattern",
            "alpha_pattern",
            "layer_replication",
            "target_parameters",
        )
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or variants:
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type = {show(config.get('peft_type'))} with "
            f"{', '.join(variants) or 'no variant'}; expected plain LoRA, as vfmseg writes it"
        )


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a peft folder; tensor names without peft's prefix."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; the checkpoint is incomplete, copy it again")
    try:
        config = read_json(folder / CONFIG)
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: the adapter cannot be read ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: holds {show(config)}, not the settings of an adapter; copy it again")
    return config, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def expected_shapes(backbone: Backbone, rank: int, sites: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Names (as in the file, without prefix) and shapes of the tensors that a LoRA of this encoder has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sites:
        layer: Any = backbone.network.get_submodule(name)
        shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
    return shapes
