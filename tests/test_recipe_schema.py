"""The JSON Schema that editors complete recipes with: current, and of one mind with the recipe itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vfmseg.errors import RecipeError
from vfmseg.recipe import parse_recipe, recipe_schema
from vfmseg.recipe.__main__ import schema_text
from vfmseg.recipe.text import read_yaml

ROOT = Path(__file__).resolve().parents[1]
OWN_RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "vfmseg" / "assets" / "demo" / "recipe.yaml"]
SMALL = """\
name: flood
data:
  classes: {0: land, 1: {name: water, color: [0, 0, 255]}}
  modalities: {optical: {}}
  train: {optical: train/*.tif, labels: train_labels/*.tif}
model:
  encoder: {name: dinov2, checkpoint: facebook/dinov2-small}
  decoder: {name: fpn}
output_dir: runs/flood
"""


def test_schema_file_is_current() -> None:
    written = (ROOT / "recipes" / "schema.json").read_text(encoding="utf-8")
    assert written == schema_text(), "run: python -m vfmseg.recipe schema > recipes/schema.json"


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a value fits a JSON Schema, as far as the keywords go that recipes/schema.json uses."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], value, root)
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "null": None,
    }
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind and not isinstance(value, kinds[kind]):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if "anyOf" in schema and not any(accepts(option, value, root) for option in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(accepts(option, value, root) for option in schema["oneOf"]) != 1:
        return False
    if "not" in schema and accepts(schema["not"], value, root):
        return False
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if not isinstance(value, dict):
        return True
    known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
    names = schema.get("propertyNames", {})
    return all(key in value for key in schema.get("required", ())) and all(
        accepts(names, str(key), root)
        and (accepts(known[key], item, root) if key in known else other is not False and accepts(other, item, root))
        for key, item in value.items()
    )


@pytest.mark.parametrize("path", OWN_RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_schema_accepts_recipes_as_they_are_written(path: Path) -> None:
    schema = recipe_schema()
    assert accepts(schema, read_yaml(path.read_text(encoding="utf-8"), str(path)), schema)


@pytest.mark.parametrize(
    "source",
    [
        {"optical": ["a.tif", "b.tif"], "labels": "c"},
        {"table": "a.csv", "split": "val", "optical": "{split}/{name}.png", "labels": "label"},
        {
            "dataset": "owner/name",
            "split": "val",
            "config": "c",
            "revision": "v1",
            "optical": "image",
            "labels": "mask",
        },
    ],
    ids=["files", "table", "dataset"],
)
def test_schema_accepts_every_kind_of_source(source: dict[str, Any], tmp_path: Path) -> None:
    schema = recipe_schema()
    mapping = read_yaml(SMALL, "memory")
    mapping["data"]["val"] = source
    assert accepts(schema, mapping, schema)
    assert parse_recipe(mapping, tmp_path, "memory").data.val is not None


def test_schema_and_recipe_agree_on_lists_of_sources(tmp_path: Path) -> None:
    schema = recipe_schema()
    one = {"optical": "a/*.tif", "labels": "b/*.tif", "weight": 2}
    two = {"table": "a.csv", "split": "train", "optical": "image", "labels": "label", "weight": 0.5}
    for split, value, right in (
        ("train", [one, two], True),
        ("train", [{"optical": "a", "labels": "b"}], True),
        ("train", [{"optical": "a", "labels": 3}], False),
        ("train", [{**one, "weight": "2"}, two], False),
        ("train", [one, "b"], False),
        ("val", [one, two], False),
    ):
        mapping = read_yaml(SMALL, "memory")
        mapping["data"][split] = value
        assert accepts(schema, mapping, schema) == right
        if right:
            assert len(parse_recipe(mapping, tmp_path, "memory").data.sources("train")) == len(value)
        else:
            with pytest.raises(RecipeError, match=rf"data\.{split}"):
                parse_recipe(mapping, tmp_path, "memory")


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("train", {"epoch": 3}),
        ("train", {"loss": {"dise": 1}}),
        ("train", {"augment": {"flips": True}}),
        ("predict", {"blend": "han"}),
        ("model", {"encoder": {"name": "sam"}, "decoder": {"name": "fpn"}}),
        ("model", {"encoder": {"name": "builtin", "checkpoint": "x"}, "decoder": {"name": "fpn"}}),
        ("model", {"encoder": {"name": "builtin"}, "decoder": {"name": "linear", "channels": 3}}),
        ("data", {"train": {"table": "a.csv", "optical": "a", "labels": "b"}}),
        ("data", {"train": {"table": "a.csv", "split": "train", "config": "c", "optical": "a", "labels": "b"}}),
        ("data", {"train": {"optical": "a"}}),
        ("data", {"train": {"optical": 3, "labels": "b"}}),
    ],
)
def test_schema_refuses_what_the_recipe_refuses(tmp_path: Path, section: str, value: dict[str, Any]) -> None:
    schema = recipe_schema()
    mapping = read_yaml(SMALL, "memory")
    mapping[section] = {**mapping.get(section, {}), **value}
    assert not accepts(schema, mapping, schema)
    with pytest.raises(RecipeError):
        parse_recipe(mapping, tmp_path, "memory")
