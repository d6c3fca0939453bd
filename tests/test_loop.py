"""The loop with sources, objectives and a score that it has never seen: no recipe, no scene, no segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from makers import on_two_processes
from torch import Tensor, nn

from vfmseg.data.image import Image
from vfmseg.data.sample import Batch, Sample
from vfmseg.data.windows import Draw
from vfmseg.errors import CheckpointError, RecipeError, VfmsegError
from vfmseg.training.loop import Loop, RunState, Score, StepReport, Stream
from vfmseg.training.processes import connect
from vfmseg.training.resume import Origin, load_run, save_run
from vfmseg.training.schedule import Schedule
from vfmseg.training.step import Objective, Step, Term

ORIGIN = Origin("a recipe", "a digest", {}, processes=1)


class Numbers:
    """`length` samples without labels: four numbers that depend on the draw, and remembers what was drawn."""

    def __init__(self, length: int, salt: int) -> None:
        self.length, self.salt = length, salt
        self.drawn: list[Draw] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: Draw) -> Sample:
        self.drawn.append(draw)
        values = torch.Generator().manual_seed(1000 * self.salt + 100 * draw.epoch + draw.index)
        pixels = torch.randn(1, 2, 2, generator=values)
        return Sample({"x": Image(pixels, torch.full((2, 2), not draw.filler))}, None)

    def kind(self, draw: Draw) -> str:
        return "numbers"


class Linear(nn.Linear):
    """A model of one part."""

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"head": dict(self.named_parameters())}


class Twice(nn.Module):
    """The model shall give twice its input."""

    def __init__(self, source: str, weight: float = 1.0) -> None:
        super().__init__()
        self.source, self.weight = source, weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"pixels": batch.images["x"].valid.sum().double()}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        image = batch.images["x"]
        wrong = model(image.pixels[:, 0]) - 2 * image.pixels[:, 0]
        return {"square": Term((wrong.square() * image.valid).sum(), self.weight, "pixels")}

    def after_step(self, model: nn.Module, step: int) -> None:
        pass


class Teacher(Twice):
    """The model shall give what a head of this objective makes of its own average over the steps so far."""

    def __init__(self, source: str, weight: float = 1.0) -> None:
        super().__init__(source, weight)
        self.head = nn.Linear(2, 2)
        self.mean = nn.Linear(2, 2).requires_grad_(False)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"samples": batch.images["x"].valid.flatten(1).any(1).sum().double()}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        image = batch.images["x"]
        wrong = self.head(model(image.pixels[:, 0])) - self.mean(image.pixels[:, 0])
        return {"distance": Term((wrong.square() * image.valid).sum(), self.weight, "samples")}

    def after_step(self, model: nn.Module, step: int) -> None:
        for mean, now in zip(self.mean.parameters(), model.parameters(), strict=True):
            mean.lerp_(now, 0.2)


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.epochs: list[tuple[int, bool]] = []

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def epoch(self, state: RunState, improved: bool) -> None:
        self.epochs.append((state.epoch, improved))


def no_score(accelerator: Accelerator) -> Score:
    return Score(None, {})


def made(objectives: dict[str, Objective], sources: dict[str, Stream] | None = None, **settings: Any) -> Loop:
    """A loop over a linear model; `first` gives 10 samples an epoch, `second` only 3."""
    torch.manual_seed(0)
    schedule = Schedule(**{"epochs": 4, "batch_size": 4, "lr": 0.05, **settings})
    sources = sources or {"first": Numbers(10, 1), "second": Numbers(3, 2)}
    # not Accelerator(): that has the precision of the last run of this process
    return Loop(connect("no"), Step(Linear(2, 2), objectives), sources, schedule, no_score)


def both() -> dict[str, Objective]:
    torch.manual_seed(1)
    return {"twice": Twice("first"), "teacher": Teacher("second", 0.3)}


def weights(loop: Loop) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in loop.step.state_dict().items()}


def test_any_sources_and_objectives_train_together() -> None:
    loop, notes = made(both(), epochs=40), Notes()
    before = weights(loop)
    state = loop.run(notes)
    after = weights(loop)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert (after["model.weight"] - 2 * torch.eye(2)).abs().max() < 0.1
    assert (state.epoch, state.step, len(notes.steps)) == (40, 120, 120)  # 10 samples in batches of 4
    assert [report.images for report in notes.steps[:3]] == [8, 8, 4]  # of both sources
    assert notes.epochs == [(epoch, True) for epoch in range(1, 41)]  # nothing to choose by: the newest is the best
    assert notes.steps[-1].loss < 0.1 * notes.steps[0].loss


def test_each_objective_takes_the_batches_of_its_source_and_each_kind_its_own_count() -> None:
    step = Step(Linear(2, 2), both())
    batches = {}
    for name, samples in (("first", 4), ("second", 3)):
        batches[name] = Batch({"x": Image(torch.randn(samples, 1, 2, 2), torch.ones(samples, 2, 2).bool())}, None)
    assert {name: int(count) for name, count in step.counts(batches).items()} == {
        "twice/pixels": 16, "teacher/samples": 3,
    }  # fmt: skip
    terms = step(batches)
    assert {name: (term.weight, term.count) for name, term in terms.items()} == {
        "twice/square": (1.0, "twice/pixels"), "teacher/distance": (0.3, "teacher/samples"),
    }  # fmt: skip
    assert sorted(step.parts()) == ["head", "objectives.teacher"]  # what is the teacher's own learns too
    assert sorted(step.parts()["objectives.teacher"]) == ["head.bias", "head.weight"]


def test_the_first_source_makes_the_epoch_and_the_others_go_round() -> None:
    first, second = Numbers(10, 1), Numbers(3, 2)
    made(both(), {"first": first, "second": second}, epochs=3).run(Notes())
    for epoch in range(3):
        lap = first.drawn[10 * epoch : 10 * epoch + 10]
        assert sorted(lap, key=lambda draw: draw.index) == [Draw(epoch, i) for i in range(10)]
    assert len(second.drawn) == 30
    for lap in range(10):  # three samples each, also where an epoch ends in between
        assert sorted(d.index for d in second.drawn[3 * lap : 3 * lap + 3]) == [0, 1, 2]
        assert {d.epoch for d in second.drawn[3 * lap : 3 * lap + 3]} == {lap}


def test_a_second_source_does_not_change_the_order_of_the_first() -> None:
    alone, beside = Numbers(10, 1), Numbers(10, 1)
    made({"twice": Twice("first")}, {"first": alone}).run(Notes())
    made(both(), {"first": beside, "second": Numbers(30, 2)}).run(Notes())
    assert alone.drawn == beside.drawn


def test_an_objective_of_weight_zero_changes_nothing() -> None:
    """Neither the model nor the losses. (Clipping would: a norm over more tensors is rounded otherwise.)"""
    alone = made({"twice": Twice("first")}, {"first": Numbers(10, 1)}, clip=0.0)
    beside = made({"twice": Twice("first"), "teacher": Teacher("second", 0.0)}, clip=0.0)
    states = [loop.run(Notes()) for loop in (alone, beside)]
    found = weights(beside)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(alone).items())
    losses = [[r["loss"] for r in state.records if r["kind"] == "step"] for state in states]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.pitfall("P55")
def test_a_run_that_goes_on_ends_like_one_that_was_never_stopped(tmp_path: Path, stop: int) -> None:
    """Also what an objective keeps without a gradient, and the place in a source that epochs do not divide."""
    whole = made(both())
    whole.run(Notes())

    class Stopped(Notes):
        def epoch(self, state: RunState, improved: bool) -> None:
            if state.epoch == stop:
                save_run(tmp_path / "state.pt", cut, ORIGIN)
                raise KeyboardInterrupt

    cut, again = made(both()), made(both())
    with pytest.raises(KeyboardInterrupt):
        cut.run(Stopped())
    for tensor in again.step.kept().values():
        tensor.detach().fill_(9.0)  # what the file does not hold would stay
    load_run(tmp_path / "state.pt", again, ORIGIN)
    again.run(Notes())
    expected, found = weights(whole), weights(again)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert whole.state.records == [
        {**r, "seconds": s["seconds"]} if "seconds" in r else r
        for r, s in zip(again.state.records, whole.state.records, strict=True)
    ]


@pytest.mark.pitfall("P49")
def test_accumulated_batches_of_several_sources_are_one_large_batch() -> None:
    large, small = made(both(), batch_size=6, clip=0.0), made(both(), batch_size=2, accumulate=3, clip=0.0)
    for loop in (large, small):
        loop.run(Notes())
    found = weights(small)
    for name, tensor in weights(large).items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-4, atol=1e-5)


def test_the_best_epoch_is_the_one_of_the_highest_score() -> None:
    scores = iter([Score(0.2, {"distance": 5}), Score(0.4, {"distance": 3}), Score(0.3, {"distance": 4})])
    loop, notes = made(both(), epochs=3), Notes()
    loop.validate = lambda accelerator: next(scores)
    state = loop.run(notes)
    assert notes.epochs == [(1, True), (2, True), (3, False)]
    assert (state.best_epoch, state.best_score) == (2, 0.4)
    assert [r["validation"] for r in state.records if r["kind"] == "epoch"] == [
        {"distance": 5}, {"distance": 3}, {"distance": 4},
    ]  # fmt: skip


def test_each_part_learns_at_its_rate() -> None:
    loop = made(both(), rates={"objectives.teacher": 0.5}, lr=0.1, warmup=0.0)
    groups = {
        group["base_lr"]: sorted(tuple(p.shape) for p in group["params"]) for group in loop.optimizer.param_groups
    }
    assert groups.keys() == {0.1, 0.5}
    notes = Notes()
    loop.run(notes)
    assert notes.steps[0].lr == 0.5  # the highest


def test_sources_and_objectives_must_fit() -> None:
    for sources in ({"first": Numbers(4, 1)}, {"first": Numbers(4, 1), "second": Numbers(4, 1), "x": Numbers(4, 1)}):
        with pytest.raises(RecipeError, match=r"sources .*but the objectives take first, second"):
            made(both(), sources)


def test_a_state_of_other_objectives_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "state.pt", made(both()), ORIGIN)
    other = made({"twice": Twice("first"), "student": Teacher("second")})
    with pytest.raises(CheckpointError, match=r"objectives\.student"):
        load_run(tmp_path / "state.pt", other, ORIGIN)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_of_several_objectives_has_its_share_of_the_loss(accumulate: int) -> None:
    """Computed by hand for the first step: weight * sum / count, the sums and counts of all of its batches."""
    by_hand = made(both(), batch_size=2, accumulate=accumulate)
    sums, divisors = dict.fromkeys(by_hand.step.objectives, 0.0), dict.fromkeys(by_hand.step.objectives, 0.0)
    for batches in next(by_hand._steps(0)):
        for name, objective in by_hand.step._each().items():
            (term,), (count,) = (
                found.values()
                for found in (
                    objective.terms(by_hand.step.model, batches[objective.source]),
                    objective.counts(batches[objective.source]),
                )
            )
            sums[name] += term.weight * term.sum.item()
            divisors[name] += float(count)
    expected = {name: sums[name] / divisors[name] for name in sums}
    loop, notes = made(both(), batch_size=2, accumulate=accumulate), Notes()
    records = [record for record in loop.run(notes).records if record["kind"] == "step"]
    assert records[0]["losses"] == pytest.approx(expected, rel=1e-5)
    assert list(records[0]["losses"]) == ["twice", "teacher"]
    assert all(record["loss"] == pytest.approx(sum(record["losses"].values()), rel=1e-6) for record in records)
    assert [report.losses for report in notes.steps] == [record["losses"] for record in records]


def test_the_log_of_one_objective_has_its_loss_alone() -> None:
    state = made({"twice": Twice("first")}, {"first": Numbers(10, 1)}, epochs=1).run(Notes())
    assert [set(record) for record in state.records if record["kind"] == "step"] == [{"kind", "step", "loss", "lr"}] * 3


def test_a_tensor_of_an_objective_that_is_no_number_is_told() -> None:
    objectives = both()
    loop = made(objectives, epochs=1)

    class Broken(Notes):
        def step(self, report: StepReport) -> None:
            if report.step == report.steps_total:  # no loss to come will see it
                objectives["teacher"].mean.weight.data.fill_(float("nan"))  # type: ignore[attr-defined]

    with pytest.raises(VfmsegError, match=r"1 tensors hold NaN or infinity after epoch 1 \(objectives\.teacher\.mean"):
        loop.run(Broken())


TOGETHER = """
import os, sys
import torch
from makers import on_two_processes
from test_loop import Notes, Numbers, both, made, weights

