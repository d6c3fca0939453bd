"""Segmenters of strangers: whatever their JSON and tensors hold, each ends in one message, or loads as it was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import an_input, recipe_dict, save_encoder, write_recipe
from safetensors.torch import load_file, save_file

from vfmseg.build.model import build_model
from vfmseg.catalog import published_statistics
from vfmseg.checkpoint import reading as checkpoint
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.checkpoint.writing import save_segmenter
from vfmseg.encoders.build import build_backbone, build_stem
from vfmseg.errors import CheckpointError, RecipeError, VfmsegError
from vfmseg.recipe import load_recipe

DEEP = "[" * 200_000
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3.0, 1e400, float("nan"), 10**30, "", "x", "3", "x" * 10**5, [], [[]], [None], {}, {"a": {}},
    [1, 2],
)  # fmt: skip


def make(root: Path, adapter: dict[str, Any], normalize: str) -> Path:
    """A segmenter as a run writes it, never trained."""
    recipe = recipe_dict(root / "data", root / "encoder", root / "run")
    recipe["model"]["adapter"] = adapter
    recipe["data"]["modalities"] = {"rgb": {"bands": [1, 2, 3], "normalize": normalize}}
    loaded = load_recipe(write_recipe(root / "r.yaml", recipe))
    inputs = (an_input(mean=90.0, std=40.0) if normalize == "dataset" else an_input(),)
    save_segmenter(root / adapter["name"], build_model(loaded, inputs), loaded, inputs, {"epoch": 1})
    return root / adapter["name"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("segmenters")
    save_encoder(root / "encoder", "dinov2")
    kinds = {"lora": "dataset", "full": "encoder", "adapter": "encoder"}
    return {name: make(root, {"name": name}, normalize) for name, normalize in kinds.items()}


@pytest.fixture(autouse=True)
def _encoder_once(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the base encoder takes most of the time of loading, and is tested elsewhere."""
    record = load_recipe(made["lora"] / "recipe.yaml")
    once = checkpoint.published_backbone(record)
    monkeypatch.setattr(checkpoint, "published_backbone", lambda *_, **__: copy.deepcopy(once))


def copied(folder: Path, target: Path) -> Path:
    """A copy without digests, which whoever means harm would make anew."""
    shutil.copytree(folder, target)
    record = json.loads((target / "segmenter.json").read_text())
    del record["files"], record["sha256"]
    (target / "segmenter.json").write_text(json.dumps(record))
    return target


