"""Where a recipe meets the model: its encoder, adapter and decoder, built from the recipe and facts of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vfmseg.adapters.attach import ADAPTERS, Attached
from vfmseg.catalog import published_statistics
from vfmseg.data.image import Known
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.base import Encoder
from vfmseg.encoders.build import build_encoder
from vfmseg.errors import RecipeError
from vfmseg.geo.said import BandSaid
from vfmseg.model import SegmentationModel
from vfmseg.recipe import Recipe
from vfmseg.terminal import say_once

# mean and standard deviation of each band of one modality, in the units of the images
BandStatistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class InputFacts:
    """What the training data tells the model: bands, stored type and statistics of each modality."""

    bands: dict[str, int]
    dtypes: dict[str, str]
    statistics: dict[str, BandStatistics]  # only for modalities that are normalised by the data set
    said: dict[str, tuple[BandSaid, ...]] = field(default_factory=dict)  # what the files say of their bands

    def __post_init__(self) -> None:
        for name, count in self.bands.items():  # what nobody said
            self.said.setdefault(name, (BandSaid(),) * count)

    def plain(self, name: str) -> bool:
        """Whether the values of a modality are the numbers that its files store."""
        return not any(band.scaled for band in self.said[name])


def normalization(recipe: Recipe, facts: InputFacts) -> dict[str, str]:
    """`encoder` or `dataset` for each modality: as the recipe says, else `encoder` for 8-bit RGB alone."""
    chosen: dict[str, str] = {}
    for name, section in recipe.data.modalities.items():
        bands, dtype = facts.bands[name], facts.dtypes[name]
        eight_bit_rgb = bands == 3 and dtype == "uint8" and facts.plain(name)
        chosen[name] = section.normalize or ("encoder" if eight_bit_rgb else "dataset")
        if chosen[name] == "encoder" and bands != 3:
            raise RecipeError(
                f"data.modalities.{name}.normalize = encoder needs 3 bands (red, green, blue), but {bands} "
                "are read; use dataset"
            )
        if chosen[name] == "encoder" and dtype != "uint8" and facts.plain(name):
            say_once(
                f"data.modalities.{name}.normalize = encoder takes values as 0 to 255, but the files hold "
                f"{dtype}: choose a scale that brings them there, or use dataset"
            )
    return chosen


def rule_of(recipe: Recipe) -> Known:
    """Where several modalities have an answer: stacked as channels of one image, where all of them are valid."""
    return "all"


def build_model(recipe: Recipe, facts: InputFacts) -> SegmentationModel:
    """Build what the recipe describes: encoder, freeze, adapter, decoder; all random parts from the recipe's seed.

    Raises RecipeError, AdapterError or CheckpointError if the parts do not fit together.
    """
    encoder = published_encoder(recipe, facts)
    _say_if_windows_are_padding(encoder, recipe.data.tile)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapter = recipe.model.adapter
        attached = ADAPTERS[adapter.name](encoder, **adapter.model_dump(exclude={"name"}))
        return with_decoder(recipe, encoder, attached, facts.bands)


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


def published_encoder(recipe: Recipe, facts: InputFacts, instead: str | None = None) -> Encoder:
    """The recipe's encoder with its published weights; `instead` is another folder or hub id to take them from."""
    section = recipe.model.encoder
    mean, std = stacked_statistics(recipe, facts)
    return build_encoder(
        section.name,
        # narrowed by name: builtin has no published weights to look for
        checkpoint=None if section.name == "builtin" else instead or section.checkpoint,
        revision=None if section.name == "builtin" or instead else section.revision,
        in_channels=sum(facts.bands.values()),
        mean=mean,
        std=std,
        layers=section.layers,
        upscale=section.upscale,
        input=section.input,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        seed=recipe.seed,
    )


def with_decoder(recipe: Recipe, encoder: Encoder, attached: Attached, bands: Mapping[str, int]) -> SegmentationModel:
    """Put the recipe's decoder (random weights) on an encoder and its adapter."""
    section = recipe.model.decoder
    decoder = build_decoder(
        section.name,
        in_channels=encoder.channels,
        strides=encoder.strides,
        classes=len(recipe.data.classes),
        channels=None if section.name == "linear" else section.channels,
    )
    return SegmentationModel(encoder, attached, decoder, bands, len(recipe.data.classes))


def stacked_statistics(recipe: Recipe, facts: InputFacts) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of all stacked channels in image units: the encoder's published ones or the data set's."""
    section = recipe.model.encoder
    checkpoint = None if section.name == "builtin" else section.checkpoint
    chosen = normalization(recipe, facts)
    mean: list[float] = []
    std: list[float] = []
    for name in facts.bands:
        if chosen[name] == "encoder":
            published_mean, published_std = published_statistics(section.name, checkpoint)
            mean += [255 * m for m in published_mean]
            std += [255 * s for s in published_std]
        else:
            mean += facts.statistics[name][0]
            std += facts.statistics[name][1]
    return tuple(mean), tuple(std)
