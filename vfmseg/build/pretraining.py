"""Where a recipe of `vfmseg pretrain` meets its parts: the encoder that learns, and what it learns by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from vfmseg.adapters.attach import ADAPTERS, attach_none
from vfmseg.build.groups import require_same_groups, tell_groups
from vfmseg.build.start import start
from vfmseg.catalog import published_statistics
from vfmseg.data.inputs import Inputs, bands_in
from vfmseg.data.masks import Masking
from vfmseg.data.sample import Batch, collate
from vfmseg.data.statistics import BandStatistics
from vfmseg.data.windows import Draw
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.build import build_backbone, build_new_backbone, build_stem, whole_network
from vfmseg.errors import DataError, RecipeError
from vfmseg.model import Encoder
from vfmseg.recipe import PretrainRecipe
from vfmseg.recipe.model import EncoderSection, NewEncoder
from vfmseg.recipe.pretrain import DistillSection, MaeSection
from vfmseg.training.loop import Stream
from vfmseg.training.objectives.distill import Distillation
from vfmseg.training.objectives.hidden import Hides
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.step import Objective


def build_encoder(recipe: PretrainRecipe, inputs: Inputs) -> Encoder:
    """The encoder that learns, with its adapter: each modality enters by a stem of its own.

    All that is random comes from the recipe's seed. RecipeError, AdapterError or CheckpointError if parts do not fit.
    """
    section, adapter = recipe.model.encoder, recipe.model.adapter
    again = recipe.train.gradient_checkpointing
    backbone = (
        build_new_backbone(
            section.patch, section.width, section.depth, section.heads, recipe.data.tile, section.layers, recipe.seed,
            again,
        )
        if isinstance(section, NewEncoder)
        else _published(section, "model.encoder", again)
    )  # fmt: skip
    _require_whole(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        attached = ADAPTERS[adapter.name].attach(backbone, tuple(recipe.data.modalities), **adapter.settings())
        upscale, way = (1.0, None) if isinstance(section, NewEncoder) else (section.upscale, section.input)
        stems = {
            one.name: build_stem(
                backbone, {one.name: one.count}, one.mean, one.std, upscale, None if one.count == 3 else way,
                groups=recipe.data.modalities[one.name].groups, seed=recipe.seed,
            )
            for one in inputs
        }  # fmt: skip
    require_same_groups(stems)
    tell_groups(stems.values())
    start(backbone, attached, stems, section, adapter, "model")
    return Encoder(backbone, stems, attached)


def _require_whole(backbone: Backbone) -> None:
    """RecipeError if blocks were left out, which would be missing in what is written."""
    blocks = whole_network(backbone).get_submodule(backbone.family.blocks)
    depth = len(list(blocks.children()))
    if backbone.layers[-1] != depth:
        raise RecipeError(
            f"model.encoder.layers = {list(backbone.layers)}: must end with block {depth}, the encoder's last, as the "
            "whole encoder is written; add it, or leave layers out"
        )


def statistics_of(recipe: PretrainRecipe) -> Callable[[str], BandStatistics]:
    """{modality}: mean and std of red, green and blue, for values from 0 to 255, that its encoder was published with.

    A new encoder takes those of DINOv2, as whoever uses it will.
    """
    section = recipe.model.encoder
    name, checkpoint = ("dinov2", None) if isinstance(section, NewEncoder) else (section.name, section.checkpoint)
    found = _in_image_units(name, checkpoint)
    return lambda modality: found


def _in_image_units(name: str, checkpoint: str | None) -> BandStatistics:
    mean, std = published_statistics(name, checkpoint)
    return tuple(255 * value for value in mean), tuple(255 * value for value in std)


def objectives_of(recipe: PretrainRecipe, inputs: Inputs, model: Encoder) -> dict[str, Objective]:
    """What is minimised, by name, each weighed as the recipe says."""
    mae, distill = recipe.objectives.mae, recipe.objectives.distill
    return objectives_from(mae, distill, None if mae is None else HIDES[mae.mask], inputs, model, recipe.seed)


def objectives_from(
    mae: MaeSection | None,
    distill: DistillSection | None,
    hides: Hides | None,
    inputs: Inputs,
    model: Encoder,
    seed: int,
    place: str = "objectives",
) -> dict[str, Objective]:
    """The same of sections; `hides`: what masks are of, if samples have some. `place`: of both in the recipe.

    All that is random comes from the seed, and moves no other random numbers.
    """
    found: dict[str, Objective] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if mae is not None:
            normalise = None if mae.normalise == "none" else mae.normalise
            found["mae"] = MaskedAutoencoder(
                model, mae.decoder.width, mae.decoder.depth, mae.decoder.heads, normalise, HIDES[mae.mask],
                weight=mae.weight,
            )  # fmt: skip
        if distill is not None:
            at = f"{place}.distill.teacher"
            teacher = _teacher(distill.teacher, inputs, at)
            found["distill"] = Distillation(model, teacher, distill.weight, hides if distill.masked else None, at)
    return found


MEASURED = 64
"""Windows from which the mean and std of a teacher's channels are taken: 4,000 cells of windows of 112 px."""


