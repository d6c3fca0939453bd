"""Recipes of strangers: a short text cannot mean much, and each ends in one message, soon."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from test_recipe_errors import SMALL, complaint

from vfmseg.catalog import published_statistics
from vfmseg.errors import CheckpointError, DataError, RecipeError, show
from vfmseg.geo.grid import Grid
from vfmseg.inference.plan import Plan
from vfmseg.inference.shards import PLAN, Parts, pieces_folder
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
    assert re.search(r"aliases .*10,000 values; write out", line)
    assert time.process_time() - started < 1


@pytest.mark.pitfall("F5")
def test_aliases_that_multiply_in_an_override_are_refused(tmp_path: Path) -> None:
    inner, last = "&a [x, x, x, x]", "*a"
    for number in range(20):
        inner, last = f"&b{number} [{inner}, {last}, {last}, {last}]", f"*b{number}"
    (line,) = complaint(tmp_path, f"name={inner}")
    assert re.search(r"aliases .*10,000 values; write out", line)


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
    assert re.search(rf"nested .*more than {DEEPEST} levels", line)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", ["- x\n", "- [a]\n", "x: {a: 1}\n"])
@pytest.mark.pitfall("F5")
def test_values_without_end_are_refused_before_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("vfmseg.recipe.text.MOST", 1000)  # of the hundred thousand, which take seconds
    (line,) = complaint(tmp_path, text=text * 1001)
    assert re.search(r"more than 1,000 values; .*pattern .*table", line)


@pytest.mark.pitfall("F5")
def test_key_path_of_thousands_of_parts_is_refused(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "a." * 3000 + "b=1")
    assert re.search(r"key\.path=value; .*train\.epochs=3$", line)


@pytest.mark.pitfall("F5")
def test_text_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(RecipeError, match=rf"r\.yaml: .*at most {LONGEST:,}"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(DataError, match=r"/dev/zero: .*device"):
        load_recipe("/dev/zero")


@pytest.mark.parametrize("value", ["!!int x", "!!bool x", '!!int ""', "!!float x", "!!null x"])
@pytest.mark.pitfall("F5")
def test_tag_before_other_text_is_one_message(tmp_path: Path, value: str) -> None:
    (line,) = complaint(tmp_path, text=f"name: {value}\n")
    assert "without a tag" in line


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
    assert re.search(r"\bmore\b.*\bfirst$", lines[-1])
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
    target = tmp_path / "labels.tif"
    pieces_folder(target).mkdir()
    (pieces_folder(target) / PLAN).write_text(content)
    parts = Parts(target, Plan(8, 8, 8, 0, False, 1), grid, {}, {})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: "):
        published_statistics("dinov2", str(tmp_path))
    with pytest.raises(DataError, match=r"preprocessor_config\.json: .*STAC"):
        scenes_of(str(file))
    with pytest.raises(DataError, match=r"preprocessor_config\.json: .*GeoJSON"):
        read_area(str(file), grid)
    with pytest.raises(DataError, match=r"plan\.json: .*--overwrite instead of --resume"):
        parts.prepare(resume=True, overwrite=False)
