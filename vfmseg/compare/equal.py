"""How many parameters the model of a recipe trains, and recipes that train as many as another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vfmseg.build.data import inputs_of, metres_of, open_training
from vfmseg.build.model import assembled, published_backbone
from vfmseg.build.own import own_backbone
from vfmseg.compare.grid import Cell
from vfmseg.compare.runs import data_key
from vfmseg.data.inputs import Inputs
from vfmseg.data.scene import Scenes
from vfmseg.data.traces import Traces
from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import VfmsegError
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.recipe.base import LARGEST_WIDTH

CLOSE = 0.02
"""Cells count as equal if they train at most this share fewer parameters than the yardstick."""


@dataclass(frozen=True)
class Count:
    """Parameters of a model: those that training changes, and all."""

    trainable: int
    total: int


@dataclass
class Counting:
    """Counts parameters without training or running anything; data are opened and encoders read once for all recipes.

    Models are built on torch's `meta` device, where tensors have a shape and no content.
    """

    traces: dict[str, dict[str, str]] = field(default_factory=dict)
    """{`data_key` of a recipe: digests of its images and labels}, of the data that were opened."""
    _scenes: dict[str, dict[str, Scenes]] = field(default_factory=dict)
    _inputs: dict[str, Inputs] = field(default_factory=dict)
    _backbones: dict[str, Backbone] = field(default_factory=dict)

    def of(self, recipe: Recipe) -> Count:
        """The parameters of a recipe's model; the errors of `finetune` for data, encoder or parts that do not fit."""
        inputs, backbone = self._inputs_of(recipe), copy.deepcopy(self._backbone_of(recipe))
        own = {name: copy.deepcopy(self._own_of(recipe, name)) for name in recipe.model.own_encoders}
        with torch.device("meta"):
            model = assembled(recipe, inputs, backbone, own, metres_of(self._scenes[data_key(recipe)]["train"]))
        return Count(
            sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())
        )

    def of_cell(self, cell: Cell) -> Count:
        """The same; errors name the cell."""
        try:
            return self.of(cell.recipe)
        except VfmsegError as error:
            raise type(error)(f"cell {cell.name}: {error}") from None

    def encoder_width(self, recipe: Recipe) -> int:
        """Channels of the encoder's tokens."""
        return self._backbone_of(recipe).width

    def _inputs_of(self, recipe: Recipe) -> Inputs:
        data = data_key(recipe)
        if data not in self._scenes:
            traces = Traces()
            self._scenes[data] = open_training(recipe, traces)
            self.traces[data] = traces.found
        # statistics are of the training scenes, or those that the encoder was published with
        encoders = (recipe.model.encoder, *recipe.model.own_encoders.values())
        published = [one.model_dump_json() for one in encoders]
        key = data + repr((published, list(recipe.model.own_encoders), recipe.train.modality_dropout))
        if key not in self._inputs:
            self._inputs[key] = inputs_of(recipe, self._scenes[data]["train"])
        return self._inputs[key]

    def _backbone_of(self, recipe: Recipe) -> Backbone:
        key = f"{recipe.model.encoder.model_dump_json()} {recipe.train.gradient_checkpointing}"
        if key not in self._backbones:
            self._backbones[key] = published_backbone(recipe).to("meta")
        return self._backbones[key]

    def _own_of(self, recipe: Recipe, modality: str) -> Backbone:
        """The published encoder that a modality has for itself."""
        section, shared = recipe.model.own_encoders[modality], self._backbone_of(recipe)
        key = f"{modality} {section.model_dump_json()} {recipe.train.gradient_checkpointing} {shared.layers}"
        if key not in self._backbones:
            self._backbones[key] = own_backbone(recipe, modality, shared).to("meta")
        return self._backbones[key]


@dataclass(frozen=True)
class Width:
    """A number of a recipe by which a part grows. key: its place; now: its value; most: the largest that is tried.

    changes(value): the overrides that set it.
    """

    key: str
    now: int
    most: int
    changes: Callable[[int], list[str]]


def width_of(cell: Cell, encoder: int) -> Width | None:
    """By which number the model of a cell can train more: of its decoder, else of its adapter; None if by none.

    A key that is itself compared is left alone. A rank reaches up to the width of the encoder: a product of larger
    factors has more parameters and says no more. `alpha` grows with it, so that alpha / rank stays. The bottlenecks of
    mm_adapter are given as a share of that width.
    """
    decoder, adapter = cell.recipe.model.decoder, cell.recipe.model.adapter

    def plain(key: str, now: int, most: int, alpha: float | None = None) -> Width:
        def changes(value: int) -> list[str]:
            scaled = [] if alpha is None else [f"model.adapter.alpha={alpha * value / now!r}"]
            return [f"{key}={value}", *scaled]

        return Width(key, now, most, changes)

    found: list[Width] = []
    if decoder.name != "linear":
        found.append(plain("model.decoder.channels", decoder.channels, LARGEST_WIDTH))
    if adapter.name == "lora" or adapter.name == "mm_lora":
        found.append(plain("model.adapter.rank", adapter.rank, encoder, adapter.alpha))
    elif adapter.name == "adapter":
        found.append(plain("model.adapter.hidden", adapter.hidden, LARGEST_WIDTH))
    elif adapter.name == "mm_adapter":
        now = max(1, round(adapter.ratio * encoder))
        key = "model.adapter.ratio"
        found.append(Width(key, now, 4 * encoder, lambda value: [f"{key}={value / encoder!r}"]))
    return next((width for width in found if width.key not in cell.keys), None)


def equalised(path: Path, cells: list[Cell], counting: Counting) -> list[Cell]:
    """The same cells, those that train fewer parameters than the largest made wider where they have a width.

    Each gets the largest width by which it trains no more than the largest cell.
    """
    counts = [counting.of_cell(cell).trainable for cell in cells]
    target = max(counts)
    return [
        cell if count == target else _grown(path, cell, target, counting)
        for cell, count in zip(cells, counts, strict=True)
    ]


def is_equal(trainable: int, yardstick: int) -> bool:
    """Whether a cell counts as training as many parameters as the yardstick."""
    return trainable >= (1 - CLOSE) * yardstick


def _grown(path: Path, cell: Cell, target: int, counting: Counting) -> Cell:
    """The widest form of a cell that trains at most `target` parameters; the cell itself if nothing can grow."""
    width = width_of(cell, counting.encoder_width(cell.recipe))
    if width is None or width.now >= width.most:
        return cell

    def wider(value: int) -> Cell:
        changes = (*cell.changes, *width.changes(value))
        name = f"{cell.name}_{changes[len(cell.changes)].removeprefix('model.').replace('=', '-')}"
        return Cell(name, changes, cell.keys, load_recipe(path, changes))

    fits, too_wide = width.now, width.most + 1
    while too_wide - fits > 1:
        middle = (fits + too_wide) // 2
        if counting.of(wider(middle).recipe).trainable <= target:
            fits = middle
        else:
            too_wide = middle
    return cell if fits == width.now else wider(fits)
