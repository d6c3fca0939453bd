"""Scores of an encoder while it is pretrained: what they tell, which epoch they choose; they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import MAE_DECODER, in_two_sittings, on_two_processes, pretrain_recipe, toy_scene, write_raster
from PIL import Image as Picture
from safetensors.torch import load_file

from vfmseg.build.probe import probe_of
from vfmseg.data.labelled_cells import Cells
from vfmseg.data.sample import collate
from vfmseg.errors import CheckpointError, DataError, RecipeError
from vfmseg.model import Encoder
from vfmseg.pretrain import pretrain
from vfmseg.recipe import PretrainRecipe
from vfmseg.training.loop import Loop, Score
from vfmseg.training.probe import Probe, due, in_words

MAE = {"decoder": MAE_DECODER}
CLASSES = {0: "ground", 1: "disc"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes to pretrain on, and labelled ones elsewhere, in train/ and val/."""
    folder = tmp_path_factory.mktemp("probe")
    for number in range(3):
        write_raster(folder / "rgb" / f"{number}.tif", toy_scene(number, 80, 96)[0], origin=(500000 + 5000 * number, 0))
    for split, first in (("train", 20), ("val", 30)):
        for number in range(2):
            image, labels = toy_scene(first + number, 72, 64)
            origin = (700000 + 5000 * (first + number), 5000000)
            write_raster(folder / split / "images" / f"{number}_{split}.tif", image, origin=origin)
            write_raster(folder / split / "labels" / f"{number}_{split}.tif", labels, origin=origin)
    return folder


def sources(place: Path, **more: Any) -> dict[str, Any]:
    """A labelled set of a probe."""
    found = {s: {"rgb": f"{place}/{s}/images", "labels": f"{place}/{s}/labels"} for s in ("train", "val")}
    return {"classes": CLASSES, **found, **more}


def recipe_of(place: Path, output: Path, **changes: Any) -> PretrainRecipe:
    """A recipe of three epochs of four windows; changes such as probe={...} replace a section."""
    return pretrain_recipe(place, output, epochs=3, samples=4, **changes)


def probed(place: Path, **more: Any) -> dict[str, Any]:
    return {"probe": {"sets": {"discs": sources(place)}, **more}}


def epochs(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "state.pt", weights_only=True)["tensors"])


