"""Recipes that are wrong: one line for each finding, with the file, the key, what was found, and what to do."""

from __future__ import annotations

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


def test_unknown_key_names_the_nearest_valid_one(tmp_path: Path) -> None:
    text = SMALL.replace("epochs: 2", "epoch: 2")
    assert complaint(tmp_path, text=text) == ["train.epoch is not a key here; did you mean 'epochs'?"]
    text = SMALL.replace("output_dir", "outputdir")
    assert complaint(tmp_path, text=text)[0] == (
        "output_dir is missing (is 'outputdir' meant?); for example 'runs/flood'"
    )


# override -> what the line says after the place; each is the whole complaint
WRONG = {
    "train.epoch=3": "train.epoch is not a key here; did you mean 'epochs'?",
    "trian.epochs=3": "trian is not a key here; did you mean 'train'?",
    "model.adapter.rnak=3": "model.adapter.rnak is not a key of adapter lora; did you mean 'rank'?",
    "data.modalities.dem.band=[1]": "data.modalities.dem.band is not a key here; did you mean 'bands'?",
    "train.loss={dise: 1}": "train.loss.dise is not a key here; did you mean 'dice'?",
    "train.epochs=ten": "train.epochs = 'ten' must be a whole number; the default is 30",
    "train.epochs=2.5": "train.epochs = 2.5 must be a whole number; the default is 30",
    "train.epochs=true": "train.epochs = true must be a whole number; the default is 30",
    "train.epochs=0": "train.epochs = 0 must be at least 1; the default is 30",
    "train.optimizer.lr=fast": "train.optimizer.lr = 'fast' must be a number; the default is 0.0003",
    "train.optimizer.lr=.inf": "train.optimizer.lr = inf must be a finite number; the default is 0.0003",
    "train.augment.flip=yes": "train.augment.flip = 'yes' must be true or false; the default is true",
    "train.precision=fp8": "train.precision = 'fp8' must be 'no', 'fp16' or 'bf16'; the default is 'no'",
    "train.precision=false": "train.precision = false must be 'no', 'fp16' or 'bf16'; put it in quotes: \"no\"",
    "predict.blend=han": "predict.blend = 'han' must be 'hann', 'gaussian', 'average' or 'none'; did you mean 'hann'?",
    "predict.overlap=64": "predict.overlap = 64 must be below 0.9; the default is 0.25",
    "predict.overlap=0.9": "predict.overlap = 0.9 must be below 0.9; the default is 0.25",
    "predict.overlap=-0.1": "predict.overlap = -0.1 must be at least 0; the default is 0.25",
    "predict.scales=[9]": "predict.scales.0 = 9 must be at most 8; the default is [1.0]",
    "data.tile=0": "data.tile = 0 must be at least 1; the default is 256",
    "data.tile=99999999999999999999": "data.tile = 99999999999999999999 must be at most 65536; the default is 256",
    "predict.tile=65537": "predict.tile = 65537 must be at most 65536; for example 512",
    "data.ignore_index=9999999999": "data.ignore_index = 9999999999 must be below 2.14748e+09; the default is 255",
    "data.samples_per_epoch=many": "data.samples_per_epoch = 'many' must be a whole number; for example 500",
    "name=3": "name = 3 must be text; put it in quotes",
    "output_dir=s3://bucket/run": "output_dir = 's3://bucket/run' must be a path on this machine; "
    "for example 'runs/flood'",
    f"data.classes.{'9' * 5000}=x": f"data.classes has the key '{'9' * 56}..., which must be a whole number; "
    "for example {0: 'land', 1: 'water'}",
    "output_dir=": "output_dir = null must be a path; for example 'runs/flood'",
    "train.optimizer=1": "train.optimizer = 1 must be a mapping (keys: lr, encoder_lr, weight_decay, warmup)",
    "data.classes={0: land}": "data.classes = {0: 'land'} must have 2 or more entries; "
    "for example {0: 'land', 1: 'water'}",
    "data.classes.x=ice": "data.classes has the key 'x', which must be a whole number; "
    "for example {0: 'land', 1: 'water'}",
    "data.classes.1=land": "data.classes.1 = 'land' is already the name of class 0; give every class its own name",
    'data.classes.1="w\\tx"': r"data.classes.1 = 'w\tx' holds a control character; write the name without it",
    'data.classes.1={name: "w\\0x"}': r"data.classes.1 = 'w\x00x' holds a control character; "
    "write the name without it",
    'data.classes.1="w\\nx"': r"data.classes.1.name = 'w\nx' must be one line of text without blanks at its ends",
    "data.classes.1={name: w, color: [0, 0, 300]}": "data.classes.1.color.2 = 300 must be at most 255; "
    "for example [230, 80, 60]",
    "data.ignore_index=1": "data.ignore_index = 1 must not be a class id (0, 1); try 255, or drop the class",
    "data.modalities.dem.bands=[0]": "data.modalities.dem.bands.0 = 0 must be at least 1; for example [1, 2, 3]",
    "data.modalities.dem.normalize=encoder": "data.modalities.dem.normalize = 'encoder' needs 3 bands "
    "(red, green, blue), not 1; use dataset",
    "data.modalities.dem.scale=0": "data.modalities.dem.scale = 0 must not be 0: it would erase the image; "
    "1 takes stored numbers as they are",
    "data.train.optcal=x": "data.train.optcal is not one of data.modalities; did you mean 'optical'?",
    "data.val={table: split.csv, split: val, optical: rgb, labels: label}": "data.val.dem is missing; "
    "say where the images of modality dem are",
    "data.train.labels=[]": "data.train.labels = [] must be a glob, a file, a folder, or a list of files; "
    "for example 'train_labels/*.tif'",
    "data.val.optical={a: 1}": "data.val.optical = {a: 1} must be text",
    "data.val.optical='{split'": "data.val.optical = '{split' is not a template: expected '}' before end of string; "
    "write columns as {name}",
    "data.val.revision=v1": "data.val.revision is not a key of a source by table (table, split, split_column, labels, "
    "and one key per modality); a source by table has the key table, one by data set the key dataset",
    "model.encoder.layers=[9, 5]": "model.encoder.layers = [9, 5] must rise from shallow to deep; try [5, 9]",
    "model.encoder.layers=[5, 5]": "model.encoder.layers = [5, 5] must rise from shallow to deep; try [5]",
    "model.encoder.layers=[0, 5]": "model.encoder.layers.0 = 0 must be at least 1; for example [3, 6, 9, 12]",
    "model.encoder.layers=[6, 13]": "model.encoder.layers = [6, 13] reaches beyond the 12 blocks of "
    "facebook/dinov2-small",
    "model.encoder.checkpoint=facebook/sam-vit-base": "model.encoder.checkpoint = 'facebook/sam-vit-base' is a sam "
    "checkpoint; set name: sam",
    "model.decoder={name: linear, channels: 9}": "model.decoder.channels is not a key of decoder linear; known: name",
    "train.focal_gamma=2": "train.focal_gamma = 2.0 is used by no loss; drop it, or add focal",
    "train.class_weights={4: 2}": "train.class_weights.4 is not a class id; data.classes has 0, 1",
    "train.augment.scale=[2, 1]": "train.augment.scale = [2.0, 1.0] must be [smallest, largest]; try [1.0, 2.0]",
    "train.augment.radiometry.optcal.hue=0.1": "train.augment.radiometry.optcal is not one of data.modalities; "
    "did you mean 'optical'?",
    "train.augment.radiometry.dem.hue=0.1": "train.augment.radiometry.dem.hue = 0.1 needs 3 bands, but dem has 1; "
    "drop it",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_key_or_value_is_one_line_that_names_the_override(tmp_path: Path, override: str) -> None:
    assert complaint(tmp_path, override) == [f", {override}: {WRONG[override]}"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["train.loss={dice: 1}", "train.class_weights={1: 2}"],
            "train.class_weights is used by no loss; drop it, or add cross_entropy or focal",
        ),
        (
            ["model.adapter={name: none}", "train.optimizer.encoder_lr=1e-5"],
            "train.optimizer.encoder_lr is not used: adapter none lets nothing in the encoder learn; drop it",
        ),
        (
            [
                "data.modalities={optical: {}}",
                "data.train={optical: a, labels: b}",
                "data.val=",
                "model.fusion.name=stack",
            ],
            "model.fusion is not used: data.modalities has only one modality; drop it",
        ),
        (
            [
                "data.modalities={optical: {bands: [1, 2, 3]}}",
                "data.train={optical: a, labels: b}",
                "data.val=",
                "model.encoder.input=widen",
            ],
            "model.encoder.input = 'widen' is not used: 3 bands enter as published; drop it",
        ),
        (
            ["model.encoder={name: builtin}"],
            "model.adapter = 'lora' does not fit the builtin encoder, which has no pretrained weights yet and must "
            "learn as a whole; use {name: full}",
        ),
    ],
)
def test_key_that_the_chosen_parts_do_not_use_is_an_error(tmp_path: Path, overrides: list[str], line: str) -> None:
    (found,) = complaint(tmp_path, *overrides)
    assert found.endswith(f": {line}") or found == line


