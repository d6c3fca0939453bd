"""Progress on a terminal: a bar where there is one to draw on, a line per epoch where output goes to a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from vfmseg.terminal import on_terminal, say


class Bar:
    """A bar on stderr from the first step on; nothing where that is no terminal, or none any more."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.shown = on_terminal()
        if not self.shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._rich = Progress(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True))
        self._task = self._rich.add_task(title, total=total, completed=done)
        with self._while_it_lasts():
            self._rich.start()

    def update(self, title: str, done: int) -> None:
        """The line before the bar, and how much is done."""
        if self.shown:
            with self._while_it_lasts():
                self._rich.update(self._task, completed=done, description=title)

    def stop(self) -> None:
        """Leave the last state on the screen."""
        if self.shown:
            with self._while_it_lasts():
                self._rich.stop()

    @contextlib.contextmanager
    def _while_it_lasts(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the terminal has gone, or stderr was closed
            self.shown = False


class TrainingProgress:
    """Shows loss, score, images a second and the time left of a training run."""

    def __init__(self, steps_total: int, epochs: int, steps_done: int = 0) -> None:
        self.steps_total = steps_total
        self.epochs = epochs
        self.first_step = steps_done
        self.started = time.perf_counter()
        self.images = 0
        self.loss = float("nan")
        self.score = ""
        self.bar = Bar("starting", steps_total, steps_done)

    def step(self, step: int, epoch: int, loss: float, images: int) -> None:
        """One optimizer step is done."""
        self.images += images
        # a mean over about twenty steps: single steps jump too much to be read
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        self.bar.update(self._line(step, epoch), step)

    def epoch(self, step: int, epoch: int, score: str) -> None:
        """One epoch and its validation are done. score: what that has found in words; empty without a validation."""
        if score:
            self.score = f", {score}"
        if not self.bar.shown:
            say(self._line(step, epoch))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()

    def _line(self, step: int, epoch: int) -> str:
        seconds = time.perf_counter() - self.started
        done = step - self.first_step
        left = seconds / max(1, done) * (self.steps_total - step)
        return (
            f"epoch {epoch}/{self.epochs}: loss {self.loss:.3f}{self.score}, "
            f"{self.images / max(seconds, 1e-9):.1f} images/s, {clock(left)} left"
        )


class SceneProgress:
    """Shows how many scenes of a split are done; silent where stderr is not a terminal.

    Used in a `with` statement, so that an error gives the terminal its cursor back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Bar | None = None  # before the first scene the number of all is not known

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
    """Shows Mpx/s, the share of time of each stage and the time left of a labelling; silent without a terminal."""

    def __init__(self, name: str, pixels: int, queue: int) -> None:
        """`pixels`: to be labelled; `queue`: batches that may wait for the model."""
        self.name = name
        self.pixels = pixels
        self.queue = queue
        self.done = 0
        self.ticks = 0
        self.queued = 0  # batches at all ticks together
        self.started = time.perf_counter()
        self.bar = Bar(name, pixels)

    def add(self, pixels: int, busy: Mapping[str, float], queued: int) -> None:
        """More pixels are done; `busy`: seconds by stage, `queued`: batches that wait for the model."""
        self.done += pixels
        self.ticks += 1
        self.queued += queued
        self.bar.update(self._line(busy, queued), self.done)

    @property
    def queue_fill(self) -> float | None:
        """How full the queue before the model was in the mean, 0 to 1; None before anything was done."""
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
    """Seconds by stage -> shares of all; stages run side by side."""
    total = sum(busy.values())
    return {name: busy[name] / total for name in ("read", "cut", "wait", "model", "blend", "write") if busy.get(name)}


def clock(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
