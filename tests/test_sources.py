"""Several sources to learn from: how a recipe names them, which scenes they give, and which are drawn how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import sensor_content, sensor_recipe, two_sensors, write_recipe

from vfmseg.build.data import inputs_of, open_split, open_training
from vfmseg.build.training import sources_of
from vfmseg.data.scene import Scenes
from vfmseg.data.traces import Traces
from vfmseg.data.visits import Portion, Visits, shares_of
from vfmseg.data.windows import Draw, alike_together, epoch_draws, rank_batches
from vfmseg.errors import DataError, RecipeError
from vfmseg.finetune import finetune
from vfmseg.recipe import dump_recipe, load_recipe
from vfmseg.segmenter import Segmenter

FOLDERS = {
    "paired": {"a": "rgb sar", "d": "rgb sar"},
    "optical": {"a": "rgb", "b": "rgb", "c": "rgb"},
    "radar": {"e": "sar"},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Scenes with both sensors, with either, and to choose by; of two sources scenes have one name."""
    for folder, has in (*FOLDERS.items(), ("val", {"v": "rgb sar"}), ("test", {"t": "rgb sar"})):
        two_sensors(tmp_path, folder, has)
    return tmp_path


def source(place: Path, folder: str, *modalities: str, **more: Any) -> dict[str, Any]:
    return {name: f"{place}/{folder}/{name}/*.tif" for name in (*modalities, "labels")} | more