def test_a_run_with_a_probe_learns_the_same_bits_and_its_best_is_that_of_the_best_score(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, with_probe = recipe_of(place, tmp_path / "plain"), recipe_of(place, tmp_path / "probed", **probed(place))
    pretrain(plain)
    plant(monkeypatch, {1: 0.3, 2: 0.9, 3: 0.5})
    found = pretrain(with_probe)
    one, two = tensors(plain.output_dir), tensors(with_probe.output_dir)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert found["best_epoch"] == 2
    assert json.loads((with_probe.output_dir / "best" / "encoder.json").read_text())["metrics"]["epoch"] == 2
    best, last = (load_file(with_probe.output_dir / name / "model.safetensors") for name in ("best", "last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.pitfall("K20")
def test_the_score_is_of_the_cells_of_val_and_is_noted(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, tmp_path / "run", **probed(place))
    pretrain(recipe)
    for epoch in epochs(recipe.output_dir):
        values = epoch["validation"]
        one = values["sets"]["discs"]
        assert values["linear"] == one["linear"] == pytest.approx(np.mean(list(one["classes"].values())))
        # the disc is brighter: what any encoder keeps of it tells it from the ground
        assert one["linear"] > 0.8
        assert one["knn"] > 0.8
        assert 1 < one["rank"] < 16
    values = {"linear": 0.6, "knn": 0.5, "sets": {"towns": {"linear": 0.612, "knn": 0.5833, "rank": 44.8}}}
    assert in_words(values) == "probe towns 0.612 linear, 0.583 kNN, rank 45"


def test_what_is_scored_are_the_cells_of_the_last_map(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfmseg.training import probe

    seen: list[tuple[Encoder, Cells, torch.Tensor]] = []
    original = probe.features_of

    def noted(accelerator: Any, model: Encoder, cells: Cells, batch_size: int) -> torch.Tensor:
        found = original(accelerator, model, cells, batch_size)
        seen.append((model, cells, found))
        return found

    monkeypatch.setattr(probe, "features_of", noted)
    pretrain(recipe_of(place, tmp_path / "run", **probed(place)))
    model, cells, found = seen[-1]
    assert len(model.backbone.layers) > 1
    tile = next(reversed(cells.numbers))
    with torch.no_grad():
        maps = model.encode(collate([cells.windows[tile]]).images)["rgb"].maps
    expected = maps[-1][0].flatten(1).T[cells.numbers[tile]]
    torch.testing.assert_close(found[-len(expected) :], expected)


@pytest.mark.pitfall("C22", "F16")
def test_bands_of_a_set_are_found_as_in_the_scenes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set whose files hold blue, green and red, and say so, is read as red, green and blue."""
    plant(monkeypatch, {1: 0.5, 2: 0.5, 3: 0.5})
    names = ("red", "green", "blue")
    image = toy_scene(0, 80, 96)[0]
    shown = {"scenes": (image, names)} | {
        split: (toy_scene(number, 72, 64)[0][::-1], names[::-1]) for split, number in (("train", 20), ("val", 30))
    }
    for number, (split, (pixels, said)) in enumerate(shown.items()):
        path = write_raster(tmp_path / split / "a.tif", pixels, origin=(500000 + 5000 * number, 0))
        with rasterio.open(path, "r+") as file:
            file.descriptions = said
        write_raster(
            tmp_path / f"{split}_labels" / "a.tif", toy_scene(20, 72, 64)[1], origin=(500000 + 5000 * number, 0)
        )
    splits = {s: {"rgb": f"{tmp_path}/{s}", "labels": f"{tmp_path}/{s}_labels"} for s in ("train", "val")}
    data = {"modalities": {"rgb": {}}, "scenes": {"rgb": f"{tmp_path}/scenes"}, "tile": 32, "samples_per_epoch": 4}
    recipe = recipe_of(place, tmp_path / "run", data=data, probe={"sets": {"a": {"classes": CLASSES, **splits}}})
    found: list[Probe | None] = []

    def noted(*arguments: Any) -> Probe | None:
        found.append(probe_of(*arguments))
        return found[-1]

    monkeypatch.setattr("vfmseg.build.probe.probe_of", noted)
    pretrain(recipe)
    assert found[0] is not None
    tile = found[0].sets["a"].train.windows[0].images["rgb"].pixels.numpy()
    np.testing.assert_array_equal(tile, shown["train"][0][::-1, :32, :32])


@pytest.mark.parametrize("names", [("ms",), ("ms", "rgb")])
def test_a_set_may_have_some_of_the_modalities(
    place: Path, tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of several are put side by side; each is read and normalised as its own modality."""
    for split in ("train", "val"):
        for number, file in enumerate(sorted((place / split / "images").iterdir())):
            image = toy_scene({"train": 20, "val": 30}[split] + number, 72, 64)[0]
            four = np.concatenate([image, image[:1]]).astype(np.float32) * 10
            origin = (700000 + 5000 * ({"train": 20, "val": 30}[split] + number), 5000000)
            write_raster(tmp_path / split / "ms" / file.name, four, origin=origin)
    folders = {"rgb": lambda split: place / split / "images", "ms": lambda split: tmp_path / split / "ms"}
    splits = {
        split: {"labels": str(place / split / "labels")} | {name: str(folders[name](split)) for name in names}
        for split in ("train", "val")
    }
    data = {
        "modalities": {"rgb": {}, "ms": {}},
        "scenes": [{"rgb": f"{place}/rgb"}, {"ms": f"{tmp_path}/train/ms"}],
        "tile": 32,
        "samples_per_epoch": 8,
    }
    from vfmseg.training import probe

    seen = []
    original = probe.features_of

    def noted(*arguments: Any) -> torch.Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(probe, "features_of", noted)
    recipe = recipe_of(
        place, tmp_path / "run", data=data, pictures=3, probe={"sets": {"discs": sources(place, **splits)}}
    )
    pretrain(recipe)
    assert {one.shape[1] for one in seen} == {16 * len(names)}
    assert epochs(recipe.output_dir)[-1]["validation"]["linear"] > 0.8
    drawn = np.asarray(Picture.open(recipe.output_dir / "pictures" / "epoch-0003.png"))
    assert drawn.shape == (3 * 32 + 2 * 4, 3 * 32 + 2 * 4, 3)


def test_a_stopped_run_goes_on_with_its_scores(place: Path, tmp_path: Path) -> None:
    one = recipe_of(place, tmp_path / "one", **probed(place), pictures=1)
    two = recipe_of(place, tmp_path / "two", **probed(place), pictures=1)
    pretrain(one)
    in_two_sittings(two, run=pretrain)
    assert [e["validation"] for e in epochs(one.output_dir)] == [e["validation"] for e in epochs(two.output_dir)]
    results = [json.loads((run.output_dir / "metrics.json").read_text()) for run in (one, two)]
    assert results[0]["best_epoch"] == results[1]["best_epoch"]
    for number in (1, 2, 3):
        names = [run.output_dir / "pictures" / f"epoch-{number:04}.png" for run in (one, two)]
        assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.pitfall("K20")
def test_an_encoder_that_collapses_is_seen_by_its_rank(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second epoch on it answers the same, whatever it sees."""
    recipe = recipe_of(place, tmp_path / "run", **probed(place))
    honest = Loop._train_epoch

    def collapsing(self: Loop, epoch: int, tell: Any) -> None:
        honest(self, epoch, tell)
        if epoch:
            embeddings = self.step.model.backbone.network.embeddings  # type: ignore[union-attr]
            with torch.no_grad():
                for tensor in (embeddings.patch_embeddings.projection.weight, embeddings.position_embeddings):  # type: ignore[union-attr]
                    tensor.zero_()  # type: ignore[operator]

    monkeypatch.setattr(Loop, "_train_epoch", collapsing)
    pretrain(recipe)
    found = [epoch["validation"]["sets"]["discs"] for epoch in epochs(recipe.output_dir)]
    assert found[0]["rank"] > 2
    assert found[1]["rank"] == pytest.approx(1, abs=0.05)
    assert found[1]["linear"] < 0.6 < found[0]["linear"]


def plant(monkeypatch: pytest.MonkeyPatch, told: dict[int, float]) -> None:
    """Let a probe work, and what it chooses by be `told` {epoch: score}."""
    original = Probe.__call__

    def planted_best(self: Probe, accelerator: Any, epoch: int) -> Score:
        found = original(self, accelerator, epoch)
        return Score(told.get(epoch, found.best), found.values)

    monkeypatch.setattr(Probe, "__call__", planted_best)


def test_some_epochs_are_not_scored_and_are_never_the_best(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {1: 0.9, 3: 0.5, 4: 0.7})
    assert [epoch for epoch in range(1, 8) if due(epoch, 3, 7)] == [1, 3, 6, 7]
    train = {"epochs": 4, "batch_size": 2, "optimizer": {"lr": 0.003}}
    recipe = recipe_of(place, tmp_path / "run", train=train, **probed(place, every=3))
    in_two_sittings(recipe, after=2, run=pretrain)
    scored = [one["epoch"] for one in epochs(recipe.output_dir) if "validation" in one]
    assert scored == [1, 3, 4]
    assert json.loads((recipe.output_dir / "metrics.json").read_text())["best_epoch"] == 1


@pytest.mark.pitfall("P52")
def test_two_processes_choose_by_one_score(place: Path, tmp_path: Path) -> None:
    """The second process would find scores of its own: there every class is guessed at random."""
    recipe_of(place, tmp_path / "run", **probed(place), pictures=1)
    (tmp_path / "together.py").write_text(TOGETHER)
    on_two_processes(tmp_path / "together.py", tmp_path / "run.yaml")
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["validation"]["sets"]["discs"]["linear"] > 0.8
    assert (one["best_epoch"], one["validation"]) == (two["best_epoch"], two["validation"])


TOGETHER = """
import json, os, sys
from pathlib import Path
import torch
from vfmseg.pretrain import pretrain
from vfmseg.recipe import load_pretrain_recipe
from vfmseg.training import probe
rank = int(os.environ["RANK"])
if rank:
    probe.linear = lambda train, labels, val, classes: torch.randint(classes, (len(val),))
found = pretrain(load_pretrain_recipe(sys.argv[1]))
Path(sys.argv[1]).with_name(f"{rank}.json").write_text(json.dumps(found))
"""


def test_a_run_with_another_probe_is_another_run(place: Path, tmp_path: Path) -> None:
    in_two_sittings(recipe_of(place, tmp_path / "run", **probed(place), pictures=1), run=pretrain)
    with pytest.raises(CheckpointError, match="neighbours"):
        pretrain(recipe_of(place, tmp_path / "run", **probed(place, neighbours=3)), resume=True)
    pretrain(recipe_of(place, tmp_path / "run", **probed(place)), resume=True)  # pictures decide nothing


@pytest.mark.parametrize("mask", ["random", "incomplete", "spectral"])
def test_pictures_show_what_is_there_what_is_hidden_and_what_is_rebuilt(place: Path, tmp_path: Path, mask: str) -> None:
    mae = MAE | {"mask": mask, "ratio": 0.5}
    recipe = recipe_of(place, tmp_path / "run", objectives={"mae": mae}, pictures=2)
    pretrain(recipe)
    files = sorted((recipe.output_dir / "pictures").iterdir())
    assert [file.name for file in files] == ["epoch-0001.png", "epoch-0002.png", "epoch-0003.png"]
    drawn = [np.asarray(Picture.open(file)).astype(int) for file in files]
    assert drawn[0].shape == (32 + 4 + 32, 3 * 32 + 2 * 4, 3)
    true, masked, rebuilt = (drawn[-1][:32, first : first + 32] for first in (0, 36, 72))
    assert true.std() > 20
    grey = np.abs(masked - 127.5) < 1
    hidden = (masked != true).any(axis=2)
    share = {"random": 0.5, "incomplete": 0.5 * 0.6, "spectral": 1.0}[mask]
    assert hidden.mean() == pytest.approx(share, abs=0.06)
    assert grey[hidden].any(axis=1).all()
    assert (np.abs(rebuilt - true).max(axis=2)[~hidden] <= 1).all()
    assert (rebuilt != masked).any(axis=2)[hidden].mean() > 0.8
    # the same windows and masks after each epoch, another reconstruction
    assert np.array_equal(drawn[0][:, :68], drawn[-1][:, :68])
    assert not np.array_equal(drawn[0][:, 72:], drawn[-1][:, 72:])


def test_pictures_of_an_earlier_run_go_and_what_else_is_there_stays(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, tmp_path / "run", pictures=1)
    pretrain(recipe)
    (tmp_path / "run" / "pictures" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "pictures" / ".epoch-0002.png.1.partial").write_text("half")
    pretrain(recipe_of(place, tmp_path / "run"), overwrite=True)
    assert [path.name for path in (tmp_path / "run" / "pictures").iterdir()] == ["notes.txt"]


def problem_sets(place: Path, folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """{what is wrong: (recipe sections, what is told)}."""
    origin = (900000, 5000000)
    for number in range(2):
        image, labels = toy_scene(50 + number, 72, 64)
        write_raster(folder / "one" / f"{number}.tif", np.zeros_like(labels), origin=origin)
        write_raster(folder / "none" / f"{number}.tif", np.full_like(labels, 7), origin=origin)
        write_raster(folder / "img" / f"{number}.tif", image, origin=origin)
        write_raster(folder / "deep" / f"{number}.tif", image.astype(np.uint16), origin=origin)
        write_raster(folder / "small" / f"{number}.tif", image[:, :24, :24], origin=origin)
        write_raster(folder / "small_labels" / f"{number}.tif", labels[:24, :24], origin=origin)

    def of(images: str, labels: str) -> dict[str, Any]:
        return {"rgb": f"{folder}/{images}", "labels": f"{folder}/{labels}"}

    def sets(**more: Any) -> dict[str, Any]:
        return {"probe": {"sets": {"towns": sources(place, **more)}}}

    two = {"modalities": {"rgb": {}, "dem": {}}, "scenes": [{"rgb": f"{place}/rgb"}, {"dem": f"{place}/rgb"}]}
    table = sources(place)["train"]
    return {
        "one class": (sets(train=of("img", "one")), "probe.sets.towns.train: all its labelled cells are of ground"),
        "val of one class": (sets(val=of("img", "one")), "probe.sets.towns.val: all its labelled cells are of ground"),
        "no labels": (
            sets(train=of("img", "none"), ignore_index=7),
            "probe.sets.towns.train: no cell of its scenes has a label",
        ),
        "stored types": (sets(val=of("deep", "one")), "(uint16), but the scenes to pretrain on have 3 (uint8)"),
        "small": (
            sets(train=of("small", "small_labels")),
            "probe.sets.towns.train: its largest scene has 24 x 24 px, but its tiles are of data.tile = 32 px",
        ),
        "modality": (
            sets(train={"rbg": "a", "labels": "b"}, val={"rbg": "c", "labels": "d"}),
            "probe.sets.towns.train.rbg is not one of data.modalities; did you mean 'rgb'?",
        ),
        "a modality in one split": (
            sets(train=table | {"dem": "a"}) | {"data": two | {"tile": 32}},
            "probe.sets.towns.val.dem is missing, and another source of this set has it",
        ),
        "same scenes": (sets(val=table), "probe.sets.towns.val names the same scenes as train"),
        "same files": (
            sets(val=table | {"labels": f"{place}/train/labels/*.tif"}),
            "is in probe.sets.towns.train and in probe.sets.towns.val",
        ),
        "weight": (sets(train=table | {"weight": 2}), "probe.sets.towns.train.weight is not used"),
        "classes": (sets(classes={0: "a", 1: "a"}), "probe.sets.towns.classes.1 = 'a' is already the name of class 0"),
        "pictures without masks": (
            {"pictures": 2, "objectives": {"distill": {"teacher": {"name": "clip", "checkpoint": str(place)}}}},
            "pictures = 2 are of what objectives.mae rebuilds; add it, or drop them",
        ),
    }


PROBLEMS = (
    "one class", "val of one class", "no labels", "stored types", "small", "modality", "a modality in one split",
    "same scenes", "same files", "weight", "classes", "pictures without masks",
)  # fmt: skip


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_set_that_could_tell_nothing_is_told_before_training(place: Path, tmp_path: Path, what: str) -> None:
    changes, message = problem_sets(place, tmp_path / "sets")[what]
    with pytest.raises((RecipeError, DataError)) as caught:
        pretrain(recipe_of(place, tmp_path / "run", **changes))
    assert message in str(caught.value)
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.name != ".lock"] == []


def test_ground_that_was_pretrained_on_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {
        "modalities": {"rgb": {}},
        "scenes": [{"rgb": f"{place}/rgb"}, {"rgb": f"{place}/val/images"}],
        "tile": 32,
        "samples_per_epoch": 4,
    }
    pretrain(recipe_of(place, tmp_path / "run", data=data, **probed(place)))
    told = capsys.readouterr().err
    assert "probe.sets.discs.val: 2 of 2 scenes lie on ground of data.scenes" in told
    assert "best epoch" in told
    assert "(probe discs 0." in told
