"""Where a recipe meets the model: its encoder, adapter and decoder, built from recipe and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.adapters.attached import Attached
from vfmseg.adapters.own import OwnEncoder
from vfmseg.build.groups import require_same_groups, tell_groups
from vfmseg.build.own import Adapted, adapted, own_backbones, own_encoder, place_of
from vfmseg.build.start import start_network
from vfmseg.catalog import published_statistics
from vfmseg.data.image import Known
from vfmseg.data.inputs import Inputs
from vfmseg.data.statistics import BandStatistics
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.build import build_backbone, build_stem
from vfmseg.encoders.side import SIDES, SideEncoder
from vfmseg.encoders.stem import Stem
from vfmseg.errors import RecipeError
from vfmseg.fusion.build import FUSIONS
from vfmseg.fusion.contract import Fusion
from vfmseg.fusion.coregister import Coregister
from vfmseg.fusion.decision import Decision, DecoderPerStream
from vfmseg.fusion.refine import Refine
from vfmseg.model import Network
from vfmseg.recipe import Recipe
from vfmseg.recipe.fusion import LARGEST_SHIFT, SideEncoderSection
from vfmseg.terminal import say_once


def normalized_by(recipe: Recipe, name: str, count: int, dtype: str, plain: bool) -> Literal["encoder", "dataset"]:
    """Whose mean and std normalise a modality of a recipe, see `normalization`."""
    return normalization(recipe.data.modalities[name].normalize, name, count, dtype, plain)


def normalization(
    given: Literal["encoder", "dataset"] | None, name: str, count: int, dtype: str, plain: bool
) -> Literal["encoder", "dataset"]:
    """Whose mean and std normalise a modality: as its section says, else `encoder` for 8-bit RGB alone.

    `count` bands are read, of stored type `dtype`; `plain`: they are the values themselves. RecipeError for `encoder`
    with other than three bands.
    """
    eight_bit_rgb = count == 3 and dtype == "uint8" and plain
    chosen = given or ("encoder" if eight_bit_rgb else "dataset")
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


def published_in_image_units(recipe: Recipe, modality: str) -> BandStatistics:
    """Mean and std of red, green and blue that its encoder was published with, for values from 0 to 255."""
    section = recipe.model.own_encoders.get(modality, recipe.model.encoder)
    mean, std = published_statistics(section.name, section.checkpoint)
    return tuple(255 * m for m in mean), tuple(255 * s for s in std)


def streams_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """{stream: its modalities}: what goes through the backbone. `stack` puts all modalities into one."""
    names = tuple(recipe.data.modalities)
    if recipe.model.joins is None:
        return {"+".join(names): names}
    return {name: (name,) for name in names}


def rule_of(recipe: Recipe) -> Known:
    """Where several modalities have an answer: in one stream where all are valid, else as their fusion says."""
    fusion = recipe.model.fusion
    if fusion is None or len(streams_of(recipe)) == 1:
        return "all"
    return Decision.known if fusion.name == "decision" else FUSIONS[fusion.name].known


def build_model(recipe: Recipe, inputs: Inputs, metres: float | None = None) -> Network:
    """Build what the recipe describes: backbone, freeze, adapter, stems, decoder; all that is random from its seed.

    Stems and adapters that `vfmseg pretrain` has trained start from that. `metres` of a pixel of the training scenes,
    for lengths that the recipe gives in metres; None if nobody knows.
    Raises RecipeError, AdapterError or CheckpointError if the parts do not fit together.
    """
    backbone = published_backbone(recipe)
    model = assembled(recipe, inputs, backbone, own_backbones(recipe, backbone), metres)
    start_network(recipe, model)
    _say_if_windows_are_padding(backbone, model.reference, recipe.data.tile)
    tell_groups(stem for stem in map(model.stem, model.streams) if isinstance(stem, Stem))
    tell_groups(own.stem for own in model.own_encoders.values())
    for name, own in model.own_encoders.items():
        _say_if_windows_are_padding(own.backbone, own.stem, recipe.data.tile, place_of(name))
    return model


def assembled(
    recipe: Recipe,
    inputs: Inputs,
    backbone: Backbone,
    own: Mapping[str, Backbone],
    metres: float | None = None,
) -> Network:
    """What `build_model` says, put into and around this backbone, which it changes; also of tensors on `meta`.

    `own` {modality: its published encoder}, of those that have one; they are changed too.
    """
    stems = stems_of(recipe, inputs, backbone, adapted(recipe, own))
    adapter = recipe.model.adapter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        attached = ADAPTERS[adapter.name].attach(backbone, inside(stems), **adapter.settings())
        return around(recipe, backbone, stems, attached, _metres_for(recipe, metres))


def published_backbone(recipe: Recipe, instead: str | None = None) -> Backbone:
    """The recipe's encoder with its published weights; `instead` is another folder or hub id to take them from."""
    section = recipe.model.encoder
    return build_backbone(
        section.name,
        checkpoint=instead or section.checkpoint,
        revision=None if instead else section.revision,
        layers=section.layers,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )


