"""Every fusion from a recipe to a map: trained, stopped and gone on with, saved, loaded, moved, merged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from makers import (
    DATA,
    image_and_heights,
    in_two_sittings,
    recipe_dict,
    save_encoder,
    sign,
    write_raster,
    write_recipe,
)
from safetensors.torch import load_file

from vfmseg import terminal
from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.model import build_model
from vfmseg.build.training import objectives_of, sources_of
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.data.image import Image
from vfmseg.data.sample import collate
from vfmseg.data.windows import Draw
from vfmseg.encoders.side import SIDES, SideEncoder
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.training.step import Step, total

FUSIONS: dict[str, dict[str, Any]] = {
    "stack": {"name": "stack"},
    "concat": {"name": "linear", "op": "concat"},
    "sum": {"name": "linear", "op": "sum", "at": "last"},
    "weighted": {"name": "linear", "at": [1, 3]},
    "mean_of_answers": {"name": "decision"},
    "weighted_answers": {"name": "decision", "op": "weighted"},
    "experts": {"name": "decision", "op": "product", "refine": {"guide": "dem", "iterations": 2}},
    "single": {"name": "attention", "mode": "single", "query": "dem", "window": 2, "width": 8, "heads": 2},
    "mutual": {"name": "attention", "window": 2, "width": 8, "heads": 2},
    "se": {"name": "se", "reduction": 8},
    "independent": {"name": "gated", "mode": "independent"},
    "complementary": {"name": "gated"},
    "cross": {"name": "gated", "mode": "cross"},
    "self_reconstruction": {"name": "reconstruction", "mode": "self", "width": 8},
    "cross_reconstruction": {"name": "reconstruction", "width": 8},
    "recovery": {"name": "reconstruction", "width": 8, "recover": True},
    "contrastive": {"name": "alignment", "width": 8},
    "mmd": {"name": "alignment", "by": "mmd", "width": 8},
    "coral": {"name": "alignment", "by": "coral", "width": 8},
    "projection": {"name": "alignment", "by": "projection", "width": 8},
    "moved": {"name": "linear", "coregister": {"max_shift": 4}},
}
ADAPTED: dict[str, dict[str, Any]] = {
    "mm_lora": {"fusion": {"name": "linear", "op": "sum"}, "adapter": {"name": "mm_lora", "rank": 2}},
    "mm_adapter": {"fusion": {"name": "se"}, "adapter": {"name": "mm_adapter"}},
    "bottleneck": {"fusion": {"name": "gated"}, "adapter": {"name": "adapter", "hidden": 4}},
    "frozen": {"fusion": {"name": "decision"}, "adapter": {"name": "none"}},
}
KINDS = (*FUSIONS, *ADAPTED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with an image and heights, of which a strip is nodata in each, and an encoder."""
    folder = tmp_path_factory.mktemp("fusions")
    save_encoder(folder / "encoder", "dinov2")
    return image_and_heights(folder)


def recipe_of(place: Path, run: Path, fusion: dict[str, Any], **changes: Any) -> Recipe:
    content = recipe_dict(place, place / "encoder", run)
    for split in ("train", "val", "test"):
        content["data"][split] = {name: f"{place}/{split}/{name}/*.tif" for name in ("rgb", "dem", "labels")}
    content["data"]["modalities"] = {"rgb": {}, "dem": {}}
    content["model"]["fusion"] = fusion
    content["train"]["epochs"] = changes.pop("epochs", 2)
    content["model"] |= changes
    run.parent.mkdir(parents=True, exist_ok=True)
    return load_recipe(write_recipe(run.parent / f"{run.name}.yaml", content))


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, place: Path) -> tuple[str, Recipe]:
    recipe = recipe_of(place, place / "runs" / request.param, **model_of(request.param))
    finetune(recipe)
    return request.param, recipe


def model_of(kind: str) -> dict[str, Any]:
    """The changes of `model` that make a kind."""
    return {"fusion": FUSIONS[kind]} if kind in FUSIONS else ADAPTED[kind]


def scene(place: Path, *names: str) -> dict[str, Any]:
    return {name: str(place / "test" / name / "0.tif") for name in names or ("rgb", "dem")}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(trained: tuple[str, Recipe], place: Path) -> None:
    kind, recipe = trained
    shorter = recipe_of(place, place / "stopped" / kind, **model_of(kind))

    in_two_sittings(shorter)
    once, twice = (load_file(r.output_dir / "last" / "head.safetensors") for r in (recipe, shorter))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.pitfall("P6", "C13")
