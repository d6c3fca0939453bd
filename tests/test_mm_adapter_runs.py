"""Adapters of several modalities from a recipe to a map: trained, stopped and gone on with, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import in_two_sittings, recipe_dict, save_encoder, toy_scene, write_raster, write_recipe
from mm_models import fill
from safetensors.torch import load_file

from vfmseg.checkpoint.reading import load_segmenter
from vfmseg.data.image import Image
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.segmenter import Segmenter

ADAPTERS: dict[str, dict[str, Any]] = {
    "mm_lora": {"name": "mm_lora", "rank": 2, "dropout": 0.1},
    "mm_adapter": {"name": "mm_adapter"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with an image, heights and infrared, and an encoder."""
    folder = tmp_path_factory.mktemp("mm_runs")
    save_encoder(folder / "encoder", "sam")
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for i in range(count):
            image, labels = toy_scene(10 * len(split) + i, 48, 64)
            heights = (image[0] * 0.5 + 300).astype(np.float32)
            heights[-10:] = -9999
            write_raster(folder / split / "rgb" / f"{i}.tif", image, nodata=0)
            write_raster(folder / split / "dem" / f"{i}.tif", heights, nodata=-9999)
            write_raster(folder / split / "ir" / f"{i}.tif", image[1:2])
            write_raster(folder / split / "labels" / f"{i}.tif", labels)
    return folder


def recipe_of(place: Path, run: Path, adapter: dict[str, Any], *names: str, **model: Any) -> Recipe:
    content = recipe_dict(place, place / "encoder", run, "sam")
    names = names or ("rgb", "dem")
    for split in ("train", "val", "test"):
        content["data"][split] = {name: f"{place}/{split}/{name}/*.tif" for name in (*names, "labels")}
    content["data"]["modalities"] = {name: {} for name in names}
    content["model"] |= {"adapter": adapter, **({"fusion": {"name": "linear"}} if len(names) > 1 else {}), **model}
    run.parent.mkdir(parents=True, exist_ok=True)
    return load_recipe(write_recipe(run.parent / f"{run.name}.yaml", content))


@pytest.fixture(scope="module", params=ADAPTERS)
def trained(request: pytest.FixtureRequest, place: Path) -> tuple[str, Recipe]:
    recipe = recipe_of(place, place / "runs" / request.param, ADAPTERS[request.param])
    finetune(recipe)
    return request.param, recipe


def pictures() -> dict[str, Image]:
    draws = torch.Generator().manual_seed(0)
    valid = torch.ones(2, 40, 50, dtype=torch.bool)
    rgb, dem = (torch.rand(2, bands, 40, 50, generator=draws) for bands in (3, 1))
    return {"rgb": Image(255 * rgb, valid), "dem": Image(300 + 80 * dem, valid.clone())}


@pytest.mark.pitfall("P6", "C13")
def test_what_was_saved_answers_as_what_was_trained(trained: tuple[str, Recipe], place: Path, tmp_path: Path) -> None:
    """Asked to merge or not, by all modalities or one; the adapter's folder has the names of its modalities."""
    name, recipe = trained
    best = recipe.output_dir / "best"
    file = best / "adapters" / "rgb+dem" / "adapter.safetensors"
    tensors = load_file(file)
    ups = {n: t for n, t in tensors.items() if n.endswith(("lora_B.weight", "up.weight"))}
    assert all(t.any() for t in ups.values())
    assert len(ups) == 2 * (3 * 4 if name == "mm_lora" else 3 * 2)  # q, v and two layers of the MLP
    apart, merged = (load_segmenter(best, merge=asked).model for asked in (False, True))
    given = pictures()
    with torch.no_grad():
        for images in (given, {"rgb": given["rgb"]}, {"dem": given["dem"]}):
            assert torch.equal(apart(images), merged(images))
        fill(apart, seed=5)
        assert not torch.allclose(apart(given), merged(given), atol=1e-2)  # it is in use
    merged.attached.save(tmp_path / "again")
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    scene = {name: str(place / "test" / name / "0.tif") for name in ("rgb", "dem")}
    assert np.isfinite(Segmenter.from_pretrained(best).probabilities(scene)).all()
    content = (best / "recipe.yaml").read_text()
    changed = content.replace("rank: 2", "rank: 3") if name == "mm_lora" else content.replace("0.25", "0.5")
    assert changed != content
    (best / "recipe.yaml").write_text(changed)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: .* of another shape"):
        load_segmenter(best)
    (best / "recipe.yaml").write_text(content)


@pytest.mark.pitfall("P55")
def test_a_run_that_was_stopped_ends_as_one_that_was_not(trained: tuple[str, Recipe], place: Path) -> None:
    name, recipe = trained
    shorter = recipe_of(place, place / "stopped" / name, ADAPTERS[name])

    in_two_sittings(shorter)
    where = Path("last") / "adapters" / "rgb+dem" / "adapter.safetensors"
    once, twice = (load_file(r.output_dir / where) for r in (recipe, shorter))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.pitfall("C8", "P53")
def test_a_modality_with_an_encoder_of_its_own_has_no_part_in_it(place: Path, tmp_path: Path, name: str) -> None:
    own = {"ir": {"encoder": {"name": "conv", "width": 8}}}
    recipe = recipe_of(place, tmp_path / "run", ADAPTERS[name], "rgb", "ir", "dem", modalities=own)
    finetune(recipe)
    tensors = load_file(recipe.output_dir / "best" / "adapters" / "rgb+ir+dem" / "adapter.safetensors")
    assert {stream for stream in ("rgb", "ir", "dem") if any(f".{stream}." in n for n in tensors)} == {"rgb", "dem"}
    load_segmenter(recipe.output_dir / "best")


@pytest.mark.parametrize("name", ADAPTERS)
def test_with_one_stream_it_is_not_used(place: Path, tmp_path: Path, name: str) -> None:
    instead = "use lora" if name == "mm_lora" else "use adapter"
    own = {"dem": {"encoder": {"name": "conv"}}}
    for names, model, why in (
        (("rgb",), {}, "only one modality"),
        (("rgb", "dem"), {"fusion": {"name": "stack"}}, "stack makes one image"),
        (("rgb", "dem"), {"fusion": None}, "stack makes one image"),
        (("rgb", "dem"), {"modalities": own}, "only rgb goes through the encoder"),
    ):
        with pytest.raises(RecipeError, match=rf"model\.adapter.* = '{name}' is not used: .*{why}.*; {instead}"):
            recipe_of(place, tmp_path / "run", ADAPTERS[name], *names, **model)
