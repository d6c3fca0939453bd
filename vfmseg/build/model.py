"""Where a recipe meets the model: its encoder, adapter and decoder, built from recipe and data."""

from __future__ import annotations

import math
from typing import Literal

import torch

from vfmseg.adapters.attach import ADAPTERS, Attached
from vfmseg.catalog import published_statistics
from vfmseg.data.image import Known
from vfmseg.data.inputs import Inputs
from vfmseg.data.statistics import BandStatistics
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.base import Encoder
from vfmseg.encoders.build import build_encoder
from vfmseg.errors import RecipeError
from vfmseg.model import SegmentationModel
from vfmseg.recipe import Recipe
from vfmseg.terminal import say_once


def normalized_by(recipe: Recipe, name: str, count: int, dtype: str, plain: bool) -> Literal["encoder", "dataset"]:
    """Whose mean and std normalise a modality: as the recipe says, else `encoder` for 8-bit RGB alone.

    `count` bands are read, of stored type `dtype`; `plain`: they are the values themselves. RecipeError for `encoder`
    with other than three bands.
    """
    eight_bit_rgb = count == 3 and dtype == "uint8" and plain
    chosen = recipe.data.modalities[name].normalize or ("encoder" if eight_bit_rgb else "dataset")
    if chosen == "encoder" and count != 3:
        raise RecipeError(
            f"data.modalities.{name}.normalize = encoder needs 3 bands (red, green, blue), but {count} "
            "are read; use dataset"
        )
    if chosen == "encoder" and dtype != "uint8" and plain:
        say_once(
            f"data.modalities.{name}.normalize = encoder takes values as 0 to 255, but the files hold "
            f"{dtype}: choose a scale that brings them there, or use dataset"
        )
    return chosen


def published_in_image_units(recipe: Recipe) -> BandStatistics:
    """Mean and std of red, green and blue that the encoder was published with, for values from 0 to 255."""
    section = recipe.model.encoder
    mean, std = published_statistics(section.name, None if section.name == "builtin" else section.checkpoint)
    return tuple(255 * m for m in mean), tuple(255 * s for s in std)


def rule_of(recipe: Recipe) -> Known:
    """Where several modalities have an answer: stacked as channels of one image, where all of them are valid."""
    return "all"


def build_model(recipe: Recipe, inputs: Inputs) -> SegmentationModel:
    """Build what the recipe describes: encoder, freeze, adapter, decoder; all random parts from the recipe's seed.

    Raises RecipeError, AdapterError or CheckpointError if the parts do not fit together.
    """
    encoder = published_encoder(recipe, inputs)
    _say_if_windows_are_padding(encoder, recipe.data.tile)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapter = recipe.model.adapter
        attached = ADAPTERS[adapter.name](encoder, **adapter.model_dump(exclude={"name"}))
        return with_decoder(recipe, encoder, attached, inputs)


def _say_if_windows_are_padding(encoder: Encoder, tile: int) -> None:
    share = encoder.padded_share(tile, tile)
    if share <= 0.25:
        return
    side = encoder.window * encoder.patch  # pixels of a window, after upscale
    windows = tile * encoder.upscale / side
    say_once(
        f"data.tile = {tile}: {share:.0%} of what the {encoder.family} encoder attends to in windows of "
        f"{encoder.window} x {encoder.window} tokens is padding, which costs time and accuracy; "
        f"try model.encoder.upscale = {math.ceil(windows) * side / tile:.4g}, or "
        f"data.tile = {round(max(1, round(windows)) * side / encoder.upscale)}"
    )


def published_encoder(recipe: Recipe, inputs: Inputs, instead: str | None = None) -> Encoder:
    """The recipe's encoder with its published weights; `instead` is another folder or hub id to take them from."""
    section = recipe.model.encoder
    return build_encoder(
        section.name,
        # narrowed by name: builtin has no published weights to look for
        checkpoint=None if section.name == "builtin" else instead or section.checkpoint,
        revision=None if section.name == "builtin" or instead else section.revision,
        in_channels=sum(one.count for one in inputs),
        mean=[value for one in inputs for value in one.mean],
        std=[value for one in inputs for value in one.std],
        layers=section.layers,
        upscale=section.upscale,
        input=section.input,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        seed=recipe.seed,
    )


def with_decoder(recipe: Recipe, encoder: Encoder, attached: Attached, inputs: Inputs) -> SegmentationModel:
    """Put the recipe's decoder (random weights) on an encoder and its adapter."""
    section = recipe.model.decoder
    decoder = build_decoder(
        section.name,
        in_channels=encoder.channels,
        strides=encoder.strides,
        classes=len(recipe.data.classes),
        channels=None if section.name == "linear" else section.channels,
    )
    return SegmentationModel(
        encoder, attached, decoder, {one.name: one.count for one in inputs}, len(recipe.data.classes)
    )
