"""The trials of faults: that they see what does not hold. The commands here are plain Python, not vfmseg's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
faults, bits, calls, kill, lab, two = (
    importlib.import_module(name)
    for name in ("faults", "faults_bits", "faults_calls", "faults_kill", "faults_lab", "faults_two")
)

needs_watching = pytest.mark.skipif(not calls.usable(), reason="processes cannot be watched here")


def ended(code: int, said: str = "vfmseg: x.tif: wrong", seconds: float = 0.1, peak: int = 0) -> lab.Ended:
    return lab.Ended(code, said, seconds, peak)


def careful(here: Path) -> None:
    """Writes aside and renames; goes on after itself."""
    out = here / "out"
    out.mkdir(exist_ok=True)
    for old in out.glob(".*.partial"):
        old.unlink()
    aside = out / f".m.tif.{os.getpid()}.partial"
    with aside.open("wb", buffering=0) as file:
        for part in (b"one", b"two", b"three"):
            file.write(part)
    aside.rename(out / "m.tif")


def in_place(here: Path) -> None:
    """Writes under the final name."""
    (here / "out").mkdir(exist_ok=True)
    with (here / "out" / "m.tif").open("wb", buffering=0) as file:
        for part in (b"one", b"two", b"three"):
            file.write(part)


def keeps_rubbish(here: Path) -> None:
    """Leaves what a killed one before it was writing."""
    out = here / "out"
    out.mkdir(exist_ok=True)
    aside = out / f".m.tif.{os.getpid()}.partial"
    aside.write_bytes(b"onetwothree")
    aside.rename(out / "m.tif")


def shrugs(here: Path) -> None:
    """Says that all went well on a full disk."""
    (here / "out").mkdir(exist_ok=True)
    try:
        (here / "out" / "m.tif").write_bytes(b"onetwothree")
    except OSError:
        (here / "out" / "m.tif").unlink(missing_ok=True)


def situation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[[Path], None], finished: bytes = b"onetwothree"
) -> kill.Situation:
    """A situation in which the command is a function."""

    def started(arguments: object, here: Path, log: Path, around: object = None, closed: object = None):  # type: ignore[no-untyped-def]
        def work() -> None:
            try:
                verb(here)
                os._exit(0)
            except OSError as error:
                log.write_text(f"vfmseg: {error}")
                os._exit(3)

        return work

    monkeypatch.setattr(lab, "started", started)
    start, counted = tmp_path / "start", tmp_path / "counted"
    start.mkdir()
    counted.mkdir()
    seen = lab.calls_of([], counted, counted / "out")
    new = lab.contents(counted / "out")
    assert (counted / "out" / "m.tif").read_bytes() == finished
    return kill.Situation("toy", start, [], [], new, seen, kill.whole_maps({}, new))


def outcomes(
    tmp_path: Path, made: kill.Situation, act: Callable[[kill.Situation, int], Callable[[Path], str]]
) -> list[str]:
    found = []
    for number in calls.places(made.calls):
        here = tmp_path / f"trial-{number}" / "here"
        here.mkdir(parents=True)
        found.append(act(made, number)(here))
    return found


@needs_watching
def test_each_change_of_a_file_is_seen_before_it_happens(tmp_path: Path) -> None:
    seen: list[calls.Call] = []

    def go(number: int, call: calls.Call) -> str:
        seen.append(call)
        assert len(seen) == number
        return "go"

    (tmp_path / "out").mkdir()
    calls.watched(lambda: in_place(tmp_path), tmp_path / "out", go)
    assert [(call.name, call.path) for call in seen] == [
        ("mkdir", ""), ("openat", "m.tif"), ("write", "m.tif"), ("write", "m.tif"), ("write", "m.tif")
    ]  # fmt: skip
    assert [call.changes for call in seen] == [False, True, True, True, True]
    assert (tmp_path / "out" / "m.tif").read_bytes() == b"onetwothree"


@needs_watching
def test_a_kill_comes_before_the_call_and_a_full_disk_instead_of_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    stopped = calls.watched(lambda: in_place(tmp_path), tmp_path / "out", lambda n, call: "kill" if n == 4 else "go")
    assert os.waitstatus_to_exitcode(stopped.status) == -9
    assert (tmp_path / "out" / "m.tif").read_bytes() == b"one"
    stopped = calls.watched(lambda: shrugs(tmp_path), tmp_path / "out", lambda n, call: "full" if n == 3 else "go")
    assert os.waitstatus_to_exitcode(stopped.status) == 0
    assert not (tmp_path / "out" / "m.tif").exists()


@needs_watching
def test_a_careful_command_holds_at_every_kill_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = situation(tmp_path, monkeypatch, careful)
    assert len(calls.places(made.calls)) >= 4
    assert set(outcomes(tmp_path / "kill", made, kill.killed)) == {""}
    assert set(outcomes(tmp_path / "full", made, kill.full)) == {""}


@needs_watching
@pytest.mark.parametrize(
    ("verb", "disturbed", "says"),
    [
        (in_place, kill.killed, "half written: m.tif"),
        (in_place, kill.full, "half written: m.tif"),
        (keeps_rubbish, kill.killed, "left over"),
        (shrugs, kill.full, "missing: m.tif"),
    ],
)
def test_a_careless_command_is_found_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: Callable[[Path], None],
    disturbed: Callable[[kill.Situation, int], Callable[[Path], str]],
    says: str,
) -> None:
    found = outcomes(tmp_path, situation(tmp_path, monkeypatch, verb), disturbed)
    assert any(says in one for one in found), found


def test_what_counts_as_a_refusal() -> None:
    assert ended(2).refusal(names="x.tif") == ended(3).refusal() == ""
    assert "ended with 0" in ended(0).refusal()
    assert "ended with 1" in ended(1, "Traceback ...\nKeyError: 'x'").refusal()
    assert "ended with 2" in ended(2, "Traceback ...\nvfmseg: x").refusal()
    assert "does not name y.tif" in ended(2).refusal(names="y.tif")
    assert "took 11.0 s" in ended(2, seconds=11).refusal()
    assert "3.0 GiB" in ended(2, peak=3 * 2**30).refusal()
    assert "asked for more" in ended(3, "vfmseg: out of memory").refusal()


def test_of_two_commands_the_bytes_of_one_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.tif").write_bytes(b"a")
    a = lab.contents(tmp_path / "out")
    (tmp_path / "out" / "m.tif").write_bytes(b"b")
    b = lab.contents(tmp_path / "out")
    assert two.one_of(tmp_path, [(ended(2), a), (ended(0), b)]) == ""
    assert two.one_of(tmp_path, [(ended(0), a), (ended(0), b)]) == ""
    assert "neither writes" in two.one_of(tmp_path, [(ended(0), a), (ended(2), b)])
    assert "neither was done" in two.one_of(tmp_path, [(ended(2), a), (ended(2), b)])
    assert "the second one: exit code 3" in two.one_of(tmp_path, [(ended(0), a), (ended(3), b)])
    (tmp_path / "out" / "m.tif").write_bytes(b"mixed")
    assert "neither writes" in two.one_of(tmp_path, [(ended(0), a), (ended(0), b)])
    (tmp_path / "out" / "m.tif").write_bytes(b"b")
    (tmp_path / "out" / ".m.tif.parts").mkdir()
    assert "left over: .m.tif.parts" in two.one_of(tmp_path, [(ended(2), a), (ended(0), b)])


def test_a_bit_is_turned_over_and_back(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    file.write_bytes((2).to_bytes(8, "little") + b"{}" + b"\0" * 4)
    before = file.read_bytes()
    bits.flip(file, 83)
    assert [i for i, (a, b) in enumerate(zip(before, file.read_bytes())) if a != b] == [10]
    assert bits.in_header(file, 79)
    assert not bits.in_header(file, 80)
    bits.flip(file, 83)
    assert file.read_bytes() == before
    assert bits.refused_or_same(ended(0), "head", file, file, may_pass=False) == "passed unnoticed"


def test_as_many_trials_as_asked_for_and_the_same_with_the_same_seed() -> None:
    assert faults.chosen(3, 5, 0) == faults.chosen(3, 0, 1) == [1, 2, 3]
    assert len(set(faults.chosen(100, 10, 0))) == 10
    assert faults.chosen(100, 10, 0) == faults.chosen(100, 10, 0) != faults.chosen(100, 10, 1)
    assert set(faults.chosen(100, 50, 0)) <= set(range(1, 101))


def test_what_does_not_hold_is_told_with_a_line_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(here: Path) -> str:
        raise KeyError("x")

    trials = [
        lab.Trial("good", lambda here: ""),
        lab.Trial("bad", lambda here: "a wrong map"),
        lab.Trial("odd", broken),
    ]
    monkeypatch.setattr(faults, "KINDS", {"toy": faults.Kind("toys", lambda where, seed: trials, 0)})
    monkeypatch.setattr(lab, "imports", lambda: None)
    monkeypatch.setattr(lab, "make", lambda where: None)
    report = tmp_path / "report.json"
    assert faults.main(["--kinds", "toy", "--json", str(report), "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "| `toy` | toys | 3 | 1 |" in said
    assert "not held: bad\n  a wrong map\n  python benchmarks/faults.py --only toy:2\n" in said
    assert "could not be judged: KeyError" in said
    assert '"held": 1' in report.read_text()
    monkeypatch.setattr(faults, "RESULTS", tmp_path / "none.json")
    assert faults.main(["--only", "toy:1", "--jobs", "1"]) == 0
    assert not faults.RESULTS.exists()
