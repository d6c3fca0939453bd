"""Batches of one set of modalities: what is not run, that steps stay the same, and that processes wait for no one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import in_two_sittings, on_two_processes, save_encoder, sensor_recipe, two_sensors
from safetensors.torch import load_file
from torch import Tensor

from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.model import build_model
from vfmseg.build.training import objectives_of, sources_of
from vfmseg.data.image import Image
from vfmseg.data.sample import Sample, collate
from vfmseg.data.windows import Draw
from vfmseg.encoders.tokens import StreamRows, Tokens
from vfmseg.finetune import finetune
from vfmseg.recipe import Recipe
from vfmseg.training.loop import Batches, Loop, RunState, Watcher
from vfmseg.training.step import Step, total

ADAPTERS = {
    "lora": {"name": "lora", "rank": 2},
    "mm_lora": {"name": "mm_lora", "rank": 2},
    "mm_adapter": {"name": "mm_adapter"},
}


def folder(place: Path) -> Path:
    """Scenes of either sensor and of both, and an encoder."""
    two_sensors(place, "paired", {"p": "rgb sar"})
    two_sensors(place, "optical", {"a": "rgb", "b": "rgb"})
    two_sensors(place, "radar", {"c": "sar", "d": "sar"})
    two_sensors(place, "val", {"v": "rgb sar"})
    save_encoder(place / "encoder", "dinov2")
    return place


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return folder(tmp_path)


def recipe_of(place: Path, run: str, *folders: str, **changes: Any) -> Recipe:
    """Optical and radar scenes as two sources, drawn alike; or the folders named."""
    sensors = {"paired": ("rgb", "sar"), "optical": ("rgb",), "radar": ("sar",)}
    train = [
        {n: f"{place}/{f}/{n}/*.tif" for n in (*sensors[f], "labels")} | {"weight": 1}
        for f in folders or ("optical", "radar")
    ]
    changes = {"train__batch_size": 2, "data__samples_per_epoch": 10, **changes}
    output = str(place / run)
    return sensor_recipe(place, data__train=train, data__test=None, output_dir=output, **changes)


def images(rgb: bool, sar: bool) -> dict[str, Image]:
    return {
        name: Image(torch.ones(bands, 4, 4), torch.full((4, 4), there))
        for name, bands, there in (("rgb", 3, rgb), ("sar", 1, sar))
    }


def test_a_batch_knows_which_modalities_none_of_its_samples_shows() -> None:
    labels = torch.zeros(4, 4, dtype=torch.int64)
    optical, both = Sample(images(True, False), labels), Sample(images(True, True), labels)
    hiding = Sample(images(True, True), labels, hidden=frozenset({"sar"}))
    assert collate([optical, both]).absent == frozenset()
    assert collate([both]).present().keys() == {"rgb", "sar"}
    for samples in ([optical], [optical, optical], [optical, hiding]):
        batch = collate(samples).to("cpu")
        assert batch.absent == {"sar"}
        assert list(batch.present()) == ["rgb"]
        assert list(batch.shown()) == ["rgb", "sar"]
    nothing = collate([Sample(images(False, False), labels)])
    assert nothing.absent == {"rgb", "sar"}
    assert list(nothing.present()) == ["rgb", "sar"]  # an answer there must be


# ------------------------------------------------------------------------------------------------------- steps


def made(recipe: Recipe) -> tuple[Step, list[Sample]]:
    """A step in training without dropout, and samples: two optical ones, then two of radar."""
    scenes = open_training(recipe)["train"]
    inputs = inputs_of(recipe, scenes)
    torch.manual_seed(0)
    model = build_model(recipe, inputs)
    step = Step(model, objectives_of(recipe, inputs, model))
    step.train()
    for name, tensor in step.named_parameters():
        if tensor.requires_grad and ("lora_B" in name or "up." in name):
            torch.nn.init.normal_(tensor, std=0.05)  # so that A gets a gradient too
    source = sources_of(recipe, scenes, inputs)["train"]
    draws = sorted((Draw(0, i) for i in range(len(source))), key=source.kind)
    return step, [source[draw] for draw in (*draws[:2], *draws[-2:])]


def gradients(step: Step, samples: list[Sample], parts: list[slice]) -> dict[str, Tensor]:
    step.zero_grad()
    batches = [{"train": collate(samples[part])} for part in parts]
    counts = [step.counts(batch) for batch in batches]
    sums = {key: torch.stack([count[key] for count in counts]).sum() for key in counts[0]}
    for batch in batches:
        total(step(batch), sums).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in step.named_parameters() if p.requires_grad}
    assert [name for name, gradient in found.items() if gradient is None] == []
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@contextmanager
def rows_run(step: Step) -> Iterator[list[StreamRows]]:
    """The rows of each stream that enter the first block, batch by batch."""
    seen: list[StreamRows] = []
    network: Any = step.model
    attached = network.attached

    def noted(depth: int, tokens: Tokens, rows: StreamRows) -> Tokens:
        if depth == 1 and not torch._C._current_graph_task_id() >= 0:  # not when run again for gradients
            seen.append(dict(rows))
        return tokens

    network.attached = replace(attached, before=(noted, *attached.before))
    yield seen
    network.attached = attached


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.pitfall("P49", "P53", "C8")
def test_batches_of_one_sensor_make_the_step_of_mixed_ones_and_run_half(
    place: Path, adapter: str, checkpointing: bool
) -> None:
    recipe = recipe_of(place, "run", model__adapter=ADAPTERS[adapter], train__gradient_checkpointing=checkpointing)
    step, samples = made(recipe)
    with rows_run(step) as seen:
        mixed = gradients(step, samples, [slice(0, 4)])
        apart = gradients(step, samples, [slice(0, 2), slice(2, 4)])
    both, *alone = seen
    assert both == {"rgb": slice(0, 4), "sar": slice(4, 8)}
    assert alone == [{"rgb": slice(0, 2)}, {"sar": slice(0, 2)}]
    assert max(float(gradient.abs().max()) for gradient in mixed.values()) > 1e-3
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, apart[name], atol=2e-6, rtol=2e-4, msg=name)


@pytest.mark.pitfall("P53")
def test_what_belongs_to_an_absent_sensor_has_a_gradient_of_zero(place: Path) -> None:
    """Not none: AdamW would pass such a tensor over, and a process group would wait for it."""
    step, samples = made(recipe_of(place, "run", model__adapter=ADAPTERS["mm_lora"]))
    found = gradients(step, samples, [slice(0, 2)])
    own = {name: gradient for name, gradient in found.items() if "of_sar" in name}
    assert len(own) > 10
    assert not any(gradient.any() for gradient in own.values())
    assert any(gradient.any() for name, gradient in found.items() if "of_rgb" in name)


# -------------------------------------------------------------------------------------------------------- runs


@contextmanager
def noted_batches(patched: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """What is absent in each batch of each step of this process."""
    found: list[list[str]] = []
    original = Loop._step

    def noted(self: Loop, epoch: int, group: list[Batches]) -> Any:
        found.append([" ".join(sorted(batches["train"].absent)) for batches in group])
        return original(self, epoch, group)

    with patched.context() as patch:
        patch.setattr(Loop, "_step", noted)
        yield found


def test_a_run_of_unmatched_sources_has_batches_of_one_sensor(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with noted_batches(monkeypatch) as found:
        finetune(recipe_of(place, "run", "paired", "optical", "radar", data__samples_per_epoch=30))
    assert len(found) == 2 * 15
    flat = [absent for (absent,) in found]
    for epoch in (flat[:15], flat[15:]):  # 10 samples of each source
        assert [epoch.count(absent) for absent in ("", "sar", "rgb")] == [5, 5, 5]
        assert epoch != sorted(epoch)


@pytest.mark.pitfall("P55", "P56")
def test_a_run_of_several_sources_goes_on_as_if_never_stopped(place: Path) -> None:
    settings = {"train__epochs": 4, "data__samples_per_epoch": 7}
    whole, cut = (recipe_of(place, run, "paired", "optical", "radar", **settings) for run in ("whole", "cut"))
    finetune(whole)
    in_two_sittings(cut, 2)
    one, two = (load_file(r.output_dir / "last" / "head.safetensors") for r in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


@contextmanager
def noted_weights(patched: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """All that training has changed, as this process has it after the last epoch."""
    kept: dict[str, Tensor] = {}
    original = Loop.run

    def run(self: Loop, tell: Watcher) -> RunState:
        state = original(self, tell)
        kept.update({name: tensor.detach().clone() for name, tensor in self.step.kept().items()})
        return state

    with patched.context() as patch:
        patch.setattr(Loop, "run", run)
        yield kept


TOGETHER = """
import os, sys
import pytest, torch
from test_sources_training import noted_batches, noted_weights
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe

patched = pytest.MonkeyPatch()
with noted_batches(patched) as absent, noted_weights(patched) as weights:
    finetune(load_recipe(sys.argv[1]))
torch.save({"weights": weights, "absent": absent}, os.environ["RANK"] + ".pt")
"""


@pytest.mark.pitfall("P49", "P51", "P53")
def test_two_processes_with_other_sensors_end_alike(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In some step one sees only optical images and the other only radar. One with two batches a step does the same."""
    settings = {"model__adapter": ADAPTERS["mm_lora"], "train__gradient_checkpointing": True}
    recipe_of(place, "together", **settings)
    (place / "together.py").write_text(TOGETHER)
    on_two_processes(place / "together.py", place / "recipe.yaml")
    ranks = [torch.load(place / f"{rank}.pt") for rank in (0, 1)]
    steps = [{*one, *two} for one, two in zip(*(rank["absent"] for rank in ranks), strict=True)]
    assert {"rgb", "sar"} in steps
    with noted_weights(monkeypatch) as weights:
        finetune(recipe_of(place, "alone", train__accumulate=2, **settings))
    assert weights.keys() == ranks[0]["weights"].keys()
    for name, tensor in weights.items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=1e-3, atol=1e-5)
