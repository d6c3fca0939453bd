"""How long and how fast a run learns: its plain numbers, the learning rate of each step, the rate of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vfmseg.errors import RecipeError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the plain numbers of a run."""

    epochs: int
    batch_size: int  # samples of one process, one source and one forward pass
    accumulate: int = 1
    clip: float = 1.0  # largest gradient norm; 0 leaves it alone
    lr: float = 3e-4
    rates: Mapping[str, float] = field(default_factory=dict)  # {part of the model: another lr than that}
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of all steps
    seed: int = 0
    workers: int = 0


def learning_rate(step: int, steps_total: int, base: float, warmup: float) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up over `warmup * steps_total`, then half a cosine to 0.

    It depends on the step number alone, so it is equal on every process and after a resume. With base 1, 100 steps and
    a warm-up of 0.1 the rates of the steps 0, 9, 10, 55 and 99 are 0.1, 1, 1, 0.5 and 0.0003.
    """
    rising = math.ceil(warmup * steps_total)
    if step < rising:
        return base * (step + 1) / rising
    done = (step - rising) / max(1, steps_total - rising)
    return base * 0.5 * (1.0 + math.cos(math.pi * done))


def parameter_groups(parts: Mapping[str, Mapping[str, Tensor]], schedule: Schedule) -> list[dict[str, Any]]:
    """AdamW groups over {part: {name: tensor that learns}}: each part at its rate, no decay on norms and biases.

    Norms and biases are the tensors of one dimension.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for part, tensors in parts.items():
        for tensor in tensors.values():
            groups.setdefault((schedule.rates.get(part, schedule.lr), tensor.ndim > 1), []).append(tensor)
    if not groups:
        raise RecipeError("model: nothing in this model is trainable; choose another adapter or decoder")
    return [
        {"params": tensors, "base_lr": rate, "weight_decay": schedule.weight_decay if decays else 0.0}
        for (rate, decays), tensors in groups.items()
    ]
