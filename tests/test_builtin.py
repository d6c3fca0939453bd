"""The encoder in the box: what lies in the package, what learns of it, what a segmenter on it keeps, and what is told.

How large it is stands in its own config.json; nothing here knows.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import build_encoder, picture
from makers import (
    MAE_DECODER,
    NEW_ENCODER,
    ROOT,
    an_input,
    image_and_heights,
    images_of,
    pretrain_recipe,
    recipe_dict,
    save_encoder,
    toy_folder,
    toy_scene,
    write_raster,
    write_recipe,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.build.model import build_model
from vfmseg.catalog import BUILTIN, FAMILIES
from vfmseg.checkpoint import writing
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.encoders import builtin
from vfmseg.encoders.backbone import quarter_points, sha256_of
from vfmseg.encoders.build import build_backbone
from vfmseg.encoders.builtin import FOLDER
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.model import Network
from vfmseg.pretrain import pretrain
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter

CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
LORA = {"name": "lora", "rank": 2}


@pytest.fixture(scope="module")
def upstream() -> Any:
    """What transformers reads in the folder, in float32."""
    from transformers.models.dinov2 import Dinov2Model

    return Dinov2Model.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("builtin"), {"train": 2, "val": 1, "test": 1})


def content_of(scenes: Path, run: Path, adapter: dict[str, Any]) -> dict[str, Any]:
    content = recipe_dict(scenes, None, run)
    content["model"]["adapter"] = adapter
    content["data"]["samples_per_epoch"] = 4
    content["train"]["epochs"] = 1
    return content


@pytest.fixture(scope="module")
def trained(scenes: Path) -> tuple[Network, Path]:
    """A model with LoRA as it was in memory after training, and the folder of the segmenter."""
    kept: list[Network] = []
    original = writing.save_segmenter

    def save(folder: Path, model: Network, *more: Any) -> None:
        kept.append(model)
        original(folder, model, *more)

    recipe = write_recipe(scenes / "lora.yaml", content_of(scenes, scenes / "run", LORA))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "save_segmenter", save)
        finetune(load_recipe(recipe))
    return kept[-1].eval(), scenes / "run" / "best"


def copied(folder: Path) -> Path:
    """The encoder in the box at another place, to be spoilt."""
    shutil.copytree(FOLDER, folder)
    return folder


def changed(folder: Path) -> Path:
    """Another encoder of the same shape, as another version of vfmseg may bring."""
    tensors = load_file(copied(folder) / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    return folder


# --------------------------------------------------------------------------------------------------- what is in the box


def test_it_answers_as_transformers_does(upstream: Any) -> None:
    patch, depth = CONFIG["patch_size"], CONFIG["num_hidden_layers"]
    encoder = build_encoder("builtin", None)
    assert encoder.backbone.layers == quarter_points(depth)
    images, valid = picture(4 * patch, 6 * patch, batch=2)
    with torch.no_grad():
        found = encoder(images, valid).maps
        mean, std = (torch.tensor(values)[:, None, None] for values in FAMILIES["builtin"].statistics)
        states = upstream((images / 255 - mean) / std, output_hidden_states=True)
        for layer, map_ in zip(encoder.backbone.layers, found, strict=True):
            expected = upstream.layernorm(states.hidden_states[layer])[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
            assert expected.shape == (2, CONFIG["hidden_size"], 4, 6)
            torch.testing.assert_close(map_, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.pitfall("P13")
def test_its_record_is_its_name_and_its_tensors_in_float32(upstream: Any) -> None:
    base = build_backbone("builtin", None, layers=[1]).base
    assert (base.id, base.revision) == ("builtin", None)
    assert base.sha256 == sha256_of(upstream.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in upstream.state_dict().values())


def test_it_is_small_and_in_half_precision_and_has_a_card() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 14_000_000
    assert {tensor.dtype for tensor in load_file(FOLDER / "model.safetensors").values()} == {torch.float16}
    assert (FOLDER / "README.md").read_text(encoding="utf-8").startswith("# ")


def test_the_catalog_tells_what_it_is() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    said = (BUILTIN.patch, BUILTIN.width, BUILTIN.depth, BUILTIN.parameters, BUILTIN.loads_with)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert said == (
        CONFIG["patch_size"], CONFIG["hidden_size"], CONFIG["num_hidden_layers"], parameters, *CONFIG["architectures"]
    )  # fmt: skip
    assert (BUILTIN.mean, BUILTIN.std) == FAMILIES["builtin"].statistics


def test_a_wheel_holds_it() -> None:
    """What pyproject.toml declares, found as setuptools finds it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (patterns,) = re.findall(r"^\[tool\.setuptools\.package-data\]\nvfmseg = (\[.*\])$", text, re.M)
    packed = {path for pattern in json.loads(patterns) for path in (ROOT / "vfmseg").glob(pattern)}
    assert set((ROOT / "vfmseg" / "assets" / "builtin").iterdir()) <= packed


# --------------------------------------------------------------------------------------------------------- what learns


