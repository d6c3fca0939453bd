"""Displays that cannot be written to: the work goes on and ends with its own exit code."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from makers import recipe_dict, write_recipe

from vfmseg.progress import LabelProgress, SceneProgress, TrainingProgress
from vfmseg.terminal import complain, on_terminal, say

TALKS = """
import logging, os, sys, warnings
from vfmseg.errors import RecipeError
from vfmseg.terminal import deliver, guarded, keep_displays, say, complain

keep_displays()
output = sys.argv[1]

def verb():
    say("hello")
    print("a library's remark")
    warnings.warn("a library's warning")
    logging.getLogger("library").error("its log")
    os.system("echo a program >&2")
    with open(output, "w") as file:
        say("more" * 20000)
        file.write(str(file.fileno()))
    complain("at last")
    if sys.argv[2] == "2":
        raise RecipeError("wrong")
    deliver("the result of 中国\\n")

sys.exit(guarded(verb))
"""


def talk(output: Path, ends: str, words: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program above by a shell, which redirects its streams."""
    command = [sys.executable, "-c", TALKS, str(output), ends]
    line = ["sh", "-c", f'exec "$@" {words}', "sh", *command]
    return subprocess.run(line, capture_output=True, check=False, timeout=60)


def broken_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("ends", ["0", "2"])
@pytest.mark.parametrize("words", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.pitfall("F10")
def test_a_display_that_cannot_be_written_to_is_dropped(tmp_path: Path, words: str, ends: str) -> None:
    done = talk(tmp_path / "work", ends, words)
    assert done.returncode == int(ends)
    assert int((tmp_path / "work").read_text()) > 2  # what a library writes to stderr by its number is not in our file
    if words.startswith("2") and ends == "0":
        assert done.stdout == "a library's remark\nthe result of 中国\n".encode()
    assert done.stderr == b""


@pytest.mark.parametrize("ends", ["0", "2"])
@pytest.mark.pitfall("F10")
def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path, ends: str) -> None:
    pipe = broken_pipe()
    command = [sys.executable, "-c", TALKS, str(tmp_path / "work"), ends]
    assert subprocess.run(command, stdout=pipe, stderr=pipe, check=False, timeout=60).returncode == int(ends)
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(pipe)
    assert done.returncode == int(ends)
    assert b"hello" in done.stderr
    assert b"BrokenPipe" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.pitfall("F10")
def test_a_result_that_the_disk_cannot_take_is_told(tmp_path: Path) -> None:
    done = talk(tmp_path / "work", "0", ">/dev/full")
    assert done.returncode == 3
    assert "vfmseg: stdout: No space left on device; the work is done" in done.stderr.decode()
    assert done.stderr.decode().endswith("the result of 中国\n\n")
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.pitfall("F10")
def test_a_pipe_that_does_not_wait_gets_all(tmp_path: Path) -> None:
    """As left behind by a program that shares the terminal or the pipe."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command = [sys.executable, "-c", TALKS, str(tmp_path / "work"), "0"]
    with subprocess.Popen(command, stdout=writing, stderr=writing) as process, open(reading, encoding="utf-8") as heard:
        os.close(writing)
        text = heard.read()
    assert process.returncode == 0
    assert "more" * 20000 in text
    assert text.endswith("the result of 中国\n")


@pytest.mark.pitfall("F10")
def test_letters_that_a_console_has_not(tmp_path: Path) -> None:
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", TALKS, str(tmp_path / "work"), "0"]
    done = subprocess.run(command, capture_output=True, check=False, env=plain, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, b"the result of \\u4e2d\\u56fd")


@pytest.mark.pitfall("F10")
def test_the_commands_keep_their_exit_codes(tmp_path: Path) -> None:
    good = write_recipe(tmp_path / "r.yaml", recipe_dict(tmp_path, None, tmp_path / "run"))
    for module, arguments, code in (
        ("vfmseg.recipe", ["check", str(good)], 0),
        ("vfmseg.recipe", ["check", str(tmp_path / "no.yaml")], 2),
        ("vfmseg.cli", ["--help"], 0),
        ("vfmseg.cli", ["finetune", str(tmp_path / "no.yaml")], 2),
        ("vfmseg.cli", ["finetune", "--no-such"], 2),
    ):
        pipe = broken_pipe()
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, stdout=pipe, stderr=pipe, check=False, timeout=60)
        os.close(pipe)
        assert done.returncode == code, command
    done = subprocess.run(
        [sys.executable, "-m", "vfmseg.recipe", "schema"], stdout=broken_pipe(), stderr=subprocess.PIPE, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.pitfall("F10")
def test_without_stderr_nothing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is it on stdout, where results are; Python callers have no command round them."""
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, open("/dev/full", "w")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        say("hello")
        complain("hello")
        assert not on_terminal()
        LabelProgress("scene", 10, 2).close()
    assert capsys.readouterr().out == ""


@pytest.mark.pitfall("F10")
def test_a_terminal_that_closes_takes_its_bar_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = os.openpty()
    held = False
    with contextlib.suppress(OSError), open(inner, "w", buffering=1, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        training, labelling = TrainingProgress(2, 1), LabelProgress("scene", 10, 2)
        with SceneProgress("scenes") as scenes:
            scenes(1, 2)
            assert training.bar.shown
            os.close(outer)
            training.step(1, 1, 0.5, 4)
            labelling.add(5, {}, 1)
            scenes(2, 2)
        training.close()
        labelling.close()
        assert not scenes.bar.shown
        held = True
    assert held