def test_what_was_saved_answers_as_what_was_trained(trained: tuple[str, Recipe], place: Path) -> None:
    """Merged into the frozen weights or beside them, and with the encoder in another place."""
    kind, recipe = trained
    best = recipe.output_dir / "best"
    shares = Segmenter.from_pretrained(best).probabilities(scene(place))
    assert shares.shape == (2, 56, 72)
    apart = load_segmenter(best, merge=False)
    merged = load_segmenter(best)
    draws = torch.Generator().manual_seed(0)
    images = _images(draws)
    with torch.no_grad():
        torch.testing.assert_close(apart.model(images), merged.model(images), atol=1e-4, rtol=1e-4)
    moved = place / f"moved_{kind}"
    shutil.copytree(place / "encoder", moved)
    again = Segmenter.from_pretrained(best, encoder=str(moved)).probabilities(scene(place))
    assert np.array_equal(again, shares)
    extra = [name for name in merged.model.state_dict() if "auxiliary" in name]
    assert extra == []


@pytest.mark.pitfall("C44", "P26")
def test_a_map_has_labels_where_the_fusion_says(trained: tuple[str, Recipe], place: Path) -> None:
    """Where any modality is valid; `stack` needs all of them."""
    kind, recipe = trained
    labels = Segmenter.from_pretrained(recipe.output_dir / "best").predict(scene(place))
    assert isinstance(labels, np.ndarray)
    known = labels != 255
    rows = slice(10, 46) if kind == "stack" else slice(0, 56)
    expected = np.zeros((56, 72), dtype=bool)
    expected[rows] = True
    assert np.array_equal(known, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stack"])
@pytest.mark.pitfall("C8", "P53")
def test_a_step_in_parts_is_the_step_in_one(place: Path, tmp_path: Path, kind: str) -> None:
    """Terms of a fusion are divided by the counts of the whole step: processes and accumulation change nothing.

    And nothing that learns is without a gradient, whichever modality a batch does not see.
    """
    recipe = recipe_of(place, tmp_path / "run", **model_of(kind))
    scenes = open_training(recipe)
    inputs = inputs_of(recipe, scenes["train"])
    model = build_model(recipe, inputs)
    step = Step(model, objectives_of(recipe, inputs, model))
    source = sources_of(recipe, scenes["train"], inputs)["train"]
    samples = [source[Draw(0, i)] for i in range(4)]
    for name in ("rgb", "dem"):  # of some samples a modality says nothing
        samples[int(name == "dem")].images[name].valid.zero_()

    def gradients(parts: list[slice]) -> dict[str, torch.Tensor]:
        step.zero_grad()
        step.eval()  # dropout would tell the parts apart
        step.model.training = True
        batches = [{"train": collate(samples[part])} for part in parts]
        counts = [step.counts(batch) for batch in batches]
        sums = {key: torch.stack([count[key] for count in counts]).sum() for key in counts[0]}
        for batch in batches:
            total(step(batch), sums).backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad for name, p in step.named_parameters() if p.requires_grad}
        assert [name for name, gradient in found.items() if gradient is None] == []
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    whole, parts = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], atol=2e-5, rtol=1e-3, msg=name)


def _images(draws: torch.Generator) -> dict[str, Image]:
    valid = torch.ones(2, 40, 50, dtype=torch.bool)
    rgb, dem = (torch.rand(2, bands, 40, 50, generator=draws) for bands in (3, 1))
    return {"rgb": Image(255 * rgb, valid), "dem": Image(300 + 80 * dem, valid.clone())}


