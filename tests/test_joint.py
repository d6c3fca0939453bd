"""Masked modelling and distillation beside segmentation: what they change, and what they must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from makers import (
    in_two_sittings,
    recipe_dict,
    save_encoder,
    sensor_content,
    toy_folder,
    toy_scene,
    two_sensors,
    write_raster,
    write_recipe,
)
from safetensors.torch import load_file

from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.joint import joint_of
from vfmseg.build.model import build_model
from vfmseg.build.training import objectives_of, sources_of, validation_of
from vfmseg.compare.comparison import compare
from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.data.traces import Traces
from vfmseg.data.windows import Draw
from vfmseg.errors import CheckpointError, DataError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.training.objectives import segmentation
from vfmseg.training.objectives.segmentation import Segmentation
from vfmseg.training.step import Step, total

DECODER = {"width": 16, "depth": 1, "heads": 2}
MAE = {"weight": 0.2, "decoder": DECODER}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set, more scenes without labels, and encoders."""
    folder = tmp_path_factory.mktemp("joint")
    toy_folder(folder / "data")
    for number in range(3):
        write_raster(folder / "more" / f"{number}.tif", toy_scene(50 + number, 80, 96)[0])
    for family in ("dinov2", "clip", "sam"):
        save_encoder(folder / family, family)
    return folder


def recipe_of(place: Path, output: Path, unlabelled: Any = None, family: str = "dinov2", **model: Any) -> Recipe:
    """A run of two epochs; `unlabelled` None: without the section. `model`: sections to replace."""
    content = recipe_dict(place / "data", place / family, output, family)
    content["model"] |= model
    if unlabelled is not None:
        content["train"]["unlabelled"] = unlabelled
    output.parent.mkdir(parents=True, exist_ok=True)
    return load_recipe(write_recipe(output.parent / f"{output.name}.yaml", content))


def more(place: Path, **changes: Any) -> dict[str, Any]:
    return {"scenes": {"rgb": f"{place}/more/*.tif"}, "mae": MAE, **changes}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "state.pt", weights_only=True)["tensors"])


def of_model(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for name, one in tensors(folder).items() if name.startswith("model.")}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def plain(place: Path) -> Path:
    """The run without anything beside segmentation."""
    recipe = recipe_of(place, place / "runs" / "plain")
    finetune(recipe)
    return recipe.output_dir


@pytest.fixture(scope="module")
def joint(place: Path) -> Recipe:
    """A finished run with other scenes beside the labelled ones."""
    recipe = recipe_of(place, place / "runs" / "joint", more(place))
    finetune(recipe)
    return recipe


@pytest.mark.pitfall("K24")
def test_a_weight_of_zero_is_the_plain_run_bit_for_bit(place: Path, plain: Path, tmp_path: Path) -> None:
    nothing = {"scenes": {"rgb": f"{place}/nowhere/*.tif"}, "mae": MAE | {"weight": 0.0}}  # not even opened
    finetune(recipe_of(place, tmp_path / "zero", nothing))
    assert same(tensors(plain), tensors(tmp_path / "zero"))
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (plain, tmp_path / "zero")]
    steps = [[one for one in map(json.loads, log) if one["kind"] == "step"] for log in logs]
    assert steps[0]
    assert steps[0] == steps[1]


def parts_of(recipe: Recipe) -> tuple[Step, dict[str, Any]]:
    """What `finetune` would train with, before the first step."""
    traces = Traces()
    scenes = open_training(recipe, traces)
    inputs = inputs_of(recipe, scenes["train"])
    model = build_model(recipe, inputs)
    stream, objectives = joint_of(recipe, scenes["train"], inputs, model, traces)
    step = Step(model, {**objectives_of(recipe, inputs, model), **objectives})
    return step, {**sources_of(recipe, scenes["train"], inputs), **stream}


