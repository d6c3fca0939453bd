"""Recipes of strangers: a short text cannot mean much, and each ends in one message, soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_recipe_errors import SMALL, complaint

from vfmseg.catalog import published_statistics
from vfmseg.errors import CheckpointError, DataError, RecipeError, show
from vfmseg.geo.grid import Grid
from vfmseg.inference.shards import _plan_in
from vfmseg.inference.worklist import scenes_of
from vfmseg.recipe import load_recipe
from vfmseg.recipe.text import DEEPEST, LONGEST, read_yaml
from vfmseg.vector.area import read_area

LEVELS = 12  # ten to the power of it: what the aliases below stand for
LISTS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, LEVELS))
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, LEVELS)
)
CHAIN = "".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}]\n" for i in range(1000))


def below(key: str, text: str) -> str:
    return SMALL.replace(f"{key}: flood\n", f"{key}:\n" + "".join(f"  {line}\n" for line in text.splitlines()))


@pytest.mark.parametrize(
    "text",
    [
        LISTS + SMALL,
        MERGED + SMALL,
        CHAIN + SMALL,
        below("name", LISTS),
        below("name", MERGED),
        "".join(f"- {line.partition(': ')[2]}\n" for line in LISTS.splitlines()),
        "".join(f"? {line.partition(': ')[2]}\n: 1\n" for line in LISTS.splitlines()),
    ],
)
@pytest.mark.pitfall("F5")
def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    (line,) = complaint(tmp_path, text=text)
    assert "aliases (*name) repeat more than 10,000 values; write out what is needed" in line
    assert time.process_time() - started < 1


@pytest.mark.pitfall("F5")
def test_aliases_that_multiply_in_an_override_are_refused(tmp_path: Path) -> None:
    inner, last = "&a [x, x, x, x]", "*a"
    for number in range(20):
        inner, last = f"&b{number} [{inner}, {last}, {last}, {last}]", f"*b{number}"
    (line,) = complaint(tmp_path, f"name={inner}")
    assert "aliases (*name) repeat more than 10,000 values" in line


@pytest.mark.pitfall("F5")
def test_ordinary_anchors_and_merge_keys_are_what_they_were(tmp_path: Path) -> None:
    text = "- &file {labels: a, optical: [b, c]}\n- <<: *file\n  labels: d\n- [*file, *file]\n"
    first = {"labels": "a", "optical": ["b", "c"]}
    assert read_yaml(text, "x") == [first, {**first, "labels": "d"}, [first, first]]
    rows = "&row [" + "1, " * 400 + "2]"
    assert len(read_yaml(f"[{rows}, {', '.join(['*row'] * 20)}]", "x")) == 21


@pytest.mark.parametrize("text", ["[" * 200_000, "{a: " * 5000, "- " * 5000, "? " * 5000, "[" * 40 + "]" * 40])
@pytest.mark.pitfall("F5")
def test_what_is_nested_deeply_is_refused_at_once(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    (line,) = complaint(tmp_path, text=text)
    assert f"nested too deeply to be a recipe (more than {DEEPEST} levels)" in line
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", ["- x\n", "- [a]\n", "x: {a: 1}\n"])
@pytest.mark.pitfall("F5")
def test_values_without_end_are_refused_before_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("vfmseg.recipe.text.MOST", 1000)  # of the hundred thousand, which take seconds
    (line,) = complaint(tmp_path, text=text * 1001)
    assert "holds more than 1,000 values; list files by a pattern or in a table" in line


@pytest.mark.pitfall("F5")
def test_key_path_of_thousands_of_parts_is_refused(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "a." * 3000 + "b=1")
    assert line.endswith("is not key.path=value; write for example train.epochs=3")


@pytest.mark.pitfall("F5")
def test_text_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(RecipeError, match=f"expected a recipe of at most {LONGEST:,}"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(DataError, match="is a device, no regular file"):
        load_recipe("/dev/zero")


@pytest.mark.parametrize("value", ["!!int x", "!!bool x", '!!int ""', "!!float x", "!!null x"])
@pytest.mark.pitfall("F5")
def test_tag_before_other_text_is_one_message(tmp_path: Path, value: str) -> None:
    (line,) = complaint(tmp_path, text=f"name: {value}\n")
    assert line.endswith("write the value without a tag")


@pytest.mark.parametrize("value", ["!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!map x", "<<"])
@pytest.mark.pitfall("F5")
def test_foreign_tag_is_one_message(tmp_path: Path, value: str) -> None:
    (line,) = complaint(tmp_path, text=f"name: {value}\n")
    assert "YAML" in line or "column 7" in line


@pytest.mark.pitfall("F5")
def test_huge_value_is_shown_without_being_written_out() -> None:
    value: object = "x"
    for _ in range(60):
        value = [value, {"k": value}]  # 2 to the power of 60 values, in 120 lists and mappings
    text = show(value)
    assert len(text) == 60
    assert text.startswith("[[[[")
    assert text.endswith("...")


@pytest.mark.pitfall("F5")
def test_of_many_findings_the_first_are_told(tmp_path: Path) -> None:
    started = time.process_time()
    lines = complaint(tmp_path, text=SMALL + "".join(f"key{i}: 1\n" for i in range(3000)))
    assert len(lines) == 21
    assert lines[-1] == "and more like these; mend them first"
    classes = ", ".join(f"{i}: c{i}" for i in range(3000))
    (line,) = complaint(tmp_path, text=SMALL.replace("0: land, 1: water", classes))
    assert len(line) < 200
    assert time.process_time() - started < 5


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a": ' * 200_000, '{"features": ' + "[" * 200_000, "9" * 5000])
@pytest.mark.pitfall("F5")
def test_json_nested_without_end_is_one_message(tmp_path: Path, content: str) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(content)
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 8, 8)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: not understood"):
        published_statistics("dinov2", str(tmp_path))
    with pytest.raises(DataError, match="is not a STAC item"):
        scenes_of(str(file))
    with pytest.raises(DataError, match="is not GeoJSON"):
        read_area(str(file), grid)
    with pytest.raises(DataError, match="is damaged"):
        _plan_in(file)
