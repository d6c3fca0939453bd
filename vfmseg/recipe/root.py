"""The whole recipe, and the checks that look at more than one section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from vfmseg.errors import nearest, show
from vfmseg.recipe.base import Name, Problem, RecipePath, Section, Whole
from vfmseg.recipe.data import DataSection
from vfmseg.recipe.fusion import AttentionFusion, DecisionFusion
from vfmseg.recipe.joint import PLACE, joint_problems
from vfmseg.recipe.model import ModelSection
from vfmseg.recipe.only import with_only
from vfmseg.recipe.predict import PredictSection
from vfmseg.recipe.pretrain import grouping_problems
from vfmseg.recipe.train import TrainSection


class Recipe(Section):
    """One run from scenes and labels to a segmenter."""

    name: Annotated[Name, Field(examples=["flood-optical-dem"])]
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Everything random derives from it."""
    data: DataSection
    model: ModelSection
    train: TrainSection = TrainSection()
    predict: PredictSection = PredictSection()
    output_dir: Annotated[RecipePath, Field(examples=["runs/flood"])]
    """Folder of the run: checkpoints, metrics, the resolved recipe."""

    @model_validator(mode="before")
    @classmethod
    def _fill_fusion(cls, value: Any) -> Any:
        """Several modalities are stacked if the recipe does not say otherwise."""
        if not isinstance(value, Mapping):
            return value
        value = with_only(value)
        data, model = value.get("data"), value.get("model")
        if not isinstance(data, Mapping) or not isinstance(model, Mapping) or model.get("fusion") is not None:
            return value
        modalities = data.get("modalities")
        several = isinstance(modalities, Mapping) and len(modalities) > 1
        return {**value, "model": {**model, "fusion": {"name": "stack"}}} if several else value

    def _problems(self) -> Iterator[Problem]:
        """Checks across sections: a key that the chosen parts do not use is an error."""
        modalities = self.data.modalities
        if self.model.fusion is not None and len(modalities) == 1:
            yield Problem("model.fusion", "is not used: data.modalities has only one modality; drop it")
        yield from self._fusion_problems()
        yield from self._stream_problems()
        counts = [m.count for m in modalities.values()]
        grouped = any(one.groups for one in modalities.values())
        as_published = None not in counts and sum(filter(None, counts)) == 3 and not grouped
        if self.model.encoder.input and as_published:
            yield Problem(
                "model.encoder.input",
                f"= '{self.model.encoder.input}' is not used: 3 bands enter as published; drop it",
            )
        for name, own in self.model.own_encoders.items():
            if own.input and name in modalities and modalities[name].count == 3:
                place = f"model.modalities.{name}.encoder.input"
                yield Problem(place, f"= '{own.input}' is not used: 3 bands enter as published; drop it")
        frozen = {self.model.adapter.name, *(self.model.adapter_of(name).name for name in self.model.own_encoders)}
        frozen_all = frozen == {"none"}
        if self.train.optimizer.encoder_lr is not None and frozen_all:
            yield Problem(
                "train.optimizer.encoder_lr", "is not used: adapter none lets nothing in the encoder learn; drop it"
            )
        if self.train.gradient_checkpointing and frozen_all and as_published:
            yield Problem(
                "train.gradient_checkpointing", "is not used: adapter none lets nothing in the encoder learn; drop it"
            )
        for number in self.train.class_weights or ():
            if number not in self.data.classes:
                ids = ", ".join(map(str, self.data.classes))
                yield Problem(f"train.class_weights.{number}", f"is not a class id; data.classes has {ids}")
        yield from self._radiometry_problems()
        yield from self._absence_problems()
        for name, one in modalities.items():
            if one.groups and len(modalities) > 1 and self.model.joins is None:
                yield Problem(
                    f"data.modalities.{name}.groups",
                    "are of one modality, and fusion stack makes one image of all; choose another fusion, or drop them",
                )
            if one.groups and name in self.model.modalities and name not in self.model.own_encoders:
                yield Problem(
                    f"data.modalities.{name}.groups",
                    "are for a vision transformer, and model.modalities gives it a small encoder; drop one",
                )
        if self.train.unlabelled is not None:
            shared = {name: one for name, one in modalities.items() if name not in self.model.modalities}
            yield from grouping_problems(shared, self.train.unlabelled.mae, f"{PLACE}.mae")
            yield from joint_problems(
                self.train.unlabelled,
                tuple(modalities),
                tuple(self.model.modalities),
                self.model.joins is None,
                self.data.tile,
                self.model.encoder.upscale,
            )

    def _absence_problems(self) -> Iterator[Problem]:
        """Modalities that may be missing or are hidden at random need a fusion that answers without them."""
        modalities, dropout = self.data.modalities, self.train.modality_dropout
        for name in dropout if isinstance(dropout, dict) else ():
            if name not in modalities:
                place = f"train.modality_dropout.{name}"
                yield Problem(place, f"is not one of data.modalities; {nearest(name, modalities)}")
        if self.model.joins is not None:
            return
        if len(modalities) == 1:
            reason = "there is only one modality, and no answer without it; drop this key"
        else:
            reason = (
                "model.fusion = stack puts all modalities into one image, in which none may be missing; choose a "
                "fusion that joins the features of those that are there (linear, gated, ...), or drop this key"
            )
        for name, modality in modalities.items():
            if modality.optional:
                yield Problem(f"data.modalities.{name}.optional", f"= true: {reason}")
        if self.train.dropout_of(modalities):
            yield Problem("train.modality_dropout", f"= {show(dropout)}: {reason}")

    def _fusion_problems(self) -> Iterator[Problem]:
        """Modalities that the model section names, and whether they are there."""
        fusion, names = self.model.joins, tuple(self.data.modalities)
        named = [(f"model.modalities.{name}", name) for name in self.model.modalities]
        if isinstance(fusion, AttentionFusion) and fusion.query is not None:
            named.append(("model.fusion.query", fusion.query))
        if isinstance(fusion, DecisionFusion) and fusion.refine is not None:
            named.append(("model.fusion.refine.guide", fusion.refine.guide))
        moved = None if fusion is None else fusion.coregister
        if moved is not None:
            named += [("model.fusion.coregister.modalities", name) for name in moved.modalities or ()]
        for place, name in named:
            if name not in names:
                yield Problem(place, f"= '{name}' is not one of data.modalities; {nearest(name, names)}")
        if moved is not None and names[0] in (moved.modalities or ()):
            yield Problem(
                "model.fusion.coregister.modalities",
                f"names {names[0]}, which the others are moved onto; expected some of {', '.join(names[1:])}",
            )
        if moved is not None and moved.unit == "pixels" and 2 * moved.max_shift > self.data.tile:
            yield Problem(
                "model.fusion.coregister.max_shift",
                f"= {moved.max_shift:g} must be at most half of data.tile = {self.data.tile}: a window moved further "
                "shows little of what it showed",
            )
        if self.model.modalities and fusion is None:
            yield Problem(
                "model.modalities",
                "is not used: modalities that are stacked go through one encoder; set model.fusion, such as "
                "{name: linear}",
            )
        elif self.model.modalities and set(names) <= set(self.model.modalities):
            yield Problem(
                "model.modalities",
                "gives each modality an encoder of its own, so that model.encoder has none; leave one out",
            )

    def _stream_problems(self) -> Iterator[Problem]:
        """Adapters of several modalities where only one image goes through the encoder."""
        adapter, names = self.model.adapter.name, tuple(self.data.modalities)
        if adapter not in ("mm_lora", "mm_adapter"):
            return
        one = {"mm_lora": "lora", "mm_adapter": "adapter"}[adapter]
        inside = [name for name in names if name not in self.model.modalities]
        if len(names) == 1:
            why = "data.modalities has only one modality"
        elif self.model.joins is None:
            why = "fusion stack makes one image of all modalities"
        elif len(inside) == 1:
            why = f"only {inside[0]} goes through the encoder"
        else:
            return
        yield Problem("model.adapter", f"= '{adapter}' is not used: {why}; use {one}")

    def _radiometry_problems(self) -> Iterator[Problem]:
        for name, radiometry in self.train.augment.radiometry.items():
            place = f"train.augment.radiometry.{name}"
            if name not in self.data.modalities:
                yield Problem(place, f"is not one of data.modalities; {nearest(name, self.data.modalities)}")
                continue
            count = self.data.modalities[name].count
            for key, value in (("saturation", radiometry.saturation), ("hue", radiometry.hue)):
                if value and count not in (None, 3):
                    yield Problem(f"{place}.{key}", f"= {value} needs 3 bands, but {name} has {count}; drop it")
