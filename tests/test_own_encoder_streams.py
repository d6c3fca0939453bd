"""A modality with a published encoder of its own beside the shared one: trained, saved, moved, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import (
    an_input,
    image_and_heights,
    images_of,
    recipe_dict,
    save_encoder,
    sign,
    write_recipe,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from vfmseg.build.model import build_model, published_in_image_units
from vfmseg.catalog import CLIP, IMAGENET
from vfmseg.checkpoint.folder import fingerprint_of
from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.cli import app
from vfmseg.compare.equal import Counting
from vfmseg.data.image import Image
from vfmseg.encoders.regrid import regrid, shares
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.model import Network
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.training.keeper import Keeper

FAMILIES = ("clip", "sam")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with an image and heights, nodata in a strip of each, and an encoder of each family."""
    folder = tmp_path_factory.mktemp("own")
    for number, family in enumerate(("dinov2", "clip", "sam")):
        save_encoder(folder / family, family, seed=number)
    return image_and_heights(folder)


def recipe_of(place: Path, run: Path, own: dict[str, Any], **changes: Any) -> Recipe:
    """rgb through DINOv2 with LoRA; `own` {family or encoder: section} is what dem has of its own."""
    content = recipe_dict(place, place / "dinov2", run)
    for split in ("train", "val", "test"):
        content["data"][split] = {name: f"{place}/{split}/{name}/*.tif" for name in ("rgb", "dem", "labels")}
    content["data"]["modalities"] = {"rgb": {}, "dem": {}}
    content["train"] |= {"epochs": 1} | changes.pop("train", {})
    content["model"] |= {"fusion": {"name": "linear"}, "modalities": {"dem": own}} | changes
    run.parent.mkdir(parents=True, exist_ok=True)
    return load_recipe(write_recipe(run.parent / f"{run.name}.yaml", content))


def of(place: Path, family: str, **more: Any) -> dict[str, Any]:
    return {"name": family, "checkpoint": str(place / family), **more}


INPUTS = (an_input(), an_input("dem", 1, "float32", mean=340.0, std=40.0))


def built(place: Path, run: Path, own: dict[str, Any], **changes: Any) -> Network:
    return build_model(recipe_of(place, run, own, **changes), INPUTS)


def scene(place: Path) -> dict[str, Any]:
    return {name: str(place / "test" / name / "0.tif") for name in ("rgb", "dem")}


def pictures(height: int = 50, width: int = 70) -> dict[str, Image]:
    draws = torch.Generator().manual_seed(5)
    valid = torch.ones(2, height, width, dtype=torch.bool)
    rgb, dem = (torch.rand(2, bands, height, width, generator=draws) for bands in (3, 1))
    return images_of({"rgb": 255 * rgb, "dem": 300 + 80 * dem}, {"rgb": valid, "dem": valid.clone()})


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, place: Path) -> tuple[str, Recipe]:
    recipe = recipe_of(place, place / "runs" / request.param, {"encoder": of(place, request.param)})
    finetune(recipe)
    return request.param, recipe


@pytest.mark.pitfall("P6", "C6", "C13")
def test_what_was_saved_answers_as_what_was_trained(trained: tuple[str, Recipe], place: Path) -> None:
    """Beside the encoder or merged into it; the encoder is that of the file, bit for bit, and not stored."""
    family, recipe = trained
    best = recipe.output_dir / "best"
    apart, merged = load_segmenter(best, merge=False), load_segmenter(best)
    images = pictures()
    with torch.no_grad():
        torch.testing.assert_close(apart.model(images), merged.model(images), atol=1e-4, rtol=1e-4)
    files = sorted(path.relative_to(best).as_posix() for path in best.rglob("*.safetensors"))
    weights = "adapter_model.safetensors"
    assert files == [f"adapters/dem/{weights}", f"adapters/rgb+dem/{weights}", "head.safetensors"]
    head = load_file(best / "head.safetensors")
    assert not any("backbone" in name for name in head)
    assert {name for name in head if name.startswith("stems.of_dem")} == {
        "stems.of_dem.stem.mean",
        "stems.of_dem.stem.std",
        *(f"stems.of_dem.heads.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")),
    }
    published = load_file(place / family / "model.safetensors")
    own = apart.model.own_encoders["dem"].backbone.network.state_dict()
    frozen = {name.replace("base_layer.", ""): tensor for name, tensor in own.items() if "lora_" not in name}
    met = [name for name in frozen if any(key.endswith(name) for key in published)]
    assert len(met) > 30
    for name in met:
        (key,) = [key for key in published if key.endswith(name)]
        assert torch.equal(published[key], frozen[name]), name