def stems_of(
    recipe: Recipe, inputs: Inputs, backbone: Backbone, own_ones: Adapted
) -> dict[str, Stem | SideEncoder | OwnEncoder]:
    """{stream: its stem, or the encoder that its modality has instead}; `own_ones`: those that are published.

    They take nothing from the seed of the other parts: what of them is random has the recipe's seed for itself.
    """
    by_name, section = {one.name: one for one in inputs}, recipe.model.encoder
    stems: dict[str, Stem | SideEncoder | OwnEncoder] = {}
    for stream, names in streams_of(recipe).items():
        mine = [by_name[name] for name in names]
        bands = {one.name: one.count for one in mine}
        mean, std = ([value for one in mine for value in getattr(one, key)] for key in ("mean", "std"))
        own = recipe.model.modalities.get(stream)
        if stream in own_ones:
            stems[stream] = own_encoder(recipe, stream, own_ones[stream], bands, mean, std, backbone)
        elif own is not None and isinstance(own.encoder, SideEncoderSection):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                body, width = SIDES[own.encoder.name], own.encoder.width
                stems[stream] = SideEncoder(bands, mean, std, body, width, backbone.channels)
        else:
            groups = recipe.data.modalities[names[0]].groups
            stems[stream] = build_stem(
                backbone, bands, mean, std, section.upscale, section.input, groups=groups, seed=recipe.seed
            )
    require_same_groups(stems)
    return stems


def inside(stems: Mapping[str, Stem | SideEncoder | OwnEncoder]) -> tuple[str, ...]:
    """The streams that go through the backbone: all but those with an encoder of their own."""
    return tuple(name for name, stem in stems.items() if isinstance(stem, Stem))


def around(
    recipe: Recipe,
    backbone: Backbone,
    stems: Mapping[str, Stem | SideEncoder | OwnEncoder],
    attached: Attached,
    metres: float = 1.0,
) -> Network:
    """The network of a backbone, its stems and its adapter: fusion and decoder are built, with random weights.

    `metres` of a pixel, for lengths in metres; those of a segmenter lie in its files.
    """
    section = recipe.model.joins
    if section is None:
        return Network(backbone, stems, attached, None, _decoder(recipe, backbone), len(recipe.data.classes))
    streams = tuple(stems)
    moved = _coregister_of(recipe, metres)
    if section.name == "decision":
        refine = None if section.refine is None else Refine(section.refine.guide, section.refine.iterations)
        decision = Decision(streams, len(recipe.data.classes), section.op, refine)
        decoders = DecoderPerStream({name: _decoder(recipe, backbone) for name in streams})
        return Network(backbone, stems, attached, decision, decoders, len(recipe.data.classes), moved)
    build: Callable[..., Fusion] = FUSIONS[section.name]
    fuse = build(streams, backbone.channels, **section.model_dump(exclude={"name", "coregister", "weight"}))
    for stem in stems.values():
        if not isinstance(stem, Stem):
            for level, head in enumerate(stem.heads):
                # a tensor that learns and gets no gradient would stop a run of several processes
                head.requires_grad_(level in fuse.levels)
    decoder = _decoder(recipe, backbone, fuse.levels)
    return Network(backbone, stems, attached, fuse, decoder, len(recipe.data.classes), moved)


def _decoder(recipe: Recipe, backbone: Backbone, levels: Sequence[int] | None = None) -> nn.Module:
    """The recipe's decoder for all maps of the backbone, or those numbered `levels`."""
    section = recipe.model.decoder
    numbers = range(len(backbone.channels)) if levels is None else levels
    return build_decoder(
        section.name,
        in_channels=tuple(backbone.channels[number] for number in numbers),
        strides=(backbone.patch / recipe.model.encoder.upscale,) * len(numbers),
        classes=len(recipe.data.classes),
        channels=None if section.name == "linear" else section.channels,
    )


def _coregister_of(recipe: Recipe, metres: float) -> Coregister | None:
    """What moves modalities onto the first, if the recipe says so; `metres` of a pixel."""
    fusion = recipe.model.joins
    if fusion is None or fusion.coregister is None:
        return None
    section, names = fusion.coregister, tuple(recipe.data.modalities)
    pixels = section.max_shift / metres if section.unit == "metres" else section.max_shift
    return Coregister(section.modalities or names[1:], pixels)


def _metres_for(recipe: Recipe, metres: float | None) -> float:
    """The metres of a pixel, 1 where the recipe needs none; RecipeError where it does and they do not fit."""
    section = None if recipe.model.joins is None else recipe.model.joins.coregister
    if section is None or section.unit == "pixels":
        return 1.0
    place = f"model.fusion.coregister.max_shift = {section.max_shift:g} metres"
    if metres is None:
        raise RecipeError(
            f"{place}: the scenes have no CRS, so nobody knows how many metres a pixel is; use unit: pixels"
        )
    most = min(LARGEST_SHIFT, recipe.data.tile / 2)
    if section.max_shift / metres > most:
        raise RecipeError(
            f"{place} are {section.max_shift / metres:.0f} pixels; expected {most:g} at most (half of data.tile, and "
            f"never more than {LARGEST_SHIFT}): give a smaller one"
        )
    return metres


def _say_if_windows_are_padding(backbone: Backbone, stem: Stem, tile: int, place: str = "model.encoder") -> None:
    share = backbone.padded_share(*stem.cells(tile, tile))
    if share <= 0.25:
        return
    side = backbone.window * backbone.patch  # pixels of a window, after upscale
    windows = tile * stem.upscale / side
    say_once(
        f"data.tile = {tile}: {share:.0%} of what the {backbone.family.name} encoder attends to in windows of "
        f"{backbone.window} x {backbone.window} tokens is padding, which costs time and accuracy; "
        f"try {place}.upscale = {math.ceil(windows) * side / tile:.4g}, or "
        f"data.tile = {round(max(1, round(windows)) * side / stem.upscale)}"
    )
