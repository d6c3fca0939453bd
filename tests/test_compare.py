"""`vfmseg compare`: which recipes a grid makes, what is trained and what is not, and what the table may say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import recipe_dict, save_encoder, toy_folder, write_raster, write_recipe
from test_fusion_runs import FUSIONS, recipe_of
from test_fusion_runs import place as _two_modalities
from typer.testing import CliRunner

from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.model import build_model
from vfmseg.cli import app
from vfmseg.compare import runs
from vfmseg.compare.comparison import compare
from vfmseg.compare.equal import Counting, equalised, is_equal
from vfmseg.compare.grid import alternatives, cells_of
from vfmseg.compare.measure import KEPT, milliseconds, peak_bytes
from vfmseg.compare.table import summary, text, verdict
from vfmseg.errors import CheckpointError, DataError, RecipeError
from vfmseg.recipe import dump_recipe, load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.training.keeper import Keeper

two_modalities = _two_modalities  # scenes with rgb and dem, and an encoder
DECODERS = "model.decoder.name=linear,fpn"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy scenes, an encoder and a recipe of one epoch in r.yaml."""
    folder = tmp_path_factory.mktemp("compare")
    toy_folder(folder / "data", {"train": 2, "val": 1, "test": 1})
    save_encoder(folder / "encoder", "dinov2")
    content = recipe_dict(folder / "data", folder / "encoder", folder / "run")
    content["train"]["epochs"] = 1
    write_recipe(folder / "r.yaml", content)
    return folder


