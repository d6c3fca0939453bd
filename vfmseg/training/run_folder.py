"""The folder of a training run: what belongs to it, whose it is, and what a killed run has left there."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from vfmseg.disk.files import require_own
from vfmseg.disk.lock import LOCK, also_held, held
from vfmseg.errors import CheckpointError, RecipeError

STATE_FILE = "state.pt"
RUN_FILES = (STATE_FILE, "metrics.jsonl", "metrics.json", "recipe.yaml")
RUN_FOLDERS = ("best", "last")
CURVES_FOLDER = "tensorboard"


def check_place(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot be made, before anything is; RecipeError."""
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other: go on with a run, or replace it")
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = "may not be written to" if there.is_dir() else "is a file"
        raise RecipeError(f"output_dir = {output}: {there} {found}; expected a folder that can be created")


def alone(output: Path, name: str, several: bool) -> AbstractContextManager[None]:
    """No other run writes into the folder, or removes anything there, while the block runs; BusyError if one does.

    For the first process of a run; `several`: others follow, by `with_the_others`.
    """
    return held(output / LOCK, output, f"training {name}", shared=several)


def with_the_others(output: Path, name: str) -> AbstractContextManager[None]:
    """The same for its other processes: if the first one dies, they may go on for a while."""
    return also_held(output / LOCK, output, f"training {name}")


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run; nothing is created here."""
    for name in RUN_FOLDERS:
        require_own(output / name, "segmenter.json")
    found = sorted(set(output.iterdir()) - {output / LOCK, *leftovers(output)}) if output.exists() else []
    some = ", ".join(path.name for path in found[:4])
    if found and not holds_run(output):
        raise RecipeError(
            f"output_dir = {output} holds {some}, but no run to go on with by --resume or to replace by "
            "--overwrite; choose another output_dir"
        )
    if found and not (resume or overwrite):
        raise RecipeError(
            f"output_dir = {output} already holds {some}; "
            "go on with that run by --resume, replace it by --overwrite, or choose another output_dir"
        )
    if found and resume and not (output / STATE_FILE).is_file():
        raise RecipeError(
            f"output_dir = {output} holds {some}, but no {STATE_FILE}, without which a run cannot go on; replace it by "
            "--overwrite, or choose another output_dir"
        )


def holds_run(output: Path) -> bool:
    """Whether there is something to go on with or to replace."""
    return (output / STATE_FILE).is_file() or any((output / name / "segmenter.json").is_file() for name in RUN_FOLDERS)


def require_best(output: Path, found: int | None, best: int, last: int) -> None:
    """CheckpointError if `best/` is not of the best epoch. found: of which it is, None if it is not there or not whole.

    last: the epoch of which the state is, so that the segmenter of an earlier one cannot be made again from it.
    """
    if found != best:
        what = "is missing or not whole" if found is None else f"is the segmenter of epoch {found}"
        raise CheckpointError(
            f"{output / 'best'}: {what}; expected that of epoch {best}, the best of {last}, which nothing else holds: "
            f"copy it back there, or train again with --overwrite ({output / 'last'} is the segmenter of epoch {last})"
        )


def forget_beginning(output: Path) -> None:
    """Remove the state of a run that ends before anything was reached, so that it can be started again as it was."""
    if not set(output.iterdir()) - {output / STATE_FILE, output / LOCK, *leftovers(output)}:
        (output / STATE_FILE).unlink(missing_ok=True)


def leftovers(output: Path) -> list[Path]:
    """What a killed run was just writing beside its files."""
    names = (f".{name}.*.{kind}" for name in (*RUN_FILES, *RUN_FOLDERS) for kind in ("partial", "old"))
    return [path for name in names for path in output.glob(name)]


def remove_leftovers(output: Path) -> None:
    """Remove it; to be called by the run whose folder it is. A segmenter that was about to be replaced comes back."""
    for name in RUN_FOLDERS:
        for old in output.glob(f".{name}.*.old"):
            if not (output / name).exists() and (old / "segmenter.json").is_file():
                old.rename(output / name)
    for path in leftovers(output):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