def measure_targets(objectives: Mapping[str, Objective], windows: Stream, place: str = "objectives") -> None:
    """Tell a distillation what its teacher says of windows to be learned from; the same ones whenever it is asked.

    `place`: of the objectives in the recipe. DataError for one to which nothing counts, so that its loss would be 0.
    """
    _require_learnable(objectives, windows, place)
    distill = objectives.get("distill")
    if isinstance(distill, Distillation):
        distill.measure(_some_of(windows))


def _require_learnable(objectives: Mapping[str, Objective], windows: Stream, place: str) -> None:
    """Reads as many windows as it takes to find something that counts: mostly one."""
    for name, objective in objectives.items():
        if not any(count > 0 for batch in _some_of(windows) for count in objective.counts(batch).values()):
            what = {"mae": "no patch of which something is hidden", "distill": "no cell"}[name]
            raise DataError(
                f"{place}.{name}: {what} is wholly valid in any of {MEASURED} windows, so nothing would be learned; "
                "expected patches without nodata: check data.modalities.NAME.nodata against the files, or take scenes "
                "with larger valid areas, or a smaller patch"
            )


def _some_of(windows: Stream) -> Iterator[Batch]:
    """MEASURED windows one by one, of all scenes and sources, which follow each other in a lap; or of several laps."""
    length = len(windows)
    for number in range(MEASURED):
        draw = Draw(0, number * length // MEASURED) if length >= MEASURED else Draw(*divmod(number, length))
        yield collate([windows[draw]])


HIDES: dict[str, Hides] = {"random": "patches", "block": "patches", "incomplete": "pixels", "spectral": "bands"}
"""{how masks are drawn: what they hide}."""


def masking_of(
    mae: MaeSection | None, model: Encoder, tile: int, inputs: Inputs, place: str = "objectives.mae"
) -> Masking | None:
    """How patches of this encoder are hidden in windows of tile x tile; None if nothing is.

    RecipeError if that would leave nothing visible; `place`: the section in the recipe.
    """
    if mae is None:
        return None
    groups = len(model.reference.groups)
    own = None if groups == 1 or mae.groups == "same" else groups
    found = Masking(mae.mask, mae.ratio, model.backbone.patch, mae.inside or 0.6, own)
    found.require(tile, bands_in(inputs), f"{place}.ratio")
    return found


def _teacher(section: EncoderSection, inputs: Inputs, place: str) -> Encoder:
    backbone = _published(section, place)
    stems = {}
    for one in inputs:
        if one.count != 3:
            raise RecipeError(
                f"{place}: it knows red, green and blue, and {one.name} has {one.count} bands; name three of them "
                f"(data.modalities.{one.name}.bands), or leave that modality to {place.partition('.distill')[0]}.mae"
            )
        # the images that the student takes, each of the two in the numbers that it was published with
        own = one.normalize == "encoder"
        mean, std = _in_image_units(section.name, section.checkpoint) if own else (one.mean, one.std)
        stems[one.name] = build_stem(backbone, {one.name: 3}, mean, std, section.upscale, None, place)
    return Encoder(backbone, stems, attach_none(backbone, tuple(stems)))


def _published(section: EncoderSection, place: str, checkpointing: bool = False) -> Backbone:
    return build_backbone(
        section.name, section.checkpoint, section.layers, checkpointing, section.revision, place=place
    )
