"""Groups of bands as a way into an encoder: what it starts from, what comes out, and in which recipes it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import SETTINGS, encoder_of, family, picture, upstream
from grouped_models import grouped, pictures
from makers import MAE_DECODER, pretrain_recipe, recipe_dict, save_encoder, toy_scene, write_raster, write_recipe

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.adapters.attached import Attached
from vfmseg.build.data import inputs_of, open_training
from vfmseg.build.groups import tell_groups
from vfmseg.build.model import build_model
from vfmseg.build.pretraining import build_encoder, masking_of, statistics_of
from vfmseg.build.unlabelled import open_unlabelled
from vfmseg.data.image import Image
from vfmseg.encoders.backbone import Backbone, BaseRecord
from vfmseg.encoders.build import ENCODERS, build_new_backbone, build_stem
from vfmseg.encoders.stem import Stem
from vfmseg.errors import RecipeError
from vfmseg.finetune import finetune
from vfmseg.model import Encoder as Plain
from vfmseg.pretrain import pretrain
from vfmseg.recipe import load_recipe
from vfmseg.segmenter import Segmenter


def backbone_of(kind: str) -> Backbone:
    return Backbone(ENCODERS[family(kind)], upstream(kind), [1, 3], False, BaseRecord(kind, None, ""))


def whole(images: torch.Tensor) -> dict[str, Image]:
    return {"cube": Image(images, torch.ones(len(images), *images.shape[2:], dtype=torch.bool))}


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip-vision"])
@pytest.mark.pitfall("P4", "C32")
def test_a_grey_image_begins_as_what_it_is_for_the_published_kernel(kind: str) -> None:
    """And the group of red, green and blue, in any order, as any image is."""
    backbone = backbone_of(kind)
    usual = encoder_of(backbone, 3, [100.0] * 3, [50.0] * 3)
    groups = ((3, 1, 2), (4, 6), (5,))
    stem = build_stem(backbone, {"cube": 6}, [100.0] * 6, [50.0] * 6, groups=groups)
    with torch.no_grad():
        stem.mix.codes.zero_()  # type: ignore[union-attr, operator]
    rgb, _ = picture(50, 70, batch=2)
    grey = rgb[:, :1].expand(-1, 6, -1, -1)
    patches = 4 * 5
    for images, of in ((grey, range(3)), (torch.cat([rgb, grey[:, :3]], dim=1), range(1))):
        rows = {
            f"b{i}": image
            for i, image in enumerate(Image(images[:, i : i + 1], whole(images)["cube"].valid) for i in range(3))
        }
        published = backbone.embed(*usual.stem("image")(rows))  # type: ignore[operator]
        found = backbone.embed(*stem(whole(images)))
        assert found.groups == 3
        assert found.values.shape[1] == backbone.prefix + 3 * patches
        assert found.seen.shape == (2, 3 * patches)
        torch.testing.assert_close(found.values[:, : backbone.prefix], published.values[:, : backbone.prefix])
        each = found.values[:, backbone.prefix :].unflatten(1, (3, -1))
        for number in of:
            torch.testing.assert_close(each[:, number], published.values[:, backbone.prefix :], rtol=1e-4, atol=1e-4)


@pytest.mark.pitfall("P57")
def test_of_a_new_encoder_kernels_are_random_from_the_seed_and_tokens_as_loud() -> None:
    backbone = build_new_backbone(8, 64, 2, 2, 32, None, 0)
    stems = [
        build_stem(backbone, {"cube": 9}, [0.0] * 9, [1.0] * 9, groups=((1, 2, 3), (4,), (5, 6, 7, 8, 9)), seed=seed)
        for seed in (0, 0, 1)
    ]
    one, two, other = (stem.state_dict() for stem in stems)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if name.startswith("mix."))
    noise = torch.randn(2, 9, 64, 64)
    with torch.no_grad():
        loud = stems[0].mix(noise)[1].std(dim=(0, 2, 3))
        kernel = backbone.network.get_submodule("embeddings.patch_embeddings.projection").get_parameter("weight")
        usual = torch.nn.functional.conv2d(noise[:, :3], kernel, stride=8).std()
    assert ((loud / usual - 1).abs() < 0.15).all()


def test_a_map_is_the_mean_over_the_groups_of_each_patch() -> None:
    model = grouped("dinov2").eval()
    images = pictures()
    valid = torch.ones(2, 50, 70, dtype=torch.bool)
    valid[0, :14, :28] = False
    backbone, stem = model.backbone, model.image_stem
    with torch.no_grad():
        features = model.encode({"cube": Image(images, valid)})["image"]
        tokens = backbone.embed(*stem({"cube": Image(images, valid)}))
        for depth in range(1, 4):
            tokens = backbone.step(depth, tokens)
    (found,) = features.maps
    assert found.shape == (2, 32, 4, 5)
    normed = backbone.finish(tokens)[:, 1:]
    place = torch.stack([normed[:, group * 20 + 1 * 5 + 3] for group in range(3)]).mean(dim=0)
    torch.testing.assert_close(found[:, :, 1, 3], place)
    assert features.seen[0].shape == (2, 4, 5)
    assert features.seen[0][0, 0].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("adapter", ["lora", "mm_lora", "mm_adapter", "adapter"])
@pytest.mark.pitfall("P53", "P10")
def test_every_adapter_sees_what_it_always_sees(adapter: str) -> None:
    """Two streams of as many groups; what a stream learns for itself moves its maps, and gets a gradient."""
    backbone = backbone_of("dinov2")
    names, groups = ("a", "b"), ((1, 2), (3,))
    stems = {n: build_stem(backbone, {n: 3}, [100.0] * 3, [50.0] * 3, groups=groups, seed=3) for n in names}
    attached: Attached = ADAPTERS[adapter].attach(backbone, names, **SETTINGS[adapter])
    model = Plain(backbone, stems, attached).train()
    valid = torch.ones(2, 50, 70, dtype=torch.bool)
    images = {name: Image(pictures(2, 3), valid) for name in names}
    before = model.encode(images)
    for tensor in attached.added:
        torch.nn.init.normal_(tensor, mean=0.5, std=0.3)
    after = model.encode(images)
    assert any((before[n].maps[-1] - after[n].maps[-1]).abs().max() > 1e-5 for n in names)
    sum(after[name].maps[-1].square().sum() for name in names).backward()  # type: ignore[union-attr]
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_streams_of_other_numbers_of_groups_are_refused() -> None:
    backbone = backbone_of("dinov2")
    one = build_stem(backbone, {"a": 3}, [0.0] * 3, [1.0] * 3, groups=((1, 2), (3,)))
    two = build_stem(backbone, {"b": 3}, [0.0] * 3, [1.0] * 3)
    model = Plain(backbone, {"a": one, "b": two}, ADAPTERS["none"].attach(backbone, ("a", "b")))
    valid = torch.ones(1, 28, 28, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected one grid of all"):
        model.encode({name: Image(pictures(1, 3, 28, 28), valid) for name in "ab"})


def test_the_price_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    stem = build_stem(backbone_of("dinov2"), {"dear": 3}, [0.0] * 3, [1.0] * 3, groups=((1, 2), (3,)))
    tell_groups([stem, build_stem(backbone_of("dinov2"), {"cheap": 3}, [0.0] * 3, [1.0] * 3)])
    said = " ".join(capsys.readouterr().err.split())
    assert "data.modalities.dear.groups: the encoder gets 2 tokens of each patch instead of one" in said
    assert "cheap" not in said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of five bands, with labels of the first of three that they come from."""
    folder = tmp_path_factory.mktemp("groups")
    for split, numbers in (("train", range(3)), ("val", range(3, 5))):
        for number in numbers:
            image, labels = toy_scene(number, 64, 64)
            five = np.concatenate([image, image[:2]]).astype(np.float32)
            at = (500000 + 5000 * number, 5000000)
            write_raster(folder / split / "ms" / f"{number}.tif", five, origin=at)
            write_raster(folder / split / "labels" / f"{number}.tif", labels, origin=at)
    for name in ("dinov2", "sam"):
        save_encoder(folder / name, name)
    return folder


