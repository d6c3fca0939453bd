"""Where a recipe meets the training: sources, objectives and schedule as its sections say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfmseg.build.data import value_ranges
from vfmseg.build.model import rule_of
from vfmseg.build.remarks import tell_idle_loss, tell_portions
from vfmseg.data.augment import Augment, Radiometry
from vfmseg.data.dataset import CoverWindows, TrainingWindows
from vfmseg.data.inputs import Inputs, bands_in
from vfmseg.data.scene import Scene, Scenes
from vfmseg.data.visits import Portion
from vfmseg.model import Network
from vfmseg.recipe import PretrainRecipe, Recipe, dump_recipe
from vfmseg.recipe.fusion import AlignmentFusion, ReconstructionFusion
from vfmseg.recipe.predict import PredictSection
from vfmseg.recipe.run import AugmentSection
from vfmseg.terminal import say
from vfmseg.training.loop import Stream
from vfmseg.training.losses import LOSSES, Loss
from vfmseg.training.objectives.coregistration import Coregistration
from vfmseg.training.objectives.segmentation import Segmentation, Validation, class_weight_tuple
from vfmseg.training.schedule import Schedule
from vfmseg.training.step import Objective


def sources_of(recipe: Recipe, scenes: Scenes, inputs: Inputs) -> dict[str, Stream]:
    """The streams to learn from, by name: random windows of the training scenes, augmented."""
    data = recipe.data
    weights = [source.weight for source in data.sources("train").values()]
    portions = [Portion(count, weight) for count, weight in zip(scenes.per_source, weights, strict=True)]
    windows = TrainingWindows(
        scenes,
        data.tile,
        recipe.seed,
        augment_of(recipe.train.augment, inputs),
        rule_of(recipe),
        data.samples_per_epoch,
        bands_in(inputs),
        recipe.train.dropout_of(data.modalities),
        portions,
    )
    if len(portions) > 1:
        tell_portions(data.sources("train"), scenes.per_source, windows.visits.shares)
    return {"train": windows}


def augment_of(section: AugmentSection, inputs: Inputs) -> Augment:
    """How windows are changed at random."""
    return Augment(
        flip=section.flip,
        rotate90=section.rotate90,
        scale=section.scale,
        rotate=section.rotate,
        radiometry={
            name: Radiometry(r.brightness, r.contrast, r.saturation, r.hue) for name, r in section.radiometry.items()
        },
        value_range=value_ranges(inputs),
    )


def segmentation_of(recipe: Recipe) -> Segmentation:
    """Supervised segmentation: each loss of the recipe with its own settings and weight."""
    section = recipe.train
    weights = class_weight_tuple(section.class_weights, tuple(sorted(recipe.data.classes)))
    settings: dict[str, dict[str, Any]] = {
        "cross_entropy": {"class_weights": weights},
        "focal": {"class_weights": weights, "gamma": section.focal_gamma},
    }
    losses: dict[str, Loss] = {name: LOSSES[name](**settings.get(name, {})) for name in section.loss}
    fusion = recipe.model.fusion
    weight = fusion.weight if isinstance(fusion, ReconstructionFusion | AlignmentFusion) else 0.0
    return Segmentation(
        losses,
        dict(section.loss.items()),
        rule_of(recipe),
        weights,
        fusion_weight=weight,
        distill=section.distill,
    )


OBJECTIVES: dict[str, Callable[[Recipe], Objective]] = {"segmentation": segmentation_of}


def objectives_of(recipe: Recipe, inputs: Inputs, model: Network) -> dict[str, Objective]:
    """What is minimised, by name; a model that moves modalities brings what finds their shifts."""
    found: dict[str, Objective] = {recipe.train.objective: OBJECTIVES[recipe.train.objective](recipe)}
    tell_idle_loss(recipe, model.parts())
    moves = model.coregister
    if moves is not None:
        bands = {one.name: one.count for one in inputs if one.name in moves.modalities}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            found["coregistration"] = Coregistration(bands, len(recipe.data.classes), moves.limit.item())
    return found


def validation_of(recipe: Recipe, model: nn.Module, scenes: Sequence[Scene] | None, inputs: Inputs) -> Validation:
    """Scores of the model on all windows of the validation scenes; without any it is said what that means."""
    if scenes is None:
        say("no validation split: the last epoch is kept as best; add data.val to choose on unseen scenes")
    return Validation(
        model,
        None if scenes is None else CoverWindows(scenes, recipe.data.tile, bands_in(inputs)),
        [recipe.data.classes[i].name for i in sorted(recipe.data.classes)],
        recipe.train.batch_size,
        rule_of(recipe),
        outside=[spec.name for spec in recipe.data.classes.values() if not spec.in_mean],
    )


def schedule_of(recipe: Recipe | PretrainRecipe) -> Schedule:
    """The plain numbers of the run. What learns inside the encoder, its adapter included, may have its own rate."""
    section = recipe.train
    of_encoder = section.optimizer.encoder_lr
    return Schedule(
        epochs=section.epochs,
        batch_size=section.batch_size,
        accumulate=section.accumulate,
        clip=section.clip,
        lr=section.optimizer.lr,
        rates={} if of_encoder is None else {"encoder": of_encoder, "adapter": of_encoder},
        weight_decay=section.optimizer.weight_decay,
        warmup=section.optimizer.warmup,
        seed=recipe.seed,
        workers=recipe.data.workers,
    )


def what_decides(recipe: Recipe | PretrainRecipe) -> str:
    """The recipe as text without what may change between sittings: it decides no weight."""
    train = recipe.train.model_copy(update={"track": "none"})
    data = recipe.data.model_copy(update={"workers": 0})
    update: dict[str, Any] = {"train": train, "data": data, "output_dir": Path()}
    if isinstance(recipe, Recipe):
        update["predict"] = PredictSection()
    else:
        update["pictures"] = 0
    return dump_recipe(recipe.model_copy(update=update))
