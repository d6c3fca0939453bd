"""`vfmseg pretrain` from scenes to an encoder that a recipe takes: every way to start, stopped and gone on with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import (
    MAE_DECODER,
    NEW_ENCODER,
    in_two_sittings,
    pretrain_recipe,
    recipe_dict,
    save_encoder,
    toy_folder,
    toy_scene,
    write_raster,
    write_recipe,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from vfmseg.build.pretraining import build_encoder, objectives_of, statistics_of
from vfmseg.build.unlabelled import open_unlabelled
from vfmseg.catalog import published_statistics
from vfmseg.checkpoint.encoder import encoder_epoch
from vfmseg.cli import app
from vfmseg.data.sample import Batch
from vfmseg.encoders.backbone import sha256_of
from vfmseg.encoders.build import build_backbone
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.pretrain import pretrain
from vfmseg.recipe import PretrainRecipe, load_recipe
from vfmseg.training.loop import Loop
from vfmseg.training.objectives.distill import Distillation
from vfmseg.training.step import Step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of two sensors without labels, a labelled set, and published encoders as teacher or to go on from."""
    folder = tmp_path_factory.mktemp("pretrain")
    for number in range(3):
        image, _ = toy_scene(number, 80, 96)
        write_raster(folder / "rgb" / f"{number}.tif", image, origin=(500000 + 5000 * number, 5000000))
    for number in range(2):
        image, _ = toy_scene(10 + number, 72, 72)
        four = np.concatenate([image, image[:1]]).astype(np.float32) * 10
        write_raster(folder / "ms" / f"{number}.tif", four, origin=(600000 + 5000 * number, 5000000))
    toy_folder(folder / "data")
    for family in ("dinov2", "clip", "sam"):
        save_encoder(folder / family, family)
    return folder


def published(place: Path, family: str, **more: Any) -> dict[str, Any]:
    return {"name": family, "checkpoint": str(place / family), **more}


KINDS: dict[str, Any] = {
    "mae": lambda place: {},
    "block": lambda place: {"objectives": {"mae": {"mask": "block", "decoder": MAE_DECODER}}},
    "incomplete": lambda place: {
        "objectives": {"mae": {"mask": "incomplete", "normalise": "none", "decoder": MAE_DECODER}}
    },
    "spectral": lambda place: {"objectives": {"mae": {"mask": "spectral", "ratio": 0.4, "decoder": MAE_DECODER}}},
    "groups": lambda place: {
        "data": {
            "modalities": {"ms": {"groups": [[3, 1], [2], [4]]}},
            "scenes": {"ms": f"{place}/ms/*.tif"},
            "tile": 32,
            "samples_per_epoch": 6,
        },
    },
    "distill": lambda place: {
        "objectives": {"distill": {"teacher": published(place, "dinov2", layers=[1, 3], upscale=1.75)}},
    },
    "both": lambda place: {
        "objectives": {
            "mae": {"weight": 0.5, "decoder": MAE_DECODER},
            "distill": {"masked": True, "teacher": published(place, "clip", layers=[1, 3], upscale=2)},
        },
    },
    "continual": lambda place: {"model": {"encoder": published(place, "clip"), "adapter": {"name": "lora", "rank": 2}}},
    "continual distill": lambda place: {
        "model": {"encoder": published(place, "dinov2"), "adapter": {"name": "lora", "rank": 2}},
        "objectives": {"distill": {"teacher": published(place, "clip", upscale=16 / 14)}},
    },
    "sam": lambda place: {"model": {"encoder": published(place, "sam"), "adapter": {"name": "full"}}},
    "two sensors": lambda place: {
        "data": {
            "modalities": {"rgb": {}, "ms": {}},
            "scenes": [{"rgb": f"{place}/rgb/*.tif"}, {"ms": f"{place}/ms/*.tif"}],
            "tile": 32,
            "samples_per_epoch": 8,
        },
    },
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, place: Path) -> tuple[str, PretrainRecipe]:
    recipe = pretrain_recipe(place, place / "runs" / request.param.replace(" ", "_"), **KINDS[request.param](place))
    pretrain(recipe)
    return request.param, recipe


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "state.pt", weights_only=True)["tensors"])


