"""TensorBoard shows what metrics.jsonl holds, once each, however often a run was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from makers import recipe_dict, save_encoder, toy_folder, write_recipe

from vfmseg.errors import MachineError
from vfmseg.finetune import finetune
from vfmseg.recipe import load_recipe
from vfmseg.training import curves, loop
from vfmseg.training.curves import Curves
from vfmseg.training.objectives.segmentation import as_curves


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{curve: its steps and values} as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def expected(log: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from `metrics.jsonl`."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in map(json.loads, log.read_text().splitlines()):
        if record["kind"] == "step":
            values = {"train/loss": record["loss"], "train/lr": record["lr"]}
        else:
            scores = record["validation"]
            values = {f"val/{name}": scores[name] for name in ("miou", "overall_accuracy", "kappa")}
            values |= {f"val/iou/{name}": one["iou"] for name, one in scores["classes"].items()}
        for name, value in values.items():
            curves.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return curves


@pytest.mark.pitfall("P55")
def test_curves_of_a_stopped_run_are_those_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of an epoch that was cut off were shown already; an earlier run's curves are in the way too."""
    encoder = save_encoder(tmp_path / "encoder", "dinov2")
    content = recipe_dict(toy_folder(tmp_path / "data"), encoder, tmp_path / "run")
    content["train"] |= {"track": "tensorboard", "epochs": 3}

    def run(**how: bool) -> dict[str, Any]:
        return finetune(load_recipe(write_recipe(tmp_path / "recipe.yaml", content)), **how)

    content["seed"] = 1
    run()
    (tmp_path / "run" / "tensorboard" / "mine.txt").write_text("keep me")
    content["seed"] = 2
    honest = loop.Loop._step

    def until(self: loop.Loop, epoch: int, group: list[Any]) -> loop.StepReport:
        if self.state.step == self.steps_per_epoch + 1:  # after a step of the second epoch
            raise KeyboardInterrupt
        return honest(self, epoch, group)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", until)
        with pytest.raises(KeyboardInterrupt):
            run(overwrite=True)
    first = shown(tmp_path / "run" / "tensorboard")
    logged = expected(tmp_path / "run" / "metrics.jsonl")
    assert first["train/loss"] == [*logged["train/loss"], first["train/loss"][-1]]  # shown as it runs
    run(resume=True)
    assert shown(tmp_path / "run" / "tensorboard") == expected(tmp_path / "run" / "metrics.jsonl")
    content["train"]["track"] = "none"
    run(overwrite=True)  # the earlier run's curves would be shown as those of this one
    assert [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()] == ["mine.txt"]


@pytest.mark.pitfall("P62")
def test_curves_without_tensorboard_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe_dict(tmp_path / "no data", tmp_path / "no encoder", tmp_path / "run")
    content["train"]["track"] = "tensorboard"
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", content))
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"vfmseg\[track\]"):
        finetune(recipe)
    assert not (tmp_path / "run").exists()


def test_what_has_no_value_has_no_point(tmp_path: Path) -> None:
    scores = {"miou": 0.5, "overall_accuracy": 0.75, "kappa": None, "classes": {"a": {"iou": 0.5}, "b": {"iou": None}}}
    written = Curves(tmp_path, as_curves)
    written.update([{"kind": "epoch", "step": 2, "epoch": 1}])
    written.update([{"kind": "epoch", "step": 2, "epoch": 1}, {"kind": "epoch", "step": 4, "validation": scores}])
    written.close()
    assert shown(tmp_path) == {
        "val/miou": [(4, 0.5)], "val/overall_accuracy": [(4, 0.75)], "val/iou/a": [(4, 0.5)],
    }  # fmt: skip


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    written = Curves(tmp_path / "tensorboard", as_curves)
    written.close()
    assert list(tmp_path.iterdir()) == []


def test_each_of_several_objectives_has_a_curve(tmp_path: Path) -> None:
    drawn = Curves(tmp_path / "curves", as_curves)
    drawn.update([{"kind": "step", "step": 1, "loss": 0.5, "losses": {"mae": 0.4, "distill": 0.1}, "lr": 0.1}])
    drawn.close()
    found = {name: values[0][1] for name, values in shown(tmp_path / "curves").items()}
    expected = {"train/loss": 0.5, "train/loss/mae": 0.4, "train/loss/distill": 0.1, "train/lr": 0.1}
    assert found == pytest.approx(expected, rel=1e-6)
