"""The recipe: one strict YAML file that describes a run. Nothing here imports torch."""

from __future__ import annotations

from vfmseg.recipe.load import dump_recipe, load_pretrain_recipe, load_recipe, parse_recipe, recipe_schema
from vfmseg.recipe.pretrain import PretrainRecipe
from vfmseg.recipe.root import Recipe

__all__ = [
    "PretrainRecipe",
    "Recipe",
    "dump_recipe",
    "load_pretrain_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_schema",
]
