"""Recipes to compare: `key=a,b` on the command line is a list of alternatives, and several of them make a grid."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vfmseg.errors import RecipeError, show
from vfmseg.recipe import Recipe, dump_recipe, load_recipe
from vfmseg.recipe.overrides import dotted, parse_override

LONGEST_NAME = 80
# a quoted text, which as in YAML begins where a value does, or a character that opens, closes or parts
_MARKS = re.compile(
    r"""(?:^|(?<=[,\[{:]))\s*(?:"(?:\\.|[^"\\])*"|'(?:''|[^'])*')|[][{},]""",
    re.DOTALL,
)
SET_HERE = {"seed": "--seeds says how many seeds there are", "output_dir": "--output names the folder of all runs"}
"""Keys that differ from run to run anyway."""


@dataclass(frozen=True)
class Cell:
    """One recipe of the grid.

    name: of its folder; changes: the overrides that make it, as on the command line; keys: those that are compared.
    """

    name: str
    changes: tuple[str, ...]
    keys: tuple[str, ...]
    recipe: Recipe


def alternatives(value: str) -> list[str]:
    """The texts between the commas of a value; commas inside brackets, braces and quotes do not count."""
    pieces, start, depth = [], 0, 0
    for mark in _MARKS.finditer(value):
        if mark[0] in "[{":
            depth += 1
        elif mark[0] in "]}":
            depth = max(0, depth - 1)
        elif mark[0] == "," and not depth:
            pieces.append(value[start : mark.start()].strip())
            start = mark.end()
    return [*pieces, value[start:].strip()]


def cells_of(path: Path, changes: Sequence[str], singles: bool = False) -> list[Cell]:
    """All recipes of the grid, checked: the product of the alternatives, the last key changing fastest.

    `singles`: before them one cell for each modality alone, `only-NAME`, with the changes that hold in all cells.

    RecipeError, which names the cell, if one of them describes no run; nothing but the recipe file is opened.
    """
    listed = [_listed(change, str(path)) for change in changes]
    keys = [options[0].partition("=")[0].strip() for options in listed if len(options) > 1]
    if not keys and not singles:
        raise RecipeError(
            f"{path}: there is nothing to compare: no key has alternatives; write some with commas between them, such "
            "as model.decoder.name=linear,fpn"
        )
    for key in keys:
        if key in SET_HERE:
            raise RecipeError(f"{key}=... is not a key to compare: {SET_HERE[key]}")
        if keys.count(key) > 1:
            raise RecipeError(f"{key}=... is given twice; write all its alternatives with commas between them")
    grid = list(product(*listed))
    several = [number for number, options in enumerate(listed) if len(options) > 1]
    rows = [[row[number] for number in several] for row in grid]
    cells = _cells(path, _names(rows) if keys else ["all"], grid, keys)
    if singles:
        plain = tuple(options[0] for options in listed if len(options) == 1)
        single = _singles(path, cells, keys)
        names = _names([*([one] for one in single), *rows])  # those of the grid too: no two alike
        grid = [*((*plain, one) for one in single), *grid]
        cells = _cells(path, names if keys else [*names[: len(single)], "all"], grid, keys)
    require_different(cells)
    return cells


def _cells(path: Path, names: Sequence[str], rows: Sequence[tuple[str, ...]], keys: Sequence[str]) -> list[Cell]:
    return [
        Cell(name, row, tuple(keys), _checked(path, name, row, keys)) for name, row in zip(names, rows, strict=True)
    ]


def _singles(path: Path, cells: Sequence[Cell], keys: Sequence[str]) -> list[str]:
    """The change that leaves one modality, for each that some cell has."""
    if "data.only" in keys:
        raise RecipeError("--singles: data.only is compared already; name the single ones there, and leave it out")
    modalities = list(dict.fromkeys(name for cell in cells for name in cell.recipe.data.modalities))
    if len(modalities) == 1:
        raise RecipeError(f"--singles: {path} has one modality, {modalities[0]}; leave it out")
    return [f'data.only=["{name}"]' for name in modalities]


def _listed(change: str, place: str) -> list[str]:
    """`key=a,b` -> ["key=a", "key=b"]; RecipeError if one alternative is empty, or there twice."""
    key, sign, value = change.partition("=")
    pieces = alternatives(value)
    if len(pieces) == 1:
        return [change]
    if "" in pieces:
        raise RecipeError(f"{change}: one of the alternatives is empty; expected a value between any two commas")
    options = [f"{key}{sign}{piece}" for piece in pieces]
    values = [repr(parse_override(option, place)[1]) for option in options]
    for number, value in enumerate(values):
        if value in values[:number]:
            raise RecipeError(f"{change}: the alternative {pieces[number]} is there twice; name each once")
    return options


def _checked(path: Path, name: str, changes: Sequence[str], keys: Sequence[str]) -> Recipe:
    try:
        return load_recipe(path, changes)
    except RecipeError as error:
        sections = [key.removesuffix(".name") for key in keys if key.endswith(".name")]
        hint = ""
        if sections and "is not a key of" in str(error):
            hint = (
                f"\nwhere alternatives have other keys, name whole sections: {sections[0]}={{name: ...}},"
                "{name: ..., key: ...}"
            )
        raise RecipeError(f"cell {name}: {error}{hint}") from None


def require_different(cells: Sequence[Cell]) -> None:
    """RecipeError if two cells are one recipe: a default and the same value written out, or made equal by `--equal`."""
    seen: dict[str, str] = {}
    for cell in cells:
        text = dump_recipe(cell.recipe)
        if text in seen:
            raise RecipeError(
                f"cell {cell.name}: is the same recipe as cell {seen[text]}; name each once, leave out a key that "
                "changes nothing, or leave out --equal if it undoes the difference"
            )
        seen[text] = cell.name


def _names(rows: Sequence[Sequence[str]]) -> list[str]:
    """A name for each row of alternatives, fit for a folder: no two alike, on disks that know no case either."""
    names = ["_".join(map(_word, row))[:LONGEST_NAME].strip("-._") for row in rows]
    often = Counter(name.casefold() for name in names)
    return [
        name
        if name and often[name.casefold()] == 1
        else f"{name or 'cell'}-{hashlib.sha256(chr(0).join(row).encode('utf-8', 'replace')).hexdigest()[:6]}"
        for name, row in zip(names, rows, strict=True)
    ]


def _word(option: str) -> str:
    """`model.adapter={name: lora, rank: 4}` -> lora-rank-4; `train.optimizer.lr=1e-3` -> lr-0.001."""
    path, value = parse_override(option, "")
    text = _plain(value) if isinstance(value, (str, Mapping)) else f"{dotted(path[-1:])}-{_plain(value)}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")


def _plain(value: Any) -> str:
    """The words of a value; of a path or hub id the last part, of a section its name without the key."""
    if isinstance(value, Mapping):
        return "-".join(_plain(item) if key == "name" else f"{key}-{_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "-".join(map(_plain, value))
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else show(value)
