"""The wired model: every pixel keeps its place, invalid pixels say nothing, frozen parts stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import picture, save_all, upstream
from makers import an_input, images_of, recipe_dict, save_encoder, toy_folder, toy_scene, write_raster, write_recipe

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.build.model import build_model, normalized_by
from vfmseg.data.image import Image, Images
from vfmseg.data.inputs import Inputs
from vfmseg.data.sample import Sample
from vfmseg.decoders.build import DECODERS, WITH_WIDTH, build_decoder
from vfmseg.encoders.build import ENCODERS, build_backbone, build_stem
from vfmseg.encoders.stem import Project
from vfmseg.errors import RecipeError
from vfmseg.finetune import finetune
from vfmseg.model import Network
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter
from vfmseg.training.losses import IGNORE, cross_entropy
from vfmseg.training.objectives.segmentation import score_windows
from vfmseg.training.processes import connect
from vfmseg.training.schedule import Schedule, parameter_groups
from vfmseg.training.step import Step

RGB = (an_input(),)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("wired"))


def wired(
    families: dict[str, Path], name: str, adapter: str, decoder: str, bands: int = 3, upscale: float = 1.0
) -> Network:
    """A model of small parts, two classes, one modality called rgb."""
    statistics = {"mean": [100.0] * bands, "std": [50.0] * bands}
    checkpoint = None if name == "builtin" else str(families[name])
    backbone = build_backbone(name, checkpoint)
    stem = build_stem(backbone, {"rgb": bands}, **statistics, upscale=upscale)
    options = {
        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ("q", "v")},
        "adapter": {"hidden": 4, "scale": 0.5},
        "mm_lora": {"rank": 2, "alpha": None, "dropout": 0.0, "targets": ("q", "v", "mlp"), "mix": True},
        "mm_adapter": {"ratio": 0.25},
    }
    attached = ADAPTERS[adapter].attach(backbone, ("rgb",), **options.get(adapter, {}))
    strides = (backbone.patch / stem.upscale,) * len(backbone.layers)
    head = build_decoder(decoder, backbone.channels, strides, 2, 16 if decoder in WITH_WIDTH else None)
    return Network(backbone, {"rgb": stem}, attached, None, head, 2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("model") / "encoder", "dinov2")


def model_of(tmp_path: Path, folder: Path, inputs: Inputs = RGB, **parts: Any) -> Network:
    content = recipe_dict(tmp_path, folder, tmp_path / "run")
    content["model"] |= parts
    if len(inputs) > 1:
        content["data"]["modalities"] = {one.name: {} for one in inputs}
        for split in ("train", "val", "test"):
            content["data"][split] |= dict.fromkeys((one.name for one in inputs), f"{tmp_path}/{split}/*.tif")
    return build_model(load_recipe(write_recipe(tmp_path / "r.yaml", content)), inputs)


class Shining(torch.nn.Module):
    """A decoder whose logit says how bright a cell is: the mean over channels of a hand-made map."""

    def forward(self, features: Any) -> torch.Tensor:
        return features.maps[-1].mean(dim=1, keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(56, 56), (50, 61), (29, 83), (14, 15)])
@pytest.mark.parametrize("upscale", [1.0, 1.5, 0.5])
@pytest.mark.pitfall("P19")
def test_every_pixel_keeps_its_place(
    tmp_path: Path, encoder: Path, height: int, width: int, upscale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that hold their own column number must come out as a ramp over the columns of the image."""
    from vfmseg.encoders.tokens import Features

    model = model_of(tmp_path, encoder, encoder={"name": "dinov2", "checkpoint": str(encoder), "upscale": upscale})
    model.decoder = Shining()
    stride = model.strides[-1]

    def ramp(images: Images) -> dict[str, Features]:
        rows, cols = (-(-round(side * upscale) // 14) for side in images["rgb"].valid.shape[-2:])
        centres = (torch.arange(cols) + 0.5) * stride  # pixels of the image
        centres = centres.expand(1, 1, rows, cols).clone()
        return {"rgb": Features((centres,), (torch.ones_like(centres[:, 0]),), (stride,))}

    monkeypatch.setattr(model, "encode", ramp)
    out = model(
        images_of({"rgb": torch.zeros(1, 3, height, width)}, {"rgb": torch.ones(1, height, width, dtype=torch.bool)})
    )
    assert out.shape == (1, 1, height, width)
    columns = torch.arange(width) + 0.5
    inner = (columns > stride / 2) & (columns < width - stride)
    if inner.any():
        assert (out[0, 0, 0] - columns)[inner].abs().max() <= 1.0


@pytest.mark.parametrize("upscale", [0.25, 0.3, 0.5, 0.7, 1.1, 1.75])
@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.pitfall("P17", "P19")
def test_logits_have_the_size_of_the_image(families: dict[str, Path], name: str, upscale: float) -> None:
    """Also where the enlarged side is rounded: 113 pixels halved are 56, exactly four patches of 14."""
    model = wired(families, name, "none", "linear", upscale=upscale)
    for height, width in ((113, 57), (225, 1), (87, 129)):
        images, valid = picture(height, width)
        with torch.no_grad():
            assert model(images_of({"rgb": images}, {"rgb": valid[:, 0]})).shape == (1, 2, height, width)


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.pitfall("C8", "P53")
def test_everything_that_may_learn_gets_a_gradient(
    families: dict[str, Path], name: str, adapter: str, decoder: str
) -> None:
    """One without would inflate the count of what is trained, and stall several processes."""
    model = wired(families, name, adapter, decoder, bands=4).train()
    images, valid = picture(70, 50, bands=4, batch=2)
    labels = torch.zeros(2, 70, 50, dtype=torch.int64)
    cross_entropy(model(images_of({"rgb": images}, {"rgb": valid[:, 0]})), labels).backward()
    assert [n for n, p in model.trainable().items() if p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    learning = {part for part, found in model.parts().items() if any(p.requires_grad for p in found.values())}
    assert learning == {"stem", "decoder"} | {"none": set(), "full": {"encoder"}}.get(adapter, {"adapter"})


@pytest.mark.pitfall("P12")
def test_the_full_state_keeps_every_part(families: dict[str, Path]) -> None:
    """Each part writes its own keys into a shared dictionary and deletes none; `train` of each returns the part."""
    model = wired(families, "dinov2", "lora", "fpn", bands=4)
    for part in model.modules():
        assert part.train() is part
        assert part.eval() is part
    shared: dict[str, torch.Tensor] = {"other.key": torch.zeros(1)}
    state = model.state_dict(destination=shared)
    assert state is shared
    parts = [("backbone.", model.backbone), ("stems.of_rgb.", model.stem("rgb")), ("decoder.", model.decoder)]
    expected = {f"{prefix}{name}" for prefix, part in parts for name in part.state_dict()}
    assert set(state) == expected | {"other.key"}
    assert {n for n, _ in model.named_parameters()} <= set(state)
    assert set(model.head_state()) == {n for n in state if not n.startswith("backbone.")} - {"other.key"}


@pytest.mark.pitfall("C9")
def test_the_mode_of_the_model_decides_nothing_about_what_learns(families: dict[str, Path]) -> None:
    """An optimizer made before `train()`, after it, or after validation has the same groups."""
    for adapter in ADAPTERS:
        model = wired(families, "sam", adapter, "upernet", bands=4)
        found = []
        for mode in (None, True, False, True):
            if mode is not None:
                model.train(mode)
            groups = parameter_groups(Step(model, {}).parts(), Schedule(epochs=1, batch_size=1))
            found.append([(g["weight_decay"], [id(p) for p in g["params"]]) for g in groups])
        assert found == [found[0]] * 4
        assert model.backbone.training
        assert model.decoder.training


@pytest.mark.parametrize("upscale", [1.0, 1.5])
@pytest.mark.pitfall("P46")
def test_scores_are_those_of_the_native_grid(families: dict[str, Path], upscale: float) -> None:
    """Labels of single pixels, far below a token, are counted one by one against answers of their own size."""
    model = wired(families, "clip", "none", "fpn", upscale=upscale)
    images, valid = picture(45, 61, batch=3)
    valid[1, :, 10:20] = False
    with torch.no_grad():  # as many answers of one class as of the other
        logits = model(images_of({"rgb": images}, {"rgb": valid[:, 0]}))
        margins = (logits[:, 0] - logits[:, 1]).flatten().sort().values
        middle = margins[len(margins) * 2 // 5 : len(margins) * 3 // 5]
        gap = middle.diff().argmax()  # no pixel near a tie, which batches of other sizes may round otherwise
        model.decoder.classify[0].bias[1] += (middle[gap] + middle[gap + 1]) / 2  # type: ignore[index,union-attr]
    labels = torch.randint(0, 2, (3, 45, 61))
    labels[2, 30:] = IGNORE
    samples = [Sample({"rgb": Image(i, v[0])}, y) for i, v, y in zip(images, valid, labels, strict=True)]
    found: Any = score_windows(connect("no"), model, samples, 2, batch_size=2, rule="all")  # type: ignore[arg-type]
    with torch.no_grad():
        answers = model(images_of({"rgb": images}, {"rgb": valid[:, 0]})).argmax(1)
    counted = valid[:, 0] & (labels != IGNORE)
    pairs = [[int(((labels == t) & (answers == p) & counted).sum()) for p in (0, 1)] for t in (0, 1)]
    assert found.matrix.tolist() == pairs
    assert min(map(min, pairs)) > 100


@pytest.mark.pitfall("C19")
def test_padding_of_sam_windows_is_said_once_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfmseg.terminal._said", set())
    folder = tmp_path / "sam"
    upstream("sam-vision", window_size=14, image_size=256).save_pretrained(folder)
    capsys.readouterr()

    def said(tile: int, upscale: float) -> str:
        content = recipe_dict(tmp_path, folder, tmp_path / "run", "sam")
        content["data"]["tile"] = tile
        content["model"]["encoder"]["upscale"] = upscale
        build_model(load_recipe(write_recipe(tmp_path / "r.yaml", content)), RGB)
        return capsys.readouterr().err

    message = said(256, 1.0)
    assert message.startswith("data.tile = 256: 67% of what the sam encoder attends to in windows of 14 x 14 tokens")
    assert message.endswith("try model.encoder.upscale = 1.75, or data.tile = 224\n")
    assert said(256, 1.0) == ""  # once
    assert said(256, 1.75) == said(224, 1.0) == said(1024, 1.0) == ""
    assert "upscale = 2.24, or data.tile = 224" in said(100, 1.0)
    assert said(100, 2.24) == ""


def test_the_recipe_reaches_every_part(tmp_path: Path, encoder: Path) -> None:
    content = recipe_dict(tmp_path, encoder, tmp_path / "run")
    content["model"]["encoder"] |= {"layers": [1, 3], "input": "project", "upscale": 1.5}
    content["model"]["adapter"] = {"name": "lora", "rank": 3, "alpha": 5.0, "targets": ["k"]}
    content["model"]["decoder"] = {"name": "fpn", "channels": 24}
    content["train"]["gradient_checkpointing"] = True
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    model = build_model(recipe, (an_input(count=4, mean=9.0, std=5.0),))
    stem = model.stem("rgb")
    assert (model.backbone.layers, stem.upscale) == ((1, 3), 1.5)
    assert isinstance(stem.mix, Project)
    assert model.backbone.gradient_checkpointing
    assert stem.mean.tolist() == [9.0] * 4
    assert stem.std.tolist() == [5.0] * 4
    assert model.decoder.classify[0].in_channels == 24  # type: ignore[index,union-attr]
    assert [site.split(".")[-1] for site in model.attached.sites] == ["k_proj"] * 3
    layer: Any = model.backbone.network.get_submodule(model.attached.sites[0])
    assert (layer.r["default"], layer.lora_alpha["default"]) == (3, 5.0)


def test_every_random_part_comes_from_the_seed_of_the_recipe(tmp_path: Path, encoder: Path) -> None:
    content = recipe_dict(tmp_path, encoder, tmp_path / "run")
    state = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        content["seed"] = seed
        found.append(build_model(load_recipe(write_recipe(tmp_path / "r.yaml", content)), RGB).trainable())
        torch.rand(3)  # what the process drew before does not matter
    torch.set_rng_state(state)
    drawn = [n for n, p in found[0].items() if p.ndim > 1 and p.any()]  # not what starts at zero
    assert any(n.startswith("decoder.") for n in drawn)
    assert any(n.startswith("backbone.") for n in drawn)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert [n for n in drawn if torch.equal(found[0][n], found[2][n])] == []


@pytest.mark.pitfall("P21", "P24")
def test_published_statistics_are_for_plain_8_bit_rgb_unless_asked_for(tmp_path: Path, encoder: Path) -> None:
    def chosen(bands: int, dtype: str, **section: Any) -> str:
        content = recipe_dict(tmp_path, encoder, tmp_path / "run")
        content["data"]["modalities"] = {"rgb": section}
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
        return normalized_by(recipe, "rgb", bands, dtype, plain=not {"scale", "offset"} & set(section))

    assert chosen(3, "uint8") == "encoder"
    assert chosen(3, "uint16") == chosen(3, "float32") == chosen(4, "uint8") == chosen(1, "uint8") == "dataset"
    assert chosen(3, "uint8", scale=0.5) == chosen(3, "uint8", offset=1.0) == "dataset"
    assert chosen(3, "uint16", normalize="encoder") == "encoder"
    assert chosen(3, "uint8", normalize="dataset") == "dataset"


@pytest.mark.pitfall("P26")
def test_what_lies_under_an_invalid_pixel_does_not_matter(tmp_path: Path, encoder: Path) -> None:
    model = model_of(tmp_path, encoder)
    images = torch.rand(1, 3, 42, 42) * 255
    valid = torch.ones(1, 42, 42, dtype=torch.bool)
    valid[:, 10:20, 5:30] = False
    changed = images.clone()
    changed[:, :, 10:20, 5:30] = 9999.0
    torch.testing.assert_close(
        model(images_of({"rgb": images}, {"rgb": valid})), model(images_of({"rgb": changed}, {"rgb": valid}))
    )


@pytest.mark.pitfall("C9")
def test_train_returns_self_and_frozen_parts_stay_in_evaluation(tmp_path: Path, encoder: Path) -> None:
    model = model_of(tmp_path, encoder, adapter={"name": "lora", "rank": 2, "dropout": 0.5})
    assert model.train() is model
    assert model.decoder.training
    learning = {id(m) for m in model.backbone.network.modules() if m.training}
    for name, module in model.backbone.network.named_modules():
        if id(module) in learning:
            assert "lora_dropout" in name
    assert any("lora_dropout" in n and m.training for n, m in model.backbone.network.named_modules())
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.pitfall("C43")
def test_stacked_modalities_have_their_own_statistics_and_masks(tmp_path: Path, encoder: Path) -> None:
    model = model_of(tmp_path, encoder, (an_input(), an_input("ir", 1, "uint16", 500.0, 50.0)))
    stem = model.stem("rgb+ir")
    assert stem.mean[3] == 500.0
    assert stem.mean[0] == pytest.approx(0.485 * 255)
    for parameter in stem.parameters():  # they start at zero, where the band would change nothing
        torch.nn.init.ones_(parameter)
    images = {"rgb": torch.rand(1, 3, 28, 28) * 255, "ir": torch.rand(1, 1, 28, 28) * 100 + 450}
    valid = {name: torch.ones(1, 28, 28, dtype=torch.bool) for name in images}
    there = model(images_of(images, valid))
    gone = model(images_of(images, valid | {"ir": torch.zeros(1, 28, 28, dtype=torch.bool)}))
    assert not torch.allclose(there, gone)
    nonsense = images | {"ir": torch.full((1, 1, 28, 28), 1e6)}
    torch.testing.assert_close(
        gone, model(images_of(nonsense, valid | {"ir": torch.zeros(1, 28, 28, dtype=torch.bool)}))
    )


@pytest.mark.pitfall("P21")
def test_published_statistics_need_three_bands(tmp_path: Path, encoder: Path) -> None:
    content = recipe_dict(tmp_path, encoder, tmp_path / "run")
    content["data"]["modalities"] = {"rgb": {"normalize": "encoder"}}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    with pytest.raises(RecipeError, match="needs 3 bands"):
        normalized_by(recipe, "rgb", 4, "uint8", plain=True)


@pytest.mark.pitfall("P24")
def test_two_modalities_with_nan_16_bits_no_crs_and_a_large_tile(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, evaluate and predict on RGB (uint8) and a float band with NaN, scenes smaller than the tile, no CRS."""
    from vfmseg import terminal

    terminal._said.clear()
    toy_folder(tmp_path / "rgb", {"train": 2, "val": 1, "test": 1}, 40, 52)
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for i in range(count):
            image, labels = toy_scene(i, 40, 52)
            band = image[0].astype(np.float32) * 40
            band[:6] = np.nan
            for kind, array in (("images", image), ("ir", band), ("labels", labels)):
                write_raster(tmp_path / "rgb" / split / kind / f"s{i}_{split}.tif", array, crs=None)
    content = recipe_dict(tmp_path / "rgb", encoder, tmp_path / "run")
    content["data"] |= {"modalities": {"rgb": {}, "ir": {}}, "tile": 96}
    for split in ("train", "val", "test"):
        content["data"][split]["ir"] = f"{tmp_path}/rgb/{split}/ir/*.tif"
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    result = finetune(recipe)
    said = capsys.readouterr().err
    assert said.count("no CRS") == 1
    assert result["validation"]["pixels"] == 34 * 52  # the NaN rows are not counted
    segmenter = Segmenter.from_pretrained(tmp_path / "run" / "best")
    assert segmenter.evaluate(recipe, "test")["pixels"] == 34 * 52
    place = tmp_path / "rgb" / "test"
    labels = segmenter.predict({"rgb": place / "images" / "s0_test.tif", "ir": place / "ir" / "s0_test.tif"})
    assert isinstance(labels, np.ndarray)
    assert (labels[:6] == 255).all()
    assert (labels[6:] != 255).all()