def mutants(value: Any, odds: tuple[Any, ...], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each place of a JSON value with each odd value, and each key left out."""
    for odd in odds:
        yield path, odd
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), ...
        yield from mutants(inner, odds, (*path, key))


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if odd is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return result


def try_all(file: Path, folder: Path, parts: tuple[str, ...], odds: tuple[Any, ...] = ODD) -> tuple[int, int]:
    """Load the folder with each mutant of the named parts of a JSON file: (mutants, refused)."""
    content = json.loads(file.read_text())
    tried = refused = 0
    for path, odd in mutants(content, odds):
        if not path or path[0] in parts:
            tried += 1
            file.write_text(json.dumps(changed(content, path, odd)))
            try:
                load_segmenter(folder)
            except VfmsegError as error:
                refused += 1
                assert len(str(error)) < 2000, (path, odd)  # noqa: PT017
    file.write_text(json.dumps(content))
    load_segmenter(folder)
    return tried, refused


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.pitfall("F11")
def test_every_odd_record_is_one_message_or_loads(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = copied(made[kind], tmp_path / "s")
    tried, refused = try_all(folder / "segmenter.json", folder, ("format", "input", "encoder"))
    assert tried > 200
    assert refused > tried // 2


@pytest.mark.pitfall("F11")
def test_every_odd_adapter_config_is_one_message_or_loads(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["lora"], tmp_path / "s")
    keys = ("peft_type", "r", "target_modules", "rank_pattern", "auto_mapping")
    odd = (None, 3.0, float("nan"), "x" * 10**5, [], [[]], {"a": {}}, [1, 2])
    tried, refused = try_all(folder / "adapters" / "rgb" / "adapter_config.json", folder, keys, odd)
    assert tried > 50
    assert refused > tried // 2


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bands", [3.0, -3, 0, None, "3", True, 4, 10**6, [3]]),
        ("dtype", [None, 3, [], "", "x" * 100]),
        ("normalize", [None, "encoder", 3, []]),
        ("statistics", [
            None, [], [[1, 2, 3]], [[1, 2], [1, 2]], [[1, 2, 3], [1, 2, 0]], [[1, 2, 3], [1, 2, -4]],
            [[1, 2, 3], [1, 2, float("nan")]], [[1, 2, float("inf")], [1, 2, 3]], [["1", 2, 3], [1, 2, 3]],
            [[1, 2, 3], [1, 2, True]], [[1, 2, 3], [1, 2, 1e-45]], [[10**400, 2, 3], [1, 2, 3]], "abc", {"0": 1},
        ]),
    ],
)  # fmt: skip
@pytest.mark.pitfall("F11")
def test_what_decides_how_pixels_are_read_is_checked(
    made: dict[str, Path], tmp_path: Path, key: str, values: list[Any]
) -> None:
    folder = copied(made["lora"], tmp_path / "s")
    content = json.loads((folder / "segmenter.json").read_text())
    words = rf"segmenter\.json: input\.rgb\.{key} = .*; expected .* copy it again"
    for value in values:
        (folder / "segmenter.json").write_text(json.dumps(changed(content, ("input", "rgb", key), value)))
        with pytest.raises(CheckpointError, match=words):
            load_segmenter(folder)


@pytest.mark.parametrize("value", [None, 3, "", "x", "0" * 63, ["0" * 64], True])
@pytest.mark.pitfall("F11")
def test_the_hash_of_the_encoder_is_a_hash(made: dict[str, Path], tmp_path: Path, value: Any) -> None:
    folder = copied(made["lora"], tmp_path / "s")
    content = json.loads((folder / "segmenter.json").read_text())
    (folder / "segmenter.json").write_text(json.dumps(changed(content, ("encoder", "sha256"), value)))
    with pytest.raises(CheckpointError, match=r"segmenter\.json: encoder\.sha256 = "):
        load_segmenter(folder)


@pytest.mark.parametrize("name", ["segmenter.json", "adapters/rgb/adapter_config.json", "recipe.yaml"])
@pytest.mark.parametrize("text", ["", "[]", "3", "null", "\x00", DEEP, '{"a": ' * 200_000, "9" * 5000, '"x"'])
@pytest.mark.pitfall("F11")
def test_files_that_hold_something_else_are_one_message(
    made: dict[str, Path], tmp_path: Path, name: str, text: str
) -> None:
    folder = copied(made["lora"], tmp_path / "s")
    (folder / name).write_text(text)
    with pytest.raises(VfmsegError, match=name.rpartition("/")[2].replace(".", r"\.") + r"|the adapter cannot be read"):
        load_segmenter(folder)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("lora", "head.safetensors"),
        ("lora", "adapters/rgb/adapter_model.safetensors"),
        ("adapter", "adapters/rgb/adapter.safetensors"),
        ("full", "encoder.safetensors"),
    ],
)
@pytest.mark.pitfall("F11")
def test_tensors_are_weights_as_training_writes_them(
    made: dict[str, Path], tmp_path: Path, kind: str, file: str
) -> None:
    folder = copied(made[kind], tmp_path / "s")
    metadata = {"scale": "0.1"}
    tensors = load_file(folder / file)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float64):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / file, metadata)
        with pytest.raises(CheckpointError, match=rf"{file}: \d+ tensors of type \w+ instead of float"):
            load_segmenter(folder)
    for number in (float("nan"), float("inf")):
        wrong = {name: tensor.clone() for name, tensor in tensors.items()}
        wrong[sorted(wrong)[-1]].view(-1)[0] = number
        save_file(wrong, folder / file, metadata)
        with pytest.raises(CheckpointError, match=rf"{file}: 1 tensors with NaN or infinity"):
            load_segmenter(folder)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # may be stored in half, as models often are
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / file, metadata)
        load_segmenter(folder)


@pytest.mark.pitfall("F11")
def test_the_head_holds_no_negative_std(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["lora"], tmp_path / "s")
    tensors = load_file(folder / "head.safetensors")
    for factor in (-1.0, 0.0):
        std = "stems.of_rgb.std"
        save_file({**tensors, std: factor * tensors[std]}, folder / "head.safetensors")
        with pytest.raises(CheckpointError, match=r"head\.safetensors: std of a modality must be above 0"):
            load_segmenter(folder)


@pytest.mark.pitfall("F11")
def test_the_order_of_modalities_in_the_record_means_nothing(tmp_path: Path) -> None:
    from vfmseg.checkpoint.record import inputs_in

    recipe = recipe_dict(tmp_path, tmp_path, tmp_path / "run")
    recipe["data"]["modalities"] = {"rgb": {"bands": [1, 2, 3]}, "dem": {"bands": [1]}}
    for split in ("train", "val", "test"):
        recipe["data"][split]["dem"] = f"{split}.tif"
    loaded = load_recipe(write_recipe(tmp_path / "r.yaml", recipe))
    one = {"bands": 1, "dtype": "float32", "normalize": "dataset", "statistics": [[5], [2]]}
    three = {"bands": 3, "dtype": "uint8", "normalize": "encoder", "statistics": None}
    inputs = inputs_in(tmp_path / "segmenter.json", {"input": {"dem": one, "rgb": three}}, loaded)
    assert [one.name for one in inputs] == ["rgb", "dem"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [float("nan"), 0.5, 0.5]),
        ("image_mean", [1e400, 0.5, 0.5]),
        ("image_mean", [10**400, 0.5, 0.5]),
        ("image_std", [float("nan"), 0.5, 0.5]),
        ("image_std", [0.5, float("nan"), 0.5]),
        ("image_std", [0.5, -0.5, 0.5]),
        ("image_std", [1e400, 0.5, 0.5]),
    ],
)
@pytest.mark.pitfall("F11")
def test_published_statistics_are_numbers(tmp_path: Path, key: str, value: list[float]) -> None:
    content = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3} | {key: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: .*copy the folder again"):
        published_statistics("dinov2", str(tmp_path))


@pytest.mark.parametrize(("mean", "std"), [(1e400, 2.0), (float("nan"), 2.0), (1.0, float("nan")), (1.0, 1e400)])
@pytest.mark.pitfall("F11")
def test_statistics_of_callers_are_numbers(mean: float, std: float) -> None:
    with pytest.raises(RecipeError, match="expected one finite mean and one std above 0"):
        build_stem(build_backbone("builtin", None), {"x": 4}, [1.0, 1.0, mean, 1.0], [1.0, 1.0, std, 1.0])


@pytest.mark.parametrize("upscale", [1e6, float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.pitfall("F6")
def test_upscale_of_callers_is_bounded_too(upscale: float) -> None:
    with pytest.raises(RecipeError, match=r"model\.encoder\.upscale = .* must be above 0 and at most 16"):
        build_stem(build_backbone("builtin", None), {"x": 3}, [1.0] * 3, [1.0] * 3, upscale)
