"""Keeps what a run has reached: after each epoch in its folder, and on the screen while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmseg.progress import TrainingProgress
from vfmseg.terminal import is_main_process, say
from vfmseg.training.curves import Curves, remove_curves
from vfmseg.training.loop import Loop, RunState, StepReport
from vfmseg.training.resume import Origin, load_run, save_run
from vfmseg.training.run_folder import BEST, LAST, RunFolder
from vfmseg.training.sitting import Sitting


@dataclass(frozen=True)
class Product:
    """What a run makes, for a loop that does not know it.

    save(folder, metrics): write it with the epoch it is of and its validation; epoch_of(folder): that epoch, None if
    the folder is not there or not whole; in_words(values): what a validation has found, for people.
    """

    save: Callable[[Path, Mapping[str, Any]], None]
    epoch_of: Callable[[Path], int | None]
    in_words: Callable[[Mapping[str, Any]], str]


def reached(state: RunState) -> dict[str, Any]:
    """What a run has reached: its best epoch and the validation of it, its steps and minutes."""
    epochs = {one["epoch"]: one.get("validation") for one in state.records if one["kind"] == "epoch"}
    return {
        "best_epoch": state.best_epoch,
        "validation": epochs.get(state.best_epoch),
        "steps": state.step,
        "minutes": round(state.seconds / 60, 2),
    }


@dataclass
class Keeper:
    """The watcher of a run. Every process has one; the first writes, and all wait until it has.

    pictures(epoch): called on the first process when an epoch is kept, to draw what there is to see.
    """

    loop: Loop
    folder: RunFolder
    product: Product
    origin: Origin
    recipe: str  # as text
    curves: Curves | None
    pictures: Callable[[int], None] | None = None

    def carry_out(self, sitting: Sitting, about: Mapping[str, Any]) -> dict[str, Any]:
        """Go on from what there is, if the sitting says so, train to the end, and return what `metrics.json` holds.

        about: what it says beside how far training came.
        """
        known = sitting.known
        if known:
            load_run(self.folder.state, self.loop, self.origin, sitting.accept_changed_data)
        if self.loop.state.epoch:
            say(f"resuming after epoch {self.loop.state.epoch} of {self.loop.schedule.epochs}")
        elif sitting.resume:
            say(f"{self.folder.path}: no epoch was finished there, so the run starts with the first one")
        if is_main_process():
            self.begin(known)
        result = {**about, **reached(self.run(known))}
        if is_main_process():
            self.finish(result)
            found = result["validation"]
            scores = f" ({self.product.in_words(found)})" if found else ""
            say(f"done: best epoch {result['best_epoch']}{scores}, {self.folder.product} in {self.folder.path / BEST}")
        return result

    def begin(self, known: bool) -> None:
        """Before the first step: clear away what a killed run has left, and make again what is missing.

        known: the loop goes on with a run of this folder. On the first process only.
        """
        state = self.loop.state
        self.folder.remove_leftovers()
        if state.epoch and not (self.folder.has_texts() and self._epoch_of(LAST) == state.epoch):
            self._keep(state)
        there = self._epoch_of(BEST)
        if state.epoch and state.epoch == state.best_epoch != there:
            self._save(BEST, state)
        elif state.epoch and there is None:
            self.folder.require_best(there, state.best_epoch, state.epoch)
        if not known:
            # first of all, so that --resume goes on with this run wherever it is stopped; what an earlier one has
            # reached stays until the first epoch ends
            save_run(self.folder.state, self.loop, self.origin)

    def run(self, known: bool) -> RunState:
        """Train to the end. A run that fails before anything is reached leaves nothing that has to be overwritten."""
        self.progress = TrainingProgress(self.loop.steps_total, self.loop.schedule.epochs, self.loop.state.step)
        try:
            return self.loop.run(self)
        except BaseException:
            if is_main_process() and not known:
                self.folder.forget_beginning()
            raise
        finally:
            self.progress.close()
            if self.curves:
                self.curves.close()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write what was reached; CheckpointError if `best/` has gone meanwhile. On the first process only."""
        state = self.loop.state
        self.folder.require_best(self._epoch_of(BEST), state.best_epoch, state.epoch)
        self.folder.write_result(result)

    def step(self, report: StepReport) -> None:
        """Show an optimizer step."""
        self.progress.step(report.step, report.epoch, report.loss, report.images, report.losses)
        if self.curves and self.curves.started:
            self.curves.update(self.loop.state.records)

    def epoch(self, state: RunState, improved: bool) -> None:
        """Show an epoch and keep it."""
        values = state.records[-1].get("validation")
        self.progress.epoch(state.step, state.epoch, self.product.in_words(values) if values else "")
        if is_main_process():
            if state.epoch == 1:  # of an earlier run, whose product is replaced now
                self.folder.forget_result()
                remove_curves(self.folder.curves)
                self.folder.forget_pictures()
            self._keep(state)
            save_run(self.folder.state, self.loop, self.origin)
            if improved:  # after the state, from which it can be made again if the run is stopped in between
                self._save(BEST, state)
            if self.curves:  # not before there is a run to go on with: until then the folder may hold another one's
                self.curves.update(state.records)
            if self.pictures:
                self.pictures(state.epoch)
        self.loop.accelerator.wait_for_everyone()

    def _keep(self, state: RunState) -> None:
        self._save(LAST, state)
        self.folder.write_texts(state.records, self.recipe)

    def _save(self, name: str, state: RunState) -> None:
        metrics = {"epoch": state.epoch, "validation": state.records[-1].get("validation")}
        self.product.save(self.folder.path / name, metrics)

    def _epoch_of(self, name: str) -> int | None:
        return self.product.epoch_of(self.folder.path / name)