@pytest.mark.pitfall("P55", "K25")
def test_a_run_that_was_stopped_ends_as_one_that_was_not(trained: tuple[str, PretrainRecipe], place: Path) -> None:
    kind, recipe = trained
    other = recipe.model_copy(update={"output_dir": place / "stopped" / kind.replace(" ", "_")})
    in_two_sittings(other, run=pretrain)
    one, two = tensors(recipe.output_dir), tensors(other.output_dir)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    weights = [load_file(run.output_dir / "best" / "model.safetensors") for run in (recipe, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.pitfall("P21")
def test_what_is_written_says_how_images_were_normalised(trained: tuple[str, PretrainRecipe]) -> None:
    """Those whose mean and std are the encoder's: whoever goes on from it, with us or elsewhere, takes the same."""
    kind, recipe = trained
    best, section = recipe.output_dir / "best", recipe.model.encoder
    of_rgb = "rgb" in recipe.data.modalities
    assert (best / "preprocessor_config.json").is_file() == of_rgb, kind
    if of_rgb:
        family = "dinov2" if section.name == "new" else section.name
        first, again = published_statistics(family, None), published_statistics(family, str(best))
        assert np.array(again) == pytest.approx(np.array(first))


@pytest.mark.pitfall("P14", "K19", "K21")
def test_what_is_written_answers_as_what_was_trained(trained: tuple[str, PretrainRecipe]) -> None:
    """As a published checkpoint: LoRA is merged, and parts that features do not need are there again."""
    _, recipe = trained
    model = build_encoder(recipe, open_unlabelled(recipe.data, statistics_of(recipe)).inputs)
    state = tensors(recipe.output_dir)
    own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    assert own
    assert model.load_state_dict(own, strict=False).unexpected_keys == []
    backbone = model.backbone
    family = "dinov2" if backbone.family.name == "dinov2" else backbone.family.name
    again = build_backbone(family, str(recipe.output_dir / "best"), backbone.layers)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 32, 32)
    one, two = backbone.embed(pixels, None, valid), again.embed(pixels, None, valid)
    with torch.no_grad():
        for depth in range(1, len(backbone.blocks) + 1):
            one, two = backbone.step(depth, one), again.step(depth, two)
        torch.testing.assert_close(backbone.tap(one), again.tap(two), atol=1e-5, rtol=1e-5)
    assert encoder_epoch(recipe.output_dir / "best") == 2


@pytest.mark.parametrize("kind", ["continual", "continual distill"])
@pytest.mark.pitfall("C6", "K21")
def test_with_lora_the_published_weights_stay(
    place: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the memory of the run, by their digest before and after, and in its files; what is added moves."""
    digests: list[str] = []
    honest = Loop.run

    def noted(self: Loop, tell: Any) -> Any:
        published = {n: p for n, p in self.step.model.named_parameters() if not p.requires_grad}
        adapters = {n: p.detach().clone() for n, p in self.step.model.named_parameters() if p.requires_grad}
        assert published
        digests.append(sha256_of(published))
        found = honest(self, tell)
        digests.append(sha256_of(published))
        assert [n for n, p in self.step.model.named_parameters() if n in adapters and torch.equal(p, adapters[n])] == []
        return found

    monkeypatch.setattr(Loop, "run", noted)
    recipe = pretrain_recipe(place, tmp_path / "lora", **KINDS[kind](place))
    pretrain(recipe)
    assert digests[0] == digests[1]
    learned = {name for name in tensors(recipe.output_dir) if name.startswith("model.")}
    assert learned
    assert all(".lora_" in name for name in learned)


def test_a_recipe_takes_it_as_its_encoder(place: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(place, tmp_path / "pretrained")
    pretrain(recipe)
    content = recipe_dict(place / "data", tmp_path / "pretrained" / "best", tmp_path / "tuned")
    content["train"]["epochs"] = 1
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    record = json.loads((tmp_path / "tuned" / "best" / "segmenter.json").read_text())
    assert record["encoder"]["id"] == str(tmp_path / "pretrained" / "best")
    assert (
        record["encoder"]["sha256"]
        == json.loads((tmp_path / "pretrained" / "best" / "encoder.json").read_text())["tensors"]
    )


def test_the_loss_falls_and_random_masks_are_another_each_epoch(place: Path, tmp_path: Path) -> None:
    train = {"epochs": 12, "batch_size": 6, "optimizer": {"lr": 0.005, "warmup": 0.0}}
    recipe = pretrain_recipe(place, tmp_path / "run", train=train)
    pretrain(recipe)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [one["loss"] for one in log if one["kind"] == "step"]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {}}, "objectives names nothing to learn; add mae or distill"),
        ({"objectives": {"mae": {"ratio": 1.0}}}, "objectives.mae.ratio = 1.0 must be below 1"),
        ({"objectives": {"mae": {"inside": 0.5}}}, "is for mask: incomplete"),
        ({"objectives": {"mae": {"ratio": 0.01}}}, "objectives.mae.ratio = 0.01 hides 0 of the 16 patches of a window"),
        ({"objectives": {"mae": {"mask": "spectral", "ratio": 0.1}}}, "objectives.mae.ratio = 0.1 hides 0 of the 3 ba"),
        ({"objectives": {"mae": {"weight": 0}}}, "objectives weighs all it names with 0"),
        ({"model": {"encoder": NEW_ENCODER | {"patch": 48}}}, "model.encoder.patch = 48 is larger than data.tile = 32"),
        ({"model": {"encoder": NEW_ENCODER, "adapter": {"name": "lora"}}}, "random ones learn as a whole"),
        ({"model": {"encoder": NEW_ENCODER | {"width": 18, "heads": 4}}}, "width = 18 must be a multiple of heads = 4"),
        ({"model": {"encoder": {"name": "clip", "checkpoint": "CLIP", "layers": [1, 2]}}}, "must end with block 3"),
        (
            {"objectives": {"distill": {"teacher": {"name": "clip", "checkpoint": "CLIP", "layers": [3]}}}},
            "name as many",
        ),
        (
            {"objectives": {"distill": {"teacher": {"name": "clip", "checkpoint": "CLIP", "layers": [1, 3]}}}},
            "its cells are 16 px wide, those of the student 8 px; set objectives.distill.teacher.upscale = 2",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    text = json.dumps(changes).replace("CLIP", str(place / "clip"))
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        pretrain(pretrain_recipe(place, tmp_path / "run", **json.loads(text)))
    assert message in str(caught.value)
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.name != ".lock"] == []


@pytest.mark.parametrize("kind", ["mae", "continual"])
@pytest.mark.parametrize("again", [True, False])
def test_blocks_are_run_again_for_their_gradients_where_the_recipe_says_so(
    place: Path, tmp_path: Path, kind: str, again: bool
) -> None:
    train = {"gradient_checkpointing": again}
    recipe = pretrain_recipe(place, tmp_path / "run", **{"train": train, **KINDS[kind](place)})
    inputs = open_unlabelled(recipe.data, statistics_of(recipe)).inputs
    assert build_encoder(recipe, inputs).backbone.gradient_checkpointing == again


@pytest.mark.pitfall("P57")
def test_what_is_random_at_the_start_is_of_the_seed_alone(place: Path, tmp_path: Path) -> None:
    """The encoder or its LoRA, decoder and projections: whatever else has drawn random numbers before."""
    for kind in ("both", "continual", "sam", "groups"):
        found = []
        for before, seed in ((0, 3), (1, 3), (1, 4)):
            recipe = pretrain_recipe(place, tmp_path / "run", seed=seed, **KINDS[kind](place))
            torch.manual_seed(before)
            inputs = open_unlabelled(recipe.data, statistics_of(recipe)).inputs
            model = build_encoder(recipe, inputs)
            state = torch.get_rng_state()
            objectives = objectives_of(recipe, inputs, model)
            assert torch.equal(torch.get_rng_state(), state)
            found.append(Step(model, objectives).kept())
        one, again, other = found
        assert [name for name in one if not torch.equal(one[name], again[name])] == []
        assert any(not torch.equal(one[name], other[name]) for name in one if name.startswith("objectives"))
        assert kind == "sam" or any(not torch.equal(one[name], other[name]) for name in one if "model." in name)


@pytest.mark.parametrize(("mask", "hides"), [("block", "patches"), ("incomplete", "pixels"), ("spectral", "bands")])
@pytest.mark.pitfall("P64")
def test_a_masked_student_does_not_see_what_the_masks_of_mae_are_of(
    place: Path, tmp_path: Path, mask: str, hides: str
) -> None:
    teacher = published(place, "clip", layers=[1, 3], upscale=2)
    both = {"mae": {"mask": mask, "decoder": MAE_DECODER}, "distill": {"teacher": teacher, "masked": True}}
    recipe = pretrain_recipe(place, tmp_path / "run", objectives=both)
    inputs = open_unlabelled(recipe.data, statistics_of(recipe)).inputs
    objective = objectives_of(recipe, inputs, build_encoder(recipe, inputs))["distill"]
    assert isinstance(objective, Distillation)
    assert objective.hides == hides


@pytest.mark.pitfall("P21")
def test_a_teacher_sees_images_as_it_was_published_with_whatever_the_student_takes(place: Path, tmp_path: Path) -> None:
    teacher = {"distill": {"teacher": published(place, "clip", layers=[1, 3], upscale=2)}}
    data = {"scenes": {"rgb": f"{place}/rgb/*.tif"}, "tile": 32}
    for normalize, family in (("encoder", "clip"), ("dataset", None)):
        modality = {"rgb": {"normalize": normalize}}
        recipe = pretrain_recipe(place, tmp_path / "run", objectives=teacher, data=data | {"modalities": modality})
        inputs = open_unlabelled(recipe.data, statistics_of(recipe)).inputs
        objective = objectives_of(recipe, inputs, build_encoder(recipe, inputs))["distill"]
        assert isinstance(objective, Distillation)
        mean, std = [inputs[0].mean, inputs[0].std]
        if family is not None:  # those of dinov2, which a new encoder takes, are others
            mean, std = (tuple(255 * value for value in of) for of in published_statistics(family, None))
        stem = objective.teacher.reference
        torch.testing.assert_close([stem.mean, stem.std], [torch.tensor(mean), torch.tensor(std)])


@pytest.mark.parametrize(("samples", "expected"), [(640, [24, 24, 16]), (8, [24, 24, 16])])
def test_a_teacher_is_measured_on_windows_of_all_scenes_in_their_shares(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int, expected: list[int]
) -> None:
    """A lap lists one scene after the other, so that its first windows are all of one place."""
    for value in (10, 20, 30):
        write_raster(tmp_path / f"{value}.tif", np.full((3, 160, 160), value, np.uint8))
    data = {
        "modalities": {"rgb": {}},
        "scenes": [
            {"rgb": [f"{tmp_path}/10.tif", f"{tmp_path}/20.tif"], "weight": 3},
            {"rgb": f"{tmp_path}/30.tif", "weight": 1},
        ],
        "tile": 32,
        "samples_per_epoch": samples,
    }
    shown: list[int] = []

    def measure(self: Distillation, batches: Iterable[Batch]) -> None:
        shown.extend(round(batch.images["rgb"].pixels.mean().item()) for batch in batches)

    monkeypatch.setattr(Distillation, "measure", measure)
    pretrain(pretrain_recipe(place, tmp_path / "run", 1, data=data, **KINDS["distill"](place)))
    found = Counter(shown)
    assert [found[value] for value in (10, 20, 30)] == pytest.approx(expected, abs=5)
    assert sum(found.values()) == 64


def test_other_scenes_than_it_was_started_with_are_refused(place: Path, tmp_path: Path) -> None:
    for number in range(2):
        image, _ = toy_scene(number, 64, 64)
        write_raster(tmp_path / "rgb" / f"{number}.tif", image)
    recipe = pretrain_recipe(tmp_path, tmp_path / "run")
    in_two_sittings(recipe, run=pretrain)
    longer = recipe.model_copy(update={"output_dir": tmp_path / "other"})
    pretrain(longer)
    write_raster(tmp_path / "rgb" / "2.tif", toy_scene(2, 64, 64)[0])
    with pytest.raises(CheckpointError, match=r"2\.tif .*is new"):
        pretrain(longer, resume=True)


def test_the_command_ends_with_a_line_that_says_how_to_use_it(place: Path, tmp_path: Path) -> None:
    pretrain_recipe(place, tmp_path / "run")
    found = CliRunner().invoke(app, ["pretrain", str(tmp_path / "run.yaml"), "train.epochs=1"])
    assert found.exit_code == 0
    assert "use it as model.encoder.checkpoint of a recipe: " in found.stderr
    wrong = CliRunner().invoke(app, ["pretrain", str(tmp_path / "run.yaml"), "train.epoch=1", "--overwrite"])
    assert wrong.exit_code == 2
    assert "did you mean 'epochs'" in wrong.stderr
