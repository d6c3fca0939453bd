"""The one training loop, on Accelerate: steps through sources of samples and minimises what a `Step` computes.

It sees no recipe, no scene, no particular model, objective or score: these meet it as protocols. The caller builds,
freezes and attaches; the loop makes the optimizer over what `requires_grad`, prepares, and steps. A step may gather
several batches (accumulation) on several processes; its losses are sums divided by the counts of the whole step, so how
the step was cut does not change it. All randomness follows from (seed, epoch, sample), so a run that goes on from the
end of an epoch ends like one that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.data.windows import Draw, alike_together, epoch_draws, rank_batches
from vfmseg.errors import MachineError, RecipeError, VfmsegError
from vfmseg.training.schedule import Schedule, learning_rate, parameter_groups
from vfmseg.training.step import Step, shares, worths

Batches = dict[str, Batch]
"""One batch of each source."""


class Stream(Protocol):
    """A source of samples. What a draw gives depends on the draw alone, in whatever process it is read."""

    def __len__(self) -> int:
        """Samples of one lap."""
        ...

    def __getitem__(self, draw: Draw) -> Sample:
        """The sample of a draw, whose index is 0..len-1; a filler must count nowhere, so its labels are IGNORE."""
        ...

    def kind(self, draw: Draw) -> Hashable:
        """What the samples of one batch should have in common; known before the sample is read."""
        ...


@dataclass(frozen=True)
class Score:
    """What a validation found. best: what epochs are compared by, higher is better; None: nothing to compare by. An
    epoch that is not scored where others are has minus infinity.

    values: everything there is to note, ready for JSON; empty without a validation.
    """

    best: float | None
    values: dict[str, Any]


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
    """One optimizer step, for a progress display: global loss, images of this step, where in the run it is.

    losses {objective: its share of the loss, weighted}; empty where there is one objective.
    """

    epoch: int
    step: int
    steps_total: int
    loss: float
    lr: float
    images: int
    losses: Mapping[str, float] = field(default_factory=dict)


class Watcher(Protocol):
    """Told of everything on every process; it decides which of them writes or prints."""

    def step(self, report: StepReport) -> None:
        """An optimizer step is done."""
        ...

    def epoch(self, state: RunState, improved: bool) -> None:
        """An epoch and its validation are done. improved: no epoch before was as good, or nothing can tell."""
        ...


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
    """A run in progress: a step, the sources of its batches, and a validation after each epoch.

    An epoch is as long as the first source. The others give as many samples, going round as often as that takes, and
    a process that is left without samples of a source gets a filler, so that every objective runs in every step.
    """

    accelerator: Accelerator
    step: Step  # not prepared: the loop wraps it, the caller keeps the plain module
    sources: Mapping[str, Stream]
    schedule: Schedule
    validate: Callable[[Accelerator], Score]  # of the plain model, on every process
    state: RunState = field(default_factory=RunState)

    def __post_init__(self) -> None:
        unknown = self.step.sources() ^ set(self.sources)
        if unknown:
            raise RecipeError(
                f"train: sources {', '.join(sorted(self.sources))}, but the objectives take "
                f"{', '.join(sorted(self.step.sources()))}; each source needs an objective, and each objective a source"
            )
        optimizer = torch.optim.AdamW(parameter_groups(self.step.parts(), self.schedule), lr=self.schedule.lr)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.step, optimizer)
        self.samples_per_epoch = len(next(iter(self.sources.values())))
        samples_per_step = self.schedule.batch_size * self.accelerator.num_processes
        self.steps_per_epoch = math.ceil(
            math.ceil(self.samples_per_epoch / samples_per_step) / self.schedule.accumulate
        )
        self.steps_total = self.steps_per_epoch * self.schedule.epochs

    def run(self, tell: Watcher) -> RunState:
        """Train the epochs that are left; after each one validate, note whether it is the best, and tell."""
        for epoch in range(self.state.epoch, self.schedule.epochs):
            started = time.perf_counter()
            self._train_epoch(epoch, tell)
            self._require_numbers(epoch)
            seconds = time.perf_counter() - started
            score = self.validate(self.accelerator)
            # where there is nothing to choose by, the newest stays
            improved = score.best is None or score.best > self.state.best_score
            if improved:
                self.state.best_score = -math.inf if score.best is None else score.best
                self.state.best_epoch = epoch + 1
            self.state.epoch = epoch + 1
            self.state.seconds += time.perf_counter() - started
            record = {"kind": "epoch", "epoch": epoch + 1, "step": self.state.step, "seconds": round(seconds, 2)}
            self.state.records.append(record | ({"validation": score.values} if score.values else {}))
            tell.epoch(self.state, improved)
        return self.state

    def _train_epoch(self, epoch: int, tell: Watcher) -> None:
        self.wrapped.train()
        # dropout is the only randomness outside the data; seeded anew each epoch it survives a resume
        torch.manual_seed(dropout_seed(self.schedule.seed, epoch, self.accelerator.process_index))
        for group in self._steps(epoch):
            tell.step(self._step(epoch, group))

    def _step(self, epoch: int, group: list[Batches]) -> StepReport:
        """One optimizer step over a group of batches."""
        on_device = [
            {source: batch.to(self.accelerator.device) for source, batch in batches.items()} for batches in group
        ]
        rate = self._set_rates()
        value, losses = self._backward(on_device)
        if not math.isfinite(value):
            raise VfmsegError(
                f"training: the loss became {value} in epoch {epoch + 1}, step {self.state.step + 1}; expected a "
                "finite number; try a lower train.optimizer.lr, or precision bf16 or no instead of fp16"
            )
        if self.schedule.clip > 0:
            self.accelerator.clip_grad_norm_(self.step.parameters(), self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.step.after_step(self.state.step)
        record = {"kind": "step", "step": self.state.step, "loss": value, "lr": rate}
        self.state.records.append(record | ({"losses": losses} if losses else {}))
        images = sum(len(batch) for batches in group for batch in batches.values()) * self.accelerator.num_processes
        return StepReport(epoch + 1, self.state.step, self.steps_total, value, rate, images, losses)

    def _set_rates(self) -> float:
        """Set the rate of each group for this step; returns the highest."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(
                self.state.step, self.steps_total, parameters["base_lr"], self.schedule.warmup
            )
        return max(parameters["lr"] for parameters in self.optimizer.param_groups)

    def _backward(self, group: list[Batches]) -> tuple[float, dict[str, float]]:
        """Gradients of a group of batches, added up; returns its loss over all processes.

        With several objectives, {objective: its share of that} as well.
        """
        divisors = self._global_counts(group)
        names = list(self.step.objectives) if len(self.step.objectives) > 1 else []
        losses = torch.zeros(1 + len(names), device=self.accelerator.device)
        for i, batches in enumerate(group):
            last = i == len(group) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    terms = self.wrapped(batches)
                worth = worths(terms, divisors)
                part = torch.stack(list(worth.values())).sum()
                # DDP averages the gradients of its ranks; the sum was meant
                self.accelerator.backward(part * self.accelerator.num_processes)
            losses = losses + torch.stack([part.detach(), *shares(worth, names)])
        value, *each = global_sum(losses).tolist()  # in one exchange of the processes
        return value, dict(zip(names, each, strict=True))

    def _require_numbers(self, epoch: int) -> None:
        """An error where the last steps have made a weight infinite or NaN: the loss has not seen it yet."""
        lost = [name for name, tensor in self.step.kept().items() if not torch.isfinite(tensor).all()]
        if lost:
            raise VfmsegError(
                f"training: {len(lost)} tensors hold NaN or infinity after epoch {epoch + 1} ({', '.join(lost[:3])}); "
                "expected finite weights, so this epoch is not saved; try a lower train.optimizer.lr"
            )

    def _global_counts(self, group: list[Batches]) -> dict[str, Tensor]:
        """The divisors of this step: counts summed over its batches and over all processes."""
        sums: dict[str, Tensor] = {}
        for batches in group:
            for kind, count in self.step.counts(batches).items():
                sums[kind] = sums.get(kind, torch.zeros_like(count)) + count
        return {kind: global_sum(value) for kind, value in sums.items()}

    def _steps(self, epoch: int) -> Iterator[list[Batches]]:
        """The batches of this process in one epoch, as many at once as one optimizer step takes."""
        streams = [_plain_errors(self._loader(epoch, number)) for number in range(len(self.sources))]
        group: list[Batches] = []
        for batches in zip(*streams, strict=True):
            group.append(dict(zip(self.sources, batches, strict=True)))
            if len(group) == self.schedule.accumulate:
                yield group
                group = []
        if group:
            yield group

    def _loader(self, epoch: int, number: int) -> Iterable[Batch]:
        """The batches of the number-th source."""
        source = list(self.sources.values())[number]
        draws = epoch_draws(len(source), self.samples_per_epoch, self.schedule.seed, epoch, number)
        draws = alike_together(draws, self.schedule.batch_size, source.kind)
        return DataLoader(
            cast("Dataset[Sample]", source),
            batch_sampler=rank_batches(
                draws, self.schedule.batch_size, self.accelerator.process_index, self.accelerator.num_processes
            ),
            collate_fn=collate,
            num_workers=self.schedule.workers,
            multiprocessing_context="spawn" if self.schedule.workers else None,
        )


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
