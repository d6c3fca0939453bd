"""Where a recipe meets the published encoders that single modalities have for themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.adapters.attached import Attached
from vfmseg.adapters.own import OwnEncoder
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.build import build_backbone, build_stem
from vfmseg.errors import AdapterError, CheckpointError, RecipeError
from vfmseg.recipe import Recipe

Adapted = Mapping[str, tuple[Backbone, Attached]]
"""{modality: the published encoder of its own, and the adapter in it}."""


def place_of(modality: str) -> str:
    """The section of its encoder in a recipe."""
    return f"model.modalities.{modality}.encoder"


def own_backbone(recipe: Recipe, modality: str, shared: Backbone, instead: str | None = None) -> Backbone:
    """The modality's published encoder, frozen, with as many maps as the shared one.

    `instead` is another folder or hub id to take it from. RecipeError if it cannot have so many maps.
    """
    section, place, wanted = recipe.model.own_encoders[modality], place_of(modality), len(shared.layers)
    try:
        backbone = build_backbone(
            section.name,
            checkpoint=instead or section.checkpoint,
            revision=None if instead else section.revision,
            layers=section.layers,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            place=place,
            maps=wanted,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from None
    found = len(backbone.layers)
    if found == wanted:
        return backbone
    said = f"{place}.layers names {found} blocks" if section.layers else f"{place} has only {found} blocks"
    raise RecipeError(
        f"{said}, but model.encoder gives {wanted} maps, of its blocks {', '.join(map(str, shared.layers))}; fusion "
        f"needs as many of each modality: name {wanted} blocks in {place}.layers, or {found} in model.encoder.layers"
    )


def own_backbones(recipe: Recipe, shared: Backbone) -> dict[str, Backbone]:
    """{modality: its published encoder}, of those that have one of their own beside the shared one."""
    return {modality: own_backbone(recipe, modality, shared) for modality in recipe.model.own_encoders}


def adapted(recipe: Recipe, own: Mapping[str, Backbone]) -> dict[str, tuple[Backbone, Attached]]:
    """{modality: its published encoder, and its adapter, random from the recipe's seed}; nothing of it has learned."""
    found: dict[str, tuple[Backbone, Attached]] = {}
    for modality, backbone in own.items():
        section = recipe.model.adapter_of(modality)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            try:
                attached = ADAPTERS[section.name].attach(backbone, (modality,), **section.settings())
            except AdapterError as error:
                raise AdapterError(f"model.modalities.{modality}: {error}") from None
        found[modality] = (backbone, attached)
    return found


def own_encoder(
    recipe: Recipe,
    modality: str,
    adapted: tuple[Backbone, Attached],
    bands: Mapping[str, int],
    mean: list[float],
    std: list[float],
    shared: Backbone,
) -> OwnEncoder:
    """The stream of a modality with an encoder of its own; what of it is random has the recipe's seed for itself."""
    section, (backbone, attached) = recipe.model.own_encoders[modality], adapted
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        groups = recipe.data.modalities[modality].groups
        stem = build_stem(
            backbone, bands, mean, std, section.upscale, section.input, place_of(modality), groups, recipe.seed
        )
        return OwnEncoder(modality, stem, backbone, attached, shared.channels)
