"""The shape of the package, read from its syntax trees and files: layers, imports, names, sizes, nothing local."""

from __future__ import annotations

import ast
import configparser
import pkgutil
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vfmseg"
FILES = sorted(PACKAGE.rglob("*.py"))
# The order that must hold whatever else is added, lowest first.
BACKBONE = (
    "errors",
    "geo",
    "recipe",
    "encoders",
    "adapters",
    "model",
    "training",
    "checkpoint",
    "segmenter",
    "demo",
    "cli",
)


def read_levels() -> dict[str, int]:
    """The level of everything directly in vfmseg/, 0 the lowest, from the import linter's own list."""
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter", encoding="utf-8")
    lines = config["importlinter:contract:levels"]["layers"].strip().splitlines()
    return {name: level for level, line in enumerate(reversed(lines)) for name in re.findall(r"\w+", line)}


LEVEL = read_levels()


def module_name(path: Path) -> str:
    """`vfmseg.geo.grid` for `vfmseg/geo/grid.py`, `vfmseg.geo` for `vfmseg/geo/__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Every `a.b` of `import a.b`, and every `a.b.c` of `from a.b import c` (c may be a module or a name)."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """The part of a dotted name directly below vfmseg: `geo` for `vfmseg.geo.grid`; empty for vfmseg itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def top_level_names() -> list[str]:
    """What lies directly in vfmseg/ and can be imported."""
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    return sorted(folders | {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"})


@cache
def text_files() -> tuple[Path, ...]:
    """The text files of the project: what git tracks or would track; without git, what is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return tuple(path for path in files if b"\0" not in path.read_bytes()[:8192])


def test_rule1_every_top_level_module_has_a_level() -> None:
    assert [name for name in top_level_names() if name not in LEVEL] == []


def test_rule1_the_backbone_keeps_its_order() -> None:
    levels = [LEVEL[name] for name in BACKBONE]
    assert levels == sorted(set(levels))


def test_rule1_imports_point_down() -> None:
    upward = []
    for path in FILES:
        own = room(module_name(path))
        targets = {room(name) for name in imported(ast.walk(tree(path))) if name.split(".")[0] == "vfmseg"}
        inside = {name for name in targets if name in LEVEL and name != own}
        if own:  # vfmseg/__init__.py offers names of the top, lazily
            upward += [f"{module_name(path)} -> {name}" for name in inside if LEVEL[name] >= LEVEL[own]]
    assert upward == []


def test_rule1_no_import_cycles() -> None:
    modules = {module_name(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        names = list(imported(iter(tree(path).body)))  # those at the top of the file, which run on import
        hits = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module_name(path)] = hits & modules - {module_name(path)}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    assert order.index("vfmseg.errors") < order.index("vfmseg.model")


def test_rule6_recipes_rasters_and_catalog_know_no_torch() -> None:
    light = [path for path in FILES if room(module_name(path)) in {"errors", "catalog", "recipe", "geo", "files"}]
    heavy = {
        f"{module_name(path)}: {name}"
        for path in light
        for name in imported(ast.walk(tree(path)))
        if name.split(".")[0] in {"torch", "torchvision", "transformers", "peft", "accelerate"}
    }
    assert light
    assert heavy == set()


def test_rule14_imports_are_absolute() -> None:
    relative = [
        f"{module_name(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_rule14_no_file_beside_the_scripts_hides_another_module() -> None:
    # A script in vfmseg/ has that folder first on its import path, so a file there would replace the real module.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed = {module.name for module in pkgutil.iter_modules(folders)}
    taken = set(sys.stdlib_module_names) | installed - {"vfmseg"}
    assert {"queue", "numpy", "peft"} <= taken
    assert [name for name in top_level_names() if name in taken] == []


@pytest.mark.parametrize("script", ["finetune.py", "pretrain.py"])
def test_rule14_scripts_have_a_guard_and_no_classes(script: str) -> None:
    path = PACKAGE / script
    if not path.exists():
        pytest.skip(f"{script} is not there yet")
    tests = [ast.unparse(node.test) for node in tree(path).body if isinstance(node, ast.If)]
    assert "__name__ == '__main__'" in tests
    # A class of the file __main__ is not the class of the module vfmseg.finetune: pickles and isinstance would fail.
    assert [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)] == []


def test_files_stay_below_400_lines() -> None:
    sources = [*FILES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in sources
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_top_of_the_package_has_at_most_16_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 16


def test_the_longest_function_has_fewer_than_60_lines() -> None:
    long = [
        f"{module_name(path)}.{node.name}: {node.end_lineno - node.lineno + 1}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 >= 60
    ]
    assert long == []


def test_the_loop_knows_neither_recipes_nor_rasters() -> None:
    """Nor any model, objective, score or scene: new ones come without a change of the loop."""
    code = "import sys, vfmseg.training.loop; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    strangers = (
        "pydantic", "rasterio", "vfmseg.recipe", "vfmseg.build", "vfmseg.model", "vfmseg.encoders", "vfmseg.metrics",
        "vfmseg.data.dataset", "vfmseg.data.scene", "vfmseg.training.objectives",
    )  # fmt: skip
    assert "vfmseg.training.step" in found
    assert [name for name in strangers if name in found] == []


def test_no_utils() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "handler"}
    assert [path for path in FILES if path.stem in vague or path.parent.name in vague] == []


# Written in pieces, so that this file does not contain what it looks for.
HOME_FOLDERS = "|".join(("root/", "work/", "home/[a-z]", "Users/[A-Za-z]", "mnt/[a-z]", "opt/[a-z]"))
REGISTRIES = "|".join(("py" + r"pi\.org", "python" + "hosted", "ana" + r"conda\.org"))
LOCAL = {
    "a path of one machine": re.compile(rf"(?<![\w.~/:>)\]}}-])/(?:{HOME_FOLDERS})|\b[A-Z]:\\\\?Users"),
    "a package registry": re.compile(rf"\b(?:{REGISTRIES})"),
}


@pytest.mark.parametrize("kind", LOCAL)
def test_no_text_file_names(kind: str) -> None:
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if LOCAL[kind].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert text_files()
    assert found == []


@pytest.mark.parametrize(
    ("kind", "text", "hit"),
    [
        ("a path of one machine", "open('/" + "home/ann/data.tif')", True),
        ("a path of one machine", "C:\\" + "Users\\ann", True),
        ("a path of one machine", "see runs/" + "home/ann and example.org/" + "work/x", False),
        ("a package registry", "https://py" + "pi.org/simple", True),
        ("a package registry", "the registry of Python packages", False),
    ],
)
def test_the_patterns_find_what_they_are_for(kind: str, text: str, hit: bool) -> None:
    assert bool(LOCAL[kind].search(text)) is hit


def test_the_list_of_pitfalls_and_the_marks_of_the_tests_agree() -> None:
    listed = re.findall(
        r"^\| ([PCFK]\d+) \|", (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(listed) == len(set(listed))
    marks = [
        node
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.pitfall"
    ]
    marked = {str(ast.literal_eval(argument)) for mark in marks for argument in mark.args}
    assert sorted(set(listed) ^ marked) == []


def test_the_site_lists_each_page_once_and_every_link_leads_somewhere() -> None:
    listed = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 10
    assert [f"{page.name}: {link}" for page, link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["clip", "sam"])
def test_a_family_of_encoders_costs_a_file_a_line_and_its_row_of_the_catalog(name: str) -> None:
    """Whoever adds one touches no other place: recipes, statistics, the demo and reading know it by these."""
    places = {
        module_name(path)
        for path in FILES
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Constant) and node.value == name)
        or (isinstance(node, ast.ImportFrom) and node.module == f"vfmseg.encoders.{name}")
    }
    assert places == {"vfmseg.catalog", "vfmseg.encoders.build", f"vfmseg.encoders.{name}"}
    lines = (PACKAGE / "encoders" / "build.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if f'"{name}"' in line]) == 1
