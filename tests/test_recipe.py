"""Recipes that are right: what they come out as, where their paths point, that they survive being written."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vfmseg.catalog import PUBLISHED_FAMILIES
from vfmseg.errors import RecipeError
from vfmseg.recipe import Recipe, dump_recipe, load_pretrain_recipe, load_recipe, parse_recipe
from vfmseg.recipe.text import read_yaml, write_yaml

ROOT = Path(__file__).resolve().parents[1]
OWN_RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "vfmseg" / "assets" / "demo" / "recipe.yaml"]
SMALL = """\
name: flood
data:
  classes: {0: land, 1: water}
  modalities: {optical: {}}
  train: {optical: train/*.tif, labels: train_labels/*.tif}
model:
  encoder: {name: dinov2, checkpoint: facebook/dinov2-small}
  decoder: {name: fpn}
output_dir: runs/flood
"""
RICH = """\
name: "no"
seed: 3
data:
  classes: {7: land, 3: {name: open water, color: [1, 2, 3]}, 200: snow}
  ignore_index: 0
  modalities:
    optical: {bands: [4, 3, 2], scale: 1.0e-4, nodata: .nan, normalize: encoder}
    dem: {nodata: -9999}
  train: {labels: [l/a.tif, l/b.tif], dem: dem, optical: "o/*_ms.tif"}
  val: {table: split.csv, split: val, optical: "{split}/{name}.png", dem: dem, labels: label}
  test: {dataset: owner/floods, split: "train[:9%]", config: small, revision: v1, optical: rgb, dem: dem, labels: mask}
model:
  encoder: {name: clip, checkpoint: ./weights, layers: [2, 5], upscale: 1.5, input: project}
  adapter: {name: lora, rank: 4, targets: [q, mlp]}
  decoder: {name: upernet, channels: 32}
train:
  loss: {focal: 1, lovasz: 0.5}
  class_weights: {3: 2.5}
  precision: bf16
  optimizer: {lr: 3e-4, encoder_lr: 1e-5}
  augment: {scale: [0.8, 1.25], rotate: 10, radiometry: {optical: {hue: 0.1}}}
predict: {tile: 512, overlap: 0, blend: none}
output_dir: runs/flood
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def small(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(write(tmp_path, SMALL), overrides)


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    assert (recipe.seed, recipe.data.ignore_index, recipe.data.tile, recipe.data.workers) == (0, 255, 256, 0)
    assert (recipe.data.val, recipe.data.test, recipe.model.fusion) == (None, None, None)
    assert recipe.model.adapter.name == "none"
    train = recipe.train
    assert (train.epochs, train.batch_size, train.accumulate, train.precision, train.clip) == (30, 8, 1, "no", 1.0)
    assert train.loss == {"cross_entropy": 1.0, "dice": 1.0}
    assert (train.optimizer.lr, train.optimizer.weight_decay, train.optimizer.warmup) == (3e-4, 0.05, 0.05)
    assert (train.augment.flip, train.augment.rotate90, train.augment.scale) == (True, True, (1.0, 1.0))
    assert (recipe.predict.tile, recipe.predict.overlap, recipe.predict.blend) == (None, 0.25, "hann")


def test_adapter_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    lora = small(tmp_path, "model.adapter={name: lora}").model.adapter
    settings = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ("q", "v")}
    assert lora.model_dump() == {"name": "lora", **settings, "start": None}
    assert lora.settings() == settings
    bottleneck = small(tmp_path, "model.adapter={name: adapter}").model.adapter
    assert bottleneck.model_dump() == {"name": "adapter", "hidden": 64, "scale": 0.1}
    streams = ("data.modalities.dem={}", "data.train.dem=dem/*.tif", "model.fusion={name: gated}")
    mm_lora = small(tmp_path, *streams, "model.adapter={name: mm_lora}").model.adapter
    assert mm_lora.model_dump() == {
        "name": "mm_lora", "rank": 4, "alpha": None, "dropout": 0.0, "targets": ("q", "v", "mlp"), "mix": True
    }  # fmt: skip
    mm_adapter = small(tmp_path, *streams, "model.adapter={name: mm_adapter}").model.adapter
    assert mm_adapter.model_dump() == {"name": "mm_adapter", "ratio": 0.25}


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "focal", "lovasz"])
@pytest.mark.pitfall("P38")
def test_default_recipe_of_every_loss_is_valid(tmp_path: Path, loss: str) -> None:
    train = small(tmp_path, f"train.loss={{{loss}: 1}}").train
    assert train.loss == {loss: 1.0}
    assert train.focal_gamma == (2.0 if loss == "focal" else None)


def test_three_kinds_of_source_are_told_apart(tmp_path: Path) -> None:
    data = load_recipe(write(tmp_path, RICH)).data
    assert data.val is not None
    assert data.test is not None
    assert (data.train.kind, data.val.kind, data.test.kind) == ("files", "table", "dataset")
    assert data.val.split_column == "split"
    assert (data.test.config, data.test.revision, data.test.labels) == ("small", "v1", "mask")
    assert data.val.images == {"optical": "{split}/{name}.png", "dem": "dem"}


def test_images_come_in_the_order_of_the_modalities(tmp_path: Path) -> None:
    """The order decides which channel is which, so it must not depend on how a source was typed."""
    data = load_recipe(write(tmp_path, RICH)).data
    for source in (data.train, data.val, data.test):
        assert source is not None
        assert list(source.images) == list(data.modalities) == ["optical", "dem"]


def test_several_modalities_are_stacked_by_default(tmp_path: Path) -> None:
    fusion = load_recipe(write(tmp_path, RICH)).model.fusion
    assert fusion is not None
    assert fusion.name == "stack"


def test_every_class_has_a_colour_of_its_own(tmp_path: Path) -> None:
    classes = {number: f"class {number}" for number in range(40)}
    filled = small(tmp_path, f"data.classes={json.dumps(classes)}".replace('"', "")).data.classes
    colors = {spec.color for spec in filled.values()}
    assert len(colors) == 40
    assert all(isinstance(value, int) and 0 <= value <= 255 for color in colors for value in color)
    assert load_recipe(write(tmp_path, RICH)).data.classes[3].color == (1, 2, 3)


def test_paths_start_from_the_recipe_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "project" / "recipes", tmp_path / "elsewhere"
    home.mkdir(parents=True)
    elsewhere.mkdir()
    write(home, RICH)
    monkeypatch.chdir(elsewhere)
    data = load_recipe("../project/recipes/recipe.yaml").data
    assert data.train.labels == [str(home / "l/a.tif"), str(home / "l/b.tif")]
    assert data.train.images == {"optical": str(home / "o/*_ms.tif"), "dem": str(home / "dem")}
    assert data.val is not None
    assert data.val.table == home / "split.csv"
    assert data.val.labels == "label"
    recipe = load_recipe("../project/recipes/recipe.yaml", ["output_dir=../out", "data.train.dem=/vsizip/x.zip/*.tif"])
    assert recipe.output_dir == home.parent / "out"
    assert recipe.data.train.images["dem"] == "/vsizip/x.zip/*.tif"


def test_a_folder_with_brackets_is_no_part_of_the_glob(tmp_path: Path) -> None:
    home = tmp_path / "area [1]"
    (home / "train").mkdir(parents=True)
    (home / "train" / "a.tif").touch()
    pattern = small(home).data.train.images["optical"]
    assert [path.name for path in Path("/").glob(pattern.lstrip("/"))] == ["a.tif"]


def test_brackets_in_names_are_letters_of_paths_and_escaped_only_in_globs(tmp_path: Path) -> None:
    home = tmp_path / "area [1]"
    (home / "train").mkdir(parents=True)
    (home / "train" / "a[2].tif").touch()
    val = "data.val={table: 's[3].csv', split: val, optical: image, labels: label}"
    recipe = small(home, "output_dir=runs [4]", "data.train.optical=train/a[2].tif", val)
    assert recipe.output_dir == home / "runs [4]"
    assert recipe.data.val is not None
    assert recipe.data.val.table == home / "s[3].csv"
    assert recipe.data.train.images["optical"] == str(home / "train" / "a[2].tif")


def test_checkpoint_is_a_folder_if_it_exists_or_looks_like_one(tmp_path: Path) -> None:
    (tmp_path / "models" / "vit").mkdir(parents=True)
    for given_, expected in {
        "models/vit": str(tmp_path / "models" / "vit"),
        "./later": str(tmp_path / "later"),
        "../later": str(tmp_path.parent / "later"),
        "~/vit": str(Path.home() / "vit"),
        "facebook/dinov2-base": "facebook/dinov2-base",
        "owner/models.v2": "owner/models.v2",
    }.items():
        assert small(tmp_path, f"model.encoder.checkpoint={given_}").model.encoder.checkpoint == expected


@pytest.mark.parametrize("text", [SMALL, RICH], ids=["small", "rich"])
def test_dump_and_load_give_the_same_recipe_from_anywhere(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, text))
    other = tmp_path / "run" / "deep"
    other.mkdir(parents=True)
    again = load_recipe(write(other, dump_recipe(recipe)))
    assert dump_recipe(again) == dump_recipe(recipe)
    # nan is not equal to itself, so it is looked at alone
    plain, plain_again = recipe.model_dump(), again.model_dump()
    nodata = [d["data"]["modalities"]["optical"].pop("nodata") for d in (plain, plain_again)]
    assert plain == plain_again
    assert nodata == [None, None] if text == SMALL else all(math.isnan(value) for value in nodata)


@pytest.mark.parametrize("path", OWN_RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.pitfall("C38")
def test_every_recipe_of_the_project_is_valid(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.pitfall("C38")
def test_what_the_page_of_pretraining_says_in_yaml_is_valid(tmp_path: Path) -> None:
    """Its first recipe as it stands, and each part of one laid over a whole one."""
    page = (ROOT / "docs" / "pretrain.md").read_text(encoding="utf-8")
    whole, *parts = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert load_pretrain_recipe(write(tmp_path, whole)).name == "aerial-vit"
    (tmp_path / "runs" / "aerial-vit" / "best").mkdir(parents=True)
    texts = [text for part in parts for text in part.split("---\n")]
    assert len(texts) == 9
    for text in texts:
        for told in ("{0: other, 1: crop}", "{rgb: a, labels: b}", "{rgb: c, labels: d}"):
            text = text.replace("{...}", told, 1)
        part = read_yaml(text, "docs")
        if {"model", "train"} & set(part):
            base = read_yaml(SMALL.replace("optical", "rgb"), "memory")
            model = base["model"] | {"adapter": {"name": "lora"}} | part.get("model", {})
            parse_recipe(base | part | {"model": model}, tmp_path, "docs")
        else:
            base = read_yaml(whole, "memory")
            names = part.get("data", {}).get("modalities", {"rgb": {}})
            data = base["data"] | {"modalities": names, "scenes": dict.fromkeys(names, "a/*.tif")}
            content = base | {"objectives": {"mae": {}}} | part | {"data": data | part.get("data", {})}
            load_pretrain_recipe(write(tmp_path, write_yaml(content)))


@pytest.mark.pitfall("P63")
def test_output_dir_is_part_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml: output_dir .*missing.*'runs/flood'"):
        load_recipe(write(tmp_path, SMALL.replace("output_dir: runs/flood\n", "")))
    with pytest.raises(RecipeError, match=r"output_dir='': output_dir = '' .*not empty"):
        small(tmp_path, "output_dir=''")


def test_overrides_are_laid_over_the_file_in_order(tmp_path: Path) -> None:
    recipe = small(
        tmp_path,
        "train.epochs=3",
        "train.epochs=4",
        "data.classes.1=flood",
        "data.classes.5=ice",
        "train.optimizer.lr=1e-3",
    )
    assert (recipe.train.epochs, recipe.train.optimizer.lr) == (4, 0.001)
    assert {number: spec.name for number, spec in recipe.data.classes.items()} == {0: "land", 1: "flood", 5: "ice"}
    assert small(tmp_path, "name=a=b").name == "a=b"


def test_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    for section, key in ((recipe, "seed"), (recipe.train, "epochs"), (recipe.data.train, "labels")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_recipes_of_every_encoder_go_to_other_processes(tmp_path: Path) -> None:
    """They are pickled on the way, as when a script starts processes that each train one."""
    published = [f"{{name: {name}, checkpoint: o/n}}" for name in PUBLISHED_FAMILIES]
    for encoder in ("{name: builtin}", *published):
        recipe = small(tmp_path, f"model.encoder={encoder}", "model.adapter={name: full}")
        assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_parse_recipe_is_the_same_check_in_memory(tmp_path: Path) -> None:
    mapping = read_yaml(SMALL, "memory")
    before = json.dumps(mapping)
    assert parse_recipe(mapping, tmp_path, "memory") == small(tmp_path)
    assert json.dumps(mapping) == before
    with pytest.raises(RecipeError, match=r"^memory: trian .*'train'"):
        parse_recipe({**mapping, "trian": {}}, tmp_path, "memory")


def test_yaml_is_read_as_editors_read_it() -> None:
    """YAML 1.2: `no` and dates are text, 3e-4 is a number (YAML 1.1 has it the other way round)."""
    text = "{a: no, b: on, c: 2024-01-02, d: 3e-4, e: true, f: 010, g: 1:30, h: 5, i: -2.5, j: ~}"
    expected = {"a": "no", "b": "on", "c": "2024-01-02", "d": 3e-4, "e": True, "f": "010", "g": "1:30", "h": 5}
    assert read_yaml(text, "memory") == {**expected, "i": -2.5, "j": None}


_texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    ["no", "1e3", "3e-4", "0x1F", "010", "~", "<<", "=", "null", "true", "12:30", "2024-01-02", "", " ", ".inf", "- a"]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(_values)
def test_yaml_that_is_written_is_read_back_as_it_was(value: Any) -> None:
    back = read_yaml(write_yaml(value), "memory")
    assert back == value
    assert type(back) is type(value)


def test_import_needs_no_torch_and_little_time() -> None:
    """Time of the processor, so that a busy machine does not fail it; the fastest of three."""
    code = (
        "import time, sys; start = time.process_time(); import vfmseg.recipe; took = time.process_time() - start; "
        "heavy = {'torch', 'numpy', 'rasterio', 'transformers', 'datasets', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; print(took)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(3)
    ]
    assert min(times) < 0.6
