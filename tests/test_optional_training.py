"""Training with missing modalities: what a sample is, what is hidden at random, and that a resumed run goes on so."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import in_two_sittings, save_encoder, sensor_recipe, two_sensors, write_raster
from safetensors.torch import load_file
from torch import nn

from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.model import build_model
from vfmseg.build.training import objectives_of, sources_of, validation_of
from vfmseg.data.augment import Augment, Radiometry
from vfmseg.data.dataset import CoverWindows, TrainingWindows
from vfmseg.data.dropout import hide
from vfmseg.data.from_files import scenes_from_files
from vfmseg.data.image import Image, Images
from vfmseg.data.sample import Batch, Sample, collate
from vfmseg.data.windows import Draw, Purpose, rng
from vfmseg.errors import RecipeError
from vfmseg.finetune import finetune
from vfmseg.geo.bands import Bands
from vfmseg.geo.classes import IGNORE, LabelMap
from vfmseg.geo.grid import Window
from vfmseg.geo.reader import Raster
from vfmseg.segmenter import Segmenter
from vfmseg.training.losses import LOSSES
from vfmseg.training.objectives.segmentation import Segmentation

COUNTS = {"rgb": 3, "sar": 1}
CHANGES = {"sar": Radiometry(0.3, 0.3), "rgb": Radiometry(0.2, 0.2, 0.2, 0.1)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    two_sensors(tmp_path, "train", {"a": "rgb sar", "b": "rgb", "c": "sar", "d": "rgb sar"})
    two_sensors(tmp_path, "val", {"v": "rgb sar", "w": "sar"})
    return tmp_path


def scenes_in(place: Path) -> list[Any]:
    sources = {name: f"{place}/train/{name}/*.tif" for name in COUNTS}
    bands = {name: Bands() for name in COUNTS}
    labels = f"{place}/train/labels/*.tif"
    return scenes_from_files(sources, labels, bands, LabelMap((0, 1), 255), "data.train", tuple(COUNTS))


def without_test(place: Path, **changes: Any) -> Any:
    save_encoder(place / "encoder", "dinov2")
    return sensor_recipe(place, data__test=None, **changes)


# ------------------------------------------------------------------------------------------------------ samples


@pytest.mark.pitfall("C44")
def test_a_missing_modality_is_an_image_of_which_nothing_is_valid(place: Path) -> None:
    scenes = scenes_in(place)
    windows = TrainingWindows(scenes, 24, 0, Augment(), "any", bands=COUNTS)
    samples = [windows[Draw(0, i)] for i in range(len(windows))]
    assert all(list(sample.images) == ["rgb", "sar"] for sample in samples)
    absent = [s.images["rgb"] for s in samples if not s.images["rgb"].valid.any()]
    assert len(absent) == len(windows) // 4  # of one scene of four
    assert all(image.pixels.shape == (3, 24, 24) and not image.pixels.any() for image in absent)
    batch = collate(samples)
    assert batch.images["sar"].pixels.shape == (len(samples), 1, 24, 24)
    assert (batch.targets("any") != IGNORE).all()
    cover = CoverWindows(scenes, 24, COUNTS)
    targets = collate([cover[i] for i in range(len(cover))]).targets("any")
    assert int((targets != IGNORE).sum()) == 4 * 48 * 56  # each pixel of each scene once


@pytest.mark.pitfall("C43", "C44")
def test_augmentation_of_the_others_does_not_depend_on_what_is_missing(place: Path) -> None:
    """The same window with and without SAR: the image and the labels move and change alike, and SAR stays nothing."""
    augment = Augment(scale=(0.8, 1.25), rotate=20.0, radiometry=CHANGES)

    def first() -> Sample:
        return TrainingWindows(scenes_in(place)[:1], 24, 0, augment, "any", bands=COUNTS)[Draw(0, 0)]

    whole = first()
    (place / "train" / "sar" / "a.tif").unlink()
    alone = first()
    assert whole.labels is not None
    assert alone.labels is not None
    assert torch.equal(whole.labels, alone.labels)
    assert torch.equal(whole.images["rgb"].pixels, alone.images["rgb"].pixels)
    assert whole.images["sar"].valid.any()
    assert not alone.images["sar"].valid.any()
    assert not alone.images["sar"].pixels.any()


def test_sources_and_validation_give_one_layout(place: Path) -> None:
    recipe = without_test(place)
    scenes = open_training(recipe)
    inputs = inputs_of(recipe, scenes["train"])
    source = sources_of(recipe, scenes["train"], inputs)["train"]
    assert list(collate([source[Draw(0, i)] for i in range(len(source))]).images) == ["rgb", "sar"]
    windows = validation_of(recipe, nn.Identity(), scenes["val"], inputs).windows
    assert windows is not None
    assert list(collate([windows[i] for i in range(len(windows))]).images) == ["rgb", "sar"]


# ------------------------------------------------------------------------------------------------------- hiding


def sample_of(valid: dict[str, np.ndarray], labels: np.ndarray | None) -> Sample:
    images = {n: Image(torch.ones(1, *v.shape), torch.from_numpy(v)) for n, v in valid.items()}
    return Sample(images, None if labels is None else torch.from_numpy(labels))


ALL, NONE = np.ones((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool)
LEFT = np.array([[True, False], [True, False]])
ONES = np.ones((2, 2), dtype=np.int64)


def hidden_in(sample: Sample, chances: dict[str, float], tries: int = 2000) -> Counter[frozenset[str]]:
    return Counter(hide(sample, chances, rng(Purpose.MODALITY, 0, 0, i)).hidden for i in range(tries))


@pytest.mark.pitfall("C44")
def test_each_modality_is_hidden_as_often_as_it_says_and_never_all() -> None:
    sample = sample_of({"a": ALL, "b": ALL, "c": ALL}, ONES)
    found = hidden_in(sample, {"a": 0.5, "b": 0.5, "c": 0.1}, 20000)
    assert frozenset("abc") not in found
    share = {name: sum(n for hidden, n in found.items() if name in hidden) / 20000 for name in "abc"}
    # in 0.025 of the draws all three are, and then one of them is kept, each as often
    for name, chance in (("a", 0.5), ("b", 0.5), ("c", 0.1)):
        assert share[name] == pytest.approx(chance - 0.025 / 3, abs=0.012)
    kept = hidden_in(sample_of({"a": ALL, "b": ALL}, ONES), {"a": 0.99, "b": 0.99})
    assert kept[frozenset("a")] == pytest.approx(kept[frozenset("b")], rel=0.15)
    assert set(hidden_in(sample, {"b": 0.5})) == {frozenset(), frozenset("b")}


@pytest.mark.pitfall("C44", "P41")
def test_what_is_kept_has_something_to_learn_from() -> None:
    labels = np.where(LEFT, 1, IGNORE)
    # b sees only what has no label, c nothing at all: only a can be learned from, so it is always shown
    sample = sample_of({"a": LEFT, "b": ~LEFT, "c": NONE}, labels)
    found = hidden_in(sample, {"a": 0.9, "b": 0.9, "c": 0.9})
    assert all("a" not in hidden for hidden in found)
    assert all("c" not in hidden for hidden in found)  # it was missing before
    assert found[frozenset("b")] > 1500
    # nothing is labelled, or there are no labels at all: one is left all the same
    for target in (np.full((2, 2), IGNORE), None):
        assert max(map(len, hidden_in(sample_of({"a": ALL, "b": ALL}, target), {"a": 0.9, "b": 0.9}))) == 1
    assert set(hidden_in(sample_of({"a": NONE, "b": NONE}, None), {"a": 0.9, "b": 0.9})) == {frozenset()}


@pytest.mark.pitfall("P56", "P57")
def test_a_draw_hides_the_same_whatever_was_drawn_before(place: Path) -> None:
    windows = [TrainingWindows(scenes_in(place), 24, 3, Augment(), "any", None, COUNTS, {"rgb": 0.5, "sar": 0.5})] * 2
    draws = [Draw(epoch, i) for epoch in range(2) for i in range(len(windows[0]))]
    once = [windows[0][draw].hidden for draw in draws]
    torch.manual_seed(1), np.random.seed(1)
    again = [windows[1][draw].hidden for draw in reversed(draws)][::-1]
    assert once == again
    assert len(set(once)) == 3
    half = len(draws) // 2
    assert once[:half] != once[half:]  # another epoch hides others


@pytest.mark.pitfall("P55")
def test_without_dropout_nothing_is_drawn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with it windows and augmentation are those without."""
    drawn: list[Purpose] = []

    def noted(purpose: Purpose, *key: int) -> np.random.Generator:
        drawn.append(purpose)
        return rng(purpose, *key)

    monkeypatch.setattr("vfmseg.data.dataset.rng", noted)
    augment = Augment(radiometry=CHANGES)
    plain = TrainingWindows(scenes_in(place), 24, 3, augment, "any", None, COUNTS, {})
    hiding = TrainingWindows(scenes_in(place), 24, 3, augment, "any", None, COUNTS, {"rgb": 0.9})
    one = [plain[Draw(0, i)] for i in range(len(plain))]
    assert Purpose.MODALITY not in drawn
    assert all(not sample.hidden for sample in one)
    two = [hiding[Draw(0, i)] for i in range(len(hiding))]
    assert any(sample.hidden for sample in two)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a.images[n].pixels, b.images[n].pixels) for n in COUNTS)  # images are kept whole
        assert all(torch.equal(a.images[n].valid, b.images[n].valid) for n in COUNTS)


