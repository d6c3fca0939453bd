"""Fine-tuning starts from what pretraining has left: encoder, ways in of other bands, adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from makers import (
    MAE_DECODER,
    in_two_sittings,
    pretrain_recipe,
    recipe_dict,
    save_encoder,
    toy_scene,
    write_raster,
    write_recipe,
)
from safetensors.torch import load_file
from torch import Tensor

from vfmseg import pretrain as verb
from vfmseg.build import pretraining
from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.model import build_model
from vfmseg.build.pretraining import build_encoder, statistics_of
from vfmseg.build.unlabelled import open_unlabelled
from vfmseg.checkpoint import encoder as written
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.data.image import Image, Images
from vfmseg.encoders.backbone import sha256_of
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.model import Encoder, Network
from vfmseg.pretrain import pretrain
from vfmseg.recipe import load_recipe

STILL = {"lr": 0.01, "weight_decay": 0.0}  # what gets no gradient does not move


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled scenes of five bands, which are pretrained on as well, and a published encoder."""
    folder = tmp_path_factory.mktemp("start")
    for number in range(3):
        image, labels = toy_scene(number, 64, 64)
        noise = np.random.default_rng(number).normal(0, 40, (2, 64, 64))
        five = np.concatenate([image, 2.0 * image[:2] + noise]).astype(np.float32)
        write_raster(folder / "ms" / f"{number}.tif", five, origin=(500000 + 5000 * number, 5000000))
        write_raster(folder / "labels" / f"{number}.tif", labels, origin=(500000 + 5000 * number, 5000000))
    save_encoder(folder / "clip", "clip")
    return folder


