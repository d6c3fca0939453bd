"""How many parameters the model of a recipe trains, and recipes that train as many as another one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.model import around, published_backbone, stems_of
from vfmseg.compare.grid import Cell
from vfmseg.data.inputs import Inputs
from vfmseg.data.scene import Scene
from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import VfmsegError
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.recipe.base import LARGEST_WIDTH

DECODERS = {"fpn": "channels", "upernet": "channels"}
ADAPTER_WIDTHS = {"lora": "rank", "adapter": "hidden"}
"""{name: the key of its width}; what is not here has no width to choose."""

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

    _scenes: dict[str, dict[str, list[Scene]]] = field(default_factory=dict)
    _inputs: dict[str, Inputs] = field(default_factory=dict)
    _backbones: dict[str, Backbone] = field(default_factory=dict)

    def of(self, recipe: Recipe) -> Count:
        """The parameters of a recipe's model; the errors of `finetune` for data, encoder or parts that do not fit."""
        inputs, backbone = self._inputs_of(recipe), copy.deepcopy(self._backbone_of(recipe))
        adapter = recipe.model.adapter
        with torch.device("meta"):
            stems = stems_of(recipe, inputs, backbone)
            attached = ADAPTERS[adapter.name].attach(backbone, **adapter.model_dump(exclude={"name"}))
            model = around(recipe, backbone, stems, attached)
        return Count(
            sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())
        )

    def of_cell(self, cell: Cell) -> Count:
        """The same; errors name the cell."""
        try:
            return self.of(cell.recipe)
        except VfmsegError as error:
            raise type(error)(f"cell {cell.name}: {error}") from None

    def _inputs_of(self, recipe: Recipe) -> Inputs:
        data = recipe.data.model_dump_json()
        if data not in self._scenes:
            self._scenes[data] = open_training(recipe)
        # statistics are of the training scenes, or those that the encoder was published with
        key = data + recipe.model.encoder.model_dump_json() + repr(recipe.train.modality_dropout)
        if key not in self._inputs:
            self._inputs[key] = inputs_of(recipe, self._scenes[data]["train"])
        return self._inputs[key]

    def _backbone_of(self, recipe: Recipe) -> Backbone:
        key = f"{recipe.model.encoder.model_dump_json()} {recipe.train.gradient_checkpointing}"
        if key not in self._backbones:
            self._backbones[key] = published_backbone(recipe).to("meta")
        return self._backbones[key]


def equalised(path: Path, cells: list[Cell], counting: Counting) -> list[Cell]:
    """The same cells, those that train fewer parameters than the largest made wider where they have a width.

    A decoder's `channels`, else an adapter's `rank` (with `alpha`, so that alpha / rank stays) or `hidden`: the widest
    that trains no more than the largest cell.
    """
    counts = [counting.of_cell(cell) for cell in cells]
    target = max(count.trainable for count in counts)
    return [
        cell if count.trainable == target else _grown(path, cell, target, counting)
        for cell, count in zip(cells, counts, strict=True)
    ]


def is_equal(trainable: int, yardstick: int) -> bool:
    """Whether a cell counts as training as many parameters as the yardstick."""
    return trainable >= (1 - CLOSE) * yardstick


def _grown(path: Path, cell: Cell, target: int, counting: Counting) -> Cell:
    """The widest form of a cell that trains at most `target` parameters; the cell itself if it has no width."""
    model = cell.recipe.model
    section: Any = model.decoder if model.decoder.name in DECODERS else model.adapter
    key = DECODERS.get(model.decoder.name) or ADAPTER_WIDTHS.get(model.adapter.name)
    if key is None:
        return cell
    part = "decoder" if section is model.decoder else "adapter"
    now = int(getattr(section, key))

    def wider(width: int) -> Cell:
        changes = [f"model.{part}.{key}={width}"]
        if key == "rank":
            changes.append(f"model.adapter.alpha={section.alpha * width / now!r}")
        every = (*cell.changes, *changes)
        return Cell(f"{cell.name}_{key}-{width}", every, load_recipe(path, every))

    most, too_wide = now, LARGEST_WIDTH + 1  # the answer is at least `most` and below `too_wide`
    while too_wide - most > 1:
        middle = (most + too_wide) // 2
        fits = counting.of(wider(middle).recipe).trainable <= target
        most, too_wide = (middle, too_wide) if fits else (most, middle)
    return cell if most == now else wider(most)