def test_a_filler_hides_nothing(place: Path) -> None:
    windows = TrainingWindows(scenes_in(place), 24, 3, None, "any", None, COUNTS, {"rgb": 0.9, "sar": 0.9})
    assert all(not windows[Draw(0, i, filler=True)].hidden for i in range(len(windows)))


class Seen(nn.Module):
    """Answers with two classes of the mean of what it sees, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.shown: list[Images] = []

    def answer(self, images: Images, frames: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        self.shown.append(images)
        total = sum(torch.where(i.valid[:, None], i.pixels, 0.0).sum(1, keepdim=True) for i in images.values())
        return torch.cat([self.gain * total, -self.gain * total], dim=1), {}


@pytest.mark.pitfall("C44", "P39")
def test_the_model_sees_and_learns_what_is_shown_alone() -> None:
    samples = [sample_of({"a": ALL, "b": LEFT}, ONES), sample_of({"a": ALL, "b": ALL}, ONES)]
    samples[0].hidden = frozenset("a")
    batch = collate(samples)
    assert {name: rows.tolist() for name, rows in batch.hidden.items()} == {"a": [True, False]}
    shown = batch.shown()
    assert batch.images["a"].valid.all()  # whole
    assert not shown["a"].valid[0].any()
    assert not shown["a"].pixels[0].any()
    assert shown["a"].valid[1].all()
    assert torch.equal(shown["b"].valid, batch.images["b"].valid)
    np.testing.assert_array_equal(batch.targets("any")[0], np.where(LEFT, 1, IGNORE))
    assert (batch.targets("any")[1] == 1).all()
    moved = batch.to("cpu")
    assert torch.equal(moved.hidden["a"], batch.hidden["a"])
    objective = Segmentation({"cross_entropy": LOSSES["cross_entropy"]()}, {"cross_entropy": 1.0}, "any")
    model = Seen()
    objective.terms(model, batch)
    assert not model.shown[0]["a"].valid[0].any()
    assert float(objective.counts(batch)["pixels"]) == 2 + 4


def test_a_batch_in_which_nothing_is_hidden_is_shown_as_it_is() -> None:
    batch = collate([sample_of({"a": ALL, "b": LEFT}, ONES)] * 2)
    assert batch.hidden == {}
    assert all(batch.shown()[name] is image for name, image in batch.images.items())


# --------------------------------------------------------------------------------------------------------- runs


@pytest.mark.pitfall("P55", "P56")
def test_a_run_that_hides_modalities_goes_on_as_if_never_stopped(place: Path) -> None:
    recipe = without_test(place, train__modality_dropout=0.4, output_dir=str(place / "whole"))
    finetune(recipe)

    shorter = without_test(place, train__modality_dropout=0.4, output_dir=str(place / "stopped"))
    in_two_sittings(shorter)
    none = without_test(place, output_dir=str(place / "none"))
    finetune(none)
    one, two, other = (load_file(r.output_dir / "last" / "head.safetensors") for r in (recipe, shorter, none))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_objectives_of_a_recipe_take_what_is_shown(place: Path) -> None:
    """Of a real fusion: a batch in which SAR is hidden everywhere costs what one without SAR does."""
    recipe = without_test(place)
    scenes = open_training(recipe)
    inputs = inputs_of(recipe, scenes["train"])
    model = build_model(recipe, inputs)
    (objective,) = objectives_of(recipe, inputs, model).values()
    source = sources_of(recipe, scenes["train"], inputs)["train"]
    samples = [s for s in (source[Draw(0, i)] for i in range(len(source))) if s.images["rgb"].valid.any()][:3]
    for sample in samples:
        sample.hidden = frozenset({"sar"})
    gone = [Sample({"rgb": s.images["rgb"], "sar": Image.nothing(1, (24, 24))}, s.labels) for s in samples]
    hidden, missing = (objective.terms(model, collate(some)) for some in (samples, gone))
    for name, term in hidden.items():
        torch.testing.assert_close(term.sum, missing[name].sum, atol=0, rtol=0)


@pytest.mark.pitfall("C44")
def test_dropout_keeps_a_model_from_leaning_on_one_sensor(tmp_path: Path) -> None:
    """Only the clear sensor decides what is learned, and the noisy one alone is worth nothing then, but for dropout."""
    two_sensors(tmp_path, "train", {f"s{i}": "rgb" for i in range(6)})
    two_sensors(tmp_path, "test", {"t": "rgb", "u": "rgb"})
    for path in tmp_path.glob("*/labels/*.tif"):
        labels, random = Raster(path).read(Window(0, 0, 48, 56)).pixels, np.random.default_rng(ord(path.stem[-1]))
        noisy = (-10 * labels + random.normal(0, 8, (1, 48, 56))).astype(np.float32)
        write_raster(path.parent.parent / "sar" / path.name, noisy)
    save_encoder(tmp_path / "encoder", "dinov2")
    alone = {}
    for chance in (0.0, 0.4):
        recipe = sensor_recipe(
            tmp_path,
            data__val=None,
            train__epochs=20,
            train__modality_dropout=chance,
            output_dir=f"{tmp_path}/{chance}",
            model__fusion={"name": "linear", "op": "sum"},
        )
        finetune(recipe)
        segmenter = Segmenter.from_pretrained(recipe.output_dir / "last", device="cpu")
        found = segmenter.evaluate_subsets(recipe)
        assert found["rgb+sar"]["miou"] > 0.7
        alone[chance] = found["sar"]["miou"]
    assert alone[0.0] < 0.4
    assert alone[0.4] > 0.6


# --------------------------------------------------------------------------------------------------- distillation


class Shares(nn.Module):
    """Logits that are the sum of what each modality shows, through a weight that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def answer(self, images: Images, frames: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        total = torch.stack([image.pixels.sum(dim=1) for image in images.values()]).sum(dim=0)
        return torch.stack([self.weight * total, torch.zeros_like(total)], dim=1), {}


def test_distillation_is_the_distance_to_what_the_whole_model_says() -> None:
    """KL(full || hidden) over labelled pixels, with no gradient through the full answer; nothing hidden: 0."""
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    images = {name: Image(torch.full((2, 1, 4, 4), value), valid) for name, value in (("rgb", 1.0), ("sar", 2.0))}
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[:, 0] = IGNORE
    objective = Segmentation({"cross_entropy": LOSSES["cross_entropy"]()}, {"cross_entropy": 1.0}, "any", distill=0.5)
    model, batch = Shares(), Batch(images, labels, {"sar": torch.tensor([True, False])})
    term = objective.terms(model, batch)["distill"]
    assert (term.weight, term.count) == (0.5, "samples")

    def chance(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    full, hidden = chance(3.0), chance(1.0)
    expected = full * math.log(full / hidden) + (1 - full) * math.log((1 - full) / (1 - hidden))
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)
    term.sum.backward()  # type: ignore[no-untyped-call]
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(1.0 * (hidden - full), rel=1e-4)  # not that of the full answer
    assert objective.terms(model, Batch(images, labels))["distill"].sum.item() == 0.0


def test_distillation_without_dropout_is_a_problem(place: Path) -> None:
    with pytest.raises(RecipeError, match="hides nothing"):
        without_test(place, train__distill=0.5)
