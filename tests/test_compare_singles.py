"""`vfmseg compare --singles` and `--missing`: which cells there are, and what is refused before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from makers import write_recipe

from vfmseg.compare.comparison import compare
from vfmseg.compare.grid import cells_of
from vfmseg.errors import RecipeError


def recipe(folder: Path, names: tuple[str, ...] = ("rgb", "sar"), **model: Any) -> Path:
    files = {s: {name: f"{s}/{name}/*.tif" for name in (*names, "labels")} for s in ("train", "val")}
    modalities: dict[str, Any] = {name: {} for name in names} | {names[-1]: {"optional": True}}
    content = {
        "name": "singles",
        "data": {"classes": {0: "a", 1: "b"}, "modalities": modalities, **files},
        "model": {"encoder": {"name": "dinov2", "checkpoint": "o/n"}, "decoder": {"name": "linear"}, **model},
        "output_dir": "run",
    }
    return write_recipe(folder / "r.yaml", content)


def names_of(file: Path, *changes: str) -> list[str]:
    return [cell.name for cell in cells_of(file, changes, singles=True)]


def test_the_recipe_need_not_be_one_without_its_alternatives(tmp_path: Path) -> None:
    """Left out, fusion is stack, in which none may be missing."""
    assert names_of(recipe(tmp_path), "model.fusion.name=linear,se") == ["only-rgb", "only-sar", "linear", "se"]


def test_names_of_singles_are_those_of_no_other_cell(tmp_path: Path) -> None:
    fused = {"fusion": {"name": "linear"}}
    names = names_of(recipe(tmp_path, **fused), "model.encoder.checkpoint=a/only-rgb,b/other")
    assert len(set(names)) == 4
    names = names_of(recipe(tmp_path, ("s1", "S1"), **fused))
    assert len({name.casefold() for name in names}) == 3
    assert names_of(recipe(tmp_path, ("rgb", "true"), **fused)) == ["only-rgb", "only-true", "all"]


def test_what_would_be_compared_twice_is_told_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--singles: data\.only is compared already"):
        names_of(recipe(tmp_path, fusion={"name": "linear"}), "data.only=[rgb],[rgb,sar]")


def test_missing_without_a_test_split_names_the_flag_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="or leave --missing out"):
        compare(recipe(tmp_path), ["model.fusion.name=linear,se"], missing=True)
