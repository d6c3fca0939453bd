"""The runs of a comparison: one recipe with one seed in one folder, finished, to go on with, or to start."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vfmseg.build.training import what_decides
from vfmseg.compare.grid import Cell
from vfmseg.data.traces import of_split
from vfmseg.disk.jsonfile import read_json
from vfmseg.errors import CheckpointError
from vfmseg.finetune import finetune
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.training.resume import changed_data, data_of
from vfmseg.training.run_folder import BEST, RECIPE, RESULT, segmenter_run


@dataclass(frozen=True)
class Run:
    """One training of a cell."""

    cell: str
    recipe: Recipe  # with its own seed and folder

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.recipe.output_dir

    @property
    def best(self) -> Path:
        """The segmenter that validation chose."""
        return self.folder / BEST

    def result(self) -> dict[str, Any] | None:
        """The content of its metrics.json; None if it is not finished."""
        path = self.folder / RESULT
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = read_json(path)
            if {"validation", "trainable_parameters", "total_parameters"} <= set(found):
                return found
            reason = "it is not the result of a run"
        except (ValueError, TypeError) as error:
            reason = str(error)
        raise CheckpointError(f"{path}: not readable as a result ({reason}); remove {self.folder} to train it again")

    def require_same(self) -> None:
        """CheckpointError if the folder holds a run of another recipe, as far as that decides its weights."""
        path = self.folder / RECIPE
        if not path.is_file():
            return  # nothing there, or a run in its first epoch, of which `finetune` asks the same
        then, now = what_decides(load_recipe(path)).splitlines(), what_decides(self.recipe).splitlines()
        lines = [f"now '{line.strip()}'" for line in now if line not in then]
        lines += [f"then '{line.strip()}'" for line in then if line not in now]
        if lines:
            raise CheckpointError(
                f"{self.folder}: holds a run of another recipe ({'; '.join(lines[:3])}); choose another --output, or "
                "move it away"
            )

    def train(self) -> dict[str, Any]:
        """Start it, or go on with it; the content of its metrics.json."""
        state = segmenter_run(self.folder).state
        try:
            return finetune(self.recipe, resume=state.is_file())
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def data_key(recipe: Recipe) -> str:
    """The data section of a recipe as text, without what decides of no pixel: runs of one key learn from one data."""
    return recipe.data.model_copy(update={"workers": 0}).model_dump_json()


def _beside(recipe: Recipe) -> str:
    """The scenes without labels that a recipe names, as text."""
    section = recipe.train.unlabelled
    return "" if section is None else section.model_dump_json(include={"scenes"})


def require_same_data(runs: Iterable[Run], now: Mapping[str, Mapping[str, str]]) -> None:
    """CheckpointError if two runs that there are learned from other images or labels, though of the same names.

    now {`data_key`: digests of the data as they are}, where runs are still to be trained.
    """
    known = {key: ("the data of now", found) for key, found in now.items()}
    for run in runs:
        state = segmenter_run(run.folder).state
        if not state.is_file():
            continue
        every, key = data_of(state), data_key(run.recipe)
        beside = of_split(every, "unlabelled")  # which the data of now do not tell, nor runs without them
        parts = {key: {what: digest for what, digest in every.items() if what not in beside}}
        if beside:
            parts[f"{key} {_beside(run.recipe)}"] = beside
        for part, found in parts.items():
            where, other = known.setdefault(part, (str(run.folder), found))
            changed = changed_data(found, other)
            if not changed:
                continue
            raise CheckpointError(
                f"{run.folder}: has learned from other data than {where} ({changed}), so their scores cannot be "
                "compared; choose another --output, or move that folder away"
            )


def runs_of(cell: Cell, folder: Path, seeds: int) -> list[Run]:
    """The runs of a cell, with the recipe's seed and the ones after it."""
    first = cell.recipe.seed
    return [
        Run(
            cell.name,
            cell.recipe.model_copy(update={"seed": seed, "output_dir": folder / cell.name / f"seed-{seed}"}),
        )
        for seed in range(first, first + seeds)
    ]
