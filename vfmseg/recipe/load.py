"""From a file (or a mapping in memory) to a checked recipe, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from vfmseg.disk.paths import require_file
from vfmseg.errors import RecipeError, show
from vfmseg.recipe.base import Section
from vfmseg.recipe.messages import lines
from vfmseg.recipe.only import with_only
from vfmseg.recipe.overrides import KeyPath, override, parse_override
from vfmseg.recipe.pretrain import PretrainRecipe
from vfmseg.recipe.root import Recipe
from vfmseg.recipe.text import LONGEST, read_yaml, write_yaml

AnyRecipe = TypeVar("AnyRecipe", Recipe, PretrainRecipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file; relative paths in it, and in the overrides, start from its folder.

    `overrides` are `key.path=value`, later ones win, values are YAML. Raises RecipeError with one line for each
    finding; nothing but the recipe file itself is opened.
    """
    return _load(path, overrides, Recipe)


def load_pretrain_recipe(path: str | Path, overrides: Sequence[str] = ()) -> PretrainRecipe:
    """The same for a recipe of `vfmseg pretrain`."""
    return _load(path, overrides, PretrainRecipe)


def _load(path: str | Path, overrides: Sequence[str], root: type[AnyRecipe]) -> AnyRecipe:
    mapping: dict[Any, Any] = _read_mapping(Path(path), root)
    set_paths: dict[str, KeyPath] = {}
    for text in overrides:
        key_path, value = parse_override(text, str(path))
        mapping = override(mapping, key_path, value, f"{path}, {text}")
        set_paths[text] = key_path
    return _check(mapping, Path(path).parent, str(path), set_paths, root)


def parse_recipe(mapping: Mapping[Any, Any], base: Path, place: str) -> Recipe:
    """The same checks for a mapping in memory: relative paths start from `base`, messages from `place`."""
    return _check(mapping, base, place, {}, Recipe)


def dump_recipe(recipe: Recipe | PretrainRecipe) -> str:
    """YAML of the resolved recipe: every default written out, paths absolute; `load_recipe` gives the same again."""
    return write_yaml(_plain(recipe.model_dump(exclude_none=True)))


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe as it is written (flat sources, class names), for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "vfmseg recipe"}


def _read_mapping(path: Path, root: type[Section]) -> dict[Any, Any]:
    require_file(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)  # whatever is named here by mistake
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file; check its name and the current folder") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder, not a recipe; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text; save the recipe as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    value = read_yaml(text, str(path))
    if value is None:
        raise RecipeError(f"{path}: is empty; a recipe needs at least {_required(root)}")
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: holds {show(value)}, not a recipe; a recipe is a mapping with {_required(root)}")
    return value


def _required(root: type[Section]) -> str:
    return ", ".join(name for name, field in root.model_fields.items() if field.is_required())


def _check(
    mapping: Mapping[Any, Any], base: Path, place: str, set_paths: Mapping[str, KeyPath], root: type[AnyRecipe]
) -> AnyRecipe:
    try:
        return root.model_validate(dict(mapping), context={"base": base.absolute()})
    except ValidationError as error:
        verb = _meant_for(mapping, root)
        if verb is not None:
            raise RecipeError(
                f"{place}: is a recipe of vfmseg {verb} by its data; expected one of vfmseg "
                f"{'pretrain' if verb == 'finetune' else 'finetune'}, which has other sections: start it as vfmseg "
                f"{verb} {place}, or name another recipe"
            ) from None
        found = lines(error.errors(include_url=False), root, _reduced(mapping), place, set_paths)
        raise RecipeError("\n".join(found)) from None


def _meant_for(mapping: Mapping[Any, Any], root: type[Section]) -> str | None:
    """The command that a recipe is for, if that is another one than whose recipe it was read as."""
    data = mapping.get("data")
    names = set(data) if isinstance(data, Mapping) else set()
    if root is PretrainRecipe and "objectives" not in mapping and {"classes", "train"} <= names:
        return "finetune"
    if root is Recipe and "objectives" in mapping and "scenes" in names and "classes" not in names:
        return "pretrain"
    return None


def _reduced(mapping: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The mapping that was checked: without what `data.only` leaves out, or whole where that key itself is wrong."""
    try:
        return with_only(mapping)
    except PydanticCustomError:
        return mapping


def _plain(value: Any) -> Any:
    """The same value with YAML's own types: paths as text, tuples as lists."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(exclude_none=True))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
