"""Backbones and stems. A new family is one file, one line in `ENCODERS` and its row in the catalog."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vfmseg.encoders.backbone import Backbone, BaseRecord, Family, quarter_points, sha256_of
from vfmseg.encoders.builtin import BUILTIN, load_builtin
from vfmseg.encoders.clip import CLIP
from vfmseg.encoders.dinov2 import DINOV2
from vfmseg.encoders.formats.format import Format
from vfmseg.encoders.formats.settings import MOST_PARAMETERS
from vfmseg.encoders.formats.transformers import TRANSFORMERS
from vfmseg.encoders.groups import group_kernels
from vfmseg.encoders.sam import SAM
from vfmseg.encoders.stem import Project, Stem, ThreeBands, Widen
from vfmseg.errors import RecipeError, nearest
from vfmseg.recipe.model import LARGEST_UPSCALE

ENCODERS: dict[str, Family] = {"sam": SAM, "dinov2": DINOV2, "clip": CLIP, "builtin": BUILTIN}

FORMATS: dict[str, Format] = {"transformers": TRANSFORMERS}
"""Forms in which encoders are kept; the first that reads a checkpoint is taken."""


def build_backbone(
    name: str,
    checkpoint: str | None,
    layers: Sequence[int] | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    place: str = "model.encoder",
    maps: int = 4,
) -> Backbone:
    """A frozen backbone with its published weights.

    `checkpoint`: folder or hub id; None: for builtin, the one in the package. `layers`: blocks whose tokens are asked
    for, 1-based and increasing; None = the four quarter points, or so many parts as `maps` says. `place`: of the
    section in the recipe. RecipeError for settings that do not fit together, CheckpointError for a checkpoint that is
    missing, damaged or of another family.
    """
    family = _family(name)
    if checkpoint is None and family is BUILTIN:
        network, base = load_builtin()
    elif checkpoint is None:
        raise RecipeError(f"model.encoder.checkpoint: the encoder {name} needs a folder or hub id")
    else:
        # that of transformers is asked last: it says of a stranger what it is
        reader = next((one for one in FORMATS.values() if one.reads(checkpoint)), TRANSFORMERS)
        network, base = reader.load(family, checkpoint, revision)
    chosen = _layers(family, network, layers, base, place, maps)
    return Backbone(family, network, chosen, gradient_checkpointing, base)


def build_backbone_from_config(
    name: str, config: dict[str, Any], layers: Sequence[int] | None = None, most: float = MOST_PARAMETERS
) -> Backbone:
    """The architecture that `config_of` described, with random weights: load the stored ones next.

    It holds exactly the tensors of the backbone it was taken from. `most`: parameters that the stored weights can hold.
    """
    family = _family(name)
    blocks = max(layers) if layers else None
    network = TRANSFORMERS.random(family, config, 0, "segmenter.json, encoder config", most, blocks)
    base = BaseRecord(name, None, "")
    return Backbone(family, network, _layers(family, network, layers, base), False, base)


def config_of(backbone: Backbone) -> dict[str, Any]:
    """Architecture of a backbone as plain JSON values: what `build_backbone_from_config` needs."""
    return TRANSFORMERS.config(backbone.network)


def whole_network(backbone: Backbone) -> nn.Module:
    """The upstream network with the tensors of a backbone, as its published files hold it.

    What a backbone leaves out because features do not need it (a mask token, a pooler) is zero.
    """
    network = TRANSFORMERS.random(backbone.family, config_of(backbone), 0, "the encoder", MOST_PARAMETERS, None)
    missing = network.load_state_dict(backbone.network.state_dict(), strict=False).missing_keys
    whole = network.state_dict()
    with torch.no_grad():
        for name in missing:
            whole[name].zero_()
    return network


def build_new_backbone(
    patch: int,
    width: int,
    depth: int,
    heads: int,
    image_size: int,
    layers: Sequence[int] | None,
    seed: int,
    gradient_checkpointing: bool = False,
) -> Backbone:
    """A frozen ViT in DINOv2's layout, random from the seed: `depth` blocks, positions for images of `image_size`.

    RecipeError for layers that are no blocks.
    """
    config = {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "patch_size": patch,
        "image_size": image_size,
    }
    network = TRANSFORMERS.random(DINOV2, config, seed, "model.encoder", MOST_PARAMETERS, None)
    base = BaseRecord("new", None, sha256_of(network.state_dict()))
    return Backbone(DINOV2, network, _layers(DINOV2, network, layers, base), gradient_checkpointing, base)


def build_stem(
    backbone: Backbone,
    modalities: Mapping[str, int],
    mean: Sequence[float],
    std: Sequence[float],
    upscale: float = 1.0,
    input: str | None = None,
    place: str = "model.encoder",
    groups: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Stem:
    """The stem of one stream of a backbone.

    `modalities` {name: number of bands}, stacked in this order; `mean`, `std`: one a band, in image units. `upscale`
    enlarges images first. `input`: "widen" (default) or "project", only where there are other than three bands.
    `place`: of the section in the recipe. `groups` of the bands of a single modality, counted from 1, of which each
    enters by a kernel of its own; `seed`: of what is random there. RecipeError for settings that do not fit together.
    """
    bands = sum(modalities.values())
    if len(mean) != bands or len(std) != bands or not _usable(mean, std):
        raise RecipeError(
            f"encoder: {len(mean)} means and {len(std)} stds for {bands} channels; expected one finite mean and "
            "one std above 0 for each channel"
        )
    if not 0 < upscale <= LARGEST_UPSCALE:
        raise RecipeError(f"{place}.upscale = {upscale} must be above 0 and at most {LARGEST_UPSCALE:g}")
    if input not in (None, "widen", "project"):
        raise RecipeError(f"{place}.input = {input} is not a way in; {nearest(str(input), ('widen', 'project'))}")
    if groups is not None:
        (name,) = modalities
        if input is not None:
            raise RecipeError(f"{place}.input = {input} is not used: groups of bands are a way in; leave one out")
        kernels = group_kernels(backbone, bands, groups, seed, f"data.modalities.{name}.groups")
        return Stem(modalities, mean, std, kernels, upscale, backbone.patch)
    if input is not None and bands == 3:
        raise RecipeError(f"{place}.input = {input} is for other than 3 channels, and this data has 3; leave it out")
    mix: nn.Module
    if bands == 3:
        mix = ThreeBands()
    elif input == "project":
        mix = Project(bands)
    else:
        mix = Widen(bands, backbone.width, backbone.patch)
    return Stem(modalities, mean, std, mix, upscale, backbone.patch)


def _family(name: str) -> Family:
    if name not in ENCODERS:
        raise RecipeError(f"model.encoder.name = {name} is not an encoder; {nearest(name, ENCODERS)}")
    return ENCODERS[name]


def _layers(
    family: Family,
    network: nn.Module,
    layers: Sequence[int] | None,
    base: BaseRecord,
    place: str = "model.encoder",
    maps: int = 4,
) -> tuple[int, ...]:
    """The blocks asked for, or the quarter points; RecipeError for numbers that are no blocks."""
    depth = len(list(network.get_submodule(family.blocks).children()))
    chosen = quarter_points(depth, maps) if layers is None else tuple(layers)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] > depth:
        raise RecipeError(
            f"{place}.layers = {list(chosen)}: expected increasing numbers from 1 to {depth}, the number of "
            f"blocks of {base.id}; leave layers out for {list(quarter_points(depth, maps))}"
        )
    return chosen


def _usable(mean: Sequence[float], std: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in mean) and all(0 < value < math.inf for value in std)