@pytest.fixture(scope="module")
def compared(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of a finished comparison of two decoders with two seeds."""
    return place / "run-compare", compare(place / "r.yaml", [DECODERS], seeds=2)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with `cell/seed-N, resume` of each training while the test runs."""
    calls: list[str] = []
    original = runs.finetune

    def watched(recipe: Any, resume: bool = False) -> dict[str, Any]:
        calls.append("/".join(recipe.output_dir.parts[-2:]) + " resumed" * resume)
        return original(recipe, resume=resume)

    monkeypatch.setattr(runs, "finetune", watched)
    return calls


@pytest.mark.parametrize(
    ("value", "pieces"),
    [
        ("stack,linear, gated", ["stack", "linear", "gated"]),
        ("1e-3", ["1e-3"]),
        ("{name: stack},{name: gated, mode: cross}", ["{name: stack}", "{name: gated, mode: cross}"]),
        ("[3,6],[12]", ["[3,6]", "[12]"]),
        ("{a: [1,2], b: {c: 3, d: 4}},5", ["{a: [1,2], b: {c: 3, d: 4}}", "5"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("'it''s, he said',b", ["'it''s, he said'", "b"]),
        (r'"say \"a,b\"",c', [r'"say \"a,b\""', "c"]),
        ('{a: "},{"},b', ['{a: "},{"}', "b"]),
        ("it's,that's", ["it's", "that's"]),  # in the middle of a word an apostrophe quotes nothing
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_commas_part_alternatives_except_inside_brackets_and_quotes(value: str, pieces: list[str]) -> None:
    assert alternatives(value) == pieces


def test_a_grid_is_the_product_of_its_keys_and_plain_changes_hold_in_all_cells(place: Path) -> None:
    changes = [DECODERS, "train.epochs=7", "model.adapter={name: none},{name: lora, rank: 3}"]
    cells = cells_of(place / "r.yaml", changes)
    assert [cell.name for cell in cells] == ["linear_none", "linear_lora-rank-3", "fpn_none", "fpn_lora-rank-3"]
    model = [(cell.recipe.model.decoder.name, cell.recipe.model.adapter.name) for cell in cells]
    assert model == [("linear", "none"), ("linear", "lora"), ("fpn", "none"), ("fpn", "lora")]
    assert {cell.recipe.train.epochs for cell in cells} == {7}
    assert cells[1].changes == (DECODERS[:-4], "train.epochs=7", "model.adapter={name: lora, rank: 3}")


def test_names_of_cells_are_fit_for_folders_and_no_two_are_alike(place: Path) -> None:
    def names(*changes: str) -> list[str]:
        return [cell.name for cell in cells_of(place / "r.yaml", changes)]

    assert names("train.optimizer.lr=1e-3,0.01", "train.augment.flip=true,false")[0] == "lr-0.001_flip-true"
    encoders = names("model.encoder.checkpoint=a/vit,b/vit,../C/VIT,plain")
    assert len({name.casefold() for name in encoders}) == 4
    assert encoders[3] == "plain"
    odd = names('name="../../up","a/b:c*?","x","ü ü"')
    assert len(set(odd)) == 4
    assert not [name for name in odd if not name or name.startswith(".") or set(name) & set("/\\:*? ")]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["train.epochs=2"], {}, "no key has alternatives"),
        (["model.decoder.nome=linear,fpn"], {}, "did you mean 'name'"),
        (["model.decoder.name=linear,linear"], {}, "the alternative linear is there twice"),
        (["train.optimizer.lr=0.01,1.0e-2"], {}, "is there twice"),
        (["model.adapter={name: lora},{name: lora, rank: 8}"], {}, "is the same recipe as cell"),
        (["model.decoder.name=linear,,fpn"], {}, "one of the alternatives is empty"),
        ([DECODERS, "model.decoder.name=fpn,upernet"], {}, "is given twice"),
        (["seed=1,2"], {}, "--seeds says how many"),
        (["output_dir=a,b"], {}, "--output names"),
        ([DECODERS, "train.epochs=2,-1"], {}, "cell linear_epochs--1: "),
        ([DECODERS, "model.decoder.channels=64"], {}, "cell linear: "),
        (["model.adapter.name=lora,adapter"], {}, "name whole sections: model.adapter={name: ...}"),
        ([DECODERS], {"seeds": 0}, "--seeds 0: expected 1 or more"),
        ([DECODERS], {"output": "r.yaml"}, "r.yaml is a file"),
        ([DECODERS], {"output": "r.yaml/below"}, "r.yaml is a file"),
        ([DECODERS, "data.val=null"], {}, "data.val is not in the recipe"),
        ([DECODERS, "data.test=null"], {"test": True}, "data.test is not in the recipe"),
        ([DECODERS, "seed=4294967294"], {"seeds": 3}, "expected seeds below"),
        ([DECODERS], {"singles": True}, "has one modality, rgb"),
        ([DECODERS], {"missing": True}, "answers without a modality"),
        # what only the data or the encoder can tell: still before the first cell is trained
        (["model.encoder.layers=[1,2,3],[1,2,9]"], {}, "cell layers-1-2-9: "),
        (["data.modalities.rgb.bands=[1,2,3],[1,2,9]"], {}, "cell bands-1-2-9: "),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, trained: list[str], changes: list[str], options: dict[str, Any], message: str
) -> None:
    shutil.copy(place / "r.yaml", tmp_path)
    if "output" in options:
        options = options | {"output": tmp_path / options["output"]}
    before = sorted(tmp_path.rglob("*"))
    output = [] if "output_dir=a,b" in changes else [f"output_dir={tmp_path / 'run'}"]
    with pytest.raises((RecipeError, DataError, CheckpointError)) as caught:
        compare(tmp_path / "r.yaml", [*changes, *output], **options)
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert trained == []


def test_the_table_holds_what_the_runs_have_told(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, content = compared
    assert json.loads((folder / "compare.json").read_text()) == content
    assert [cell["name"] for cell in content["cells"]] == ["linear", "fpn"]
    assert content["seeds"] == [0, 1]
    shown = text(content)
    for cell in content["cells"]:
        told = [json.loads((folder / cell["name"] / f"seed-{n}" / "metrics.json").read_text()) for n in (0, 1)]
        assert [one["seed"] for one in told] == [0, 1]
        first, second = (one["validation"]["miou"] for one in told)
        assert cell["validation"]["seeds"] == {"0": first, "1": second}
        assert cell["validation"]["mean"] == pytest.approx((first + second) / 2)
        assert cell["validation"]["spread"] == pytest.approx(abs(first - second) / 2**0.5)  # of a sample: n - 1
        assert cell["trainable_parameters"] == told[0]["trainable_parameters"]
        assert cell["total_parameters"] == told[0]["total_parameters"]
        line = next(line for line in shown.splitlines() if line.startswith(f"{cell['name']} "))
        assert f"{(first + second) / 2:.3f} ± {abs(first - second) / 2**0.5:.3f}" in line
        assert f"{told[0]['trainable_parameters']:,}" in line
        assert cell["cost"]["ms"] > 0 < cell["cost"]["mib"]
    assert content["cells"][0]["trainable_parameters"] < content["cells"][1]["trainable_parameters"]
    assert content["cells"][0]["cost"]["mib"] < content["cells"][1]["cost"]["mib"]
    assert content["verdict"]["words"] in shown
    assert f"torch {torch.__version__}; seeds 0, 1" in shown


def test_the_same_command_again_trains_and_measures_nothing(
    compared: tuple[Path, dict[str, Any]], place: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segmenter, "from_pretrained", None)
    again = compare(place / "r.yaml", [DECODERS, "data.workers=0", "predict.overlap=0.5"], seeds=2)
    assert trained == []
    for cell in (*again["cells"], *compared[1]["cells"]):
        cell["changes"] = []
    assert again == compared[1]


def test_what_was_measured_of_another_segmenter_or_machine_is_measured_anew(
    compared: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(compared[0], tmp_path / "run")
    first, second = (folder / cell / "seed-0" / KEPT for cell in ("linear", "fpn"))
    for path, at, key in ((first, "about", "machine"), (second, None, "segmenter")):
        known = json.loads(path.read_text())
        known["cost"]["ms"] = -1.0
        (known["cost"][at] if at else known)[key] = "another"
        path.write_text(json.dumps(known))
    content = compare(place / "r.yaml", [DECODERS], seeds=2, output=folder)
    assert all(cell["cost"]["ms"] > 0 for cell in content["cells"])


def test_a_further_seed_trains_that_alone(
    compared: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path, trained: list[str]
) -> None:
    folder = shutil.copytree(compared[0], tmp_path / "more")
    content = compare(place / "r.yaml", [DECODERS], seeds=3, output=folder)
    assert trained == ["linear/seed-2", "fpn/seed-2"]
    assert content["seeds"] == [0, 1, 2]


def test_a_comparison_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    place: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", str(place / "r.yaml"), DECODERS, "train.epochs=2", "--seeds", "1", "--output"]
    original, seen = Keeper.epoch, []

    def stop(self: Keeper, state: Any, improved: bool) -> None:
        original(self, state, improved)
        seen.append(state.epoch)
        if len(seen) == 3:  # the first epoch of the second cell
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "epoch", stop)
        stopped = CliRunner().invoke(app, [*arguments, str(tmp_path / "a b")])
    assert stopped.exit_code == 130
    assert f"interrupted; go on with: vfmseg {' '.join(arguments)} '{tmp_path / 'a b'}'" in stopped.stderr
    assert not (tmp_path / "a b" / "compare.json").exists()
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "a b"), "--json"])
    assert done.exit_code == 0, done.stderr
    assert trained == ["linear/seed-0", "fpn/seed-0", "fpn/seed-0 resumed"]
    content = json.loads(done.stdout)
    whole = compare(place / "r.yaml", [DECODERS, "train.epochs=2"], seeds=1, output=tmp_path / "whole")
    assert [cell["validation"] for cell in content["cells"]] == [cell["validation"] for cell in whole["cells"]]


def test_a_run_of_another_recipe_is_refused_before_any_cell_is_trained(
    compared: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path, trained: list[str]
) -> None:
    folder = shutil.copytree(compared[0], tmp_path / "other")
    shutil.rmtree(folder / "linear")
    with pytest.raises(CheckpointError, match=r"seed-0: holds a run of another recipe \(now '.*lr: 0\.02"):
        compare(place / "r.yaml", [DECODERS, "train.optimizer.lr=0.02"], seeds=2, output=folder)
    assert trained == []
    assert not (folder / "linear").exists()


@pytest.mark.pitfall("F17")
@pytest.mark.parametrize("missing", [True, False], ids=["one to train", "all finished"])
def test_runs_of_other_data_are_not_compared(
    compared: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path, trained: list[str], missing: bool
) -> None:
    data = shutil.copytree(place / "data", tmp_path / "data")
    content = recipe_dict(data, place / "encoder", tmp_path / "run")
    content["train"]["epochs"] = 1
    recipe = write_recipe(tmp_path / "r.yaml", content)
    compare(recipe, [DECODERS], seeds=1)
    labels = data / "train" / "labels" / "s1_train.tif"
    write_raster(labels, np.zeros((64, 64), np.uint8))
    if missing:
        shutil.rmtree(tmp_path / "run-compare" / "fpn")
    else:  # a run of the changed data comes from elsewhere
        compare(recipe, [DECODERS], seeds=1, output=tmp_path / "later")
        shutil.rmtree(tmp_path / "run-compare" / "fpn")
        shutil.copytree(tmp_path / "later" / "fpn", tmp_path / "run-compare" / "fpn")
    trained.clear()
    with pytest.raises(CheckpointError, match=r"has learned from other data than .*s1_train.tif"):
        compare(recipe, [DECODERS], seeds=1)
    assert trained == []


def test_one_process_compares(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="trains in one process"):
        compare(place / "r.yaml", [DECODERS])


@pytest.mark.pitfall("C1")
def test_the_test_split_is_read_with_test_alone_and_measured_once(
    compared: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(compared[0], tmp_path / "run")
    data = shutil.copytree(place / "data", tmp_path / "data")
    content = recipe_dict(data, place / "encoder", folder)
    content["train"]["epochs"] = 1
    recipe = write_recipe(tmp_path / "r.yaml", content)
    labels = data / "test" / "labels" / "s0_test.tif"
    with rasterio.open(labels) as file:
        right = file.read(1)
    write_raster(labels, right + 77)  # whoever reads them stops: there are no such classes
    untouched = compare(recipe, [DECODERS], seeds=1, output=tmp_path / "new")
    assert {cell["test"] for cell in untouched["cells"]} == {None}
    with pytest.raises(DataError, match="s0_test"):
        compare(recipe, [DECODERS], seeds=1, output=tmp_path / "new", test=True)
    write_raster(labels, right)
    found = compare(recipe, [DECODERS], seeds=1, output=tmp_path / "new", test=True)
    for cell in found["cells"]:
        run = tmp_path / "new" / cell["name"] / "seed-0"
        scores = Segmenter.from_pretrained(run / "best").evaluate(recipe, "test")
        assert cell["test"]["seeds"] == {"0": scores["miou"]}
        assert json.loads((run / KEPT).read_text())["test"]["scores"] == scores
        assert f"{scores['miou']:.3f}" in next(x for x in text(found).splitlines() if x.startswith(cell["name"]))
    with monkeypatch.context() as patched:
        patched.setattr(Segmenter, "evaluate", None)
        assert compare(recipe, [DECODERS], seeds=1, output=tmp_path / "new", test=True) == found
        with pytest.raises(TypeError):  # another way of labelling is another question
            compare(recipe, [DECODERS, "predict.overlap=0.6"], seeds=1, output=tmp_path / "new", test=True)


def test_each_modality_alone_and_each_one_missing(two_modalities: Path, tmp_path: Path) -> None:
    """`--singles` adds a cell for each modality alone; `--missing` measures without each where a fusion allows it."""
    recipe = recipe_of(two_modalities, tmp_path / "run", {"name": "linear"})
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    fusions = "model.fusion={name: linear},{name: stack}"
    found = compare(file, [fusions, "train.epochs=1"], seeds=1, output=tmp_path / "all", singles=True, missing=True)
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert list(cells) == ["only-rgb", "only-dem", "linear", "stack"]
    for name in ("only-rgb", "only-dem"):
        run = load_recipe(tmp_path / "all" / name / "seed-0" / "recipe.yaml")
        assert list(run.data.modalities) == [name.removeprefix("only-")]
        assert cells[name]["missing"] is None
    assert cells["stack"]["missing"] is None
    segmenter = Segmenter.from_pretrained(tmp_path / "all" / "linear" / "seed-0" / "best")
    for gone, kept in (("rgb", "dem"), ("dem", "rgb")):
        assert cells["linear"]["missing"][gone]["mean"] == segmenter.evaluate(recipe, "test", only=[kept])["miou"]
    assert cells["linear"]["missing"]["rgb"]["mean"] != cells["linear"]["test"]["mean"]
    head, *rows = text(found).splitlines()
    assert head.split("  ")[0] == "cell"
    assert "without rgb" in head
    assert f"{cells['linear']['missing']['dem']['mean']:.3f}" in next(row for row in rows if row.startswith("linear"))
    alone = cells_of(file, ["train.epochs=1"], singles=True)
    assert [cell.name for cell in alone] == ["only-rgb", "only-dem", "all"]


# ----------------------------------------------------------------------------------------------- equal parameters


@pytest.mark.parametrize("kind", FUSIONS)
def test_parameters_are_counted_as_the_built_model_has_them(two_modalities: Path, tmp_path: Path, kind: str) -> None:
    recipe = recipe_of(two_modalities, tmp_path / "run", FUSIONS[kind], decoder={"name": "fpn", "channels": 16})
    model = build_model(recipe, inputs_of(recipe, open_training(recipe)["train"]))
    count = Counting().of(recipe)
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("adapter", ["none", "full", "lora", "adapter", "mm_lora", "mm_adapter"])
def test_adapters_are_counted_too(two_modalities: Path, tmp_path: Path, adapter: str) -> None:
    recipe = recipe_of(two_modalities, tmp_path / "run", {"name": "linear"}, adapter={"name": adapter})
    model = build_model(recipe, inputs_of(recipe, open_training(recipe)["train"]))
    assert Counting().of(recipe).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.pitfall("C41")
@pytest.mark.parametrize(
    ("changes", "grown"),
    [
        (["model.decoder={name: fpn, channels: 16},{name: upernet, channels: 24}"], "model.decoder.channels="),
        (
            ["model.decoder={name: linear},{name: fpn, channels: 8}", "model.adapter={name: adapter, hidden: 4}"],
            "model.adapter.hidden=",
        ),
        (["model.adapter={name: mm_lora, rank: 2, mix: false},{name: mm_lora, rank: 9}"], "model.adapter.rank="),
        (["model.adapter={name: lora, rank: 2, targets: [q]},{name: lora, rank: 7}"], "model.adapter.rank="),
        (
            ["model.fusion={name: linear},{name: decision},{name: stack}", "model.decoder={name: fpn, channels: 96}"],
            "model.decoder.channels=",
        ),
    ],
)
def test_equal_cells_train_as_many_parameters_from_below(
    two_modalities: Path, tmp_path: Path, changes: list[str], grown: str
) -> None:
    recipe_of(two_modalities, tmp_path / "run", {"name": "linear"})
    path = tmp_path / "run.yaml"
    counting, cells = Counting(), cells_of(path, changes)
    before = [counting.of(cell.recipe).trainable for cell in cells]
    equal = equalised(path, cells, counting)
    after = [counting.of(cell.recipe).trainable for cell in equal]
    most = max(before)
    assert after[before.index(most)] == most
    assert equal[before.index(most)] == cells[before.index(most)]
    for cell, count, was in zip(equal, after, before, strict=True):
        assert 0.98 * most <= count <= most
        if was < most:
            assert any(change.startswith(grown) for change in cell.changes)
            key, value = next(change for change in cell.changes[::-1] if change.startswith(grown)).split("=")
            wider = cells_of(path, [*cell.changes, f"{key}={int(value) + 1}", "name=a,b"])[0]
            assert counting.of(wider.recipe).trainable > most  # one more would be too many


def test_a_rank_grows_with_its_alpha_and_not_beyond_the_width_of_the_encoder(place: Path) -> None:
    path = place / "r.yaml"
    cells = equalised(path, cells_of(path, [DECODERS]), Counting())
    assert cells[0].name == "linear_adapter.rank-32"  # larger factors could say no more
    adapter = cells[0].recipe.model.adapter
    assert adapter.name == "lora"
    assert (adapter.rank, adapter.alpha) == (32, 16 / 2 * 32)


def test_the_bottlenecks_of_several_modalities_grow_by_their_share(two_modalities: Path, tmp_path: Path) -> None:
    recipe_of(two_modalities, tmp_path / "run", {"name": "linear"})
    both = "model.adapter={name: mm_adapter, ratio: 0.125},{name: mm_adapter, ratio: 1.0}"
    cells, counting = cells_of(tmp_path / "run.yaml", [both]), Counting()
    first, second = equalised(tmp_path / "run.yaml", cells, counting)
    assert second == cells[1]
    assert first.recipe.model.adapter == second.recipe.model.adapter
    with pytest.raises(RecipeError, match="leave out --equal if it undoes the difference"):
        compare(tmp_path / "run.yaml", [both], equal=True)
    assert not (tmp_path / "run-compare").exists()


@pytest.mark.pitfall("C41")
def test_what_cannot_be_made_equal_is_marked(place: Path, tmp_path: Path) -> None:
    path = place / "r.yaml"
    compared_key = equalised(path, cells_of(path, ["model.adapter.rank=2,4"]), Counting())
    assert [cell.name for cell in compared_key] == ["rank-2", "rank-4"]  # growing would undo the comparison
    changes = [DECODERS, "model.adapter={name: none}"]
    content = compare(path, changes, seeds=1, equal=True, output=tmp_path / "run")
    assert [cell["equal"] for cell in content["cells"]] == [False, True]
    assert content["equal"] == "fpn"
    linear, fpn = text(content).splitlines()[1:3]
    assert linear.endswith("not equal: 100 % fewer")
    assert "not equal" not in fpn
    assert is_equal(98, 100)
    assert not is_equal(97, 100)


# ----------------------------------------------------------------------------------------------- what is said


def scores(miou: float | None, absent: tuple[str, ...] = (), support: int = 5) -> dict[str, Any]:
    rows = {
        name: {"iou": None if name in absent else miou, "support": 0 if name in absent else support} for name in "ab"
    }
    return {"miou": miou, "classes": rows, "absent": list(absent)}


def seeds_of(*values: float) -> dict[int, dict[str, Any]]:
    return {seed: scores(value) for seed, value in enumerate(values)}


@pytest.mark.pitfall("C42")
@pytest.mark.parametrize(
    ("values", "best", "near"),
    [
        ({"a": (0.60, 0.62), "b": (0.80, 0.82)}, "b", []),
        ({"a": (0.70, 0.80), "b": (0.72, 0.84)}, None, ["b", "a"]),
        # the second lies below, but the third varies so much that it reaches the first
        ({"a": (0.90, 0.91), "b": (0.80, 0.81), "c": (0.50, 0.99)}, None, ["a", "c"]),
        ({"a": (0.9,), "b": (0.1,)}, None, ["a", "b"]),
        ({"a": (0.5, 0.5), "b": (0.5, 0.5)}, None, ["a", "b"]),
    ],
    ids=["apart", "overlap", "a third overlaps", "one seed", "the same"],
)
def test_no_cell_is_called_best_where_intervals_overlap(
    values: dict[str, tuple[float, ...]], best: str | None, near: list[str]
) -> None:
    found = verdict({cell: seeds_of(*some) for cell, some in values.items()})
    assert (found["best"], found["not_told_apart"]) == (best, near)
    one_seed = len(next(iter(values.values()))) == 1
    assert ("best on validation" in found["words"]) is (best is not None)
    assert ("no difference is seen at these seeds" in found["words"]) is (best is None and not one_seed)
    assert ("one seed shows no spread" in found["words"]) is one_seed


@pytest.mark.pitfall("F18")
def test_a_mean_over_fewer_classes_has_a_star_and_decides_nothing() -> None:
    partial = {0: scores(0.9, absent=("b",)), 1: scores(0.8)}
    found = summary(partial)
    assert found["words"] == {"0": "0.900 over 1 of 2 classes (no b)", "1": "0.800"}
    judged = verdict({"x": partial, "y": seeds_of(0.1, 0.2)})
    assert judged["best"] is None
    assert "only one class with labels" in judged["words"]
    cell = {
        "name": "x", "validation": found, "test": None, "trainable_parameters": 1, "total_parameters": 2,
        "cost": {"ms": 1.0, "mib": None}, "equal": None, "missing": {"dem": found},
    }  # fmt: skip
    content = {
        "cells": [cell], "test": False, "equal": None, "machine": "m", "torch": "t", "seeds": [0, 1], "verdict": judged,
    }  # fmt: skip
    lines = text(content).splitlines()
    assert lines[1].count("0.850 ± 0.071*") == 2
    assert lines[2] == "* x, validation, seed 0: 0.900 over 1 of 2 classes (no b)"
    assert lines[3] == "* x, test without dem, seed 0: 0.900 over 1 of 2 classes (no b)"
    assert summary({0: scores(None, absent=("a", "b"))})["mean"] is None


def test_the_peak_of_memory_is_what_is_held_at_one_time() -> None:
    x = torch.ones(2**18)  # 1 MiB, there before

    def forward() -> None:
        a = x * 2
        b = a * 2  # two at a time
        del a
        c = torch.cat([b, b])  # three: one and a double one
        del b
        c.sum()

    assert peak_bytes(forward, CPU) == pytest.approx(3 * 2**20, rel=0.01)


def test_time_is_a_median_after_warm_up() -> None:
    import time

    waits = iter([0.2, 0.2, *[0.01] * 4, *[0.2] * 3])  # slow at first; then the median is a short one
    assert 9 < milliseconds(lambda: time.sleep(next(waits)), CPU) < 100