@pytest.mark.pitfall("C6", "P6")
def test_only_what_should_learns(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run changes each tensor that learns, and none that was published; all of it is there once it is loaded."""
    recipe = recipe_of(
        place, tmp_path / "run", {"encoder": of(place, "clip"), "adapter": {"name": "adapter", "hidden": 4}}
    )
    seen: dict[str, dict[str, torch.Tensor]] = {}
    begin, epoch = Keeper.begin, Keeper.epoch

    def network(keeper: Keeper) -> Network:
        model: Any = keeper.loop.step.model
        return model

    def at_first(self: Keeper, known: bool) -> None:
        seen["before"] = {name: tensor.clone() for name, tensor in network(self).state_dict().items()}
        begin(self, known)

    def at_last(self: Keeper, state: Any, improved: bool) -> None:
        model = network(self)
        seen["after"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parts = model.parts()
        assert not any(parameter.requires_grad for parameter in parts["encoder"].values())
        seen["encoder"] = {name: parameter.detach() for name, parameter in parts["encoder"].items()}
        seen["learns"] = {name: tensor.detach() for name, tensor in model.trainable().items()}
        epoch(self, state, improved)

    monkeypatch.setattr(Keeper, "begin", at_first)
    monkeypatch.setattr(Keeper, "epoch", at_last)
    finetune(recipe)
    told = capsys.readouterr().err
    assert "adapter lora on 6 layers: encoder.layer.0.attention" in told
    assert "adapter of dem adapter on 3 layers: encoder.layers.0.mlp ... encoder.layers.2.mlp" in told
    same = {name for name in seen["before"] if torch.equal(seen["before"][name], seen["after"][name])}
    assert set(seen["encoder"]) <= same
    own = {name for name in seen["encoder"] if name.startswith("stems.of_dem.backbone")}
    assert len(own) > 30
    assert not set(seen["learns"]) & same
    assert any(".mlp.down." in name for name in seen["learns"])
    assert {"stems.of_dem.heads.0.weight", "stems.of_dem.heads.2.bias"} <= set(seen["learns"])
    saved = load_segmenter(recipe.output_dir / "best", merge=False).model
    assert {name for name in saved.trainable() if "stems." in name} == {n for n in seen["learns"] if "stems." in n}
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, seen["after"][name]), name


def test_parts_count_every_parameter_once(place: Path, tmp_path: Path) -> None:
    model = built(place, tmp_path / "run", {"encoder": of(place, "sam")})
    parts = model.parts()
    names = [name for found in parts.values() for name in found]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    of_dem = {part: [name for name in found if name.startswith("stems.of_dem")] for part, found in parts.items()}
    assert all("lora_" in name for name in of_dem["adapter"])
    assert len(of_dem["adapter"]) == 3 * 2  # A and B of qkv in each of three blocks
    assert all(".heads." in name for name in of_dem["stem"])
    assert len(of_dem["stem"]) == 3 * 2
    model.train()
    assert not model.own_encoders["dem"].backbone.network.vision_encoder.training  # type: ignore[union-attr]
    assert model.own_encoders["dem"].heads.training


def test_dropout_of_an_own_adapter_is_of_training_alone(place: Path, tmp_path: Path) -> None:
    adapter = {"name": "lora", "rank": 2, "dropout": 0.9}
    model = built(place, tmp_path / "run", {"encoder": of(place, "clip"), "adapter": adapter}, adapter={"name": "none"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    only = {"dem": pictures()["dem"]}
    with torch.no_grad():
        quiet = [model.encode(only)["dem"].maps[-1] for _ in range(2)]
        loud = [model.train().encode(only)["dem"].maps[-1] for _ in range(2)]
    assert torch.equal(*quiet)
    assert not torch.equal(*loud)


def test_gradient_checkpointing_changes_no_gradient(place: Path, tmp_path: Path) -> None:
    def gradients(on: bool) -> dict[str, torch.Tensor]:
        train = {"gradient_checkpointing": on}
        model = built(place, tmp_path / f"run{on}", {"encoder": of(place, "clip")}, train=train)
        assert model.own_encoders["dem"].backbone.gradient_checkpointing == on
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        model.train()(pictures()).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert any("of_dem" in name and "lora_A" in name and tensor.any() for name, tensor in plain.items())
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, again[name], msg=name)


def test_compare_counts_what_is_trained(place: Path, tmp_path: Path) -> None:
    """Models that are compared are counted without weights, twice alike."""
    recipe = recipe_of(place, tmp_path / "run", {"encoder": of(place, "clip"), "adapter": {"name": "lora", "rank": 3}})
    model, counting = build_model(recipe, INPUTS), Counting()
    for _ in range(2):
        count = counting.of(recipe)
        assert count.total == sum(p.numel() for p in model.parameters())
        assert count.trainable == sum(p.numel() for p in model.trainable().values())


@pytest.mark.pitfall("P53")
@pytest.mark.parametrize("own", ["clip", "conv"])
@pytest.mark.parametrize("at", ["all", "last", [1, 3]])
def test_each_tensor_that_learns_gets_a_gradient(place: Path, tmp_path: Path, own: str, at: Any) -> None:
    """Also where the fusion takes some of the maps only."""
    encoder = {"name": "conv"} if own == "conv" else of(place, own)
    model = built(place, tmp_path / "run", {"encoder": encoder}, fusion={"name": "linear", "at": at})
    model.train()(pictures()).square().mean().backward()
    without = [name for name, tensor in model.trainable().items() if tensor.grad is None]
    assert without == []


def test_windows_that_are_mostly_padding_are_told_with_their_place(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 px of a training tile are 2 x 2 patches of SAM's 16, and with upscale 1.5 windows of 2 cover 3 x 3."""
    built(place, tmp_path / "run", {"encoder": of(place, "sam", upscale=1.5)})
    assert "model.modalities.dem.encoder.upscale = 2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(("have", "want"), [(14.0, 16.0), (16.0, 14.0), (8.0, 14.0), (16.0, 16.0), (5.6, 14.0)])
@pytest.mark.parametrize("size", [50, 112, 224])
def test_a_ramp_keeps_its_place_on_another_grid(have: float, want: float, size: int) -> None:
    """Each cell holds the place of its centre in pixels: after moving it holds that of the other grid's centres."""
    grids = [((-(-size // int(cell)) if cell == int(cell) else round(size / cell + 0.499),) * 2, cell)
             for cell in (have, want)]  # fmt: skip
    (rows, _), (wanted, _) = grids
    at = (torch.arange(rows[0]) + 0.5) * have
    maps = torch.stack([at[:, None].expand(rows), at[None].expand(rows), torch.full(rows, 7.0)])[None]
    moved = regrid(maps, torch.ones(1, *rows), grids[0], grids[1])
    expected = ((torch.arange(wanted[0]) + 0.5) * want).clamp(at[0], at[-1])
    inner = (expected > at[0] + max(have, want)) & (expected < at[-1] - max(have, want))
    for found in (moved[0, 0][:, 0], moved[0, 1][0]):
        torch.testing.assert_close(found[inner], expected[inner], atol=0.05 * want, rtol=0)
        torch.testing.assert_close(found, expected, atol=0.3 * want, rtol=0)  # at the edge cells are missing
    torch.testing.assert_close(moved[0, 2], torch.full(wanted, 7.0))
    if have == want:
        assert torch.equal(moved, maps)


@pytest.mark.parametrize(
    ("family", "upscale", "patch"), [("clip", 1, 16), ("sam", 1, 16), ("clip", 2, 16), ("dinov2", 1, 14)]
)
def test_a_mark_stays_where_it_is_in_the_image(
    place: Path, tmp_path: Path, family: str, upscale: float, patch: int
) -> None:
    """One bright patch of the own encoder moves the features most round its centre, on the shared grid of 14 px."""
    model = built(place, tmp_path / "run", {"encoder": of(place, family, upscale=float(upscale))})
    size = 180  # 13 cells of 14 px, 12 of 16, 23 of 8
    valid = torch.ones(1, size, size, dtype=torch.bool)
    plain, rgb = torch.full((1, 1, size, size), 340.0), torch.zeros(1, 3, size, size)
    for row, column in ((2, 9), (9, 1), (5, 10)):
        marked = plain.clone()
        marked[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 600.0
        with torch.no_grad():
            one, two = (
                model.encode(images_of({"rgb": rgb, "dem": dem}, {"rgb": valid, "dem": valid}))["dem"]
                for dem in (plain, marked)
            )
        assert one.maps[0].shape[-2:] == (13, 13)
        change = (one.maps[0] - two.maps[0]).norm(dim=1)[0]
        change = (change - 0.15 * change.max()).clamp(min=0)  # other patches attend to it
        centres = (torch.arange(13) + 0.5) * 14
        for axis, index in ((1, row), (0, column)):
            found = float((change.sum(dim=axis) * centres).sum() / change.sum())
            assert abs(found - (index + 0.5) * patch) < 3


def test_what_is_seen_is_what_the_shared_grid_sees(place: Path, tmp_path: Path) -> None:
    """The same mask has the same shares in both streams, whatever the patches of their encoders."""
    model = built(place, tmp_path / "run", {"encoder": of(place, "sam")})
    images = pictures()
    valid = torch.rand(2, 50, 70, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[:, 20:45, 30:] = False
    found = model.encode({name: Image(image.pixels, valid) for name, image in images.items()})
    for one, two in zip(found["rgb"].seen, found["dem"].seen, strict=True):
        torch.testing.assert_close(one, two)
    whole = shares(torch.ones(1, 28, 42, dtype=torch.bool), ((2, 3), 14.0))
    torch.testing.assert_close(whole, torch.ones(1, 2, 3))


@pytest.mark.pitfall("C44", "P26")
@pytest.mark.parametrize("fusion", ["linear", "gated", "attention", "decision"])
def test_nothing_valid_is_the_same_as_missing(place: Path, tmp_path: Path, fusion: str) -> None:
    """Whatever lies under the mask, NaN included."""
    model = built(place, tmp_path / "run", {"encoder": of(place, "clip")}, fusion={"name": fusion})
    images = pictures()
    hidden = torch.zeros(2, 50, 70, dtype=torch.bool)
    nothing = [Image(torch.full((2, 1, 50, 70), value), hidden) for value in (0.0, float("nan"), 1e6)]
    with torch.no_grad():
        alone = model({"rgb": images["rgb"]})
        for dem in nothing:
            torch.testing.assert_close(model({"rgb": images["rgb"], "dem": dem}), alone)
        assert not torch.allclose(model(images), alone)


@pytest.mark.pitfall("C44")
def test_cells_that_saw_nothing_do_not_leak_into_their_neighbours() -> None:
    maps = torch.ones(1, 1, 4, 4)
    seen = torch.ones(1, 4, 4)
    seen[..., 2:], maps[..., 2:] = 0, 1000
    moved = regrid(maps, seen, ((4, 4), 16.0), ((5, 5), 14.0))
    torch.testing.assert_close(moved[..., :3], torch.ones(1, 1, 5, 3))
    assert not moved[..., 4].any()


# ---------------------------------------------------------------------------------------------- recipes


def test_what_is_not_said_is_taken_from_the_shared_adapter(place: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
        ({"name": "lora", "rank": 2}, None, "lora"),
        ({"name": "none"}, None, "none"),
        ({"name": "adapter", "hidden": 4}, None, "adapter"),
        ({"name": "full"}, None, "none"),
        ({"name": "lora"}, {"name": "none"}, "none"),
        ({"name": "none"}, {"name": "lora"}, "lora"),
    ]
    for number, (shared, own, expected) in enumerate(cases):
        section = {"encoder": of(place, "clip")} | ({"adapter": own} if own else {})
        recipe = recipe_of(place, tmp_path / str(number), section, adapter=shared)
        assert recipe.model.adapter_of("dem").name == expected
        assert build_model(recipe, INPUTS).own_encoders["dem"].attached.name == expected


def test_maps_are_as_many_as_the_shared_encoder_gives(place: Path, tmp_path: Path) -> None:
    shared = of(place, "dinov2", layers=[2, 3])
    model = built(place, tmp_path / "two", {"encoder": of(place, "clip")}, encoder=shared)
    assert model.own_encoders["dem"].backbone.layers == (2, 3)
    assert len(model.encode(pictures())["dem"].maps) == 2
    model = built(place, tmp_path / "one", {"encoder": of(place, "clip", layers=[1, 3])}, encoder=shared)
    assert model.own_encoders["dem"].backbone.layers == (1, 3)
    with pytest.raises(RecipeError, match=r"model.modalities.dem.encoder.layers names 1 blocks.* gives 2 maps"):
        built(place, tmp_path / "few", {"encoder": of(place, "clip", layers=[3])}, encoder=shared)
    with pytest.raises(RecipeError, match=r"model.modalities.dem.encoder.layers = \[2, 9\]: .*1 to 3"):
        built(place, tmp_path / "deep", {"encoder": of(place, "clip", layers=[2, 9])}, encoder=shared)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"encoder": {"name": "conv"}, "adapter": {"name": "lora"}}, "adapter.*conv encoder learns as a whole"),
        ({"encoder": {"name": "clip", "checkpoint": "a/b"}, "adapter": {"name": "mm_lora"}}, "mm_lora"),
        ({"encoder": {"name": "clip", "checkpoint": "a/b"}, "adapter": {"name": "full"}}, "full"),
        ({"encoder": {"name": "builtin"}, "adapter": {"name": "full"}}, "full"),
        ({"encoder": {"name": "clip"}}, "model.modalities.dem.encoder.checkpoint"),
        ({"adapter": {"name": "lora"}}, "model.modalities.dem.encoder"),
        ({"encoder": {"name": "clip", "checkpoint": "facebook/dinov2-small"}}, "model.modalities.dem.encoder.check"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(
    place: Path, tmp_path: Path, own: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(place, tmp_path / "run", own)


def test_a_checkpoint_of_another_family_is_told_with_its_place(place: Path, tmp_path: Path) -> None:
    wrong = {"encoder": {"name": "clip", "checkpoint": str(place / "sam")}}
    with pytest.raises(CheckpointError, match=r"model.modalities.dem.encoder: .*model_type = .*sam.*the encoder clip"):
        built(place, tmp_path / "run", wrong)


def test_an_encoder_lr_is_of_an_own_adapter_too(place: Path, tmp_path: Path) -> None:
    train = {"optimizer": {"lr": 0.01, "encoder_lr": 0.001}}
    own = {"encoder": of(place, "clip"), "adapter": {"name": "lora"}}
    recipe_of(place, tmp_path / "run", own, train=train, adapter={"name": "none"})
    with pytest.raises(RecipeError, match="encoder_lr"):
        recipe_of(place, tmp_path / "run", {"encoder": of(place, "clip")}, train=train, adapter={"name": "none"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_moves_no_map(place: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """A network of half precision, and one whose layers compute so, find what float32 finds, but for rounding."""
    model, images = built(place, tmp_path / "run", {"encoder": of(place, "clip")}), pictures()
    with torch.no_grad():
        exact = model.encode(images)["dem"]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found = model.to(dtype).encode(images)["dem"]
    assert torch.equal(found.seen[0].float(), exact.seen[0].to(dtype).float())
    difference = (found.maps[-1].float() - exact.maps[-1]).abs().mean() / exact.maps[-1].abs().mean()
    assert difference < 0.05


def test_images_are_normalised_as_their_own_encoder_was_trained(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, tmp_path / "run", {"encoder": of(place, "clip")})
    assert published_in_image_units(recipe, "rgb")[0] == tuple(255 * mean for mean in IMAGENET[0])
    assert published_in_image_units(recipe, "dem")[0] == tuple(255 * mean for mean in CLIP[0])


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.pitfall("P13")
def test_a_moved_encoder_is_named_by_its_modality(trained: tuple[str, Recipe], place: Path, tmp_path: Path) -> None:
    """In Python and in a command; without it the message says which modality lacks its encoder."""
    family, recipe = trained
    best = shutil.copytree(recipe.output_dir / "best", tmp_path / "best")
    shares_there = Segmenter.from_pretrained(best).probabilities(scene(place))
    moved = shutil.copytree(place / family, tmp_path / "moved")
    text = (best / "recipe.yaml").read_text()
    (best / "recipe.yaml").write_text(text.replace(str(place / family), str(place / "gone")))
    sign(best)
    with pytest.raises(CheckpointError, match=r"base encoder of dem; .*encoder=\{\"dem\": FOLDER\} \(--encoder dem="):
        Segmenter.from_pretrained(best)
    again = Segmenter.from_pretrained(best, encoder={"dem": str(moved)})
    assert np.array_equal(again.probabilities(scene(place)), shares_there)
    both = Segmenter.from_pretrained(best, encoder={"dem": str(moved), "": str(place / "dinov2")})
    assert np.array_equal(both.probabilities(scene(place)), shares_there)
    paths = scene(place)
    words = ["predict", str(best), paths["rgb"], "--modality", f"dem={paths['dem']}", "-o", str(tmp_path / "map.tif")]
    failed = CliRunner().invoke(app, words)
    assert failed.exit_code != 0
    done = CliRunner().invoke(app, [*words, "--encoder", f"dem={moved}", "--encoder", str(place / "dinov2")])
    assert done.exit_code == 0, done.output
    with pytest.raises(CheckpointError, match=r"encoder rgb=.*rgb is no modality with a published encoder of its own"):
        Segmenter.from_pretrained(best, encoder={"rgb": str(moved)})


@pytest.mark.pitfall("P13")
def test_another_encoder_is_refused_by_its_hash(trained: tuple[str, Recipe], place: Path, tmp_path: Path) -> None:
    family, recipe = trained
    save_encoder(tmp_path / "other", family, seed=99)
    with pytest.raises(CheckpointError, match=r"the base encoder of dem .* has SHA-256 .*trained on"):
        load_segmenter(recipe.output_dir / "best", encoder={"dem": str(tmp_path / "other")})


@pytest.mark.pitfall("P13")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: entries.clear(), r"encoders = .*; expected those of model.modalities"),
        (lambda entries: entries.update(rgb=entries["dem"]), "encoders = .*rgb"),
        (lambda entries: entries.update(dem=3), "encoders.dem = 3.*a mapping"),
        (lambda entries: entries["dem"].pop("sha256"), "encoders.dem.sha256"),
        (lambda entries: entries["dem"].update(sha256="12"), "encoders.dem.sha256.*64 hexadecimal"),
        (lambda entries: entries["dem"].update(name="dinov2"), "encoders.dem.name.*clip as in recipe.yaml"),
    ],
)
def test_a_damaged_record_is_refused(place: Path, tmp_path: Path, change: Any, words: str) -> None:
    recipe = recipe_of(place, tmp_path / "run", {"encoder": of(place, "clip")})
    finetune(recipe)
    best = recipe.output_dir / "best"
    record = json.loads((best / "segmenter.json").read_text())
    before = fingerprint_of(best)
    change(record["encoders"])
    (best / "segmenter.json").write_text(json.dumps(record))
    sign(best)
    assert fingerprint_of(best) != before
    with pytest.raises(CheckpointError, match=words):
        load_segmenter(best)


def test_a_folder_without_own_encoders_is_as_before(place: Path, tmp_path: Path) -> None:
    """It has no such key, and one that has is refused."""
    recipe = recipe_of(place, tmp_path / "run", {"encoder": {"name": "conv", "width": 8}})
    finetune(recipe)
    best = recipe.output_dir / "best"
    record = json.loads((best / "segmenter.json").read_text())
    assert record["format"] == 2
    assert "encoders" not in record
    load_segmenter(best)
    record["encoders"] = {"dem": record["encoder"]}
    (best / "segmenter.json").write_text(json.dumps(record))
    sign(best)
    with pytest.raises(CheckpointError, match="encoders"):
        load_segmenter(best)


def test_a_run_goes_on_only_with_the_encoders_that_it_began_with(place: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(place / "clip", tmp_path / "clip")
    own = {"encoder": {"name": "clip", "checkpoint": str(mine)}}
    finetune(recipe_of(place, tmp_path / "run", own))
    shutil.rmtree(mine)
    save_encoder(mine, "clip", seed=99)
    with pytest.raises(CheckpointError, match="started on an encoder with SHA-256"):
        finetune(recipe_of(place, tmp_path / "run", own), resume=True)
