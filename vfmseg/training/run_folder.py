"""The folder of a run that trains: what belongs to it, whose it is, and what a killed run has left there.

best/ last/      what the run makes, of the best and of the newest epoch, each a folder that holds `mark`
state.pt         from which an interrupted run goes on
metrics.jsonl    a line per step and epoch
metrics.json     what was reached in the end
recipe.yaml      the recipe, complete
tensorboard/     curves, if the recipe asks for them
pictures/        what masked pretraining rebuilds, after each scored epoch, if the recipe asks for it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmseg.disk.files import require_own, whole_file, write_json
from vfmseg.disk.lock import LOCK, also_held, held
from vfmseg.errors import CheckpointError, RecipeError

STATE, LOG, RESULT, RECIPE = "state.pt", "metrics.jsonl", "metrics.json", "recipe.yaml"
BEST, LAST = "best", "last"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, whatever it trains.

    product: what `best` and `last` are called in messages; mark: the file by which such a folder is known as ours, so
    that no other is replaced; doing: what the run does, for whoever finds the folder locked.
    """

    path: Path
    product: str
    mark: str
    doing: str

    @property
    def state(self) -> Path:
        """The file from which a run goes on."""
        return self.path / STATE

    @property
    def curves(self) -> Path:
        """The folder of the curves."""
        return self.path / "tensorboard"

    @property
    def pictures(self) -> Path:
        """The folder of the pictures."""
        return self.path / "pictures"

    def require_place(self, resume: bool, overwrite: bool) -> None:
        """RecipeError for a folder that cannot be made, before anything is."""
        if resume and overwrite:
            raise RecipeError("--resume and --overwrite exclude each other: go on with a run, or replace it")
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            found = "may not be written to" if there.is_dir() else "is a file"
            raise RecipeError(f"output_dir = {self.path}: {there} {found}; expected a folder that can be created")

    def alone(self, several: bool) -> AbstractContextManager[None]:
        """No other run writes into the folder, or removes anything there, while the block runs; BusyError if one does.

        For the first process of a run; `several`: others follow, by `with_the_others`.
        """
        return held(self.path / LOCK, self.path, self.doing, shared=several)

    def with_the_others(self) -> AbstractContextManager[None]:
        """The same for its other processes: if the first one dies, they may go on for a while."""
        return also_held(self.path / LOCK, self.path, self.doing)

    def require_own(self, resume: bool, overwrite: bool) -> None:
        """RecipeError or CheckpointError for a folder that holds another run or something else; creates nothing."""
        for name in (BEST, LAST):
            require_own(self.path / name, self.mark)
        found = sorted(set(self.path.iterdir()) - {self.path / LOCK, *self._leftovers()}) if self.path.exists() else []
        some = ", ".join(path.name for path in found[:4])
        if found and not self.holds_run():
            raise RecipeError(
                f"output_dir = {self.path} holds {some}, but no run to go on with by --resume or to replace by "
                "--overwrite; choose another output_dir"
            )
        if found and not (resume or overwrite):
            raise RecipeError(
                f"output_dir = {self.path} already holds {some}; "
                "go on with that run by --resume, replace it by --overwrite, or choose another output_dir"
            )
        if found and resume and not self.state.is_file():
            raise RecipeError(
                f"output_dir = {self.path} holds {some}, but no {STATE}, without which a run cannot go on; replace it "
                "by --overwrite, or choose another output_dir"
            )

    def holds_run(self) -> bool:
        """Whether there is something to go on with or to replace."""
        return self.state.is_file() or any((self.path / name / self.mark).is_file() for name in (BEST, LAST))

    def has_texts(self) -> bool:
        """Whether the log and the recipe are there."""
        return all((self.path / name).is_file() for name in (LOG, RECIPE))

    def write_texts(self, records: Iterable[Mapping[str, Any]], recipe: str) -> None:
        """Write the log and the recipe."""
        with whole_file(self.path / LOG) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        with whole_file(self.path / RECIPE) as aside:
            aside.write_text(recipe, encoding="utf-8")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write what was reached in the end."""
        write_json(self.path / RESULT, result)

    def forget_result(self) -> None:
        """Remove what an earlier run had reached."""
        (self.path / RESULT).unlink(missing_ok=True)

    def forget_pictures(self) -> None:
        """Remove what an earlier run has drawn, and nothing else."""
        for path in self.pictures.glob("epoch-*.png"):
            path.unlink()

    def require_best(self, found: int | None, best: int, last: int) -> None:
        """CheckpointError if `best/` is not of the best epoch. found: of which it is, None if not there or not whole.

        last: the epoch of which the state is, so that what an earlier one has made cannot be made again from it.
        """
        if found != best:
            what = "is missing or not whole" if found is None else f"is the {self.product} of epoch {found}"
            raise CheckpointError(
                f"{self.path / BEST}: {what}; expected that of epoch {best}, the best of {last}, which nothing else "
                f"holds: copy it back there, or train again with --overwrite ({self.path / LAST} is the {self.product} "
                f"of epoch {last})"
            )

    def forget_beginning(self) -> None:
        """Remove the state of a run that ends before anything is reached, so that it can be started as it was."""
        if not set(self.path.iterdir()) - {self.state, self.path / LOCK, *self._leftovers()}:
            self.state.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what a killed run was just writing; what was about to be replaced comes back. For its own run only."""
        for name in (BEST, LAST):
            for old in self.path.glob(f".{name}.*.old"):
                if not (self.path / name).exists() and (old / self.mark).is_file():
                    old.rename(self.path / name)
        for path in self._leftovers():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _leftovers(self) -> list[Path]:
        """What a killed run was just writing beside its files."""
        names = (STATE, LOG, RESULT, RECIPE, BEST, LAST)
        found = [path for name in names for kind in ("partial", "old") for path in self.path.glob(f".{name}.*.{kind}")]
        return [*found, *self.pictures.glob(".epoch-*.png.*.partial")]


def encoder_run(path: Path, name: str = "") -> RunFolder:
    """The folder of a run that trains an encoder. name: what the recipe calls it."""
    return RunFolder(path, product="encoder", mark="encoder.json", doing=f"pretraining {name}")


def segmenter_run(path: Path, name: str = "") -> RunFolder:
    """The folder of a run that trains a segmenter. name: what the recipe calls it."""
    return RunFolder(path, product="segmenter", mark="segmenter.json", doing=f"training {name}")