def contents(tensors: Iterable[Tensor]) -> list[str]:
    """What tensors hold, whatever they are called and in whatever order they come."""
    return sorted(sha256_of({"": tensor}) for tensor in tensors)


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.pitfall("C6")
def test_only_what_the_adapter_says_learns(upstream: Any, scenes: Path, tmp_path: Path, adapter: str) -> None:
    content = content_of(scenes, tmp_path / "run", {"name": adapter})
    several = adapter.startswith("mm_")  # which are for several modalities
    names = ("rgb", "dem") if several else ("rgb",)
    content["data"] |= {"modalities": {name: {} for name in names}}
    for split in ("train", "val", "test"):
        content["data"][split] |= dict.fromkeys(names, f"{scenes}/{split}/images/*.tif")
    content["model"] |= {"fusion": {"name": "linear"}} if several else {}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    model = build_model(recipe, tuple(an_input(name) for name in names))
    sha256 = model.backbone.base.sha256
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.01, weight_decay=0.1)
    images, valid = picture(50, 40, batch=2)
    for _ in range(3):
        optimizer.zero_grad()
        given = images_of(dict.fromkeys(names, images), dict.fromkeys(names, valid[:, 0]))
        model.train()(given).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    parts = {part for part, tensors in model.parts().items() if moved & set(tensors)}
    learning = {"none": set(), "full": {"encoder"}}.get(adapter, {"adapter"})
    assert parts == {"decoder"} | learning | ({"fusion"} if several else set())
    published = upstream.state_dict()
    assert model.backbone.base.sha256 == sha256 == sha256_of(published)
    del published["embeddings.mask_token"]  # which no map depends on
    same = contents(model.parts()["encoder"].values()) == contents(published.values())
    assert same == (adapter != "full")


def test_a_modality_takes_it_for_itself(tmp_path: Path) -> None:
    place = image_and_heights(tmp_path)
    content = recipe_dict(place, save_encoder(place / "dinov2", "dinov2"), tmp_path / "run")
    for split in ("train", "val", "test"):
        content["data"][split] = {name: f"{place}/{split}/{name}/*.tif" for name in ("rgb", "dem", "labels")}
    content["data"] |= {"modalities": {"rgb": {}, "dem": {}}, "samples_per_epoch": 4}
    content["train"]["epochs"] = 1
    own = {"encoder": {"name": "builtin"}, "adapter": LORA}
    content["model"] |= {"fusion": {"name": "linear"}, "modalities": {"dem": own}}
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    loaded = load_segmenter(tmp_path / "run" / "best")
    assert loaded.record["encoders"]["dem"]["id"] == "builtin"
    assert loaded.model.own_encoders["dem"].backbone.base == build_backbone("builtin", None).base


# --------------------------------------------------------------------------------------- what a segmenter on it keeps


def answer(model: Network) -> Tensor:
    images, valid = picture(50, 70, batch=2)
    with torch.no_grad():
        return model(images_of({"rgb": images}, {"rgb": valid[:, 0]}))


@pytest.mark.pitfall("P6", "P13")
def test_a_segmenter_keeps_adapter_and_decoder_alone_and_answers_the_same(trained: tuple[Network, Path]) -> None:
    model, folder = trained
    encoder = json.loads((folder / "segmenter.json").read_text())["encoder"]
    base = build_backbone("builtin", None).base
    assert (encoder["id"], encoder["sha256"], encoder["stored"]) == ("builtin", base.sha256, False)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    assert set(files) == {"head.safetensors", "adapters/rgb/adapter_model.safetensors"}
    kept = sum(math.prod(tensor.shape) for path in files.values() for tensor in load_file(path).values())
    learned = sum(tensor.numel() for tensor in model.trainable().values())
    assert learned <= kept <= learned + 6  # mean and std of three bands
    for merge in (False, True):
        torch.testing.assert_close(answer(load_segmenter(folder, merge=merge).model), answer(model), atol=1e-4, rtol=0)
    build = build_model(load_segmenter(folder).recipe, (an_input(),))
    assert (answer(build.eval()) - answer(model)).abs().max() > 0.01  # not what an untrained one answers