loop = made(both(), {"first": Numbers(9, 1), "second": Numbers(4, 2)}, batch_size=2)
notes = Notes()
loop.run(notes)
found = {"weights": weights(loop), "losses": [report.loss for report in notes.steps],
         "each": [dict(report.losses) for report in notes.steps],
         "fillers": sum(draw.filler for source in loop.sources.values() for draw in source.drawn)}
torch.save(found, os.path.join(sys.argv[1], os.environ["RANK"] + ".pt"))
"""


@pytest.mark.pitfall("P49", "P51", "P53")
def test_two_processes_with_two_objectives_equal_one(tmp_path: Path) -> None:
    """One forward and one backward pass for all objectives; nine samples leave the second process with fillers."""
    (tmp_path / "together.py").write_text(TOGETHER)
    on_two_processes(tmp_path / "together.py", tmp_path)
    one, notes = made(both(), {"first": Numbers(9, 1), "second": Numbers(4, 2)}, batch_size=4), Notes()
    one.run(notes)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [rank["fillers"] for rank in ranks] == [0, 8]  # in four epochs, of both sources
    for name, tensor in weights(one).items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx([report.loss for report in notes.steps], rel=1e-5)
    for name in ("twice", "teacher"):
        together = [[one[name] for one in rank["each"]] for rank in ranks]
        assert together[0] == together[1] == pytest.approx([report.losses[name] for report in notes.steps], rel=1e-5)
