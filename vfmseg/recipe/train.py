"""The `train` section of a run with labels: objective, losses, and what is learned beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from vfmseg.recipe.base import Number, Problem
from vfmseg.recipe.data import ClassId
from vfmseg.recipe.joint import JointSection
from vfmseg.recipe.run import RunSection

LossName = Literal["cross_entropy", "dice", "focal", "lovasz"]


def _list_losses(schema: dict[str, Any]) -> None:
    """Editors complete `properties`, not `propertyNames`: list the losses as keys of their own."""
    weight = schema.pop("additionalProperties")
    schema.pop("propertyNames", None)
    schema["properties"] = {name: dict(weight) for name in get_args(LossName)}
    schema["additionalProperties"] = False


def _chance_or_chances(value: Any) -> Any:
    """A number, or {modality: number}; each at least 0 and below 1."""
    chances = list(value.values()) if isinstance(value, Mapping) else [value]
    if not chances or not all(_is_chance(chance) for chance in chances):
        raise ValueError("must be a number of at least 0 and below 1, or one for each modality, such as {sar: 0.3}")
    return {str(name): float(chance) for name, chance in value.items()} if isinstance(value, Mapping) else float(value)


def _is_chance(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


_CHANCE = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
# A plain union would report "no number" and "no mapping" as two errors; one check says it in one line.
Chances = Annotated[
    float | dict[str, float],
    BeforeValidator(_chance_or_chances),
    WithJsonSchema({"anyOf": [_CHANCE, {"type": "object", "additionalProperties": _CHANCE, "minProperties": 1}]}),
]


class TrainSection(RunSection):
    """What is minimised and how."""

    objective: Literal["segmentation"] = "segmentation"
    loss: Annotated[
        dict[LossName, Annotated[Number, Field(gt=0)]], Field(min_length=1, json_schema_extra=_list_losses)
    ] = Field(default={"cross_entropy": 1.0, "dice": 1.0})
    """Losses and their weights in the sum."""
    focal_gamma: Number | None = Field(default=None, ge=0, examples=[2.0])
    """Exponent of the focal loss (2 if left out); only with focal."""
    class_weights: dict[ClassId, Annotated[Number, Field(gt=0)]] | None = Field(default=None, examples=[{1: 2.0}])
    """Class id: weight of its pixels (1 if left out); only with cross_entropy or focal."""
    modality_dropout: Annotated[Chances, Field(examples=[0.3, {"sar": 0.3}])] = 0.0
    """How often a modality is hidden from a training window, never all at once; one number, or {modality: number}."""
    unlabelled: JointSection | None = Field(default=None, examples=[{"mae": {"weight": 0.2}}])
    """What is learned beside, from windows without labels; left out: nothing."""
    distill: Annotated[Number, Field(ge=0, examples=[0.5])] = 0.0
    """Weight of a loss that draws the answer without hidden modalities to that with all; with modality_dropout."""

    @model_validator(mode="before")
    @classmethod
    def _fill_gamma(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("focal_gamma") is not None:
            return value
        loss = value.get("loss")
        return {**value, "focal_gamma": 2.0} if isinstance(loss, Mapping) and "focal" in loss else value

    def dropout_of(self, modalities: Iterable[str]) -> dict[str, float]:
        """{modality: how often it is hidden} of those that ever are."""
        given = self.modality_dropout
        chances = given if isinstance(given, dict) else dict.fromkeys(modalities, given)
        return {name: chances[name] for name in modalities if chances.get(name, 0.0) > 0}

    def _problems(self) -> Iterator[Problem]:
        if self.focal_gamma is not None and "focal" not in self.loss:
            yield Problem("focal_gamma", f"= {self.focal_gamma} is used by no loss; drop it, or add focal")
        chances = self.modality_dropout.values() if isinstance(self.modality_dropout, dict) else [self.modality_dropout]
        if self.distill and not any(chances):
            yield Problem(
                "distill", f"= {self.distill:g} is not used: train.modality_dropout hides nothing; set it too"
            )
        if self.class_weights is not None and not {"cross_entropy", "focal"} & set(self.loss):
            yield Problem("class_weights", "is used by no loss; drop it, or add cross_entropy or focal")
