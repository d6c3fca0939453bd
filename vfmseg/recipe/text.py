"""The only reader and writer of YAML.

YAML 1.2 as editors read it, not PyYAML's 1.1: `no`, `on` and dates stay text, `3e-4` is a number. A key that is
written twice is an error, where YAML libraries silently keep the last. What a short text can mean is bounded: aliases
of aliases would multiply to any number of values.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from vfmseg.errors import RecipeError, show

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


LONGEST = 2 * 2**20
"""Characters of a recipe: a list of some 30,000 files."""

MOST = 100_000
"""Values of a recipe: three for each of those files. Each takes the parser 50 microseconds."""

DEEPEST = 32
"""Lists and mappings inside each other."""

REPEATED = 10_000
"""Values that aliases (`*name`, `<<: *name`) may repeat in all."""

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not for a recipe; the problem says what to do."""


class _Loader(yaml.SafeLoader):
    """Safe YAML: plain values only, no Python objects, and no more of them than a person writes."""

    # emptied, then filled below: without this, PyYAML's own 1.1 patterns would stay in force
    yaml_implicit_resolvers = dict[str, Any]()  # noqa: RUF012 (PyYAML declares it without ClassVar)
    yaml_constructors = {  # noqa: RUF012 (as above); without dates and binary values, which fail on wrong text
        tag: how
        for tag, how in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # an anchor that holds itself is then an error, not an endless value
        self._level = 0
        self._values = 0  # composed so far, those that aliases repeat counted in
        self._repeated = 0
        self._sizes: dict[int, int] = {}  # values that a node stands for, by id; nodes live as long as the loader

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, counted: an alias as all the values that it repeats, before anything is built of them."""
        event = self.peek_event()
        place: Any = event.start_mark
        before = self._values
        self._level += 1
        if self._level > DEEPEST:
            what = f"nested too deeply to be a recipe (more than {DEEPEST} levels)"
            raise _Refused(None, None, what, place)
        node = super().compose_node(parent, index)
        self._level -= 1
        if isinstance(event, yaml.AliasEvent):
            size = self._sizes.get(id(node), 0)  # 0: an anchor that holds itself, which is an error later
            self._values += size
            self._repeated += size
            if self._repeated > REPEATED:
                what = f"aliases (*name) repeat more than {REPEATED:,} values; write out what is needed"
                raise _Refused(None, None, what, place)
        else:
            self._values += 1
            if self._values - self._repeated > MOST:
                what = f"holds more than {MOST:,} values; list files by a pattern or in a table (CSV)"
                raise _Refused(None, None, what, place)
            self._sizes[id(node)] = self._values - before
            self._require_fitting(node)
        return node

    def _require_fitting(self, node: yaml.Node | None) -> None:
        """A tag such as !!int before other text is refused here, as PyYAML's constructors would trip over it."""
        if not isinstance(node, yaml.ScalarNode) or node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN[:4]:
            return
        if self.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag:
            what = f"{show(node.value)} is no {node.tag.rpartition(':')[2]}; write the value without a tag"
            raise _Refused(None, None, what, node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that it names twice is an error at its second place."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise _Refused(
                    None, None, f"the key {show(str(key))} is here a second time; keep one", key_node.start_mark
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
    if len(text) > LONGEST:
        raise RecipeError(
            f"{place}: has {len(text):,} characters or more; expected a recipe of at most {LONGEST:,}: list files by a "
            "pattern or in a table (CSV)"
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        what = error.problem or error.context or "not YAML"
        hint = "" if isinstance(error, _Refused) else "; check indentation, colons, brackets and quotes near it"
        if error.context == "while scanning an alias":
            hint = '; text that starts with * needs quotes: "*.tif"'
        raise RecipeError(f"{place}: {where}: {what}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        # a number of too many digits, `!!map text`, characters that YAML forbids
        what = " ".join(str(error).split())
        raise RecipeError(f"{place}: not readable as YAML: {what}; save it as plain text (UTF-8)") from None


def write_yaml(value: Any) -> str:
    """YAML of plain values, keys in their order, innermost lists and mappings on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