def trained(place: Path, output: Path, modalities: dict[str, Any] | None = None, **model: Any) -> tuple[Encoder, Path]:
    """An encoder pretrained on the five bands, as it was in memory in the end, and its folder."""
    names = modalities or {"ms": {}}
    recipe = pretrain_recipe(
        place, output, epochs=model.pop("epochs", 2),
        data={"modalities": names, "scenes": dict.fromkeys(names, f"{place}/ms/*.tif"), "tile": 32,
              "samples_per_epoch": 6},
        model={"encoder": {"name": "clip", "checkpoint": str(place / "clip")}, **model},
        objectives={"mae": {"decoder": MAE_DECODER}},
        train={"epochs": 2, "batch_size": 2, "optimizer": STILL},
    )  # fmt: skip
    kept: list[Encoder] = []
    original = written.save_encoder

    def save(folder: Path, model: Encoder, *more: Any) -> None:
        kept.append(model)
        original(folder, model, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(written, "save_encoder", save)
        pretrain(recipe)
    return kept[-1].eval(), output / "best"


@pytest.fixture(scope="module")
def full(place: Path) -> tuple[Encoder, Path]:
    return trained(place, place / "runs" / "full")


@pytest.fixture(scope="module")
def lora(place: Path) -> tuple[Encoder, Path]:
    return trained(place, place / "runs" / "lora", adapter={"name": "lora", "rank": 2})


def content_of(place: Path, checkpoint: Path, output: Path, adapter: dict[str, Any], **encoder: Any) -> dict[str, Any]:
    content = recipe_dict(place, checkpoint, output, "clip")
    files = {"ms": f"{place}/ms/*.tif", "labels": f"{place}/labels/*.tif"}
    content["data"] |= {"modalities": {"ms": {}}, "train": files}
    del content["data"]["val"], content["data"]["test"]
    content["model"] |= {"adapter": adapter}
    content["model"]["encoder"] |= encoder
    content["train"]["epochs"] = 1
    return content


def fresh(place: Path, content: dict[str, Any]) -> Network:
    """The network that fine-tuning begins with."""
    output = Path(content["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(write_recipe(output.parent / f"{output.name}.yaml", content))
    return build_model(recipe, inputs_of(recipe, open_training(recipe)["train"]))


def picture(name: str = "ms", bands: int = 5) -> Images:
    pixels = 255 * torch.rand(2, bands, 40, 48, generator=torch.Generator().manual_seed(1))
    return {name: Image(pixels, torch.ones(2, 40, 48, dtype=torch.bool))}


@torch.no_grad()
def maps(model: Encoder) -> list[Tensor]:
    return list(model.encode(picture())["ms"].maps)


def assert_same(one: list[Tensor], two: list[Tensor]) -> None:
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def differs(one: list[Tensor], two: list[Tensor]) -> bool:
    return any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(one, two, strict=True))


def test_fine_tuning_begins_with_the_encoder_that_pretraining_ended_with(
    place: Path, full: tuple[Encoder, Path], tmp_path: Path
) -> None:
    model, folder = full
    network = fresh(place, content_of(place, folder, tmp_path / "run", {"name": "none"}))
    assert_same(maps(network), maps(model))
    with torch.no_grad():  # as if the way in had not been written
        network.stem("ms").mix.extra.weight.zero_()  # type: ignore[union-attr]
    assert differs(maps(network), maps(model))


@pytest.mark.pitfall("K22")
def test_all_that_fine_tuning_loads_has_learned(place: Path, full: tuple[Encoder, Path], tmp_path: Path) -> None:
    recipe = verb.load_pretrain_recipe(full[1].parent / "recipe.yaml")
    before = build_encoder(recipe, open_unlabelled(recipe.data, statistics_of(recipe)).inputs)
    after = fresh(place, content_of(place, full[1], tmp_path / "run", {"name": "full"}))
    loaded = {name: tensor for name, tensor in after.named_parameters() if not name.startswith("decoder.")}
    assert loaded.keys() == dict(before.named_parameters()).keys()
    assert any(name.startswith("stems.") for name in loaded)
    assert [name for name, tensor in before.named_parameters() if torch.equal(tensor, loaded[name])] == []


def test_projections_start_so_as_well_and_where_an_own_encoder_takes_them(
    place: Path, full: tuple[Encoder, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = {"name": "clip", "checkpoint": str(place / "clip"), "input": "project"}
    model, folder = trained(place, tmp_path / "project", encoder=encoder)
    content = content_of(place, folder, tmp_path / "run", {"name": "none"}, input="project")
    assert_same(maps(fresh(place, content)), maps(model))
    content = content_of(place, place / "clip", tmp_path / "own", {"name": "none"})
    content["data"]["modalities"] = {"rgb": {"bands": [1, 2, 3]}, "ms": {}}
    content["data"]["train"]["rgb"] = f"{place}/ms/*.tif"
    own = {"name": "clip", "checkpoint": str(full[1])}
    content["model"] |= {"modalities": {"ms": {"encoder": own}}, "fusion": {"name": "linear"}}
    found = fresh(place, content).own_encoders["ms"].stem.mix.state_dict()
    assert torch.equal(found["extra.weight"], load_file(full[1] / "stems.safetensors")["ms.extra.weight"])
    content["model"]["modalities"]["ms"]["encoder"]["input"] = "project"
    fresh(place, content)
    assert "it was pretrained with input: widen in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({"ms": {"bands": [1, 2, 3, 4]}}, "the way in of ms (4 bands) starts untrained: it was pretrained with 5"),
        ({"sar": {}}, "the way in of sar (5 bands) starts untrained: "),
        ({"ms": {}, "dem": {"bands": [4]}}, "the way in of ms + dem (6 bands) starts untrained: it takes several"),
    ],
)
def test_it_is_said_which_way_in_starts_untrained_and_why(
    place: Path,
    full: tuple[Encoder, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    modalities: dict[str, Any],
    message: str,
) -> None:
    content = content_of(place, full[1], tmp_path / "run", {"name": "none"})
    content["data"]["modalities"] = modalities
    files = dict.fromkeys(modalities, f"{place}/ms/*.tif")
    content["data"]["train"] = {**files, "labels": f"{place}/labels/*.tif"}
    network = fresh(place, content)
    assert not any(tensor.any() for tensor in network.reference.mix.state_dict().values())
    lines = [line for line in capsys.readouterr().err.splitlines() if "way in" in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_another_pretraining_goes_on_from_its_ways_in(place: Path, full: tuple[Encoder, Path], tmp_path: Path) -> None:
    recipe = verb.load_pretrain_recipe(full[1].parent / "recipe.yaml", [f"model.encoder.checkpoint={full[1]}"])
    again = build_encoder(recipe, open_unlabelled(recipe.data, statistics_of(recipe)).inputs)
    assert_same(maps(again), maps(full[0]))


def test_a_changed_way_in_is_refused(place: Path, full: tuple[Encoder, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(full[1], tmp_path / "copy")
    content = (folder / "stems.safetensors").read_bytes()
    (folder / "stems.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"stems\.safetensors: is not what was written with this encoder"):
        fresh(place, content_of(place, folder, tmp_path / "run", {"name": "none"}))


def test_three_bands_leave_no_file_of_ways_in(place: Path, tmp_path: Path) -> None:
    _, folder = trained(place, tmp_path / "rgb", {"rgb": {"bands": [1, 2, 3]}})
    assert not (folder / "stems.safetensors").exists()
    assert not (folder / "adapter").exists()


def test_a_segmenter_does_not_need_what_it_was_started_from(
    place: Path, lora: tuple[Encoder, Path], tmp_path: Path
) -> None:
    start = shutil.copytree(lora[1], tmp_path / "start")
    content = content_of(place, place / "clip", tmp_path / "run", {"name": "lora", "rank": 2, "start": str(start)})
    finetune(load_recipe(write_recipe(tmp_path / "run.yaml", content)))
    before = load_segmenter(tmp_path / "run" / "best").model
    shutil.rmtree(start)
    after = load_segmenter(tmp_path / "run" / "best").model
    assert_same(maps(after), maps(before))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["tensors"]
    head = load_file(tmp_path / "run" / "best" / "head.safetensors")
    assert torch.equal(head["stems.of_ms.mix.extra.weight"], state["model.stems.of_ms.mix.extra.weight"])


def test_a_stopped_run_that_was_started_so_ends_as_one_that_was_not(
    place: Path, lora: tuple[Encoder, Path], tmp_path: Path
) -> None:
    ends = []
    for name in ("whole", "stopped"):
        asked = {"name": "lora", "rank": 2, "start": str(lora[1])}
        content = content_of(place, place / "clip", tmp_path / name, asked)
        content["train"]["epochs"] = 2
        recipe = load_recipe(write_recipe(tmp_path / f"{name}.yaml", content))
        if name == "whole":
            finetune(recipe)
        else:
            in_two_sittings(recipe)
        ends.append(torch.load(tmp_path / name / "state.pt", weights_only=True)["tensors"])
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


@pytest.mark.pitfall("K21")
def test_lora_of_fine_tuning_starts_where_that_of_pretraining_ended(
    place: Path, lora: tuple[Encoder, Path], tmp_path: Path
) -> None:
    """On the published weights, which pretraining has not moved; it answers as the merged encoder does."""
    model, folder = lora
    adapter = {"name": "lora", "rank": 2}
    started = fresh(place, content_of(place, place / "clip", tmp_path / "run", {**adapter, "start": str(folder)}))
    merged = fresh(place, content_of(place, folder, tmp_path / "merged", {"name": "none"}))
    assert_same(maps(started), maps(merged))
    assert_same(maps(started), maps(model))
    assert differs(maps(fresh(place, content_of(place, place / "clip", tmp_path / "none", adapter))), maps(model))
    assert started.backbone.base.sha256 == json.loads((folder / "encoder.json").read_text())["base"]["sha256"]


@pytest.mark.pitfall("K21")
def test_continual_pretraining_moves_the_adapter_and_the_way_in_alone(place: Path, lora: tuple[Encoder, Path]) -> None:
    model, folder = lora
    published = fresh(place, content_of(place, place / "clip", folder.parent / "any", {"name": "none"}))
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.backbone.network.state_dict().items()
        if ".lora_" not in name
    }
    assert sha256_of(base) == sha256_of(published.backbone.network.state_dict())
    moving = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert all(".lora_" in name or name.startswith("stems.") for name in moving)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert stored
    assert all(tensor.any() for tensor in stored.values())  # B is zero at the start


def test_continual_pretraining_goes_on_from_an_adapter(place: Path, lora: tuple[Encoder, Path], tmp_path: Path) -> None:
    adapter = {"name": "lora", "rank": 2, "start": str(lora[1])}
    recipe = verb.load_pretrain_recipe(
        write_recipe(
            tmp_path / "again.yaml",
            {
                **json.loads(verb.load_pretrain_recipe(lora[1] / "recipe.yaml").model_dump_json(exclude_none=True)),
                "model": {"encoder": {"name": "clip", "checkpoint": str(place / "clip")}, "adapter": adapter},
            },
        )
    )
    again = build_encoder(recipe, open_unlabelled(recipe.data, statistics_of(recipe)).inputs)
    assert_same(maps(again), maps(lora[0]))


@pytest.mark.parametrize(
    ("checkpoint", "adapter", "message"),
    [
        ("CLIP", {"rank": 4}, "model.adapter.rank = 4, but .* was trained with 2; set rank: 2"),
        ("CLIP", {"alpha": 8.0}, r"model.adapter.alpha = 8.0, but .* was trained with 16.0; set alpha: 16.0"),
        ("CLIP", {"targets": ["q"]}, r"model.adapter.targets = \['q'\], but .* was trained with \['q', 'v'\]"),
        ("LORA", {}, r"into which it is merged already; set model.encoder to .*clip\}, or drop"),
        ("OTHER", {}, r"its adapter was trained on .*clip \(SHA-256 .*; set model.encoder to .*checkpoint: .*clip\}"),
        ("CLIP", {"start": "FULL"}, "holds an encoder without an adapter, to be named as checkpoint"),
        ("CLIP", {"start": "LORA/adapter"}, "has no encoder.json; name .*best"),
        ("CLIP", {"start": "CLIP"}, "has no encoder.json; expected a folder that vfmseg pretrain has written"),
    ],
)
def test_an_adapter_of_something_else_is_refused(
    place: Path,
    full: tuple[Encoder, Path],
    lora: tuple[Encoder, Path],
    tmp_path: Path,
    checkpoint: str,
    adapter: dict[str, Any],
    message: str,
) -> None:
    save_encoder(tmp_path / "other", "clip", seed=1)
    asked = {"name": "lora", "rank": 2, "start": "LORA", **adapter}
    text = yaml.safe_dump(content_of(place, Path(checkpoint), tmp_path / "run", asked))
    for word, path in {"CLIP": place / "clip", "LORA": lora[1], "FULL": full[1], "OTHER": tmp_path / "other"}.items():
        text = text.replace(f": {word}", f": {path}")
    with pytest.raises(RecipeError, match=message) as caught:
        fresh(place, yaml.safe_load(text))
    assert len(str(caught.value).splitlines()) == 1


def test_an_encoder_of_a_modality_starts_its_own_adapter_and_inherits_no_start(
    place: Path, lora: tuple[Encoder, Path], tmp_path: Path
) -> None:
    asked = {"name": "lora", "rank": 2, "start": str(lora[1])}
    content = content_of(place, place / "clip", tmp_path / "own", {"name": "none"})
    content["data"]["modalities"] = {"rgb": {"bands": [1, 2, 3]}, "ms": {}}
    content["data"]["train"]["rgb"] = f"{place}/ms/*.tif"
    own = {"encoder": {"name": "clip", "checkpoint": str(place / "clip")}, "adapter": asked}
    content["model"] |= {"modalities": {"ms": own}, "fusion": {"name": "linear"}}

    def adapter_of(network: Network) -> dict[str, Tensor]:
        network.own_encoders["ms"].attached.save(tmp_path / "saved")
        found = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        shutil.rmtree(tmp_path / "saved")
        return found

    trained = load_file(lora[1] / "adapter" / "adapter_model.safetensors")
    found = adapter_of(fresh(place, content))
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    del own["adapter"]
    content["model"]["adapter"] = asked
    found = adapter_of(fresh(place, content))
    assert not any(tensor.any() for name, tensor in found.items() if "lora_B" in name)


def test_fewer_blocks_take_their_part_of_the_adapter(place: Path, lora: tuple[Encoder, Path], tmp_path: Path) -> None:
    asked = {"name": "lora", "rank": 2, "start": str(lora[1])}
    started = fresh(place, content_of(place, place / "clip", tmp_path / "run", asked, layers=[1, 2]))
    assert_same(maps(started), maps(lora[0])[:2])


def losses(place: Path, output: Path) -> list[float]:
    """Of each step of a run with LoRA that is long enough to learn something."""
    recipe = pretrain_recipe(
        place, output,
        data={"modalities": {"ms": {}}, "scenes": {"ms": f"{place}/ms/*.tif"}, "tile": 64, "samples_per_epoch": 6},
        model={"encoder": {"name": "clip", "checkpoint": str(place / "clip")}, "adapter": {"name": "lora", "rank": 4}},
        objectives={"mae": {"decoder": MAE_DECODER, "ratio": 0.25, "normalise": "none"}},
        train={"epochs": 60, "batch_size": 6, "optimizer": {"lr": 0.005, "weight_decay": 0.0}},
    )  # fmt: skip
    pretrain(recipe)
    log = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [one["loss"] for one in log if one["kind"] == "step"]


@pytest.mark.pitfall("K21")
def test_the_loss_falls_further_than_with_the_adapter_disabled(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = losses(place, tmp_path / "lora")
    honest = pretraining.build_encoder
    monkeypatch.setattr(pretraining, "build_encoder", lambda *given: honest(*given).requires_grad_(False))
    decoder_alone = losses(place, tmp_path / "still")
    assert np.mean(learned[-6:]) < 0.9 * np.mean(learned[:4])
    assert np.mean(learned[-6:]) < np.mean(decoder_alone[-6:])