def test_wrong_encoder_shows_no_errors_of_other_families(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "model.encoder.layer=[1]")
    assert line.endswith(": model.encoder.layer is not a key of encoder dinov2; did you mean 'layers'?")
    (line,) = complaint(tmp_path, "model.encoder={name: sam}")
    assert line.endswith(": model.encoder.checkpoint is missing; for example 'facebook/sam-vit-base'")
    (line,) = complaint(tmp_path, "model.encoder.name=dino2")
    assert line.endswith(": model.encoder.name = 'dino2' is not known here; did you mean 'dinov2'?")
    (line,) = complaint(tmp_path, "model.encoder={layers: [1]}")
    assert line.endswith(": model.encoder.name is missing; one of sam, dinov2, clip, builtin")
    (line,) = complaint(tmp_path, "model.adapter=lora")
    assert line.endswith(
        ": model.adapter = 'lora' must be a mapping with a name (none, full, lora, adapter); for example {name: 'lora'}"
    )


def test_several_findings_are_one_line_each(tmp_path: Path) -> None:
    text = SMALL.replace("epochs: 2", "epoch: 2\n  batch_size: x") + "sede: 1\n"
    assert complaint(tmp_path, text=text) == [
        "train.batch_size = 'x' must be a whole number; the default is 8",
        "train.epoch is not a key here; did you mean 'epochs'?",
        "sede is not a key here; did you mean 'seed'?",
    ]
    assert complaint(tmp_path, "data.ignore_index=0", "data.classes.1=land", "data.train.x=a") == [
        ", data.ignore_index=0: data.ignore_index = 0 must not be a class id (0, 1); try 255, or drop the class",
        ", data.classes.1=land: data.classes.1 = 'land' is already the name of class 0; give every class its own name",
        ", data.train.x=a: data.train.x is not one of data.modalities; known: optical, dem",
    ]