@pytest.mark.pitfall("K24")
def test_what_segmentation_draws_does_not_move(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    (one, first), (two, second) = (
        parts_of(recipe_of(place, tmp_path / name, section)) for name, section in (("a", None), ("b", more(place)))
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(one.model.state_dict(), two.model.state_dict())
    assert list(second) == ["train", "unlabelled"]  # the first decides how long an epoch is
    assert len(first["train"]) == len(second["train"])
    for index in range(4):
        a, b = (source["train"][Draw(1, index)] for source in (first, second))
        assert torch.equal(a.images["rgb"].pixels, b.images["rgb"].pixels)
        assert torch.equal(a.labels, b.labels)


def test_windows_with_and_without_labels_are_drawn_apart(place: Path, tmp_path: Path) -> None:
    """Of one number in an epoch they are not turned alike."""
    _, sources = parts_of(recipe_of(place, tmp_path / "run", {"mae": MAE}))
    equal = [
        torch.equal(*(sources[name][Draw(0, index)].frame for name in ("train", "unlabelled")))
        for index in range(len(sources["train"]))
    ]
    assert not all(equal)


def test_an_epoch_stays_as_long_as_the_scenes_with_labels_make_it(plain: Path, joint: Recipe) -> None:
    steps = [json.loads((folder / "metrics.json").read_text())["steps"] for folder in (plain, joint.output_dir)]
    assert steps == [8, 8]  # of 16 windows with labels and 27 without


def batches_of(sources: dict[str, Any], count: int = 4) -> dict[str, Batch]:
    return {name: collate([source[Draw(0, index)] for index in range(count)]) for name, source in sources.items()}


def values_of(step: Step, batches: dict[str, Batch]) -> dict[str, float]:
    """{objective: its loss on these batches}."""
    terms, counts = step(batches), step.counts(batches)
    names = {name.partition("/")[0] for name in terms}
    return {
        name: float(total({k: t for k, t in terms.items() if k.startswith(f"{name}/")}, counts).detach())
        for name in names
    }


def learn(step: Step, batches: dict[str, Batch], steps: int = 30) -> None:
    optimizer = torch.optim.Adam([one for part in step.parts().values() for one in part.values()], lr=0.005)
    step.train()
    for _ in range(steps):
        optimizer.zero_grad()
        total(step(batches), step.counts(batches)).backward()
        optimizer.step()


def test_both_losses_fall(place: Path, tmp_path: Path) -> None:
    teacher = {"name": "clip", "checkpoint": str(place / "clip"), "layers": [1, 2, 3], "upscale": 16 / 14}
    section = more(place, distill={"teacher": teacher, "masked": True})
    step, sources = parts_of(recipe_of(place, tmp_path / "run", section))
    batches = batches_of(sources)
    before = values_of(step, batches)
    learn(step, batches)
    after = values_of(step, batches)
    assert set(before) == {"segmentation", "mae", "distill"}
    assert all(after[name] < 0.9 * before[name] for name in before), (before, after)


def test_the_encoder_learns_of_it(place: Path, plain: Path, joint: Recipe) -> None:
    """The masked loss reaches the adapter, and the more it weighs the more."""
    step, sources = parts_of(joint)
    with torch.no_grad():
        for name, one in step.model.named_parameters():
            if "lora_B" in name:
                one.normal_(0, 0.1)
    batches = batches_of(sources)
    terms, counts = step(batches), step.counts(batches)
    masked = {name: term for name, term in terms.items() if name.startswith("mae/")}
    total(masked, counts).backward()
    grown = {name: one.grad for name, one in step.model.named_parameters() if "lora_" in name and one.requires_grad}
    assert grown
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grown.values())
    assert not same(of_model(plain), of_model(joint.output_dir))
    assert of_model(plain).keys() == of_model(joint.output_dir).keys()


@pytest.mark.parametrize("kind", ["other scenes", "own scenes", "sam"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(place: Path, tmp_path: Path, kind: str) -> None:
    section = {"mae": MAE} if kind == "own scenes" else more(place)
    family = "sam" if kind == "sam" else "dinov2"
    whole, stopped = (recipe_of(place, tmp_path / name, section, family) for name in ("whole", "stopped"))
    finetune(whole)
    in_two_sittings(stopped)
    one, two = tensors(whole.output_dir), tensors(stopped.output_dir)
    assert any(name.startswith("objectives.mae.decoder") for name in one)
    assert same(one, two)


def test_what_is_saved_holds_nothing_of_it(plain: Path, joint: Recipe) -> None:
    folders = [plain / "best", joint.output_dir / "best"]
    files = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in folders]
    assert files[0] == files[1]
    for name in sorted(name for name in files[0] if name.endswith(".safetensors")):
        one, two = (load_file(folder / name) for folder in folders)
        assert {key: (t.shape, t.dtype) for key, t in one.items()} == {k: (t.shape, t.dtype) for k, t in two.items()}
        assert (folders[0] / name).stat().st_size == (folders[1] / name).stat().st_size
    counted = [json.loads((folder / "segmenter.json").read_text())["parameters"] for folder in folders]
    assert counted[0] == counted[1]


@pytest.mark.pitfall("K24")
def test_no_score_and_no_label_loss_is_of_masked_windows(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Batch] = []
    terms = Segmentation.terms

    def noted(self: Segmentation, model: torch.nn.Module, batch: Batch) -> Any:
        met.append(batch)
        return terms(self, model, batch)

    def scored(samples: Sequence[Sample]) -> Batch:
        met.append(collate(samples))
        return met[-1]

    monkeypatch.setattr(Segmentation, "terms", noted)
    monkeypatch.setattr(segmentation, "collate", scored)
    recipe = recipe_of(place, tmp_path / "run", more(place))
    finetune(recipe)
    assert len(met) > 8  # 4 steps and the windows of 2 scenes, in each of 2 epochs
    assert all(batch.labels is not None and batch.mask is None and not batch.band_mask for batch in met)
    step, _ = parts_of(recipe)
    step.load_state_dict(tensors(tmp_path / "run"), strict=False)
    scenes = open_training(recipe)
    inputs = inputs_of(recipe, scenes["train"])
    found = validation_of(recipe, step.model, scenes["val"], inputs)(Accelerator())
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found.values == log[-1]["validation"]


def test_runs_with_and_without_it_are_compared(place: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_raster(tmp_path / "more" / f"{number}.tif", toy_scene(number, 80, 96)[0])
    recipe_of(place, tmp_path / "run", more(tmp_path))
    grid = ["train.unlabelled.mae.weight=0.0,0.2", "train.epochs=1"]
    for seeds in (1, 2):  # the second time with runs that are there
        found = compare(tmp_path / "run.yaml", grid, seeds=seeds)
    assert [cell["name"] for cell in found["cells"]] == ["weight-0.0", "weight-0.2"]
    assert found["seeds"] == [0, 1]
    write_raster(tmp_path / "more" / "1.tif", toy_scene(9, 80, 96)[0])
    shutil.rmtree(tmp_path / "run-compare" / "weight-0.2" / "seed-1")
    compare(tmp_path / "run.yaml", grid, seeds=2)
    with pytest.raises(CheckpointError, match=r"other data than .*1\.tif \(rgb of data\.unlabelled"):
        compare(tmp_path / "run.yaml", grid, seeds=2)


def test_other_unlabelled_scenes_than_it_was_started_with_are_refused(place: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_raster(tmp_path / "more" / f"{number}.tif", toy_scene(number, 80, 96)[0])
    recipe = recipe_of(place, tmp_path / "run", more(tmp_path))
    finetune(recipe)
    write_raster(tmp_path / "more" / "1.tif", toy_scene(9, 80, 96)[0])
    with pytest.raises(CheckpointError, match=r"1\.tif \(rgb of data\.unlabelled, scene 1\) has changed"):
        finetune(recipe, resume=True)
    other = recipe_of(place, tmp_path / "run", more(place, mae=MAE | {"weight": 0.3}))
    with pytest.raises(CheckpointError, match="another recipe"):
        finetune(other, resume=True)


SENSORS: dict[str, dict[str, Any]] = {
    "linear": {},
    "stack": {
        "model__fusion": {"name": "stack"},
        "data__modalities": {"rgb": {}, "sar": {}},
    },
    "mm_lora": {"model__adapter": {"name": "mm_lora"}},
    "mm_adapter": {"model__adapter": {"name": "mm_adapter"}},
    "side": {"model__modalities": {"sar": {"encoder": {"name": "conv"}}}},
    "own": {"model__modalities": {"rgb": {"encoder": {"name": "clip", "checkpoint": "CLIP"}}}},
}


@pytest.mark.parametrize("kind", SENSORS)
def test_several_sensors(place: Path, tmp_path: Path, kind: str) -> None:
    """Whatever enters the shared encoder by a stem learns; a sensor with an encoder of its own has no part in it."""
    for split in ("train", "val", "test"):
        two_sensors(tmp_path, split, {"a": "rgb sar", "b": "rgb sar"})
    blank = np.zeros((3, 48, 56), np.uint8)  # one sensor shows nothing there
    write_raster(tmp_path / "train" / "rgb" / "b.tif", blank, nodata=0)
    save_encoder(tmp_path / "encoder", "dinov2")
    changes = json.loads(json.dumps(SENSORS[kind]).replace("CLIP", str(place / "clip")))
    content = sensor_content(tmp_path, **changes, train__unlabelled={"mae": MAE}, train__batch_size=1)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    step, sources = parts_of(recipe)
    expected = {"side": ["rgb"], "own": ["sar"]}.get(kind, ["rgb", "sar"])
    assert list(sources["unlabelled"][Draw(0, 0)].images) == expected
    streams = {"stack": {"rgb+sar"}, "side": {"rgb"}, "own": {"sar"}}.get(kind, {"rgb", "sar"})
    assert set(step.objectives["mae"].modalities) == streams
    for index in range(len(sources["unlabelled"])):
        batches = batches_of(sources, 1) | {"unlabelled": collate([sources["unlabelled"][Draw(0, index)]])}
        loss = total(step(batches), step.counts(batches))
        loss.backward()  # every process waits for the gradients of all that learns
        assert torch.isfinite(loss)
        assert [name for part in step.parts().values() for name, one in part.items() if one.grad is None] == []
        step.zero_grad()
    finetune(recipe)


def test_scenes_of_one_sensor_beside_two_with_labels(place: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        two_sensors(tmp_path, split, {"a": "rgb sar", "b": "rgb"})
    save_encoder(tmp_path / "encoder", "dinov2")
    section = more(place)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", sensor_content(tmp_path, train__unlabelled=section)))
    assert list(parts_of(recipe)[1]["unlabelled"].scenes[0].bands()) == ["rgb"]
    finetune(recipe)
    alone = sensor_content(tmp_path, train__unlabelled=section, data__only=["sar"])
    assert load_recipe(write_recipe(tmp_path / "one.yaml", alone)).train.unlabelled is None
    alone["data"]["only"] = ["rgb"]
    kept = load_recipe(write_recipe(tmp_path / "one.yaml", alone)).train.unlabelled
    assert kept is not None
    assert list(kept.sources()["scenes"].images) == ["rgb"]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "train.unlabelled names nothing to learn; add mae or distill"),
    ({"mae": MAE}, {"adapter": {"name": "none"}}, "model.adapter = none lets nothing in the encoder learn"),
    (
        {"mae": MAE},
        {"encoder": {"name": "dinov2", "checkpoint": "HERE/dinov2", "upscale": 2}},
        "train.unlabelled.mae needs model.encoder.upscale = 1 instead of 2",
    ),
    (
        {
            "mae": MAE | {"weight": 0},
            "distill": {"masked": True, "teacher": {"name": "dinov2", "checkpoint": "HERE/dinov2", "upscale": 2}},
        },
        {"encoder": {"name": "dinov2", "checkpoint": "HERE/dinov2", "upscale": 2}},
        "train.unlabelled.distill.masked = true needs model.encoder.upscale = 1 instead of 2",
    ),
    ({"mae": MAE, "scale": [2.0, 0.5]}, {}, "train.unlabelled.scale = [2.0, 0.5] must be [smallest, largest]"),
    ({"mae": MAE, "scale": [0.5, 80.0]}, {}, "train.unlabelled.scale = [0.5, 80] of data.tile = 32 makes windows"),
    ({"mae": MAE, "scenes": {"sar": "HERE/more/*.tif"}}, {}, "train.unlabelled.scenes.sar is not one of data.modal"),
    ({"mae": MAE, "scenes": {"rgb": "HERE/none/*.tif"}}, {}, "train.unlabelled.scenes.rgb"),
    ({"mae": MAE, "scenes": {"rgb": "HERE/two/*.tif"}}, {}, "train.unlabelled.scenes: 0 has bands {'rgb': 2}"),
    ({"mae": MAE, "scenes": {"rgb": "HERE/blank/*.tif"}}, {}, "train.unlabelled.scenes: rgb is invalid"),
    ({"mae": MAE, "scenes": {"rgb": "HERE/striped/*.tif"}}, {}, "train.unlabelled.mae: no patch of which something"),
    ({"mae": MAE | {"ratio": 0.01}}, {}, "train.unlabelled.mae.ratio = 0.01 hides 0 of the 9 patches"),
    (
        {"distill": {"teacher": {"name": "clip", "checkpoint": "HERE/clip", "layers": [1, 3]}}},
        {},
        "train.unlabelled.distill.teacher.layers: 2 layers for 3 of the student",
    ),
    (
        {"distill": {"masked": True, "teacher": {"name": "clip", "checkpoint": "HERE/clip"}}},
        {},
        "train.unlabelled.distill.masked = true needs train.unlabelled.mae",
    ),
]


@pytest.mark.parametrize(("section", "model", "message"), REFUSED, ids=[message[:60] for *_, message in REFUSED])
def test_what_does_not_fit_is_told(
    place: Path, tmp_path: Path, section: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    if not (place / "two").exists():
        image, _ = toy_scene(0, 64, 64)
        write_raster(place / "two" / "0.tif", image[:2])
        write_raster(place / "blank" / "0.tif", np.zeros_like(image), nodata=0)
        striped = np.maximum(image, 1)
        striped[:, :, ::3] = 0
        write_raster(place / "striped" / "0.tif", striped, nodata=0)
    section, model = (json.loads(json.dumps(one).replace("HERE", str(place))) for one in (section, model))
    with pytest.raises((RecipeError, DataError)) as caught:
        finetune(recipe_of(place, tmp_path / "run", section, **model))
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "best").exists()


def test_an_encoder_of_its_own_and_stacked_sensors_are_told_of(place: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        two_sensors(tmp_path, split, {"a": "rgb sar"})
    save_encoder(tmp_path / "encoder", "dinov2")
    scenes = {"rgb": f"{tmp_path}/train/rgb/*.tif"}

    def told(**changes: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(write_recipe(tmp_path / "r.yaml", sensor_content(tmp_path, **changes)))
        return str(caught.value)

    stack = {"model__fusion": {"name": "stack"}, "data__modalities": {"rgb": {}, "sar": {}}}
    found = told(**stack, train__unlabelled={"mae": MAE, "scenes": scenes})
    assert "train.unlabelled.scenes.sar is missing: fusion stack makes one image of rgb, sar" in found
    teacher = {"name": "clip", "checkpoint": str(place / "clip")}
    assert "is not for fusion stack" in told(**stack, train__unlabelled={"distill": {"teacher": teacher}})
    side = {"model__modalities": {"rgb": {"encoder": {"name": "conv"}}}}
    found = told(**side, train__unlabelled={"mae": MAE, "scenes": scenes})
    assert "train.unlabelled.scenes.rgb is not used: rgb has an encoder of its own" in found


def test_scored_images_among_them_are_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {"mae": MAE, "scenes": {"rgb": f"{place}/data/val/images/*.tif"}}
    parts_of(recipe_of(place, tmp_path / "run", section))
    assert "train.unlabelled.scenes: 2 of the 2 scenes of data.val are among them" in capsys.readouterr().err
