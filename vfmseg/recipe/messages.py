"""Pydantic's findings as lines that a person can act on: file, key, what was found, what is expected, what to do."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from vfmseg.errors import nearest, show
from vfmseg.recipe.base import TOLD, Problem, Section
from vfmseg.recipe.overrides import KeyPath, dotted

# Pydantic's type of error -> what a right value is; {...} is filled from the error's context.
_EXPECTED = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be one line of text without blanks at its ends",
    "path_type": "must be a path",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} entries at most",
}


class _Place(NamedTuple):
    """Where an error is: its key path as the user wrote it, and what the recipe's types say about that key."""

    path: KeyPath
    section: type[BaseModel] | None  # what is at the place, if that is a section
    owner: type[BaseModel] | None  # section that the last key belongs to
    field: FieldInfo | None  # innermost named field on the way


def lines(
    errors: Sequence[ErrorDetails],
    root: type[Section],
    written: Mapping[Any, Any],
    place: str,
    overrides: Mapping[str, KeyPath],
) -> list[str]:
    """One line for each finding, up to TOLD; a key that an override set is named together with that override.

    `written` is what was checked; values are shown as they stand there, before shorthands were filled.
    """
    found: list[str] = []
    for error in errors:
        for path, text in _findings(error, root, written):
            blamed = [over for over, set_path in overrides.items() if _overlap(path, set_path)]
            line = f"{', '.join([place, *blamed[-1:]])}: {dotted(path)} {text}"
            if line in found:
                continue
            if len(found) == TOLD:
                return [*found, f"{place}: and more like these; mend them first"]
            found.append(line)
    return found


def _overlap(path: KeyPath, set_path: KeyPath) -> bool:
    """True if one of the two key paths starts with the other."""
    return all(str(a) == str(b) for a, b in zip(path, set_path, strict=False))


def _findings(error: ErrorDetails, root: type[Section], written: Mapping[Any, Any]) -> list[tuple[KeyPath, str]]:
    at = _locate(error["loc"], root)
    kind, context = error["type"], error.get("ctx", {})
    value = error["input"] if kind == "missing" else _as_written(written, at.path, error["input"])
    if kind == "problems":
        problems: list[Problem] = context["problems"]
        return [((*at.path, *filter(None, problem.key.split("."))), problem.text) for problem in problems]
    of_key = error["loc"][-1:] == ("[key]",)
    if kind in ("extra_forbidden", "invalid_key") or (kind == "literal_error" and of_key):
        known = list(at.owner.model_fields) if at.owner else _choices(context)
        return [(at.path, f"is not a key {_of_variant(at)}; {nearest(str(at.path[-1]), known)}")]
    if of_key:
        return [(at.path[:-1], f"has the key {show(error['input'])}, which {_expected(error)}{_example(at)}")]
    if kind == "missing":
        return [(at.path, f"is missing{_misspelt(str(at.path[-1]), value, at)}{_example(at)}")]
    if kind.startswith("union_tag"):
        return [_unknown_variant(at, value, context)]
    if kind == "literal_error":
        return [(at.path, f"= {show(value)} must be {context['expected']}{_nearest_choice(value, context, at)}")]
    if kind == "value_error":
        return [(at.path, f"= {show(value)} {context['error']}{_example(at)}")]
    if kind in ("model_type", "model_attributes_type"):
        if at.section is None:
            return [_unknown_variant(at, value, context)]
        remedy = "; fill it, or drop the line" if value is None else _example(at)
        return [(at.path, f"= {show(value)} must be a mapping (keys: {', '.join(at.section.model_fields)}){remedy}")]
    if kind == "too_short" and isinstance(value, (list, tuple)) and len(value) >= context["min_length"]:
        return []  # entries that are wrong themselves are reported, and were not counted
    remedy = "; put it in quotes" if kind == "string_type" and isinstance(value, (bool, int, float)) else _example(at)
    return [(at.path, f"= {show(value)} {_expected(error)}{remedy}")]


def _expected(error: ErrorDetails) -> str:
    template = _EXPECTED.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else f"is wrong: {error['msg']}"


def _as_written(written: Any, path: KeyPath, otherwise: Any) -> Any:
    """The value at a key path of the mapping that was checked; `otherwise` where the path leads nowhere."""
    for part in path:
        in_list = isinstance(written, (list, tuple)) and isinstance(part, int) and part < len(written)
        if not in_list and not (isinstance(written, Mapping) and part in written):
            return otherwise
        written = written[part]
    return written