@pytest.mark.pitfall("C1")
def test_validation_and_test_scenes_are_not_training_scenes(tmp_path: Path) -> None:
    """A score on scenes that were trained on, or that chose the checkpoint, says nothing."""
    files = "{optical: %s, dem: dem/*.tif, labels: %s}"
    table = "{table: %s, split: %s, optical: rgb, dem: dem, labels: label}"
    dataset = "{dataset: %s, split: '%s', optical: rgb, dem: dem, labels: label}"
    same_files = files % ("other/*.tif", "./x/../train_labels/*.tif")
    (line,) = complaint(tmp_path, f"data.val={same_files}")
    assert f"data.val names the same scenes as data.train ({tmp_path}/train_labels/*.tif); give val" in line
    one_shared = files % ("other/*.tif", "[q/a.tif, train_labels/*.tif]")
    (line,) = complaint(tmp_path, f"data.test={one_shared}")
    assert "data.test names the same scenes as data.train" in line
    (line,) = complaint(tmp_path, f"data.test={table % ('./split.csv', 'val')}")
    assert f"data.test names the same scenes as data.val (split val of {tmp_path}/split.csv)" in line
    for train, val in (("train", "train"), ("train", "train[:10%]"), ("train+extra", "extra")):
        overrides = [f"data.{name}={dataset % ('owner/x', split)}" for name, split in (("train", train), ("val", val))]
        (line,) = complaint(tmp_path, *overrides)
        assert "data.val names the same scenes as data.train (split " in line


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
    assert any(f"data.modalities.{name} has a name that sources use themselves; try {name}_image" in x for x in lines)


@pytest.mark.parametrize("name", ["my-rgb", "class", "2018"])
def test_modality_must_be_a_plain_name(tmp_path: Path, name: str) -> None:
    lines = complaint(tmp_path, text=SMALL.replace("dem:", f'"{name}":'))
    assert any(f"data.modalities.{name} must be a plain name" in line for line in lines)


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, text=SMALL.replace("classes: {0: land", "classes: {0: land: x"))
    assert line.startswith("line 3, column ")
    assert "check indentation, colons, brackets and quotes" in line
    (line,) = complaint(tmp_path, text="a: 1\n\tb: 2\n")
    assert line.startswith("line 2, column 1: ")


