"""`vfmseg compare`: all recipes of a grid checked, trained with several seeds, measured, and put into one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmseg.compare.grid import Cell, cells_of, require_different
from vfmseg.disk.files import write_json
from vfmseg.disk.lock import LOCK, held
from vfmseg.errors import RecipeError
from vfmseg.launch import several
from vfmseg.terminal import quiet_libraries, say

if TYPE_CHECKING:
    from vfmseg.compare.runs import Run

TABLE = "compare.json"


def compare(
    path: Path,
    changes: Sequence[str],
    seeds: int = 3,
    test: bool = False,
    equal: bool = False,
    output: Path | None = None,
    singles: bool = False,
    missing: bool = False,
) -> dict[str, Any]:
    """Train each cell of the grid with each seed, measure it, and return the content of `compare.json`.

    `changes`: overrides of the recipe `path`; `key=a,b` is a list of alternatives. Runs are written to
    OUTPUT/CELL/seed-N, OUTPUT being the recipe's output_dir with `-compare` if left out. Finished runs are taken as
    they are, interrupted ones are gone on with. `test`: the test split is measured too, and read for that alone.
    `equal`: cells that train fewer parameters than the largest are made wider, see `equal.py`.
    `singles`: a cell for each modality alone is added. `missing`: as `test`, and once more without each modality.
    """
    if seeds < 1:
        raise RecipeError(f"--seeds {seeds}: expected 1 or more, better 3: a spread needs several")
    if several():
        raise RecipeError(
            "compare trains in one process; start it without a launcher, or train single recipes by accelerate launch "
            "vfmseg/finetune.py RECIPE"
        )
    cells = cells_of(path, changes, singles)
    if missing and not any(cell.recipe.model.joins for cell in cells):
        raise RecipeError(f"--missing: no cell of {path} answers without a modality; add one with a fusion of several")
    _require_measurable(path, cells, seeds, "--missing" if missing else "--test" if test else None)
    test = test or missing
    folder = _place(cells, output)
    quiet_libraries()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler complains where there is no GPU
    # torch-based rooms are imported here: a wrong grid or folder has been refused long before
    from vfmseg.compare.equal import Counting, equalised
    from vfmseg.compare.runs import require_same_data, runs_of

    with held(folder / LOCK, folder, "comparing recipes"):
        counting = Counting()
        if equal:
            cells = equalised(path, cells, counting)
            require_different(cells)
        runs = {cell.name: runs_of(cell, folder, seeds) for cell in cells}
        every = [run for some in runs.values() for run in some]
        for run in every:
            run.require_same()
        for cell in () if equal else cells:
            if any(run.result() is None for run in runs[cell.name]):
                counting.of_cell(cell)  # builds it, so that what does not fit is told before hours of training
        require_same_data(every, counting.traces)
        results = _train(runs)
        content = _content(path, cells, runs, results, test, missing, equal)
        write_json(folder / TABLE, content)
    say(f"table in {folder / TABLE}")
    return content


def _require_measurable(path: Path, cells: Sequence[Cell], seeds: int, asks: str | None) -> None:
    """RecipeError for a cell that cannot be compared: without validation, or test where the flag `asks` for it."""
    for cell in cells:
        data = cell.recipe.data
        if data.val is None:
            raise RecipeError(f"{path}: data.val is not in the recipe, and cells are compared by it; add it")
        if asks and data.test is None:
            raise RecipeError(f"{path}: data.test is not in the recipe; add it, or leave {asks} out")
        if cell.recipe.seed + seeds > 2**32:
            raise RecipeError(f"{path}: seed = {cell.recipe.seed} and {seeds - 1} more; expected seeds below 2**32")


def _place(cells: Sequence[Cell], output: Path | None) -> Path:
    """The folder of all runs; RecipeError if it cannot be one."""
    default = cells[0].recipe.output_dir
    folder = (default.with_name(f"{default.name}-compare") if output is None else output.expanduser()).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = "may not be written to" if there.is_dir() else "is a file"
        raise RecipeError(f"--output {folder}: {there} {found}; expected a folder that can be created")
    return folder


def _train(runs: dict[str, list[Run]]) -> dict[str, dict[int, dict[str, Any]]]:
    """{cell: {seed: content of metrics.json}}; what is not finished is trained, one run after the other."""
    total, number = sum(map(len, runs.values())), 0
    results: dict[str, dict[int, dict[str, Any]]] = {cell: {} for cell in runs}
    for cell, some in runs.items():
        for run in some:
            number += 1
            found = run.result()
            what = "is finished, and taken as it is" if found is not None else f"into {run.folder}"
            say(f"[{number}/{total}] {cell}, seed {run.recipe.seed} {what}")
            results[cell][run.recipe.seed] = run.train() if found is None else found
    return results


def _content(
    path: Path,
    cells: Sequence[Cell],
    runs: dict[str, list[Run]],
    results: dict[str, dict[int, dict[str, Any]]],
    test: bool,
    missing: bool,
    equal: bool,
) -> dict[str, Any]:
    """What compare.json holds; measures what was not measured yet."""
    import torch

    from vfmseg.compare.equal import is_equal
    from vfmseg.compare.measure import machine, measured
    from vfmseg.compare.table import summary, verdict

    first = {cell: next(iter(by_seed.values())) for cell, by_seed in results.items()}
    yardstick = max(first, key=lambda cell: int(first[cell]["trainable_parameters"]))
    most = first[yardstick]["trainable_parameters"]
    rows = []
    for cell in cells:
        mine = runs[cell.name]
        without = missing and cell.recipe.model.joins is not None
        found = [measured(run, cost=run is mine[0], test=test, missing=without) for run in mine]
        seeds = [run.recipe.seed for run in mine]
        trainable = first[cell.name]["trainable_parameters"]
        rows.append(
            {
                "name": cell.name,
                "changes": list(cell.changes),
                "folder": str(mine[0].folder.parent),
                "trainable_parameters": trainable,
                "total_parameters": first[cell.name]["total_parameters"],
                "equal": is_equal(trainable, most) if equal else None,
                "cost": found[0]["cost"],
                "validation": summary({seed: one["validation"] for seed, one in results[cell.name].items()}),
                "test": summary({seed: one["test"]["scores"] for seed, one in zip(seeds, found, strict=True)})
                if test
                else None,
                "missing": {
                    gone: summary({s: one["missing"]["scores"][gone] for s, one in zip(seeds, found, strict=True)})
                    for gone in cell.recipe.data.modalities
                }
                if without
                else None,
            }
        )
    return {
        "recipe": str(path),
        "cells": rows,
        "seeds": [run.recipe.seed for run in next(iter(runs.values()))],
        "test": test,
        "equal": yardstick if equal else None,
        "machine": machine(),
        "torch": torch.__version__,
        "verdict": verdict(
            {cell: {seed: one["validation"] for seed, one in by_seed.items()} for cell, by_seed in results.items()}
        ),
    }
