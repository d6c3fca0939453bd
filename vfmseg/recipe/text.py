"""The only reader and writer of YAML.

YAML 1.2 as editors read it, not PyYAML's 1.1: `no`, `on` and dates stay text, `3e-4` is a number. A key that is
written twice is an error, where YAML libraries silently keep the last.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from vfmseg.errors import RecipeError

# (tag, what it looks like, first characters): the core schema of YAML 1.2, without hexadecimal and octal numbers,
# and with the merge key `<<` of YAML 1.1. Numbers with leading zeros stay text: 010 is 8 to some readers, 10 to others.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?((0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?|(0|[1-9][0-9]*)(\.([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML: plain values only, no Python objects."""

    # emptied, then filled below: without this, PyYAML's own 1.1 patterns would stay in force
    yaml_implicit_resolvers = dict[str, Any]()  # noqa: RUF012 (PyYAML declares it without ClassVar)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # an anchor that holds itself is then an error, not an endless value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that it names twice is an error at its second place."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is here a second time; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or a reader of YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Anchors and aliases save bytes, not readers."""
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str, place: str) -> Any:
    """The value that a YAML text holds. Raises RecipeError with line and column if it holds none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        what = error.problem or error.context or "not YAML"
        hint = "" if "second time" in what else "; check indentation, colons, brackets and quotes near it"
        if error.context == "while scanning an alias":
            hint = '; text that starts with * needs quotes: "*.tif"'
        raise RecipeError(f"{place}: {where}: {what}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        what = " ".join(str(error).split())
        raise RecipeError(f"{place}: not readable as YAML: {what}; save it as plain text (UTF-8)") from None
    except RecursionError:
        raise RecipeError(f"{place}: nested too deeply to be a recipe; check brackets and indentation") from None


def write_yaml(value: Any) -> str:
    """YAML of plain values, keys in their order, innermost lists and mappings on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
