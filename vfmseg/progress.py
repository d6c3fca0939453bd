"""Progress of training and labelling: a bar where stderr is a terminal; else a line per epoch of training, no more.

A log file gets no bar, as thousands of redrawn lines would hide the few that matter.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

from vfmseg.terminal import on_terminal, say


class Bar:
    """A bar on stderr of `done` out of `total`, with a line of text before it; nothing where stderr is no terminal.

    It is there from the first step on, as the first one may take minutes. A terminal that is closed meanwhile ends the
    bar, not the work.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.shown = on_terminal()
        if not self.shown:
            return
        # imported here, as a run without a terminal does without it
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._rich = Progress(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True))
        self._task = self._rich.add_task(title, total=total, completed=done)
        with self._while_it_lasts():
            self._rich.start()

    def update(self, title: str, done: int) -> None:
        """Set the text before the bar, and how much of the total is done."""
        if self.shown:
            with self._while_it_lasts():
                self._rich.update(self._task, completed=done, description=title)

    def stop(self) -> None:
        """End the bar; its last state stays on the screen."""
        if self.shown:
            with self._while_it_lasts():
                self._rich.stop()

    @contextlib.contextmanager
    def _while_it_lasts(self) -> Iterator[None]:
        """Drawing in this block that fails ends the bar."""
        try:
            yield
        except (OSError, ValueError):  # the terminal has gone, or stderr was closed
            self.shown = False


class TrainingProgress:
    """Shows how far a training run is: "epoch 3/20: loss 0.412, val mIoU 0.613, 18.2 images/s, 12:40 left".

    `steps_total`: optimizer steps of the whole run; `steps_done`: those of before, where it is resumed.
    """

    def __init__(self, steps_total: int, epochs: int, steps_done: int = 0) -> None:
        self.steps_total = steps_total
        self.epochs = epochs
        self.first_step = steps_done
        self.started = time.perf_counter()
        self.images = 0
        self.losses: dict[str, float] = {}  # {objective: its share}, the whole loss under ""
        self.score = ""
        self.bar = Bar("starting", steps_total, steps_done)

    def step(self, step: int, epoch: int, loss: float, images: int, losses: Mapping[str, float] = {}) -> None:
        """Optimizer step number `step` is done; `images`: that it has seen, over all processes.

        losses {objective: its share of the loss}, where there are several.
        """
        self.images += images
        for name, value in {"": loss, **losses}.items():
            # 0.95 old + 0.05 new, a mean over about 1 / 0.05 = 20 steps: single steps jump too much to be read
            self.losses[name] = 0.95 * self.losses[name] + 0.05 * value if name in self.losses else value
        self.bar.update(self._line(step, epoch), step)

    def epoch(self, step: int, epoch: int, score: str) -> None:
        """An epoch and its validation are done. score: what that has found, in words; empty if there was none."""
        if score:
            self.score = f", {score}"
        if not self.bar.shown:
            say(self._line(step, epoch))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()

    def _line(self, step: int, epoch: int) -> str:
        seconds = time.perf_counter() - self.started
        done = step - self.first_step  # of this start; the time of earlier ones is not known
        left = seconds / max(1, done) * (self.steps_total - step)
        shares = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items() if name)
        return (
            f"epoch {epoch}/{self.epochs}: loss {self.losses.get('', math.nan):.3f}"
            f"{f' ({shares})' if shares else ''}{self.score}, "
            f"{self.images / max(seconds, 1e-9):.1f} images/s, {clock(left)} left"
        )


class SceneProgress:
    """Shows how many scenes of a split are done; nothing where stderr is no terminal.

    Used in a `with` statement, so that an error gives the terminal its cursor back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Bar | None = None  # made with the first scene, when the number of all is known

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` scenes are done."""
        self.bar = self.bar or Bar(self.name, total)
        self.bar.update(f"{self.name} {done}/{total}", done)

    def __enter__(self) -> SceneProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()


class LabelProgress:
    """Shows how far a labelling is: "a.tif: 9.31 Mpx/s, read 20% cut 5% model 60% blend 15%, queue 2/2, 3:20 left".

    A full queue before the model says that the model is the bottleneck, an empty one that reading is. Nothing is shown
    where stderr is no terminal, but all is counted for the summary.
    """

    def __init__(self, name: str, pixels: int, queue: int) -> None:
        """`pixels`: that this process labels; `queue`: batches that may wait for the model."""
        self.name = name
        self.pixels = pixels
        self.queue = queue
        self.done = 0
        self.ticks = 0
        self.queued = 0  # sum over all ticks of the batches that waited
        self.started = time.perf_counter()
        self.bar = Bar(name, pixels)

    def add(self, pixels: int, busy: Mapping[str, float], queued: int) -> None:
        """So many more pixels are done. busy {stage: seconds so far}; `queued`: batches that wait for the model now."""
        self.done += pixels
        self.ticks += 1
        self.queued += queued
        self.bar.update(self._line(busy, queued), self.done)

    @property
    def queue_fill(self) -> float | None:
        """How full the queue before the model was in the mean of all ticks, 0 to 1; None before the first."""
        return self.queued / self.ticks / self.queue if self.ticks else None

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()

    def _line(self, busy: Mapping[str, float], queued: int) -> str:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        left = seconds / max(1, self.done) * (self.pixels - self.done)
        shares = " ".join(f"{name} {share:.0%}" for name, share in stage_shares(busy).items())
        speed = self.done / seconds / 1e6
        return f"{self.name}: {speed:.2f} Mpx/s, {shares}, queue {queued}/{self.queue}, {clock(left)} left"


def stage_shares(busy: Mapping[str, float]) -> dict[str, float]:
    """{stage: seconds} -> {stage: share of all seconds}, 0 to 1, in the order in which pixels go through them.

    Stages run side by side, so the seconds of all may be more than have passed.
    """
    total = sum(busy.values())
    return {name: busy[name] / total for name in ("read", "cut", "wait", "model", "blend", "write") if busy.get(name)}


def clock(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
