"""The one training loop, on Accelerate: takes a model, a data set and an objective, and sees no recipe and no file.

Order: the caller builds, freezes and attaches; the loop makes the optimizer over what `requires_grad`, prepares,
and steps. A step may gather several batches (accumulation) on several processes; its losses are sums divided by
the counts of the whole step, so how the step was cut does not change it. All randomness follows from
(seed, epoch, sample), so a run that goes on from the end of an epoch ends like one that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vfmseg.data.dataset import CoverWindows, TrainingWindows
from vfmseg.data.image import Known
from vfmseg.data.sample import Batch, collate
from vfmseg.data.windows import Draw, epoch_order, rank_batches
from vfmseg.errors import MachineError, RecipeError, VfmsegError
from vfmseg.metrics import Confusion, comparable
from vfmseg.model import Network
from vfmseg.training.objectives.segmentation import Segmentation, total


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the plain numbers of a run."""

    epochs: int
    batch_size: int  # samples of one process and one forward pass
    accumulate: int = 1
    clip: float = 1.0  # largest gradient norm; 0 leaves it alone
    lr: float = 3e-4
    encoder_lr: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of all steps
    seed: int = 0
    workers: int = 0


@dataclass
class RunState:
    """What a run knows beside its weights: where it is, and what it has seen so far."""

    epoch: int = 0  # epochs completed
    step: int = 0  # optimizer steps done
    best_score: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0  # of training and validation, in all sittings
    records: list[dict[str, Any]] = field(default_factory=list)  # one per step and one per epoch


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, for a progress display: global loss, images of this step, where in the run it is."""

    epoch: int
    step: int
    steps_total: int
    loss: float
    lr: float
    images: int


def learning_rate(step: int, steps_total: int, base: float, warmup: float) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up over `warmup * steps_total`, then half a cosine to 0.

    A closed form of the step number alone: equal on every rank and after a resume.
    """
    rising = math.ceil(warmup * steps_total)
    if step < rising:
        return base * (step + 1) / rising
    done = (step - rising) / max(1, steps_total - rising)
    return base * 0.5 * (1.0 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """AdamW groups over what is trainable: encoder and head apart, no decay on norms and biases (1-d tensors)."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise RecipeError("model: nothing in this model is trainable; choose another adapter or decoder")
    rates = {True: schedule.encoder_lr or schedule.lr, False: schedule.lr}
    return [
        {"params": tensors, "base_lr": rates[of_encoder], "weight_decay": schedule.weight_decay if decays else 0.0}
        for (of_encoder, decays), tensors in groups.items()
    ]


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """Seed of torch's generator for one epoch of one process: the same on every machine, another for each."""
    words = np.random.SeedSequence([abs(seed), int(seed < 0), epoch, rank]).generate_state(1, np.uint64)
    return int(words[0] % 2**63)


def global_sum(values: Tensor) -> Tensor:
    """Sum over all processes; the tensor itself where there is only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


@dataclass
class Loop:
    """A run in progress. `on_step` and `on_epoch` are told on every rank; they decide who writes or prints."""

    accelerator: Accelerator
    model: Network  # not prepared: the loop wraps it, the caller keeps the plain module
    objective: Segmentation
    data: TrainingWindows
    schedule: Schedule
    validate: Callable[[], dict[str, Any] | None]
    on_step: Callable[[StepReport], None]
    on_epoch: Callable[[RunState, bool], None]
    state: RunState = field(default_factory=RunState)

    def __post_init__(self) -> None:
        optimizer = torch.optim.AdamW(parameter_groups(self.model, self.schedule), lr=self.schedule.lr)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.batches_per_epoch = len(self._batches(0))
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / self.schedule.accumulate)
        self.steps_total = self.steps_per_epoch * self.schedule.epochs

    def run(self) -> RunState:
        """Train the epochs that are left; after each one validate, note whether it is the best, and report."""
        for epoch in range(self.state.epoch, self.schedule.epochs):
            started = time.perf_counter()
            self._train_epoch(epoch)
            self._require_numbers(epoch)
            seconds = time.perf_counter() - started
            scores = self.validate()
            score = comparable(scores) if scores else None
            # without a validation split, or with one of a single class, there is nothing to choose by: the newest stays
            improved = score is None or score > self.state.best_score
            if improved:
                self.state.best_score = -math.inf if score is None else score
                self.state.best_epoch = epoch + 1
            self.state.epoch = epoch + 1
            self.state.seconds += time.perf_counter() - started
            record = {"kind": "epoch", "epoch": epoch + 1, "step": self.state.step, "seconds": round(seconds, 2)}
            self.state.records.append(record | ({"validation": scores} if scores else {}))
            self.on_epoch(self.state, improved)
        return self.state

    def _train_epoch(self, epoch: int) -> None:
        self.wrapped.train()
        # dropout is the only randomness outside the data; seeded anew each epoch it survives a resume
        torch.manual_seed(dropout_seed(self.schedule.seed, epoch, self.accelerator.process_index))
        for group in self._steps(epoch):
            self._step(epoch, [batch.to(self.accelerator.device) for batch in group])

    def _step(self, epoch: int, group: list[Batch]) -> None:
        divisors = self._global_counts(group)
        rate = 0.0
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(
                self.state.step, self.steps_total, parameters["base_lr"], self.schedule.warmup
            )
            rate = max(rate, parameters["lr"])
        loss = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    terms = self.objective.terms(self.wrapped, batch)
                part = total(terms, divisors)
                # DDP averages the gradients of its ranks; the sum was meant
                self.accelerator.backward(part * self.accelerator.num_processes)
            loss = loss + part.detach()
        value = float(global_sum(loss))
        if not math.isfinite(value):
            raise VfmsegError(
                f"training: the loss became {value} in epoch {epoch + 1}, step {self.state.step + 1}; expected a "
                "finite number; try a lower train.optimizer.lr, or precision bf16 or no instead of fp16"
            )
        if self.schedule.clip > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.records.append({"kind": "step", "step": self.state.step, "loss": value, "lr": rate})
        images = sum(len(batch) for batch in group) * self.accelerator.num_processes
        self.on_step(StepReport(epoch + 1, self.state.step, self.steps_total, value, rate, images))

    def _require_numbers(self, epoch: int) -> None:
        """An error where the last steps have made a weight infinite or NaN: the loss has not seen it yet."""
        lost = [name for name, tensor in self.model.trainable().items() if not torch.isfinite(tensor).all()]
        if lost:
            raise VfmsegError(
                f"training: {len(lost)} tensors hold NaN or infinity after epoch {epoch + 1} ({', '.join(lost[:3])}); "
                "expected finite weights, so this epoch is not saved; try a lower train.optimizer.lr"
            )

    def _global_counts(self, group: list[Batch]) -> dict[str, Tensor]:
        """The divisors of this step: counts summed over its batches and over all processes."""
        sums: dict[str, Tensor] = {}
        for batch in group:
            for kind, count in self.objective.counts(batch).items():
                sums[kind] = sums.get(kind, torch.zeros_like(count)) + count
        return {kind: global_sum(value) for kind, value in sums.items()}

    def _batches(self, epoch: int) -> list[list[Draw]]:
        order = epoch_order(len(self.data), self.schedule.seed, epoch)
        return rank_batches(
            order,
            self.schedule.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            epoch=epoch,
        )

    def _steps(self, epoch: int) -> Iterator[list[Batch]]:
        loader = DataLoader(
            self.data,
            batch_sampler=self._batches(epoch),
            collate_fn=collate,
            num_workers=self.schedule.workers,
            multiprocessing_context="spawn" if self.schedule.workers else None,
        )
        group: list[Batch] = []
        for batch in _plain_errors(loader):
            group.append(batch)
            if len(group) == self.schedule.accumulate:
                yield group
                group = []
        if group:
            yield group


def _plain_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; an error that a worker process has met is raised as it was there, without its traceback as text."""
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            f"training: a process that reads data has ended ({' '.join(str(error).split())}); a script that calls "
            "finetune() must do so below `if __name__ == '__main__':`, as every worker runs it; if it does, memory may "
            "be short: data.workers=0 reads without workers"
        ) from error
    except VfmsegError as error:
        text = str(error).rstrip()
        if not text.startswith("Caught "):
            raise
        # the last paragraph of torch's report: class, colon, message
        message = text[text.rindex(f"{type(error).__name__}: ") :].partition(": ")[2]
        raise type(error)(message) from None


@torch.no_grad()
def score_windows(
    accelerator: Accelerator, model: nn.Module, data: CoverWindows, classes: int, batch_size: int, rule: Known
) -> Confusion:
    """One confusion matrix over all windows, each on exactly one process, the same on every process afterwards.

    The plain module is run, not the wrapped one: nothing has to be synchronised, so uneven shares cannot hang.
    """
    was_training = model.training
    model.eval()
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    confusion = Confusion(classes)
    for first in range(0, len(mine), batch_size):
        batch = collate([data[i] for i in mine[first : first + batch_size]]).to(accelerator.device)
        with accelerator.autocast():
            logits = model(batch.images)
        confusion.update(logits.argmax(dim=1), batch.targets(rule))
    confusion.matrix = global_sum(confusion.matrix.to(accelerator.device)).cpu()
    model.train(was_training)
    return confusion
