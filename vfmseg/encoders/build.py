"""Build an encoder by name. A new family is one file and one line in `ENCODERS`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vfmseg.catalog import published_statistics
from vfmseg.encoders.base import BaseRecord, Encoder, Family, quarter_points, sha256_of
from vfmseg.encoders.builtin import BUILTIN, BUILTIN_CONFIG
from vfmseg.encoders.clip import CLIP
from vfmseg.encoders.dinov2 import DINOV2
from vfmseg.encoders.published import check_model_type, load_published, quick_imports
from vfmseg.encoders.sam import SAM
from vfmseg.encoders.settings import MOST_PARAMETERS, plain_settings
from vfmseg.encoders.stem import Project, Published, Widen
from vfmseg.errors import RecipeError, nearest
from vfmseg.recipe.model import LARGEST_UPSCALE

ENCODERS: dict[str, Family] = {"sam": SAM, "dinov2": DINOV2, "clip": CLIP, "builtin": BUILTIN}


def build_encoder(
    name: str,
    checkpoint: str | None,
    in_channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    upscale: float = 1.0,
    input: str | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    seed: int = 0,
) -> Encoder:
    """A frozen encoder.

    `checkpoint`: folder or hub id (None for builtin). `mean`, `std`: one per channel in image units; None = those
    that the weights were published with, for 8-bit RGB. `layers`: blocks passed, 1-based and increasing; None = the
    four quarter points. `upscale` enlarges the input first. `input`: "widen" (default) or "project", only where
    in_channels is not 3. `seed`: random weights of builtin. Raises RecipeError for settings that do not fit together
    and CheckpointError for a checkpoint that is missing, damaged or of another family.
    """
    family = _family(name)
    statistics = _statistics(family, checkpoint, in_channels, mean, std)
    _check_input(in_channels, input, upscale)
    if family is BUILTIN:
        if checkpoint is not None:
            raise RecipeError(f"model.encoder: builtin reads no checkpoint, but {checkpoint} is given; leave it out")
        backbone = _random(family, BUILTIN_CONFIG, seed, "builtin")
        base = BaseRecord("builtin", None, sha256_of(backbone.state_dict()))
    else:
        if checkpoint is None:
            raise RecipeError(f"model.encoder.checkpoint: the encoder {name} needs a folder or hub id")
        backbone, base = load_published(family, checkpoint, revision)
    return _finish(family, backbone, base, in_channels, statistics, layers, upscale, input, gradient_checkpointing)


def build_encoder_from_config(
    name: str,
    config: dict[str, Any],
    in_channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    upscale: float = 1.0,
    input: str | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    most: float = MOST_PARAMETERS,
) -> Encoder:
    """The architecture that `Encoder.config` described, with random weights: load the stored ones next.

    Its backbone holds exactly the tensors of the encoder it was taken from. `most`: parameters that the stored weights
    can hold. Other arguments as in `build_encoder`.
    """
    family = _family(name)
    statistics = _statistics(family, None, in_channels, mean, std)
    _check_input(in_channels, input, upscale)
    backbone = _random(family, config, seed, "segmenter.json, encoder config", most, max(layers) if layers else None)
    base = BaseRecord(name, None, "")
    return _finish(family, backbone, base, in_channels, statistics, layers, upscale, input, gradient_checkpointing)


def _family(name: str) -> Family:
    if name not in ENCODERS:
        raise RecipeError(f"model.encoder.name = {name} is not an encoder; {nearest(name, ENCODERS)}")
    return ENCODERS[name]


def _random(
    family: Family,
    config: dict[str, Any],
    seed: int,
    place: str,
    most: float = MOST_PARAMETERS,
    blocks: int | None = None,
) -> nn.Module:
    with quick_imports():
        cls = family.model_class(check_model_type(family, config, place))
    settings = plain_settings(cls.config_class, config, place, most, blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = cls(settings)
    return model


def _finish(
    family: Family,
    backbone: nn.Module,
    base: BaseRecord,
    in_channels: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    layers: Sequence[int] | None,
    upscale: float,
    input: str | None,
    gradient_checkpointing: bool,
) -> Encoder:
    depth = len(list(backbone.get_submodule(family.blocks).children()))
    chosen = quarter_points(depth) if layers is None else tuple(layers)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] > depth:
        raise RecipeError(
            f"model.encoder.layers = {list(chosen)}: expected increasing numbers from 1 to {depth}, the number of "
            f"blocks of {base.id}; leave layers out for {list(quarter_points(depth))}"
        )
    kernel = backbone.get_submodule(family.patch_kernel)
    assert isinstance(kernel, nn.Conv2d)
    stem: nn.Module
    if in_channels == 3:
        stem = Published()
    elif input == "project":
        stem = Project(in_channels)
    else:
        stem = Widen(in_channels, kernel.out_channels, int(kernel.stride[0]))
    mean, std = statistics
    return Encoder(family, backbone, stem, mean, std, chosen, upscale, gradient_checkpointing, base)


def _statistics(
    family: Family,
    checkpoint: str | None,
    in_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std per channel in image units."""
    if (mean is None) != (std is None):
        raise RecipeError("encoder: mean and std come together; give both or neither")
    if mean is None or std is None:
        if in_channels != 3:
            raise RecipeError(
                f"encoder: {in_channels} channels have no published mean and std (those are for 3); "
                "give mean and std of the data"
            )
        published = published_statistics(family.name, checkpoint)
        return tuple(255 * m for m in published[0]), tuple(255 * s for s in published[1])
    if len(mean) != in_channels or len(std) != in_channels or not _usable(mean, std):
        raise RecipeError(
            f"encoder: {len(mean)} means and {len(std)} stds for {in_channels} channels; expected one finite mean and "
            "one std above 0 for each channel"
        )
    return mean, std


def _usable(mean: Sequence[float], std: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in mean) and all(0 < value < math.inf for value in std)


def _check_input(in_channels: int, input: str | None, upscale: float) -> None:
    if not 0 < upscale <= LARGEST_UPSCALE:
        raise RecipeError(f"model.encoder.upscale = {upscale} must be above 0 and at most {LARGEST_UPSCALE:g}")
    if input not in (None, "widen", "project"):
        raise RecipeError(f"model.encoder.input = {input} is not a way in; {nearest(str(input), ('widen', 'project'))}")
    if input is not None and in_channels == 3:
        raise RecipeError(
            f"model.encoder.input = {input} is for other than 3 channels, and this data has 3; leave it out"
        )