FIVE = [[5, 1], [2, 4], [3]]


def recipe_of(place: Path, output: Path, **changes: Any) -> Any:
    data = {
        "modalities": {"ms": {"groups": FIVE}},
        "scenes": {"ms": f"{place}/train/ms/*.tif"},
        "tile": 32,
        "samples_per_epoch": 6,
    }
    return pretrain_recipe(place, output, **{"data": data, **changes})


@pytest.mark.parametrize(("said", "own"), [("own", 3), (None, 3), ("same", None)])
@pytest.mark.pitfall("K13")
def test_the_recipe_says_whose_masks_they_are(place: Path, tmp_path: Path, said: str | None, own: int | None) -> None:
    mae = {"decoder": MAE_DECODER, **({} if said is None else {"groups": said})}
    recipe = recipe_of(place, tmp_path / "run", objectives={"mae": mae})
    masking = masking_of(recipe.objectives.mae, grouped("dinov2"), 32, ())  # type: ignore[arg-type]
    assert masking is not None
    assert masking.groups == own
    ungrouped = encoder_of(backbone_of("dinov2"), 3)
    assert masking_of(recipe.objectives.mae, ungrouped, 32, ()).groups is None  # type: ignore[union-attr]


def tuned(place: Path, output: Path, checkpoint: Path, **changes: Any) -> Any:
    content = recipe_dict(place, checkpoint, output)
    content["data"]["modalities"] = {"ms": {"groups": FIVE}}
    for split in ("train", "val"):
        content["data"][split] = {
            "ms": f"{place}/{split}/ms/*.tif", "labels": f"{place}/{split}/labels/*.tif"
        }  # fmt: skip
    del content["data"]["test"]
    content["train"]["epochs"] = 1
    content.update(changes)
    return content


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 2}, {"name": "full"}])
@pytest.mark.pitfall("P12")
def test_a_segmenter_with_groups_is_read_as_it_was_written(
    place: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    content = tuned(place, tmp_path / "run", place / "dinov2")
    content["train"]["unlabelled"] = {"mae": {"groups": "same", "decoder": MAE_DECODER}}
    content["model"]["adapter"] = adapter
    finetune(load_recipe(write_recipe(tmp_path / "r.yaml", content)))
    found = Segmenter.from_pretrained(tmp_path / "run" / "best")
    stem = found.model.reference
    assert stem.groups == ((4, 0), (1, 3), (2,))
    state = {n: t for n, t in found.model.head_state().items() if n.startswith("stems.of_ms.mix.")}
    assert sorted(state) == [
        "stems.of_ms.mix.codes", *(f"stems.of_ms.mix.kernels.{number}.weight" for number in range(3))
    ]  # fmt: skip
    trained = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["tensors"]
    there = dict(found.model.named_parameters())
    shared = {n: t for n, t in trained.items() if n.removeprefix("model.") in there}
    assert len(shared) > (30 if adapter["name"] == "full" else 3)
    assert all(torch.equal(there[n.removeprefix("model.")], t) for n, t in shared.items())
    fresh = build_stem(found.model.backbone, {"ms": 5}, [0.0] * 5, [1.0] * 5, groups=FIVE, seed=0)
    assert all(not torch.equal(fresh.state_dict()[n.removeprefix("stems.of_ms.")], t) for n, t in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"ms": {"groups": [[1, 2], [2, 3]]}}}, "must have each band that is read in one group"),
        ({"modalities": {"ms": {"bands": [1, 2, 3], "groups": [[1, 2], [4]]}}}, "by its number there: 1 to 3"),
        ({"modalities": {"ms": {"groups": [[1, 2, 3]]}}}, "groups"),
        ({"modalities": {"ms": {"groups": [[1, 2], [3, 4]]}}}, "expected each of the 5 bands in one group"),
    ],
)
def test_groups_have_each_band_once(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = {"scenes": {"ms": f"{place}/train/ms/*.tif"}, "tile": 32, "samples_per_epoch": 6, **changes}
    with pytest.raises(RecipeError) as caught:
        pretrain(recipe_of(place, tmp_path / "run", data=data))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"mae": {"mask": "spectral"}}}, "= 'spectral' hides parts of tokens"),
        ({"objectives": {"mae": {"mask": "incomplete"}}}, "= 'incomplete' hides parts of tokens"),
        ({"model": {"encoder": {"name": "sam", "checkpoint": "SAM"}}}, "blocks of sam attend in windows of one grid"),
        (
            {"model": {"encoder": {"name": "dinov2", "checkpoint": "DINO", "input": "widen"}}},
            "groups of bands are a way in; leave one out",
        ),
    ],
)
def test_what_does_not_go_with_groups_is_told(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for section in changes.get("model", {}).values():
        section["checkpoint"] = str(place / section["name"])
    with pytest.raises(RecipeError) as caught:
        pretrain(recipe_of(place, tmp_path / "run", **changes))
    assert message in str(caught.value)


def test_masks_of_groups_need_groups(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"objectives\.mae\.groups = 'own' is for data\.modalities\.NAME\.groups"):
        pretrain_recipe(place, tmp_path / "run", objectives={"mae": {"groups": "own"}})


def test_in_recipes_of_several_modalities(place: Path, tmp_path: Path) -> None:
    content = tuned(place, tmp_path / "run", place / "dinov2")
    content["data"]["modalities"]["other"] = {}
    for split in ("train", "val"):
        content["data"][split]["other"] = content["data"][split]["ms"]
    with pytest.raises(RecipeError, match="fusion stack makes one image of all"):
        load_recipe(write_recipe(tmp_path / "a.yaml", content))
    content["model"]["fusion"] = {"name": "linear"}
    with pytest.raises(RecipeError, match=r"ms has 3, other has 1 \(1: all bands together\)"):
        finetune(load_recipe(write_recipe(tmp_path / "b.yaml", content)))
    content["model"]["modalities"] = {"ms": {"encoder": {"name": "conv"}}}
    with pytest.raises(RecipeError, match="gives it a small encoder"):
        load_recipe(write_recipe(tmp_path / "c.yaml", content))
    content["model"]["modalities"] = {"ms": {"encoder": {"name": "dinov2", "checkpoint": str(place / "dinov2")}}}
    finetune(load_recipe(write_recipe(tmp_path / "d.yaml", content)))
    own = Segmenter.from_pretrained(tmp_path / "run" / "best").model.own_encoders["ms"]
    assert isinstance(own.stem, Stem)
    assert own.stem.groups == ((4, 0), (1, 3), (2,))


def pretrained(recipe: Any) -> Plain:
    """The encoder of a run as it was in the end."""
    model = build_encoder(recipe, open_unlabelled(recipe.data, statistics_of(recipe)).inputs)
    state = torch.load(recipe.output_dir / "state.pt", weights_only=True)["tensors"]
    own = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    learned = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert learned <= set(own)
    assert model.load_state_dict(own, strict=False).unexpected_keys == []
    return model.eval()


@torch.no_grad()
def maps(model: Plain, bands: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(5)
    images = {"ms": Image(pictures(2, bands, 40, 48), torch.ones(2, 40, 48, dtype=torch.bool))}
    return list(model.eval().encode(images)["ms"].maps)


@pytest.mark.parametrize("way", ["new", "lora"])
@pytest.mark.pitfall("K22", "C32")
def test_fine_tuning_begins_with_the_answers_of_what_was_pretrained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    layers = {"layers": [1, 3]} if way == "lora" else {}
    published = {"encoder": {"name": "dinov2", "checkpoint": str(place / "dinov2"), **layers}}
    changes: dict[str, Any] = {} if way == "new" else {"model": published | {"adapter": {"name": "lora", "rank": 2}}}
    recipe = recipe_of(place, tmp_path / "first", **changes)
    pretrain(recipe)
    before = pretrained(recipe)
    content = tuned(place, tmp_path / "then", tmp_path / "first" / "best")
    content["model"]["encoder"] |= layers
    capsys.readouterr()

    def begun(groups: Any, **modality: Any) -> Plain:
        content["data"]["modalities"] = {"ms": {**({"groups": groups} if groups else {}), **modality}}
        again = load_recipe(write_recipe(tmp_path / "r.yaml", content))
        return build_model(again, inputs_of(again, open_training(again)["train"]))

    found = begun(FIVE)
    for one, two in zip(maps(before), maps(found), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert "ms (5 bands) starts as it was pretrained in" in " ".join(capsys.readouterr().err.split())
    assert type(before.reference.mix) is type(found.reference.mix)
    # and other groups do not take these kernels for theirs
    other = begun([[5, 2], [1, 4], [3]])
    assert max(float((a - b).abs().max()) for a, b in zip(maps(before), maps(other), strict=True)) > 1e-3
    told = " ".join(capsys.readouterr().err.split())
    assert "starts untrained: it was pretrained with groups: [[5, 1], [2, 4], [3]] in" in told
    assert "and here with groups: [[5, 2], [1, 4], [3]]" in told
    begun(None, bands=[1, 2, 3])
    told = " ".join(capsys.readouterr().err.split())
    assert "ms enters by the kernel of red, green and blue, which was not trained in" in told