def test_a_side_encoder_sees_what_the_published_one_does_not(place: Path, tmp_path: Path) -> None:
    """Small encoders are saved whole, and their features lie on the cells of the published encoder's."""
    for name in ("conv", "spectral"):
        own = {"dem": {"encoder": {"name": name, "width": 8}}}
        recipe = recipe_of(place, tmp_path / name, {"name": "gated"}, modalities=own, epochs=1)
        result = finetune(recipe)
        best = recipe.output_dir / "best"
        model = load_segmenter(best).model
        images = _images(torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = model.encode(images)
            alone = model.encode({"dem": images["dem"]})
        for one, two in zip(features["rgb"].maps, features["dem"].maps, strict=True):
            assert one.shape == two.shape
        torch.testing.assert_close(alone["dem"].maps[-1], features["dem"].maps[-1])
        assert {part for part, found in model.parts().items() if found} >= {"stem", "fusion", "decoder"}
        shares = Segmenter.from_pretrained(best).probabilities(scene(place))
        assert np.isfinite(shares).all()
        assert result["trainable_parameters"] > 10_000


@pytest.mark.pitfall("P19")
@pytest.mark.parametrize("body", ["conv", "spectral"])
@torch.no_grad()
def test_a_small_encoder_keeps_the_ground_of_each_cell(body: str) -> None:
    """Of 50 px in cells of 14 the last holds 8: it is filled up, and not stretched over the others."""
    torch.manual_seed(0)
    side = SideEncoder({"dem": 2}, [0.0, 1.0], [1.0, 2.0], SIDES[body], 4, (6, 6))
    pixels, valid = torch.randn(1, 2, 56, 70), torch.ones(1, 56, 70, dtype=torch.bool)
    valid[:, 50:] = False
    whole = side({"dem": Image(pixels, valid)}, (4, 5), (14.0, 14.0))
    cut = side({"dem": Image(pixels[:, :, :50], valid[:, :50])}, (4, 5), (14.0, 14.0))
    for one, two in zip((*whole.maps, *whole.seen), (*cut.maps, *cut.seen), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert whole.seen[0][0, 0, 0] == 1
    assert 0.5 < whole.seen[0][0, 3, 0] < 0.65  # 8 of 14 px
    nothing = side({"dem": Image(torch.full_like(pixels, torch.nan), ~valid & False)}, (4, 5), (14.0, 14.0))
    assert all(torch.isfinite(values).all() for values in nothing.maps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fusion": {"name": "gated"}, "modalities": {"ir": {"encoder": {"name": "conv"}}}}, "model.modalities.ir"),
        ({"fusion": {"name": "stack"}, "modalities": {"dem": {"encoder": {"name": "conv"}}}}, "is not used"),
        ({"fusion": {"name": "attention", "mode": "single", "query": "ir"}}, "model.fusion.query"),
        ({"fusion": {"name": "attention", "query": "rgb"}}, "mode mutual"),
        ({"fusion": {"name": "attention", "width": 30}}, "multiple of heads"),
        ({"fusion": {"name": "decision", "refine": {"guide": "sar"}}}, "model.fusion.refine.guide"),
        ({"fusion": {"name": "linear", "coregister": {"max_shift": 5, "modalities": ["rgb"]}}}, "moved onto"),
        ({"fusion": {"name": "linear", "coregister": {"max_shift": 0}}}, "max_shift"),
        ({"fusion": {"name": "linear", "coregister": {"max_shift": 17}}}, "half of data.tile = 32"),
        ({"fusion": {"name": "linear", "at": [3, 1]}}, "must rise"),
        ({"fusion": {"name": "linear", "at": 3}}, r"fusion.at = 3 must be all, last, or numbers of [^\n]*$"),
        ({"fusion": {"name": "linear", "at": [0]}}, r"fusion.at = \[0\] must be all, last, or numbers of [^\n]*$"),
        ({"fusion": {"name": "reconstruction", "mode": "self", "recover": True}}, "needs mode: cross"),
        ({"fusion": {"name": "gatet"}}, "gated"),
        (
            {
                "fusion": {"name": "gated"},
                "modalities": {name: {"encoder": {"name": "conv"}} for name in ("rgb", "dem")},
            },
            "model.encoder has none",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(
    place: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(place, tmp_path / "run", **change)


def test_a_level_that_the_encoder_has_not_is_told(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, tmp_path / "run", {"name": "linear", "at": [1, 9]})
    with pytest.raises(RecipeError, match="names map 9"):
        finetune(recipe)
    assert not (tmp_path / "run" / "best").exists()


def test_a_shift_in_metres_is_one_of_pixels_on_the_ground(place: Path, tmp_path: Path) -> None:
    """Pixels are 10 m; the limit in pixels is kept with the segmenter. Without a CRS nobody knows it."""
    fusion = {"name": "linear", "coregister": {"max_shift": 40, "unit": "metres"}}
    recipe = recipe_of(place, tmp_path / "run", fusion, epochs=1)
    finetune(recipe)
    coregister = load_segmenter(recipe.output_dir / "best").model.coregister
    assert coregister is not None
    assert coregister.limit.item() == pytest.approx(4, rel=0.01)
    for path in place.glob("*/*/*.tif"):
        array, nodata = read_raster(path)
        write_raster(tmp_path / path.relative_to(place), array, nodata=nodata, crs=None)
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    nowhere = recipe_of(tmp_path, tmp_path / "other", fusion, epochs=1)
    with pytest.raises(RecipeError, match="max_shift = 40 metres: the scenes have no CRS"):
        finetune(nowhere)
    far = {"name": "linear", "coregister": {"max_shift": 9000, "unit": "metres"}}
    with pytest.raises(RecipeError, match="are 900 pixels; expected 16 at most"):
        finetune(recipe_of(place, tmp_path / "far", far, epochs=1))


@pytest.mark.pitfall("F13")
@pytest.mark.parametrize(
    ("kind", "model", "told"),
    [
        ("contrastive", {"adapter": {"name": "none"}}, True),
        ("self_reconstruction", {"adapter": {"name": "none"}}, True),
        ("recovery", {"adapter": {"name": "none"}}, False),
        ("gated", {"adapter": {"name": "none"}}, False),
        ("contrastive", {"adapter": {"name": "lora"}}, False),
        ("contrastive", {"adapter": {"name": "none"}, "modalities": {"dem": {"encoder": {"name": "conv"}}}}, False),
    ],
)
def test_a_loss_with_nothing_to_shape_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, model: dict[str, Any], told: bool
) -> None:
    recipe = recipe_of(place, tmp_path / "run", FUSIONS.get(kind, {"name": kind}), **model)
    inputs = inputs_of(recipe, open_training(recipe)["train"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(terminal, "_said", set())
        objectives_of(recipe, inputs, build_model(recipe, inputs))
    assert ("nothing before the fusion learns" in capsys.readouterr().err) is told


def read_raster(path: Path) -> tuple[np.ndarray, float | None]:
    with rasterio.open(path) as opened:
        return opened.read(), opened.nodata


@pytest.mark.pitfall("P14", "C14")
def test_a_head_of_another_fusion_is_refused(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, tmp_path / "run", FUSIONS["complementary"], epochs=1)
    finetune(recipe)
    best = recipe.output_dir / "best"
    text = (best / "recipe.yaml").read_text()
    assert "complementary" in text
    (best / "recipe.yaml").write_text(text.replace("complementary", "cross"))
    sign(best)
    with pytest.raises(CheckpointError, match=r"head.safetensors"):
        load_segmenter(best)


@pytest.mark.parametrize(
    ("folder", "files", "second"),
    [
        ("pan_ms_pair", {"pan": "pan.tif", "ms": "ms.tif"}, {}),
        ("dem_other_grid", {"image": "optical_l7.tif", "dem": "dem.tif"}, {"derive": ["slope", "height_above_local"]}),
    ],
)
def test_real_pairs_on_other_grids_are_fused(
    place: Path, tmp_path: Path, folder: str, files: dict[str, str], second: dict[str, Any]
) -> None:
    """One pixel of ms is two of pan; the elevation model has another reference system: labels are of the first's grid.

    The class is whether the first is brighter than its median: with both it is found, and each alone has a map, the
    second on its own grid.
    """
    there = DATA / "formats" / folder
    if not there.is_dir():
        pytest.skip("the real data sets are not beside the project")
    first, other = files
    with rasterio.open(there / files[first]) as source:
        image, valid, kind = source.read(1), source.dataset_mask() > 0, source.profile
    labels = np.where(valid, image > np.median(image[valid]), 255).astype(np.uint8)
    kind |= {"count": 1, "dtype": "uint8", "nodata": None}
    with rasterio.open(tmp_path / "labels.tif", "w", **kind) as target:
        target.write(labels, 1)
    source = {name: str(there / file) for name, file in files.items()} | {"labels": str(tmp_path / "labels.tif")}
    content = recipe_dict(tmp_path, place / "encoder", tmp_path / "run")
    content["data"] |= {"modalities": {first: {"normalize": "dataset"}, other: second}, "train": source}
    content["data"] |= {"tile": 64, "samples_per_epoch": 64}
    content["data"] = {key: value for key, value in content["data"].items() if key not in ("val", "test")}
    content["model"]["fusion"] = {"name": "gated"}
    content["train"] |= {"epochs": 3, "modality_dropout": 0.2}
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    segmenter = Segmenter.from_pretrained(tmp_path / "run" / "best", device="cpu")
    found = {
        names: segmenter.predict({name: str(there / files[name]) for name in names})
        for names in ((first, other), (first,), (other,))
    }
    for names in ((first, other), (first,)):
        assert found[names].shape == labels.shape
        assert (found[names] == labels)[labels != 255].mean() > 0.7  # half of them by chance
    with rasterio.open(there / files[other]) as source:
        assert found[other,].shape == source.shape
    assert set(np.unique(found[other,])) <= {0, 1, 255}