def test_key_written_twice_is_refused(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, text=SMALL + "name: again\n")
    assert line == "line 14, column 1: the key 'name' is here a second time; keep one"
    (line,) = complaint(tmp_path, text=SMALL.replace("{0: land, 1: water}", "{0: land, 0: water}"))
    assert line == "line 3, column 22: the key '0' is here a second time; keep one"
    (line,) = complaint(tmp_path, "train.loss={dice: 1, dice: 2}")
    assert "the key 'dice' is here a second time" in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty; a recipe needs at least name, data, model, output_dir"),
        ("# only a comment\n", "is empty; a recipe needs at least name, data, model, output_dir"),
        ("- a\n- b\n", "holds ['a', 'b'], not a recipe; a recipe is a mapping with name, data, model, output_dir"),
        (b"name: caf\xe9\n", "byte 9 is not UTF-8 text; save the recipe as UTF-8"),
        (b"name: a\x00b\n", "not readable as YAML: unacceptable character"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1, column 4: could not determine a constructor"),
        ("[" * 600, "line 1, column 33: nested too deeply to be a recipe"),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, text: str | bytes, line: str) -> None:
    (found,) = complaint(tmp_path, text=text)
    assert found.startswith(line)


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
    assert f"model.encoder.revision is not used: {tmp_path}/vit is no hub id; drop it" in line
    source = "data.test={dataset: %s, split: test, optical: rgb, dem: dem, labels: mask, revision: v1, config: small}"
    one, two = complaint(tmp_path, source % "set.parquet")
    assert f"data.test.revision is not used: {tmp_path}/set.parquet is no hub id; drop it" in one
    assert f"data.test.config is not used: {tmp_path}/set.parquet is a single file; drop it" in two
    (line,) = complaint(tmp_path, source % "./vit")  # a folder may have configs
    assert "data.test.revision is not used" in line


def test_gradient_checkpointing_without_gradients_in_the_encoder_is_refused(tmp_path: Path) -> None:
    three = SMALL.replace("{optical: {bands: [1, 2, 3]}, dem: {bands: [1]}}", "{optical: {bands: [1, 2, 3]}}")
    three = three.replace(" dem: dem/*.tif,", "").replace(" dem: dem,", "")
    (line,) = complaint(tmp_path, "train.gradient_checkpointing=true", "model.adapter={name: none}", text=three)
    assert "train.gradient_checkpointing is not used: adapter none lets nothing in the encoder learn" in line
    # a stem for a fourth band learns through the encoder
    (tmp_path / "lora.yaml").write_text(SMALL)
    load_recipe(tmp_path / "lora.yaml", ["train.gradient_checkpointing=true", "model.adapter={name: none}"])


@pytest.mark.parametrize("template", ["i/{id:03d}.tif", "i/{id:{split}}.tif", "i/{id:.tif"])
def test_template_that_no_text_can_fill_is_refused(tmp_path: Path, template: str) -> None:
    (line,) = complaint(tmp_path, f"data.val.optical='{template}'")
    assert f"data.val.optical = '{template}' is not a template" in line
    assert line.endswith("write columns as {name}")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe file; check its name and the current folder$"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r": is a folder, not a recipe; name a YAML file$"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs", "override 'train.epochs' is not key.path=value; write for example train.epochs=3"),
        ("=3", "override '=3' is not key.path=value; write for example train.epochs=3"),
        ("train..epochs=3", "override 'train..epochs=3' is not key.path=value; write for example train.epochs=3"),
        ("train.epochs=[1", ", train.epochs=[1: line 1, column 3: expected ',' or ']'"),
        (
            "name.x=3",
            ", name.x=3: name = 'flood' has no keys below it; write name=... to replace it as a whole",
        ),
        (
            "model.encoder.name.x=3",
            ", model.encoder.name.x=3: model.encoder.name = 'dinov2' has no keys below it; write model.encoder.name=",
        ),
    ],
)
def test_override_with_wrong_syntax(tmp_path: Path, override: str, line: str) -> None:
    (found,) = complaint(tmp_path, override)
    assert found.startswith(line)


def test_checkpoint_that_is_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "model.encoder.checkpoint=weights/vit/small")
    assert f"must be a hub id (owner/name), or a folder or file; {tmp_path}/weights/vit/small does not exist" in line


def test_module_command_ends_with_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "vfmseg.recipe", "check", "lora.yaml"]
    done = subprocess.run([*command, "train.epoch=3"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    line = "vfmseg: lora.yaml, train.epoch=3: train.epoch is not a key here; did you mean 'epochs'?"
    assert done.stderr.splitlines() == [line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert "epochs: 2" in done.stdout
