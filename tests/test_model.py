"""The wired model: every pixel keeps its place, invalid pixels say nothing, frozen parts stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import recipe_dict, save_encoder, toy_folder, toy_scene, write_raster, write_recipe

from vfmseg.errors import RecipeError
from vfmseg.finetune import finetune
from vfmseg.model import InputFacts, SegmentationModel, build_model
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter

RGB = InputFacts({"rgb": 3}, {"rgb": "uint8"}, {})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("model") / "encoder", "dinov2")


def model_of(tmp_path: Path, folder: Path, facts: InputFacts = RGB, **parts: Any) -> SegmentationModel:
    content = recipe_dict(tmp_path, folder, tmp_path / "run")
    content["model"] |= parts
    if len(facts.bands) > 1:
        content["data"]["modalities"] = {name: {} for name in facts.bands}
        for split in ("train", "val", "test"):
            content["data"][split] |= dict.fromkeys(facts.bands, f"{tmp_path}/{split}/*.tif")
    return build_model(load_recipe(write_recipe(tmp_path / "r.yaml", content)), facts)


class Shining(torch.nn.Module):
    """A decoder whose logit says how bright a cell is: the mean over channels of a hand-made map."""

    def forward(self, features: Any) -> torch.Tensor:
        return features.maps[-1].mean(dim=1, keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(56, 56), (50, 61), (29, 83), (14, 15)])
@pytest.mark.parametrize("upscale", [1.0, 1.5])
def test_p19_every_pixel_keeps_its_place(
    tmp_path: Path, encoder: Path, height: int, width: int, upscale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that hold their own column number must come out as a ramp over the columns of the image."""
    from vfmseg.encoders.base import Features

    model = model_of(tmp_path, encoder, encoder={"name": "dinov2", "checkpoint": str(encoder), "upscale": upscale})
    model.decoder = Shining()
    stride = model.encoder.strides[-1]

    def ramp(images: torch.Tensor, valid: torch.Tensor) -> Features:
        rows, cols = (-(-round(side * upscale) // 14) for side in images.shape[-2:])
        centres = (torch.arange(cols) + 0.5) * stride  # pixels of the image
        return Features((centres.expand(1, 1, rows, cols).clone(),), (stride,))

    monkeypatch.setattr(model.encoder, "forward", ramp)
    out = model({"rgb": torch.zeros(1, 3, height, width)}, {"rgb": torch.ones(1, height, width, dtype=torch.bool)})
    assert out.shape == (1, 1, height, width)
    columns = torch.arange(width) + 0.5
    inner = (columns > stride / 2) & (columns < width - stride)
    if inner.any():
        assert (out[0, 0, 0] - columns)[inner].abs().max() <= 1.0


def test_p26_what_lies_under_an_invalid_pixel_does_not_matter(tmp_path: Path, encoder: Path) -> None:
    model = model_of(tmp_path, encoder)
    images = torch.rand(1, 3, 42, 42) * 255
    valid = torch.ones(1, 42, 42, dtype=torch.bool)
    valid[:, 10:20, 5:30] = False
    changed = images.clone()
    changed[:, :, 10:20, 5:30] = 9999.0
    torch.testing.assert_close(model({"rgb": images}, {"rgb": valid}), model({"rgb": changed}, {"rgb": valid}))


def test_c9_train_returns_self_and_frozen_parts_stay_in_evaluation(tmp_path: Path, encoder: Path) -> None:
    model = model_of(tmp_path, encoder, adapter={"name": "lora", "rank": 2, "dropout": 0.5})
    assert model.train() is model
    assert model.decoder.training
    learning = {id(m) for m in model.encoder.modules() if m.training}
    for name, module in model.encoder.backbone.named_modules():
        if id(module) in learning:
            assert "lora_dropout" in name
    assert any("lora_dropout" in n and m.training for n, m in model.encoder.backbone.named_modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_c43_stacked_modalities_have_their_own_statistics_and_masks(tmp_path: Path, encoder: Path) -> None:
    facts = InputFacts({"rgb": 3, "ir": 1}, {"rgb": "uint8", "ir": "uint16"}, {"ir": ((500.0,), (50.0,))})
    model = model_of(tmp_path, encoder, facts)
    assert model.encoder.mean[3] == 500.0
    assert model.encoder.mean[0] == pytest.approx(0.485 * 255)
    for parameter in model.encoder.stem.parameters():  # they start at zero, where the band would change nothing
        torch.nn.init.ones_(parameter)
    images = {"rgb": torch.rand(1, 3, 28, 28) * 255, "ir": torch.rand(1, 1, 28, 28) * 100 + 450}
    valid = {name: torch.ones(1, 28, 28, dtype=torch.bool) for name in images}
    there = model(images, valid)
    gone = model(images, valid | {"ir": torch.zeros(1, 28, 28, dtype=torch.bool)})
    assert not torch.allclose(there, gone)
    nonsense = images | {"ir": torch.full((1, 1, 28, 28), 1e6)}
    torch.testing.assert_close(gone, model(nonsense, valid | {"ir": torch.zeros(1, 28, 28, dtype=torch.bool)}))


def test_p21_published_statistics_need_three_bands(tmp_path: Path, encoder: Path) -> None:
    content = recipe_dict(tmp_path, encoder, tmp_path / "run")
    content["data"]["modalities"] = {"rgb": {"normalize": "encoder"}}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", content))
    with pytest.raises(RecipeError, match="needs 3 bands"):
        build_model(recipe, InputFacts({"rgb": 4}, {"rgb": "uint8"}, {}))


def test_p24_two_modalities_with_nan_16_bits_no_crs_and_a_large_tile(
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