def _of_variant(at: _Place) -> str:
    """`of encoder builtin` where only this variant of a section lacks the key."""
    names = _tag(at.owner)
    return f"of {at.path[-2]} {names[0]}" if names else "here"


def _nearest_choice(value: Any, context: Mapping[str, Any], at: _Place) -> str:
    close = difflib.get_close_matches(str(value), _choices(context), n=1)
    if value is False and "no" in _choices(context):
        return '; put it in quotes: "no"'
    return f"; did you mean '{close[0]}'?" if close else _example(at)


def _unknown_variant(at: _Place, value: Any, context: Mapping[str, Any]) -> tuple[KeyPath, str]:
    """`name` of an encoder, adapter, ... is missing or unknown."""
    names = [name.strip(" '") for name in str(context.get("expected_tags", "")).split(",")]
    names = [name for name in names if name] or _tags(at.field)
    if not isinstance(value, Mapping):
        return at.path, f"= {show(value)} must be a mapping with a name ({', '.join(names)}){_example(at)}"
    if "name" not in value:
        return (*at.path, "name"), f"is missing; one of {', '.join(names)}"
    return (*at.path, "name"), f"= {show(value['name'])} is not known here; {nearest(str(value['name']), names)}"


def _misspelt(name: str, siblings: Any, at: _Place) -> str:
    """A key beside it that looks like the missing one."""
    known = set(at.owner.model_fields) if at.owner else set()
    others = [str(key) for key in siblings if str(key) not in known] if isinstance(siblings, Mapping) else []
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
    return f" (is '{close[0]}' meant?)" if close else ""


def _example(at: _Place) -> str:
    """What a right value looks like: the default of the field, or the example that its section gives."""
    if at.field is None:
        return ""
    if at.field.examples:
        return f"; for example {show(at.field.examples[0])}"
    default = at.field.default
    if default in (None, PydanticUndefined) or isinstance(default, BaseModel):
        return ""
    return f"; the default is {show(default)}"


def _choices(context: Mapping[str, Any]) -> list[str]:
    """Names in pydantic's "'a', 'b' or 'c'"."""
    return [part.strip(" '") for part in str(context.get("expected", "")).replace(" or ", ", ").split(",")]


def _locate(loc: Sequence[str | int], root: type[Section]) -> _Place:
    """Walk the recipe's types along an error's location; steps that only choose a variant do not show in the path."""
    path: list[str | int] = []
    kind: Any = root
    owner: type[BaseModel] | None = None
    field: FieldInfo | None = None
    for part in loc:
        if part == "[key]":
            continue
        kind = _plain(kind)
        variant = _variant(kind, part)
        if variant is None:
            path.append(part)
            owner = kind if _is_section(kind) else None
            field = owner.model_fields.get(str(part)) if owner else field
            kind = _below(kind, part)
        else:
            kind = variant
    kind = _plain(kind)
    return _Place(tuple(path), kind if _is_section(kind) else None, owner, field)


def _is_section(kind: Any) -> bool:
    # Python 3.10 takes dict[str, int] for a class too; it has an origin, a section has none
    return inspect.isclass(kind) and get_origin(kind) is None and issubclass(kind, BaseModel)


def _plain(kind: Any) -> Any:
    """A type without `Annotated` and `| None`."""
    while True:
        arguments = [item for item in get_args(kind) if item is not types.NoneType]
        optional = get_origin(kind) in (Union, types.UnionType) and len(arguments) == 1
        if get_origin(kind) is not Annotated and not optional:
            return kind
        kind = arguments[0]


def _below(kind: Any, part: str | int) -> Any:
    """The type of what lies under the key `part` of a section, mapping or list; None where that is unknown."""
    if _is_section(kind):
        found = kind.model_fields.get(str(part))
        return found.annotation if found else None
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    return arguments[0] if get_origin(kind) in (list, tuple) else None


def _variant(kind: Any, part: str | int) -> Any:
    """The member of a union that the tag `part` chooses; None if `kind` is no union or has no such member."""
    if get_origin(kind) not in (Union, types.UnionType):
        return None
    return next((member for member in get_args(kind) if part in _tag(member)), None)


def _tag(member: Any) -> list[str]:
    tags = [item.tag for item in get_args(member) if isinstance(item, Tag)]
    plain = _plain(member)
    if tags or not _is_section(plain) or "name" not in plain.model_fields:
        return tags
    literal = plain.model_fields["name"].annotation
    return list(get_args(literal)) if get_origin(literal) is Literal else []


def _tags(field: FieldInfo | None) -> list[str]:
    members = get_args(_plain(field.annotation)) if field else ()
    return [tag for member in members for tag in _tag(member)]
