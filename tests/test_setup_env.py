"""The set-up script: refuses old Pythons, finds a way to an environment, installs once, stops at the first failure."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "setup_env.py"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and shell scripts of POSIX")


@pytest.fixture
def script() -> ModuleType:
    """The script as a module, so that nothing is shared between tests."""
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a project file, its name with a space as on many machines."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n", encoding="utf-8")
    (folder / ".venv").mkdir()
    return folder


class Calls(list[list[str]]):
    """Stands for `run`: notes every command and answers with the given exit codes, then 0."""

    def __init__(self, *codes: int) -> None:
        super().__init__()
        self.codes = list(codes)

    def __call__(self, command: list[str], folder: Path) -> int:
        self.append(command)
        return self.codes.pop(0) if self.codes else 0


@pytest.mark.parametrize(
    ("version", "refused"), [((3, 9, 18), True), ((2, 7, 18), True), ((3, 10, 0), False), ((4, 0, 0), False)]
)
def test_old_python_is_refused(script: ModuleType, version: tuple[int, ...], refused: bool) -> None:
    line = script.too_old(version)
    assert (line is not None) is refused
    if line:
        assert ".".join(map(str, version)) in line
        assert "3.10" in line
        assert "\n" not in line


def test_old_python_is_told_of_a_newer_one(script: ModuleType) -> None:
    assert "python3.12 setup_env.py" in script.too_old((3, 8, 1), "python3.12")


def test_minimum_is_that_of_the_project(script: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={script.MINIMUM[0]}.{script.MINIMUM[1]}"' in text


def test_old_python_gets_as_far_as_the_refusal() -> None:
    # Python 3.6 must be able to read the file: nothing newer in its grammar, no annotation that fails when evaluated.
    source = SCRIPT.read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert futures == []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    notes = [a.annotation for f in functions for a in f.args.args] + [f.returns for f in functions]
    composed = [ast.unparse(note) for note in notes if isinstance(note, ast.Subscript | ast.BinOp)]
    assert functions
    assert composed == []


def test_script_needs_the_standard_library_only() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == set()


def test_programs_of_an_environment(script: ModuleType) -> None:
    assert script.tool(Path("e"), "python", windows=False) == Path("e/bin/python")
    assert script.tool(Path("e"), "python", windows=True) == Path("e/Scripts/python.exe")


def test_settings_that_lead_elsewhere_do_not_reach_the_installer(script: ModuleType) -> None:
    given = {"PIP_TARGET": "t", "PIP_USER": "1", "PYTHONPATH": "p", "PIP_INDEX_URL": "mirror", "PATH": "x"}
    clean = script.clean_environment(given)
    assert clean["PIP_USER"] == "0"
    assert {"PIP_TARGET", "PYTHONPATH"}.isdisjoint(clean)
    assert (clean["PIP_INDEX_URL"], clean["PATH"]) == ("mirror", "x")
    assert given["PIP_USER"] == "1"  # the caller's own stay as they are


@posix
def test_run_passes_the_exit_code_on(script: ModuleType, tmp_path: Path) -> None:
    assert script.run([sys.executable, "-c", "raise SystemExit(7)"], tmp_path) == 7
    assert script.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path) == 137


@pytest.mark.parametrize(
    ("modules", "programs", "pip", "expected"),
    [
        ({"venv", "ensurepip"}, set(), True, ["-m venv", "--without-pip"]),
        ({"venv"}, set(), True, ["--without-pip"]),  # Debian without python3-venv, but with pip
        ({"venv", "virtualenv"}, set(), False, ["-m virtualenv"]),
        ({"venv"}, {"uv", "virtualenv"}, False, ["virtualenv --python", "uv venv --python"]),
        ({"venv"}, set(), False, []),
    ],
)
def test_ways_to_an_environment(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    modules: set[str],
    programs: set[str],
    pip: bool,
    expected: list[str],
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: "yes" if name in modules else None)
    monkeypatch.setattr(script.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(script, "host_pip", lambda: pip)
    ways = [" ".join(way) for way in script.ways_to_create(Path("e"))]
    assert len(ways) == len(expected)
    assert all(part in way and way.endswith(" e") for part, way in zip(expected, ways, strict=True))


def test_no_way_to_an_environment_names_the_package(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "ways_to_create", lambda venv: [])
    with pytest.raises(script.SetupError, match=r"ensurepip.*apt install python3\.\d+-venv"):
        script.create(tmp_path / ".venv", tmp_path)


def test_a_failed_way_leaves_nothing_and_the_next_is_tried(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    venv, tried = tmp_path / ".venv", []

    def run(command: list[str], folder: Path) -> int:
        assert not venv.exists()
        venv.mkdir()
        tried.append(command)
        return 1 if command == ["first"] else 0

    monkeypatch.setattr(script, "ways_to_create", lambda venv: [["first"], ["second"], ["third"]])
    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "usable", lambda venv: True)
    script.create(venv, tmp_path)
    assert tried == [["first"], ["second"]]


def test_a_folder_that_is_no_environment_is_left_alone(script: ModuleType, project: Path) -> None:
    (project / ".venv" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(script.SetupError, match="not a virtual environment"):
        script.create(project / ".venv", project)
    assert (project / ".venv" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_a_broken_environment_is_made_anew(script: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    venv = project / ".venv"
    (venv / "pyvenv.cfg").write_text("home = nowhere", encoding="utf-8")
    assert not script.usable(venv)
    script.create(venv, project)
    assert script.usable(venv)
    assert script.answers(
        [str(script.tool(venv, "python")), "-c", "import sys; sys.exit(sys.prefix == sys.base_prefix)"]
    )


@posix
def test_the_interpreter_of_the_machine_is_no_environment(script: ModuleType, project: Path) -> None:
    python = script.tool(project / ".venv", "python")
    python.parent.mkdir()
    base = Path(sys.base_prefix, "bin", "python3")
    python.write_text(f'#!/bin/sh\nexec "{base}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    assert not script.usable(project / ".venv")


@pytest.mark.parametrize(
    ("have", "want", "enough"),
    [("", "", True), ("test", "", True), ("test", "test", True), ("", "test", False)],
)
def test_stamp_covers(script: ModuleType, project: Path, have: str, want: str, enough: bool) -> None:
    stamp = project / ".venv" / script.STAMP
    stamp.write_text(json.dumps(script.wanted(project, have)), encoding="utf-8")
    assert script.installed(stamp, script.wanted(project, want)) is enough


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}"])
def test_damaged_stamp_means_install_again(script: ModuleType, project: Path, content: str) -> None:
    stamp = project / ".venv" / script.STAMP
    stamp.write_text(content, encoding="utf-8")
    assert script.installed(stamp, script.wanted(project, "")) is False


def test_install_once_then_again_when_the_project_file_changes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    calls = Calls()
    monkeypatch.setattr(script, "run", calls)
    monkeypatch.setattr(script, "installer", lambda venv: ["pip", "install"])
    venv = project / ".venv"
    assert script.install(project, venv, "test") == 0
    assert calls == [["pip", "install", "--editable", f"{project}[test]"]]
    assert script.install(project, venv, "test") == 0
    assert script.install(project, venv, "") == 0
    assert len(calls) == 1
    (project / "pyproject.toml").write_text("[project]\nname = 'y'\n", encoding="utf-8")
    assert script.install(project, venv, "") == 0
    assert calls[1:] == [["pip", "install", "--editable", str(project)]]


def test_moved_project_is_installed_again(script: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    calls = Calls()
    monkeypatch.setattr(script, "run", calls)
    monkeypatch.setattr(script, "installer", lambda venv: ["pip", "install"])
    script.install(project, project / ".venv", "")
    moved = project.rename(project.with_name("moved"))
    script.install(moved, moved / ".venv", "")
    assert [call[-1] for call in calls] == [str(project), str(moved)]


def test_failed_install_does_not_look_complete(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    venv = project / ".venv"
    (venv / script.STAMP).write_text(json.dumps(script.wanted(project, "")), encoding="utf-8")
    monkeypatch.setattr(script, "run", Calls(1))
    monkeypatch.setattr(script, "installer", lambda venv: ["pip", "install"])
    assert script.install(project, venv, "test") == 1
    assert not (venv / script.STAMP).exists()


def test_environment_without_pip_is_filled_from_outside(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    inner = str(script.tool(project / ".venv", "python"))
    monkeypatch.setattr(script, "answers", lambda command: command[0] != inner)
    assert script.installer(project / ".venv") == [sys.executable, "-m", "pip", "--python", inner, "install"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ([], True),
        (["-k", "geo"], True),
        (["-n", "2"], False),
        (["-n2"], False),
        (["--numprocesses=0"], False),
        (["-p", "no:xdist"], False),
        (["--pdb"], False),
    ],
)
def test_callers_choice_of_test_processes_holds(script: ModuleType, given: list[str], chosen: bool) -> None:
    extra = script.workers(given)
    assert bool(extra) is chosen
    assert not chosen or (extra[0] == "-n" and 1 <= int(extra[1]) <= 4)


def test_steps_of_test(script: ModuleType) -> None:
    plan = script.steps("test", Path("e"), ["-n", "2", "-k", "geo"])
    assert [name for name, _ in plan] == ["ruff", "lint-imports", "mypy", "pytest"]
    assert plan[-1][1][-4:] == ["-n", "2", "-k", "geo"]
    assert all("geo" not in command for _, command in plan[:-1])
    assert all(Path(command[0]).parts[0] == "e" for _, command in plan)  # never a program of the machine


def test_steps_of_demo(script: ModuleType) -> None:
    ((_, command),) = script.steps("demo", Path("e"), ["--output", "out"])
    assert command == [str(script.tool(Path("e"), "vfmseg")), "demo", "--output", "out"]


def test_steps_stop_at_the_first_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls(0, 5)
    monkeypatch.setattr(script, "run", calls)
    assert script.run_steps([("a", ["x"]), ("b", ["y"]), ("c", ["z"])], tmp_path) == 5
    assert calls == [["x"], ["y"]]
    said = capsys.readouterr().out
    assert "[1/3] a: done" in said
    assert "[2/3] b: FAILED with exit code 5" in said


@pytest.mark.parametrize(
    ("arguments", "code", "stream"), [([], 2, "stderr"), (["tset"], 2, "stderr"), (["--help"], 0, "stdout")]
)
def test_wrong_arguments_show_the_two_commands(arguments: list[str], code: int, stream: str) -> None:
    ran = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    shown = {"stdout": ran.stdout, "stderr": ran.stderr}
    assert ran.returncode == code
    assert "setup_env.py demo" in shown[stream]
    assert "setup_env.py test" in shown[stream]


@pytest.mark.parametrize(("verb", "extra"), [("demo", ""), ("test", "test")])
@pytest.mark.parametrize(("install", "steps", "code"), [(0, 0, 0), (0, 5, 5), (1, 0, 3)])
def test_main_installs_what_the_verb_needs_and_passes_the_exit_code_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, verb: str, extra: str, install: int, steps: int, code: int
) -> None:
    done: list[object] = []

    def fake_install(folder: Path, venv: Path, extra: str) -> int:
        done.append((venv, extra))
        return install

    def fake_steps(plan: list[tuple[str, list[str]]], folder: Path) -> int:
        done.append(plan[-1][1][-1])
        return steps

    monkeypatch.setattr(script, "usable", lambda venv: True)  # a good .venv is used as it is: `create` is not called
    monkeypatch.setattr(script, "create", lambda venv, folder: pytest.fail("made anew"))
    monkeypatch.setattr(script, "install", fake_install)
    monkeypatch.setattr(script, "run_steps", fake_steps)
    assert script.main([verb, "--last"]) == code
    assert done == [(ROOT / ".venv", extra), *(["--last"] if install == 0 else [])]
