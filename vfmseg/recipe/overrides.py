"""`key.path=value` on the command line, laid over what the file says before anything is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vfmseg.errors import RecipeError, show
from vfmseg.recipe.text import DEEPEST, read_yaml

KeyPath = tuple[str | int, ...]


def parse_override(text: str, place: str) -> tuple[KeyPath, Any]:
    """`train.epochs=3` -> (("train", "epochs"), 3). Values are YAML; parts of digits are class ids."""
    path, equals, value = text.partition("=")
    parts = [part.strip() for part in path.split(".")]
    if not equals or not all(parts) or len(parts) > DEEPEST:
        raise RecipeError(f"{place}: override {show(text)} is not key.path=value; write for example train.epochs=3")
    return tuple(_part(part) for part in parts), read_yaml(value, f"{place}, {text}")


def _part(text: str) -> str | int:
    return int(text) if len(text) < 12 and text.removeprefix("-").isdecimal() else text  # Python refuses endless ones


def override(mapping: Mapping[Any, Any], path: KeyPath, value: Any, place: str) -> dict[Any, Any]:
    """A copy of `mapping` with `value` at `path`; sections on the way that are not there yet are made.

    A number on the way is a class id, or counts the entries of a list from 0: `data.train.1.weight`.
    """
    return _set(mapping, path, value, place, ())


def _set(mapping: Mapping[Any, Any], path: KeyPath, value: Any, place: str, above: KeyPath) -> dict[Any, Any]:
    first, rest = path[0], path[1:]
    if not rest:
        return {**mapping, first: value}
    inner = mapping.get(first)
    inner = {} if inner is None else inner
    here = (*above, first)
    if isinstance(inner, list) and len(rest) > 1 and rest[0] in range(len(inner)):
        entries = dict(enumerate(inner))
        return {**mapping, first: list(_set(entries, rest, value, place, here).values())}
    if not isinstance(inner, Mapping):
        name = dotted(here)
        raise RecipeError(
            f"{place}: {name} = {show(inner)} has no keys below it; write {name}=... to replace it as a whole"
        )
    return {**mapping, first: _set(inner, rest, value, place, here)}


def dotted(path: Sequence[str | int]) -> str:
    """`train.epochs` for ("train", "epochs")."""
    return ".".join(map(str, path))
