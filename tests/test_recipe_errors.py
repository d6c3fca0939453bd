"""Recipes that are wrong: one line for each finding, with the file, the key, what was found, and what to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vfmseg.errors import RecipeError
from vfmseg.recipe import load_recipe

SMALL = """\
name: flood
data:
  classes: {0: land, 1: water}
  modalities: {optical: {bands: [1, 2, 3]}, dem: {bands: [1]}}
  train: {optical: train/*.tif, dem: dem/*.tif, labels: train_labels/*.tif}
  val: {table: split.csv, split: val, optical: rgb, dem: dem, labels: label}
model:
  encoder: {name: dinov2, checkpoint: facebook/dinov2-small}
  adapter: {name: lora}
  decoder: {name: fpn}
train:
  epochs: 2
output_dir: runs/flood
"""


def complaint(folder: Path, *overrides: str, text: str | bytes = SMALL) -> list[str]:
    """The lines of the RecipeError, without the file's own name; every line must start with it."""
    path = folder / "lora.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines), lines
    return [line.removeprefix(str(path)).removeprefix(": ") for line in lines]


def tells(line: str, place: str, *parts: str) -> bool:
    """Whether a line begins with a place, and goes on with what was found and what to do, in this order."""
    return bool(re.match(rf"{re.escape(place)}(?![\w.])" + "".join(f".*{re.escape(part)}" for part in parts), line))


def after(line: str) -> str:
    """A line without the override that it begins with."""
    return re.sub(r"^, .*?: (?=data|model|train|line)", "", line)


def test_unknown_key_names_the_nearest_valid_one(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, text=SMALL.replace("epochs: 2", "epoch: 2"))
    assert tells(line, "train.epoch", "did you mean 'epochs'?")
    line = complaint(tmp_path, text=SMALL.replace("output_dir", "outputdir"))[0]
    assert tells(line, "output_dir", "'outputdir'", "'runs/flood'")


# override -> the place, what was found, and the remedy
WRONG = {
    "train.epoch=3": ("train.epoch", "did you mean 'epochs'?"),
    "trian.epochs=3": ("trian", "did you mean 'train'?"),
    "model.adapter.rnak=3": ("model.adapter.rnak", "adapter lora", "did you mean 'rank'?"),
    "data.modalities.dem.band=[1]": ("data.modalities.dem.band", "did you mean 'bands'?"),
    "train.loss={dise: 1}": ("train.loss.dise", "did you mean 'dice'?"),
    "train.epochs=ten": ("train.epochs", "'ten'", "whole number", "default", "30"),
    "train.epochs=2.5": ("train.epochs", "2.5", "whole number", "default", "30"),
    "train.epochs=true": ("train.epochs", "true", "whole number", "default", "30"),
    "train.epochs=0": ("train.epochs", "= 0", "at least 1", "default", "30"),
    "train.optimizer.lr=fast": ("train.optimizer.lr", "'fast'", "number", "default", "0.0003"),
    "train.optimizer.lr=.inf": ("train.optimizer.lr", "inf", "finite", "default", "0.0003"),
    "train.augment.flip=yes": ("train.augment.flip", "'yes'", "true or false", "default", "true"),
    "train.precision=fp8": ("train.precision", "'fp8'", "'no', 'fp16' or 'bf16'", "default", "'no'"),
    "train.precision=false": ("train.precision", "false", "'no', 'fp16' or 'bf16'", 'quotes: "no"'),
    "predict.blend=han": ("predict.blend", "'han'", "'average' or 'none'", "did you mean 'hann'?"),
    "predict.overlap=64": ("predict.overlap", "64", "below 0.9", "default", "0.25"),
    "predict.overlap=0.9": ("predict.overlap", "0.9", "below 0.9", "default", "0.25"),
    "predict.overlap=-0.1": ("predict.overlap", "-0.1", "at least 0", "default", "0.25"),
    "predict.scales=[9]": ("predict.scales.0", "9", "at most 8", "default", "[1.0]"),
    "data.tile=0": ("data.tile", "= 0", "at least 1", "default", "256"),
    "data.tile=99999999999999999999": ("data.tile", "99999999999999999999", "at most 65536", "default", "256"),
    "predict.tile=65537": ("predict.tile", "65537", "at most 65536", "example", "512"),
    "data.ignore_index=9999999999": ("data.ignore_index", "9999999999", "below 2.14748e+09", "default", "255"),
    "data.samples_per_epoch=many": ("data.samples_per_epoch", "'many'", "whole number", "example", "500"),
    "name=3": ("name", "3", "text", "quotes"),
    "output_dir=s3://bucket/run": ("output_dir", "'s3://bucket/run'", "this machine", "example", "'runs/flood'"),
    f"data.classes.{'9' * 5000}=x": ("data.classes", f"'{'9' * 56}...", "whole number", "{0: 'land', 1: 'water'}"),
    "output_dir=": ("output_dir", "null", "path", "example", "'runs/flood'"),
    "train.optimizer=1": ("train.optimizer", "= 1", "mapping", "lr, encoder_lr, weight_decay, warmup"),
    "data.classes={0: land}": ("data.classes", "{0: 'land'}", "2 or more", "{0: 'land', 1: 'water'}"),
    "data.classes.x=ice": ("data.classes", "'x'", "whole number", "{0: 'land', 1: 'water'}"),
    "data.classes.1=land": ("data.classes.1", "'land'", "class 0", "its own name"),
    'data.classes.1="w\\tx"': ("data.classes.1", r"'w\tx'", "without it"),
    'data.classes.1={name: "w\\0x"}': ("data.classes.1", r"'w\x00x'", "without it"),
    'data.classes.1="w\\nx"': ("data.classes.1.name", r"'w\nx'", "one line"),
    "data.classes.1={name: w, color: [0, 0, 300]}": ("data.classes.1.color.2", "300", "at most 255", "[230, 80, 60]"),
    "data.ignore_index=1": ("data.ignore_index", "1", "class id (0, 1)", "try 255", "drop the class"),
    "data.modalities.dem.bands=[0]": ("data.modalities.dem.bands.0", "= 0", "at least 1", "[1, 2, 3]"),
    "data.modalities.dem.normalize=encoder": ("data.modalities.dem.normalize", "3 bands", "1", "use dataset"),
    "data.modalities.dem.scale=0": ("data.modalities.dem.scale", "= 0", "1 takes"),
    "data.train.optcal=x": ("data.train.optcal", "data.modalities", "did you mean 'optical'?"),
    "data.val={table: split.csv, split: val, optical: rgb, labels: label}": ("data.val.dem", "missing", "dem"),
    "data.train.labels=[]": ("data.train.labels", "[]", "glob, a file, a folder", "'train_labels/*.tif'"),
    "data.val.optical={a: 1}": ("data.val.optical", "{a: 1}", "text"),
    "data.val.optical='{split'": ("data.val.optical", "'{split'", "template", "{name}"),
    "data.val.revision=v1": ("data.val.revision", "by table (table, split, split_column, labels,", "key dataset"),
    "model.encoder.layers=[9, 5]": ("model.encoder.layers", "[9, 5]", "try [5, 9]"),
    "model.encoder.layers=[5, 5]": ("model.encoder.layers", "[5, 5]", "try [5]"),
    "model.encoder.layers=[0, 5]": ("model.encoder.layers.0", "= 0", "at least 1", "[3, 6, 9, 12]"),
    "model.encoder.layers=[6, 13]": ("model.encoder.layers", "[6, 13]", "12 blocks", "facebook/dinov2-small"),
    "model.encoder.checkpoint=facebook/sam-vit-base": (
        "model.encoder.checkpoint", "'facebook/sam-vit-base'", "set name: sam"
    ),
    "model.decoder={name: linear, channels: 9}": ("model.decoder.channels", "decoder linear", "known: name"),
    "train.focal_gamma=2": ("train.focal_gamma", "2.0", "drop it", "focal"),
    "train.class_weights={4: 2}": ("train.class_weights.4", "data.classes", "0, 1"),
    "train.augment.scale=[2, 1]": ("train.augment.scale", "[2.0, 1.0]", "try [1.0, 2.0]"),
    "train.augment.radiometry.optcal.hue=0.1": (
        "train.augment.radiometry.optcal", "data.modalities", "did you mean 'optical'?"
    ),
    "train.augment.radiometry.dem.hue=0.1": ("train.augment.radiometry.dem.hue", "0.1", "3 bands", "dem", "drop it"),
}  # fmt: skip


@pytest.mark.parametrize("override", WRONG)
def test_wrong_key_or_value_is_one_line_that_names_the_override(tmp_path: Path, override: str) -> None:
    (line,) = complaint(tmp_path, override)
    assert line.startswith(f", {override}: ")
    assert tells(line.removeprefix(f", {override}: "), *WRONG[override])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["train.loss={dice: 1}", "train.class_weights={1: 2}"],
            ("train.class_weights", "drop it", "cross_entropy or focal"),
        ),
        (
            ["model.adapter={name: none}", "train.optimizer.encoder_lr=1e-5"],
            ("train.optimizer.encoder_lr", "adapter none", "drop it"),
        ),
        (
            [
                "data.modalities={optical: {}}",
                "data.train={optical: a, labels: b}",
                "data.val=",
                "model.fusion.name=stack",
            ],
            ("model.fusion", "data.modalities", "one", "drop it"),
        ),
        (
            [
                "data.modalities={optical: {bands: [1, 2, 3]}}",
                "data.train={optical: a, labels: b}",
                "data.val=",
                "model.encoder.input=widen",
            ],
            ("model.encoder.input", "'widen'", "3 bands", "drop it"),
        ),
    ],
)
def test_key_that_the_chosen_parts_do_not_use_is_an_error(
    tmp_path: Path, overrides: list[str], parts: tuple[str, ...]
) -> None:
    (line,) = complaint(tmp_path, *overrides)
    before = next((f", {override}: " for override in overrides if line.startswith(f", {override}: ")), "")
    assert tells(line.removeprefix(before), *parts)


def test_wrong_encoder_shows_no_errors_of_other_families(tmp_path: Path) -> None:
    for override, parts in {
        "model.encoder.layer=[1]": ("model.encoder.layer", "encoder dinov2", "did you mean 'layers'?"),
        "model.encoder={name: sam}": ("model.encoder.checkpoint", "missing", "'facebook/sam-vit-base'"),
        "model.encoder.name=dino2": ("model.encoder.name", "'dino2'", "did you mean 'dinov2'?"),
        "model.encoder={layers: [1]}": ("model.encoder.name", "missing", "sam, dinov2, clip, builtin"),
        "model.adapter=lora": (
            "model.adapter",
            "'lora'",
            "(none, full, lora, adapter, mm_lora, mm_adapter)",
            "{name: 'lora'}",
        ),
    }.items():
        (line,) = complaint(tmp_path, override)
        assert tells(line.removeprefix(f", {override}: "), *parts)


def test_several_findings_are_one_line_each(tmp_path: Path) -> None:
    text = SMALL.replace("epochs: 2", "epoch: 2\n  batch_size: x") + "sede: 1\n"
    batch, epoch, seed = complaint(tmp_path, text=text)
    assert tells(batch, "train.batch_size", "'x'", "8")
    assert tells(epoch, "train.epoch", "'epochs'")
    assert tells(seed, "sede", "'seed'")
    overrides = ("data.ignore_index=0", "data.classes.1=land", "data.train.x=a")
    lines = complaint(tmp_path, *overrides)
    for line, override in zip(lines, overrides, strict=True):
        assert line.startswith(f", {override}: ")
        assert tells(line.removeprefix(f", {override}: "), override.partition("=")[0])


@pytest.mark.pitfall("C1")
def test_validation_and_test_scenes_are_not_training_scenes(tmp_path: Path) -> None:
    """A score on scenes that were trained on, or that chose the checkpoint, says nothing."""
    files = "{optical: %s, dem: dem/*.tif, labels: %s}"
    table = "{table: %s, split: %s, optical: rgb, dem: dem, labels: label}"
    dataset = "{dataset: %s, split: '%s', optical: rgb, dem: dem, labels: label}"
    same_files = files % ("other/*.tif", "./x/../train_labels/*.tif")
    (line,) = complaint(tmp_path, f"data.val={same_files}")
    assert tells(after(line), "data.val", f"data.train ({tmp_path}/train_labels/*.tif)", "give val")
    one_shared = files % ("other/*.tif", "[q/a.tif, train_labels/*.tif]")
    (line,) = complaint(tmp_path, f"data.test={one_shared}")
    assert tells(after(line), "data.test", "data.train")
    (line,) = complaint(tmp_path, f"data.test={table % ('./split.csv', 'val')}")
    assert tells(after(line), "data.test", f"data.val (split val of {tmp_path}/split.csv)")
    for train, val in (("train", "train"), ("train", "train[:10%]"), ("train+extra", "extra")):
        overrides = [f"data.{name}={dataset % ('owner/x', split)}" for name, split in (("train", train), ("val", val))]
        (line,) = complaint(tmp_path, *overrides)
        assert tells(after(line), "data.val", "data.train (split ")


@pytest.mark.pitfall("C1")
def test_scenes_of_their_own_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(SMALL)
    table = "data.{}={{table: split.csv, split: {}, optical: rgb, dem: dem, labels: label}}"
    dataset = "data.{}={{dataset: owner/x, split: '{}', optical: rgb, dem: dem, labels: label}}"
    load_recipe(tmp_path / "lora.yaml", [table.format("train", "train"), table.format("test", "test")])
    load_recipe(tmp_path / "lora.yaml", [dataset.format("train", "train[:80%]"), dataset.format("val", "train[80%:]")])


@pytest.mark.parametrize("name", ["labels", "table", "dataset", "split", "split_column", "revision", "config"])
def test_modality_must_not_be_called_like_a_key_of_sources(tmp_path: Path, name: str) -> None:
    lines = complaint(tmp_path, f"data.modalities.{name}={{}}")
    assert any(tells(after(line), f"data.modalities.{name}", f"try {name}_image") for line in lines)


@pytest.mark.parametrize("name", ["my-rgb", "class", "2018"])
def test_modality_must_be_a_plain_name(tmp_path: Path, name: str) -> None:
    lines = complaint(tmp_path, text=SMALL.replace("dem:", f'"{name}":'))
    assert any(tells(line, f"data.modalities.{name}", "plain name", "letters, digits and _") for line in lines)


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, text=SMALL.replace("classes: {0: land", "classes: {0: land: x"))
    assert line.startswith("line 3, column ")
    assert "check indentation" in line
    (line,) = complaint(tmp_path, text="a: 1\n\tb: 2\n")
    assert line.startswith("line 2, column 1: ")


def test_key_written_twice_is_refused(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, text=SMALL + "name: again\n")
    assert tells(line, "line 14, column 1", "'name'", "keep one")
    (line,) = complaint(tmp_path, text=SMALL.replace("{0: land, 1: water}", "{0: land, 0: water}"))
    assert tells(line, "line 3, column 22", "'0'", "keep one")
    (line,) = complaint(tmp_path, "train.loss={dice: 1, dice: 2}")
    assert tells(after(line), "line 1, column 11", "'dice'", "keep one")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("is empty", "name, data, model, output_dir")),
        ("# only a comment\n", ("is empty", "name, data, model, output_dir")),
        ("- a\n- b\n", ("holds", "['a', 'b']", "mapping", "name, data, model, output_dir")),
        (b"name: caf\xe9\n", ("byte 9", "save the recipe as UTF-8")),
        (b"name: a\x00b\n", ("not readable as YAML", "character")),
        ("a: !!python/object/apply:os.system ['true']\n", ("line 1, column 4", "constructor")),
        ("[" * 600, ("line 1, column 33", "nested")),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, text: str | bytes, parts: tuple[str, ...]) -> None:
    (line,) = complaint(tmp_path, text=text)
    assert tells(line, *parts)


@pytest.mark.parametrize("text", ["name: &a [*a]\n", "name: &a {name: *a}\n", "a: &a\n  b: {c: *a}\n"])
def test_anchor_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    (line,) = complaint(tmp_path, text=text)
    assert line.startswith(f"line {text.count(chr(10), 0, text.index('&')) + 1}, column ")
    assert "recursive" in line


def test_pattern_without_quotes_is_told_about_them(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "data.train.optical=*.tif")
    assert line.endswith('text that starts with * needs quotes: "*.tif"')
    (line,) = complaint(tmp_path, text=SMALL.replace("train/*.tif", "*.tif"))
    assert line.startswith("line 5, column ")
    assert line.endswith('text that starts with * needs quotes: "*.tif"')


def test_keys_that_local_files_do_not_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "set.parquet").touch()
    (line,) = complaint(tmp_path, "model.encoder.checkpoint=vit", "model.encoder.revision=main")
    assert tells(after(line), "model.encoder.revision", f"{tmp_path}/vit", "hub id", "drop it")
    source = "data.test={dataset: %s, split: test, optical: rgb, dem: dem, labels: mask, revision: v1, config: small}"
    one, two = complaint(tmp_path, source % "set.parquet")
    assert tells(after(one), "data.test.revision", f"{tmp_path}/set.parquet", "hub id", "drop it")
    assert tells(after(two), "data.test.config", f"{tmp_path}/set.parquet", "single file", "drop it")
    (line,) = complaint(tmp_path, source % "./vit")  # a folder may have configs
    assert tells(after(line), "data.test.revision")


def test_gradient_checkpointing_without_gradients_in_the_encoder_is_refused(tmp_path: Path) -> None:
    three = SMALL.replace("{optical: {bands: [1, 2, 3]}, dem: {bands: [1]}}", "{optical: {bands: [1, 2, 3]}}")
    three = three.replace(" dem: dem/*.tif,", "").replace(" dem: dem,", "")
    (line,) = complaint(tmp_path, "train.gradient_checkpointing=true", "model.adapter={name: none}", text=three)
    assert tells(after(line), "train.gradient_checkpointing", "adapter none", "drop it")
    # a stem for a fourth band learns through the encoder
    (tmp_path / "lora.yaml").write_text(SMALL)
    load_recipe(tmp_path / "lora.yaml", ["train.gradient_checkpointing=true", "model.adapter={name: none}"])


@pytest.mark.parametrize("template", ["i/{id:03d}.tif", "i/{id:{split}}.tif", "i/{id:.tif"])
def test_template_that_no_text_can_fill_is_refused(tmp_path: Path, template: str) -> None:
    (line,) = complaint(tmp_path, f"data.val.optical='{template}'")
    assert tells(after(line), "data.val.optical", template, "template", "{name}")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: .*check its name"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=rf"{tmp_path.name}: .*folder.*YAML file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs", ("override", "'train.epochs'", "key.path=value", "train.epochs=3")),
        ("=3", ("override", "'=3'", "key.path=value", "train.epochs=3")),
        ("train..epochs=3", ("override", "'train..epochs=3'", "key.path=value", "train.epochs=3")),
        ("train.epochs=[1", ("line 1, column 3", "']'")),
        ("name.x=3", ("name", "'flood'", "name=...")),
        ("model.encoder.name.x=3", ("model.encoder.name", "'dinov2'", "model.encoder.name=")),
    ],
)
def test_override_with_wrong_syntax(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    (line,) = complaint(tmp_path, override)
    assert line.startswith(("override ", f", {override}: "))
    assert tells(line.removeprefix(f", {override}: "), *parts)


def test_checkpoint_that_is_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "model.encoder.checkpoint=weights/vit/small")
    assert tells(after(line), "model.encoder.checkpoint", "hub id (owner/name)", f"{tmp_path}/weights/vit/small")


def test_module_command_ends_with_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "vfmseg.recipe", "check", "lora.yaml"]
    done = subprocess.run([*command, "train.epoch=3"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert tells(line, "vfmseg: lora.yaml, train.epoch=3: train.epoch", "did you mean 'epochs'?")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert "epochs: 2" in done.stdout