def three(place: Path, *weights: float | None) -> list[dict[str, Any]]:
    """Paired, optical and radar scenes as sources with these weights."""
    found = [source(place, "paired", "rgb", "sar"), source(place, "optical", "rgb"), source(place, "radar", "sar")]
    return [
        one if weight is None else {**one, "weight": weight}
        for one, weight in zip(found, weights or (None,) * 3, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------ recipe


def test_a_list_of_sources_stays_as_it_was_written(place: Path) -> None:
    recipe = sensor_recipe(place, data__train=three(place, 2, 1, None))
    sources = recipe.data.sources("train")
    assert list(sources) == ["train.0", "train.1", "train.2"]
    assert [one.weight for one in sources.values()] == [2, 1, None]
    assert [list(one.images) for one in sources.values()] == [["rgb", "sar"], ["rgb"], ["sar"]]
    (place / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(place / "again.yaml") == recipe
    assert "weight:" not in dump_recipe(sensor_recipe(place))
    assert list(recipe.data.sources("val")) == ["val"]
    assert sensor_recipe(place, data__test=None).data.sources("test") == {}


def test_a_list_of_one_source_is_resolved_as_a_list(place: Path) -> None:
    listed = sensor_recipe(place, data__train=three(place)[:1])
    assert list(listed.data.sources("train")) == ["train.0"]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], r"data\.train = \[\] must have 1 or more entries"),
        ([{"rgb": "a", "labels": f"l{i}"} for i in range(65)], r"data\.train = .* must have 64 entries at most"),
        ([3], r"data\.train\.0 = 3 must be a mapping \(keys: labels, weight\)"),
        ([{"rgb": "a", "labels": "l"}, {"rgb": 3, "labels": "m"}], r"data\.train\.1\.rgb = 3 must be a glob"),
        ([{"rgb": "a", "labels": "l", "weight": 0}], r"data\.train\.0\.weight = 0 must be above 0"),
        ([{"rgb": "a", "labels": "l", "weight": float("nan")}], r"data\.train\.0\.weight = .*nan"),
        ([{"rgb": "a", "labels": "l"}, {"rbg": "a", "labels": "m"}], r"data\.train\.1\.rbg is not one of .*'rgb'"),
        ([{"rgb": "a", "labels": "l"}, {"labels": "m"}], r"data\.train\.1 names no images"),
        (
            [{"rgb": "a", "labels": "l"}, {"table": "t.csv", "rgb": "x", "labels": "m"}],
            r"data\.train\.1\.split is miss",
        ),
    ],
)
@pytest.mark.pitfall("P62")
def test_a_wrong_source_of_a_list_is_one_line_that_names_it(place: Path, train: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        sensor_recipe(place, data__train=train)
    assert len(str(caught.value).splitlines()) == 1


def test_a_weight_that_is_weighed_against_nothing_is_told(place: Path) -> None:
    alone = source(place, "paired", "rgb", "sar", weight=2)
    for train, words in (
        (alone, r"data\.train\.weight is not used: there is only one source"),
        ([alone], r"data\.train\.0\.weight is not used: it shares draws with"),
        (three(place, None, None, 3), r"data\.train\.2\.weight is not used: it shares draws with"),
    ):
        with pytest.raises(RecipeError, match=words):
            sensor_recipe(place, data__train=train)
    with pytest.raises(RecipeError, match=r"data\.val\.weight is not used: only the sources of data\.train"):
        sensor_recipe(place, data__val=source(place, "val", "rgb", "sar", weight=1))


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_splits_are_single_sources(place: Path, split: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.{split} = .* must be one source; only data\.train may be a list"):
        sensor_recipe(place, **{f"data__{split}": three(place)})


def test_only_optional_modalities_may_be_left_out_of_a_source(place: Path) -> None:
    strict = {"rgb": {}, "sar": {"optional": True}}
    assert sensor_recipe(place, data__modalities=strict, data__train=three(place)[:2])
    with pytest.raises(RecipeError, match=r"data\.train\.2\.rgb is missing; say where"):
        sensor_recipe(place, data__modalities=strict, data__train=three(place))


@pytest.mark.pitfall("C24")
def test_a_leak_of_any_source_is_told(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.val names the same scenes as data\.train\.1 "):
        sensor_recipe(place, data__train=three(place), data__val=source(place, "optical", "rgb"))


# ------------------------------------------------------------------------------------------------------ scenes


def test_scenes_of_all_sources_are_opened_in_their_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, traces = sensor_recipe(place, data__train=three(place, 2, 1, 1)), Traces()
    scenes = open_training(recipe, traces)
    train = scenes["train"]
    assert train.per_source == (2, 3, 1)
    has = [" ".join(scene.bands()) for scene in train]
    assert (has, [scene.name for scene in train]) == (["rgb sar"] * 2 + ["rgb"] * 3 + ["sar"], list("adabce"))
    assert len([what for what in traces.found if "of data.train" in what]) == 2 * 3 + 3 * 2 + 2
    sources_of(recipe, train, inputs_of(recipe, train))
    told = " ".join(capsys.readouterr().err.split())
    assert "data.train: 5 of 6 scenes have rgb, which is optional" in told
    assert "data.train.0 has 2 scenes and 50.0% of the windows; data.train.1 has 3 scenes and 25.0%" in told


@pytest.mark.pitfall("C24")
def test_a_file_of_any_source_may_be_in_no_other_split(place: Path) -> None:
    listed = {**source(place, "optical", "rgb"), "labels": [f"{place}/optical/labels/{name}.tif" for name in "abc"]}
    recipe = sensor_recipe(place, data__train=three(place), data__val=listed)
    with pytest.raises(DataError, match=r"is in data\.train and in data\.val"):
        open_training(recipe)


def test_messages_of_files_name_the_source(place: Path) -> None:
    train = three(place)
    train[1]["rgb"] = f"{place}/optical/nowhere/*.tif"
    with pytest.raises(DataError, match=r"data\.train\.1\.rgb: the pattern .* matches no file"):
        open_split(sensor_recipe(place, data__train=train), "train")


def test_sources_of_several_kinds_are_one_split(place: Path) -> None:
    rows = [f"train,optical/rgb/{name}.tif,optical/labels/{name}.tif" for name in "abc"]
    (place / "t.csv").write_text("\n".join(["split,image,label", *rows]) + "\n")
    table = {"table": f"{place}/t.csv", "split": "train", "rgb": "image", "labels": "label"}
    scenes = open_split(sensor_recipe(place, data__train=[three(place)[0], table]), "train")
    assert scenes.per_source == (2, 3)
    assert [" ".join(scene.bands()) for scene in scenes] == ["rgb sar"] * 2 + ["rgb"] * 3


# ------------------------------------------------------------------------------------------------------ shares


def test_shares_by_weight_and_by_area() -> None:
    assert shares_of([10, 30, 60], [2, 1, 1]) == [0.5, 0.25, 0.25]
    assert shares_of([10, 30, 60], [None, 1, 2]) == pytest.approx([0.1, 0.3, 0.6])
    assert shares_of([10, 30, 60], [None, 2, 1]) == pytest.approx([0.1, 0.6, 0.3])
    assert shares_of([1, 1], [3e-5, 1e-5]) == pytest.approx([0.75, 0.25])


def drawn(visits: Visits, epoch: int) -> list[int]:
    return [visits.scene(Draw(epoch, i)) for i in range(len(visits))]


COUNTS = [4, 4, 1, 1, 1, 9]
"""Visits that cover each of six scenes."""


@pytest.mark.parametrize("length", [None, 7, 40, 101])
@pytest.mark.pitfall("P57")
def test_each_source_gets_its_share_of_every_epoch(length: int | None) -> None:
    """Exact but for rounding; over the epochs in proportion, also where that is less than one draw an epoch."""
    portions = [Portion(2, 1.0), Portion(3, 6.0), Portion(1, 0.25)]
    visits = Visits(COUNTS, 5, length, portions)
    assert len(visits) == (length or 20)
    sources, total = [0, 0, 1, 1, 1, 2], Counter[int]()
    epochs = 200
    for epoch in range(epochs):
        found = Counter(sources[scene] for scene in drawn(visits, epoch))
        for number, share in enumerate(visits.shares):
            assert abs(found[number] - share * len(visits)) < 1
        total += found
    for number, share in enumerate(visits.shares):
        assert total[number] == pytest.approx(share * len(visits) * epochs, rel=0.03)


def test_shares_that_come_out_even_are_exact_in_each_epoch() -> None:
    visits = Visits(COUNTS, 5, 30, [Portion(2, 0.1), Portion(3, 0.2), Portion(1, 0.3)])
    for epoch in range(50):
        found = drawn(visits, epoch)
        assert [sum(s in some for s in found) for some in ({0, 1}, {2, 3, 4}, {5})] == [5, 10, 15]


def test_inside_a_source_scenes_are_drawn_by_area_and_all_in_time() -> None:
    visits = Visits(COUNTS, 5, 60, [Portion(2, 1.0), Portion(4, 2.0)])  # 20 draws of 8 visits, 40 of 12
    found = Counter(drawn(visits, 0))
    assert {found[0], found[1]} <= {8, 9, 10, 11, 12}
    assert found[0] + found[1] == 20
    assert found[5] >= 3 * 9
    assert all(found[scene] in (3, 4) for scene in (2, 3, 4))
    few = Visits(COUNTS, 5, 4, [Portion(2, 1.0), Portion(4, 1.0)])
    assert {scene for epoch in range(60) for scene in drawn(few, epoch)} == set(range(6))


def test_sources_without_weights_are_drawn_as_one() -> None:
    """And so is a list with a single source: tests/test_same_state.py holds what that was."""
    plain = Visits(COUNTS, 3, 13)
    listed = Visits(COUNTS, 3, 13, [Portion(2), Portion(4)])
    assert [drawn(plain, e) for e in range(4)] == [drawn(listed, e) for e in range(4)]
    weighed = Visits(COUNTS, 3, 13, [Portion(2, 1.0), Portion(4, 1.0)])
    assert [drawn(plain, e) for e in range(4)] != [drawn(weighed, e) for e in range(4)]


def test_a_source_without_weight_keeps_the_share_of_its_area() -> None:
    visits = Visits(COUNTS, 3, 200, [Portion(2), Portion(3, 3.0), Portion(1, 1.0)])
    assert visits.shares == pytest.approx([0.4, 0.45, 0.15])  # 8 of 20 visits; the rest 3 to 1
    found = Counter(drawn(visits, 0))
    assert found[0] + found[1] == 80
    assert found[5] == 30


@pytest.mark.pitfall("P55", "P56")
def test_a_draw_is_of_the_same_scene_whatever_was_drawn_before() -> None:
    portions = [Portion(2, 1.0), Portion(3, 2.0), Portion(1, 1.5)]
    once, again = Visits(COUNTS, 7, 11, portions), Visits(COUNTS, 7, 11, portions)
    draws = [Draw(epoch, index) for epoch in range(5) for index in range(11)]
    expected = [once.scene(draw) for draw in draws]
    mixed = np.random.default_rng(0).permutation(len(draws))
    found = {int(i): again.scene(draws[i]) for i in mixed}
    assert [found[i] for i in range(len(draws))] == expected
    other = Visits(COUNTS, 8, 11, portions)
    assert [other.scene(draw) for draw in draws] != expected
    assert [expected[11 * e : 11 * e + 11] for e in range(5)].count(expected[:11]) < 5


# ----------------------------------------------------------------------------------------------------- batches


def kinds(batches: list[list[Draw]], kind: Any) -> list[set[str]]:
    return [{kind(draw) for draw in batch} for batch in batches]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.pitfall("P54", "P56")
def test_batches_are_of_one_kind_as_far_as_counts_allow(world: int) -> None:
    def kind(draw: Draw) -> str:
        return "ABC"[draw.index % 7 // 3]  # 3 of 7, 3 of 7, 1 of 7

    draws = epoch_draws(100, 100, 0, 2)
    ordered = alike_together(draws, 4, kind)
    assert sorted(ordered, key=lambda draw: draw.index) == sorted(draws, key=lambda draw: draw.index)
    every = [rank_batches(ordered, 4, rank, world) for rank in range(world)]
    taken = [batch for step in zip(*every, strict=True) for batch in step if not batch[0].filler]
    assert [draw for batch in taken for draw in batch] == ordered  # whatever the number of processes
    mixed = [i for i, found in enumerate(kinds(taken, kind)) if len(found) > 1]
    assert len(mixed) <= 2  # of three kinds less than a batch each is left
    assert all(i >= len(taken) - 3 for i in mixed)
    assert len({next(iter(found)) for found in kinds(taken, kind)[:6]}) > 1  # they take turns over the epoch


def test_one_kind_alone_keeps_its_order() -> None:
    draws = epoch_draws(30, 17, 0, 1)
    assert alike_together(draws, 4, lambda draw: "same") == draws


def test_windows_know_the_modalities_of_a_draw_without_reading_it(place: Path) -> None:
    recipe = sensor_recipe(place, data__train=three(place, 1, 1, 1))
    scenes = open_training(recipe)["train"]
    windows = sources_of(recipe, scenes, inputs_of(recipe, scenes))["train"]
    for index in range(len(windows)):
        sample = windows[Draw(0, index)]
        assert windows.kind(Draw(0, index)) == tuple(n for n, i in sample.images.items() if bool(i.valid.any()))
    assert len({windows.kind(Draw(0, index)) for index in range(len(windows))}) == 3


# ------------------------------------------------------------------------------------------------------ scores


def test_a_segmenter_is_scored_on_all_sources_of_the_training(place: Path) -> None:
    recipe = sensor_recipe(place, data__train=three(place), train__epochs=1)
    finetune(recipe)
    segmenter = Segmenter.from_pretrained(recipe.output_dir / "last", device="cpu")
    assert segmenter.evaluate(recipe, "train")["scenes"] == 6
    assert isinstance(open_split(recipe, "val"), Scenes)


def test_recipe_content_is_a_list_in_yaml(place: Path) -> None:
    content = sensor_content(place, data__train=three(place, 2, 1, 1))
    recipe = load_recipe(write_recipe(place / "r.yaml", content), ["train.epochs=3"])
    assert len(recipe.data.sources("train")) == 3


def test_an_override_reaches_into_the_list(place: Path) -> None:
    path = write_recipe(place / "r.yaml", sensor_content(place, data__train=three(place, 2, 1, 1)))
    recipe = load_recipe(path, ["data.train.1.weight=5", "data.train.2.weight=0.5"])
    assert [one.weight for one in recipe.data.sources("train").values()] == [2, 5, 0.5]
    for wrong in ("data.train.3.weight=1", "data.train.weight=1", "data.train.-1.weight=1"):
        with pytest.raises(RecipeError, match=r"data\.train = .* has no keys below it; write data\.train="):
            load_recipe(path, [wrong])
    with pytest.raises(RecipeError, match=r"r\.yaml, data\.train\.1\.weight=no: data\.train\.1\.weight = 'no' must be"):
        load_recipe(path, ["data.train.1.weight=no"])
