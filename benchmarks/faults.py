"""Whether vfmseg holds: kills, full disks, two runs in one place, damage, broken and hostile files, absurd numbers.

    python benchmarks/faults.py                                 # some minutes; a sample of each kind of trials
    python benchmarks/faults.py --kinds kill bits --trials 40   # at most 40 of each of two kinds; 0: all there are
    python benchmarks/faults.py --only kill:17                  # one trial again
    python benchmarks/faults.py write                           # the table into docs/trust.md

Each trial is a command of the command line, disturbed, on a tiny scene or run in a folder of its own. Printed is how
many were tried and how many held, by kind, and what did not hold with a line that repeats it; the exit code is 1 if
anything did not. What "held" means stands in the files of the kinds: faults_kill.py (kill, full), faults_two.py (two),
faults_bits.py (bits), faults_configs.py (configs), faults_rasters.py (rasters), faults_numbers.py (numbers). A run of
all kinds is kept in benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import faults_bits  # noqa: E402
import faults_configs  # noqa: E402
import faults_kill  # noqa: E402
import faults_lab  # noqa: E402
import faults_numbers  # noqa: E402
import faults_rasters  # noqa: E402
import faults_two  # noqa: E402
from faults_lab import Skipped, Trial  # noqa: E402

RESULTS = HERE / "results" / "faults.json"
PAGE = HERE.parent / "docs" / "trust.md"
BEGIN, END = "<!-- table: python benchmarks/faults.py write -->", "<!-- end of the table -->"


class Kind(NamedTuple):
    """Trials of one kind. usual: how many of them are made if nothing is asked for."""

    title: str
    trials: Callable[[Path, int], Iterable[Trial]]
    usual: int


KINDS = {
    "kill": Kind("killed at a file-system call", lambda lab, seed: faults_kill.kills(lab), 160),
    "full": Kind("disk full from a file-system call on", lambda lab, seed: faults_kill.full_disks(lab), 80),
    "two": Kind("two commands in one place", lambda lab, seed: faults_two.two(lab), 120),
    "bits": Kind("one bit of a file turned over", faults_bits.bits, 160),
    "configs": Kind("broken configurations and checkpoints", lambda lab, seed: faults_configs.configs(lab), 240),
    "rasters": Kind("scenes from strangers", lambda lab, seed: faults_rasters.rasters(lab), 0),
    "numbers": Kind("absurd numbers, odd environments", lambda lab, seed: faults_numbers.numbers(lab), 120),
}


class Result(NamedTuple):
    """Of one trial; found: what did not hold, or nothing."""

    number: int
    name: str
    found: str


def chosen(count: int, most: int, seed: int) -> list[int]:
    """Numbers of the trials that are made, from 1: at most `most` of `count`, or all if that is 0."""
    if not most or count <= most:
        return list(range(1, count + 1))
    return sorted(random.Random(seed).sample(range(1, count + 1), most))


def tried(trial: Trial, number: int, scratch: Path) -> Result:
    """Make a trial in an empty folder, which is removed; a trial that breaks has not held."""
    around = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=scratch))
    here = around / "here"
    here.mkdir()
    try:
        found = trial.act(here)
    except Exception as error:
        found = f"the trial could not be judged: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(around, ignore_errors=True)
    return Result(number, trial.name, found)


def make_trials(trials: Sequence[Trial], numbers: Sequence[int], scratch: Path, jobs: int) -> list[Result]:
    """The results, in order. Each of `jobs` processes is a fork of this one, so that it has everything imported."""
    global _work
    _work = lambda number: tried(trials[number - 1], number, scratch)  # noqa: E731
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_call_work, numbers))


_work: Callable[[int], Result]


def _call_work(number: int) -> Result:
    return _work(number)


def run(options: argparse.Namespace) -> int:
    """Make the trials that were asked for; 1 if any did not hold."""
    only = dict([options.only.split(":")]) if options.only else {}
    faults_lab.imports()
    started = time.perf_counter()
    held: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        lab, scratch = Path(name) / "lab", Path(name) / "trials"
        lab.mkdir()
        scratch.mkdir()
        faults_lab.make(lab)
        for kind in only or options.kinds:
            try:
                trials = list(KINDS[kind].trials(lab, options.seed))
            except Skipped as reason:
                print(f"{kind}: skipped: {reason}", file=sys.stderr, flush=True)
                continue
            most = KINDS[kind].usual if options.trials is None else options.trials
            numbers = [int(only[kind])] if only else chosen(len(trials), most, options.seed)
            results = make_trials(trials, numbers, scratch, options.jobs)
            broken = [told(kind, result, options.seed) for result in results if result.found]
            failures += broken
            good = sum(not result.found for result in results)
            held[kind] = {"tried": len(results), "held": good, "of": len(trials)}
            passed = round(time.perf_counter() - started)
            print(f"{kind}: {good} of {len(results)} held, {passed} s so far", file=sys.stderr, flush=True)
            print("".join(f"{lines}\n" for lines in broken), end="", flush=True)
    print(table(held))
    report = options.json or (RESULTS if not only and list(held) == list(KINDS) else None)
    if report:
        minutes = round((time.perf_counter() - started) / 60, 1)
        content = {"kinds": held, "failures": failures, "seed": options.seed, "minutes": minutes} | facts()
        report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(bool(failures))


def told(kind: str, result: Result, seed: int) -> str:
    """What did not hold, with the line that repeats it."""
    again = f"python benchmarks/faults.py --only {kind}:{result.number}" + (f" --seed {seed}" if seed else "")
    return f"not held: {result.name}\n  {result.found}\n  {again}"


def facts() -> dict[str, Any]:
    """The machine and the versions."""
    import rasterio

    from vfmseg.checkpoint.writing import versions

    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return {"machine": machine, "versions": versions() | {"gdal": rasterio.__gdal_version__}}


def table(held: dict[str, Any]) -> str:
    """Tried and held by kind, as Markdown."""
    lines = ["| kind | what is tried | tried | held |", "|---|---|---|---|"]
    for kind, counts in held.items():
        of = f" of {counts['of']}" if counts["of"] > counts["tried"] else ""
        lines.append(f"| `{kind}` | {KINDS[kind].title} | {counts['tried']}{of} | {counts['held']} |")
    return "\n".join(lines)


def page() -> str:
    """The page of the documentation with the table as it is now."""
    written = PAGE.read_text(encoding="utf-8")
    before, after = written[: written.index(BEGIN)], written[written.index(END) :]
    made = show(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.is_file() else ""  # a tree not tried yet
    return f"{before}{BEGIN}\n{made}{after}"


def show(result: dict[str, Any]) -> str:
    """The table and where it was made."""
    versions = result["versions"]
    names = ("python", "torch", "transformers", "peft", "rasterio", "gdal")
    libraries = ", ".join(f"{name} {versions[name]}" for name in names)
    made = f"`python benchmarks/faults.py --seed {result['seed']}`, {result['minutes']:.0f} minutes"
    return f"\n{table(result['kinds'])}\n\n{made} on {result['machine']}; {libraries}.\n\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("run", "write"), default="run")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--trials", type=int, help="at most so many of each kind; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="trials at a time")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one trial")
    options = parser.parse_args(arguments)
    if options.verb == "write":
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
