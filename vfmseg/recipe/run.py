"""How a run learns, whatever it learns: schedule, optimizer and augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from vfmseg.recipe.base import Flag, Number, Problem, Section, Whole

LARGEST_BATCH = 4096  # windows or tiles in memory at once
LARGEST_RATE = 100.0  # of learning; AdamW moves each weight by about as much in a step
Share = Annotated[Number, Field(ge=0, le=1)]


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
