"""`python -m vfmseg.recipe schema` prints recipes/schema.json; `python -m vfmseg.recipe check FILE [key=value ...]`
prints the resolved recipe."""

from __future__ import annotations

import json
import sys

from vfmseg.errors import RecipeError
from vfmseg.recipe import dump_recipe, load_recipe, recipe_schema
from vfmseg.terminal import deliver, guarded, keep_displays


def schema_text() -> str:
    """The text of recipes/schema.json."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def main(arguments: list[str]) -> None:
    """Run one of the two commands."""
    if arguments == ["schema"]:
        deliver(schema_text())
    elif len(arguments) >= 2 and arguments[0] == "check":
        deliver(dump_recipe(load_recipe(arguments[1], arguments[2:])))
    else:
        raise RecipeError("use: python -m vfmseg.recipe schema, or python -m vfmseg.recipe check FILE [key=value ...]")


if __name__ == "__main__":
    keep_displays()
    sys.exit(guarded(lambda: main(sys.argv[1:])))