def test_one_that_learns_as_a_whole_is_stored_whole(scenes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    content = content_of(scenes, tmp_path / "run", {"name": "full"})
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    best = tmp_path / "run" / "best"
    assert (best / "encoder.safetensors").is_file()
    expected = answer(load_segmenter(best).model)
    monkeypatch.setattr(builtin, "FOLDER", tmp_path / "nowhere")
    assert torch.equal(answer(load_segmenter(best).model), expected)


@pytest.mark.pitfall("P13")
def test_other_weights_in_the_box_are_told(trained: tuple[Network, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(builtin, "FOLDER", changed(tmp_path / "box"))
    with pytest.raises(CheckpointError) as caught:
        Segmenter.from_pretrained(trained[1])
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert "the base encoder builtin has SHA-256" in said
    assert "install the version that it was trained with (versions.vfmseg in" in said
    assert "pass encoder=FOLDER (--encoder FOLDER)" in said
    # and what it says helps: the weights of then, wherever they lie
    assert torch.equal(answer(load_segmenter(trained[1], encoder=str(FOLDER)).model), reference(trained[1]))
    with pytest.raises(CheckpointError, match="this checkpoint was trained on"):
        Segmenter.from_pretrained(trained[1], encoder=str(tmp_path / "box"))


def reference(folder: Path) -> Tensor:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(builtin, "FOLDER", FOLDER)
        return answer(load_segmenter(folder).model)


# --------------------------------------------------------------------------------------------- a broken installation


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (cut_short, "cannot be read as tensors"),
        (lacks_a_tensor, r"1 missing \(layernorm.weight\)"),
    ],
)
@pytest.mark.pitfall("P14", "P62")
def test_a_broken_installation_is_told_in_one_line(tmp_path: Path, monkeypatch: Any, spoil: Any, found: str) -> None:
    box = copied(tmp_path / "box")
    spoil(box)
    monkeypatch.setattr(builtin, "FOLDER", box)
    with pytest.raises(CheckpointError, match=found) as caught:
        build_backbone("builtin", None)
    said = str(caught.value)
    assert said.startswith(f"{box}: should hold the encoder that comes with vfmseg")
    assert "install vfmseg again" in said
    assert len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------ pretraining it


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    for number in range(2):
        write_raster(folder / "rgb" / f"{number}.tif", toy_scene(number)[0], origin=(500000 + 5000 * number, 5000000))
    return folder


@pytest.mark.parametrize("adapter", [{"name": "full"}, LORA])
def test_pretraining_goes_on_from_it_and_gives_a_dinov2_folder(
    unlabelled: Path, scenes: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    side = 4 * CONFIG["patch_size"]
    recipe = pretrain_recipe(
        unlabelled, tmp_path / "run", epochs=1,
        data={"modalities": {"rgb": {}}, "scenes": {"rgb": f"{unlabelled}/rgb/*.tif"}, "tile": side,
              "samples_per_epoch": 4},
        model={"encoder": {"name": "builtin"}, "adapter": adapter},
    )  # fmt: skip
    pretrain(recipe)
    best, before = tmp_path / "run" / "best", build_backbone("builtin", None)
    base = json.loads((best / "encoder.json").read_text())["base"]
    assert (base["id"], base["sha256"]) == ("builtin", before.base.sha256)
    after = build_backbone("dinov2", str(best)).network.state_dict()
    assert after.keys() == before.network.state_dict().keys()
    still = [name for name, tensor in before.network.state_dict().items() if torch.equal(tensor, after[name])]
    assert ("embeddings.cls_token" in still) == (adapter["name"] == "lora")
    assert len(still) < len(after)
    if adapter["name"] == "lora":
        content = content_of(scenes, tmp_path / "tuned", adapter | {"start": str(best)})
        model = build_model(load_recipe(write_recipe(tmp_path / "r.yaml", content)), (an_input(),))
        content["model"] |= {"encoder": {"name": "dinov2", "checkpoint": str(best)}, "adapter": {"name": "none"}}
        merged = build_model(load_recipe(write_recipe(tmp_path / "m.yaml", content)), (an_input(),))
        images, valid = picture(side, side)
        given = images_of({"rgb": images}, {"rgb": valid[:, 0]})
        with torch.no_grad():
            for ours, theirs in zip(model.encode(given)["rgb"].maps, merged.encode(given)["rgb"].maps, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_was_trained_on_another_box_is_refused(
    unlabelled: Path, scenes: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model = {"encoder": {"name": "builtin"}, "adapter": LORA}
    pretrain(pretrain_recipe(unlabelled, tmp_path / "run", epochs=1, samples=2, model=model))
    content = content_of(scenes, tmp_path / "tuned", LORA | {"start": str(tmp_path / "run" / "best")})
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    content["model"]["encoder"] = {"name": "dinov2", "checkpoint": str(save_encoder(tmp_path / "other", "dinov2"))}
    other = load_recipe(write_recipe(tmp_path / "other.yaml", content))
    with pytest.raises(RecipeError, match=r"set model.encoder to \{name: builtin\}"):
        build_model(other, (an_input(),))
    monkeypatch.setattr(builtin, "FOLDER", changed(tmp_path / "box"))
    with pytest.raises(RecipeError, match=r"that one came with another vfmseg: .*versions.vfmseg in .*encoder.json"):
        build_model(recipe, (an_input(),))


def test_it_teaches(unlabelled: Path, tmp_path: Path) -> None:
    depth = CONFIG["num_hidden_layers"]
    distill = {"teacher": {"name": "builtin", "layers": [depth - 1, depth]}}
    objectives = {"mae": {"decoder": MAE_DECODER}, "distill": distill}
    model = {"encoder": NEW_ENCODER | {"patch": CONFIG["patch_size"]}}
    pretrain(pretrain_recipe(unlabelled, tmp_path / "run", epochs=1, samples=2, model=model, objectives=objectives))
    kinds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(one["losses"]["distill"] > 0 for one in kinds if "losses" in one)
    assert any("losses" in one for one in kinds)
