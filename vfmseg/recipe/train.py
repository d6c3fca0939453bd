"""The `train` section: objective, losses, schedule, optimizer and augmentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from vfmseg.recipe.base import Flag, Number, Problem, Section, Whole
from vfmseg.recipe.data import ClassId

LossName = Literal["cross_entropy", "dice", "focal", "lovasz"]
LARGEST_BATCH = 4096  # windows or tiles in memory at once
LARGEST_RATE = 100.0  # of learning; AdamW moves each weight by about as much in a step
Share = Annotated[Number, Field(ge=0, le=1)]


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


class OptimizerSection(Section):
    """AdamW with a linear warm-up and a cosine to zero."""

    lr: Annotated[Number, Field(gt=0, le=LARGEST_RATE)] = 3e-4
    """Highest learning rate."""
    encoder_lr: Number | None = Field(default=None, gt=0, le=LARGEST_RATE, examples=[1e-5])
    """Highest learning rate of what learns inside the encoder; left out: lr."""
    weight_decay: Annotated[Number, Field(ge=0, le=LARGEST_RATE)] = 0.05
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of all steps in which the learning rate rises."""


class RadiometrySection(Section):
    """Largest random change of one modality; 0 switches a change off."""

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    """Only for three bands (red, green, blue)."""
    hue: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    """Only for three bands (red, green, blue); 0.5 is half the colour circle."""


class AugmentSection(Section):
    """Random changes of the training windows; geometry moves all modalities and the labels together."""

    flip: Flag = True
    rotate90: Flag = True
    scale: tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]] = (1.0, 1.0)
    """Smallest and largest factor of enlargement."""
    rotate: Annotated[Number, Field(ge=0, le=180)] = 0.0
    """Largest turn in degrees, either way."""
    radiometry: Annotated[dict[str, RadiometrySection], Field(examples=[{"rgb": {"brightness": 0.2}}])] = Field(
        default={}
    )
    """Modality: its changes of brightness and colour."""

    def _problems(self) -> Iterator[Problem]:
        if self.scale[0] > self.scale[1]:
            yield Problem("scale", f"= {list(self.scale)} must be [smallest, largest]; try {sorted(self.scale)}")


class RunSection(Section):
    """How a run learns, whatever it learns."""

    epochs: Annotated[Whole, Field(ge=1, le=10**6)] = 30
    batch_size: Annotated[Whole, Field(ge=1, le=LARGEST_BATCH)] = 8
    """Windows per step and process."""
    accumulate: Annotated[Whole, Field(ge=1, le=LARGEST_BATCH)] = 1
    """Batches per optimizer step."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision; fp16 needs a GPU."""
    clip: Annotated[Number, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    gradient_checkpointing: Flag = False
    """Less memory for more time in the encoder."""
    track: Literal["none", "tensorboard"] = "none"
    """Curves beside metrics.jsonl; tensorboard: in output_dir/tensorboard, needs pip install 'vfmseg[track]'."""
    optimizer: OptimizerSection = OptimizerSection()
    augment: AugmentSection = AugmentSection()


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
