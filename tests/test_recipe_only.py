"""`data.only`: the recipe of some modalities is the one that somebody would have written for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vfmseg.errors import RecipeError
from vfmseg.recipe import dump_recipe, parse_recipe

BASE: dict[str, Any] = {
    "name": "only",
    "data": {
        "classes": {0: "land", 1: "water"},
        "modalities": {"rgb": {"bands": [1, 2, 3]}, "sar": {"optional": True}, "dem": {"optional": True}},
        "train": [
            {"rgb": "a/rgb/*.tif", "sar": "a/sar/*.tif", "dem": "a/dem/*.tif", "labels": "a/labels/*.tif"},
            {"sar": "b/sar/*.tif", "labels": "b/labels/*.tif", "rgb": "b/rgb/*.tif"},
        ],
        "val": {"rgb": "v/rgb/*.tif", "sar": "v/sar/*.tif", "labels": "v/labels/*.tif"},
    },
    "model": {
        "encoder": {"name": "dinov2", "checkpoint": "facebook/dinov2-small"},
        "modalities": {"sar": {"encoder": {"name": "clip", "checkpoint": "a/clip"}, "adapter": {"name": "lora"}}},
        "fusion": {"name": "gated", "coregister": {"max_shift": 4, "modalities": ["sar", "dem"]}},
        "decoder": {"name": "fpn", "channels": 16},
    },
    "train": {
        "modality_dropout": {"sar": 0.3, "dem": 0.2},
        "distill": 0.5,
        "augment": {"radiometry": {"rgb": {"brightness": 0.1}, "sar": {"brightness": 0.1}}},
    },
    "output_dir": "run",
}


def parsed(data: dict[str, Any], **sections: Any) -> str:
    return dump_recipe(parse_recipe(BASE | sections | {"data": BASE["data"] | data}, Path("/"), "r.yaml"))


def test_two_of_three() -> None:
    train, val = BASE["data"]["train"], BASE["data"]["val"]
    by_hand = parsed(
        {
            "modalities": {"rgb": {"bands": [1, 2, 3]}, "sar": {"optional": True}},
            "train": [{key: value for key, value in one.items() if key != "dem"} for one in train],
            "val": val,
        },
        model=BASE["model"] | {"fusion": {"name": "gated", "coregister": {"max_shift": 4, "modalities": ["sar"]}}},
        train=BASE["train"] | {"modality_dropout": {"sar": 0.3}},
    )
    assert parsed({"only": ["sar", "rgb"]}) == by_hand  # in the order of data.modalities
    assert parsed({"only": ["rgb", "sar", "dem"]}) == parsed({})
    assert "only:" not in by_hand


def test_a_single_one_has_no_fusion_and_nothing_that_may_be_missing() -> None:
    files = {"train": [{"dem": "a/dem/*.tif", "labels": "a/labels/*.tif"}]}
    model = {key: value for key, value in BASE["model"].items() if key not in ("fusion", "modalities")}
    by_hand = parsed({"modalities": {"dem": {}}, "val": None} | files, model=model, train={})
    assert parsed({"only": ["dem"], "val": None}) == by_hand  # the second source has no dem, and is left out
    assert parsed({"only": "dem", "val": None}) == by_hand


def test_an_encoder_of_its_own_becomes_the_encoder() -> None:
    own = BASE["model"]["modalities"]["sar"]
    by_hand = parsed(
        {
            "modalities": {"sar": {}},
            "train": [{key: one[key] for key in ("sar", "labels")} for one in BASE["data"]["train"]],
            "val": {key: BASE["data"]["val"][key] for key in ("sar", "labels")},
        },
        model={**own, "decoder": BASE["model"]["decoder"]},
        train={"augment": {"radiometry": {"sar": {"brightness": 0.1}}}},
    )
    assert parsed({"only": ["sar"]}) == by_hand


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["rbg"], "data.only = 'rbg' is not one of data.modalities; did you mean 'rgb'"),
        ([], "data.only = [] must be a list of some of data.modalities"),
        (3, "data.only = 3 must be a list"),
        ([1], "data.only = [1] must be a list"),
        (["dem"], "data.val"),  # whose scenes have no dem
    ],
)
def test_what_does_not_fit_is_told(only: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed({"only": only})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"only": ["dem"], "val": None, "train": BASE["data"]["train"][1:]}, {}, "data.train = [] must have 1 or more"),
        ({"only": ["rgb"]}, {"encoder": {"name": "dinov2"}}, "model.encoder.checkpoint is missing"),
    ],
)
def test_messages_are_about_the_recipe_that_is_left(data: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(data, model=BASE["model"] | model)
    assert message in str(caught.value)


def test_what_named_only_those_that_are_gone_goes_too() -> None:
    train = {"modality_dropout": {"dem": 0.2}, "distill": 0.5}
    moved = BASE["model"] | {"fusion": {"name": "gated", "coregister": {"max_shift": 4, "modalities": ["dem"]}}}
    by_hand = parsed({"only": ["rgb", "sar"]}, model=BASE["model"] | {"fusion": {"name": "gated"}}, train={})
    assert parsed({"only": ["rgb", "sar"]}, model=moved, train=train) == by_hand


def test_the_first_that_is_left_is_not_moved_onto_itself() -> None:
    kept = BASE["model"] | {"fusion": {"name": "gated", "coregister": {"max_shift": 4, "modalities": ["dem"]}}}
    files = {"val": None, "only": ["sar", "dem"]}
    assert parsed(files) == parsed(files, model=kept)


def test_a_source_is_left_out_for_what_is_gone_and_never_for_a_misspelt_name() -> None:
    with pytest.raises(RecipeError, match=r"train\.1\.rbg is not one of data.modalities"):
        parsed({"only": ["rgb"], "train": [{"rgb": "a", "labels": "l"}, {"rbg": "b", "labels": "m"}]})


def test_the_weight_of_the_only_one_left_that_has_one_goes_too() -> None:
    pairs = [{"rgb": "a", "labels": "l"}, {"rgb": "b", "labels": "m"}]
    weighed = [pairs[0] | {"weight": 2}, pairs[1], {"sar": "c", "labels": "n", "weight": 1}]
    assert parsed({"only": ["rgb"], "train": weighed}) == parsed({"only": ["rgb"], "train": pairs})
    with pytest.raises(RecipeError, match=r"train.0.weight is not used"):  # as without data.only
        parsed({"only": ["rgb"], "train": [weighed[0], pairs[1]]})


@pytest.mark.parametrize(
    ("shared", "own", "learns"),
    [("full", {}, "none"), ("mm_lora", {}, "none"), ("lora", {}, "lora"), ("none", {"adapter": None}, "none")],
)
def test_an_own_encoder_learns_alone_what_it_learned_among_others(
    shared: str, own: dict[str, Any], learns: str
) -> None:
    section = {"encoder": {"name": "clip", "checkpoint": "a/clip"}} | own
    model = BASE["model"] | {"adapter": {"name": shared}, "modalities": {"sar": section}}
    train = [{"rgb": "a", "dem": "d", "sar": "s", "labels": "l"}]
    data = BASE["data"] | {"train": train}
    among = parse_recipe(BASE | {"data": data, "model": model}, Path("/"), "r.yaml")
    alone = parse_recipe(BASE | {"data": data | {"only": ["sar"]}, "model": model}, Path("/"), "r.yaml")
    assert among.model.adapter_of("sar").name == alone.model.adapter.name == learns


@pytest.mark.parametrize(
    ("adapter", "alone"),
    [
        ({"name": "mm_lora"}, {"name": "lora", "rank": 4, "alpha": 4, "targets": ["q", "v", "mlp"]}),
        (
            {"name": "mm_lora", "rank": 2, "alpha": 6, "mix": False},
            {"name": "lora", "rank": 2, "alpha": 6, "targets": ["q", "v", "mlp"]},
        ),
        ({"name": "mm_adapter", "ratio": 0.5}, {"name": "adapter"}),
        ({"name": "lora", "rank": 3}, {"name": "lora", "rank": 3}),
    ],
)
def test_an_adapter_of_several_becomes_that_of_one(adapter: dict[str, Any], alone: dict[str, Any]) -> None:
    """Where one modality goes through the encoder, alone or beside one with an encoder of its own."""
    model = BASE["model"] | {"adapter": adapter, "fusion": {"name": "gated"}}
    whole = {"only": ["rgb"], "val": None}
    assert parsed(whole, model=model) == parsed(whole, model=model | {"adapter": alone})
    beside = {"only": ["rgb", "sar"], "val": None}
    assert parsed(beside, model=model) == parsed(beside, model=model | {"adapter": alone})


def test_alone_a_modality_with_a_small_encoder_goes_through_that_of_all() -> None:
    model = BASE["model"] | {"modalities": {"dem": {"encoder": {"name": "conv"}}}, "fusion": {"name": "gated"}}
    plain = {key: value for key, value in model.items() if key != "modalities"}
    assert parsed({"only": ["dem"], "val": None}, model=model) == parsed({"only": ["dem"], "val": None}, model=plain)
