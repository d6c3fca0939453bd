"""Trials: two commands in one place, the second begun some time after the first, or while the first stands still.

Held: at least one ends with exit code 0, and one that does not is refused with exit code 2 and a message; what lies
there at the end is byte-equal to what one that ended with 0 writes when it is alone, and nothing else lies there. A
map made from a run that trains is that of one of its checkpoints, and of the one that it names.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from faults_bits import OUT, PIECES, label
from faults_calls import Call, Decision, places, usable
from faults_kill import begin, slug
from faults_lab import (
    Ended,
    Running,
    Trial,
    calls_of,
    contents,
    difference,
    map_of,
    recipe,
    require,
    run,
    run_watched,
)  # fmt: skip

STEP = 4  # calls from one at which the first stands still to the next
DELAYS = 12  # for each pair, from no delay to a bit more than the first command takes


@dataclass(frozen=True)
class Pair:
    """Two commands and the folder that they meet in; `judge` says what did not hold (folder, how both ended)."""

    name: str
    start: Path
    first: Sequence[str]
    second: Sequence[str]
    judge: Callable[[Path, Ended, Ended], str]


def two(lab: Path) -> Iterator[Trial]:
    """Each pair at many delays, and with the first one standing still before calls that change files."""
    for pair in [*_labelling(lab), *_training(lab), _mixed(lab)]:
        counted = lab / "counted" / slug(pair.name)
        begin(pair.start, counted)
        since = time.perf_counter()
        require(run(pair.first, counted))
        takes = time.perf_counter() - since
        for i in range(DELAYS):
            yield Trial(f"{pair.name}, {100 * i // (DELAYS - 2)} % of it later", _later(pair, takes * i / (DELAYS - 2)))
        if not usable():
            continue
        shutil.rmtree(counted)
        begin(pair.start, counted)
        calls = calls_of(pair.first, counted, counted / OUT)
        for number in places(calls)[::STEP]:
            where = f"{calls[number - 1].name} {calls[number - 1].path} ({number})"
            yield Trial(f"{pair.name}, while the first stands still before {where}", _meanwhile(pair, number))


def _later(pair: Pair, delay: float) -> Callable[[Path], str]:
    def act(here: Path) -> str:
        begin(pair.start, here)
        first = Running(pair.first, here)
        time.sleep(delay)
        second = run(pair.second, here)
        return pair.judge(here, first.end(), second)

    return act


def _meanwhile(pair: Pair, at: int) -> Callable[[Path], str]:
    def act(here: Path) -> str:
        begin(pair.start, here)
        ended: list[Ended] = []

        def decide(number: int, call: Call) -> Decision:
            if number == at:
                ended.append(run(pair.second, here))
            return "go"

        first = run_watched(pair.first, here, here / OUT, decide)
        return pair.judge(here, first, ended[0]) if ended else "the first one never came there"

    return act


def refused(ended: Ended, which: str) -> str:
    """Empty if a command ended with 0, or was refused because of its input; else how it ended."""
    found = "" if ended.code in (0, 2) and "Traceback" not in ended.said else f"exit code {ended.code}: {ended.tail}"
    return f"the {which} one: {found}" if found else ""


def one_of(here: Path, ends: Sequence[tuple[Ended, dict[str, str]]]) -> str:
    """Empty if the folder holds what a command that ended with 0 writes alone; else what does not fit."""
    wrong = refused(ends[0][0], "first") or refused(ends[1][0], "second")
    if wrong:
        return wrong
    found = contents(here / OUT) if (here / OUT).is_dir() else {}
    done = [difference(found, alone) for ended, alone in ends if ended.code == 0]
    if not done:
        return f"neither was done: {ends[0][0].tail} / {ends[1][0].tail}"
    codes = " and ".join(str(ended.code) for ended, _ in ends)
    return "" if "" in done else f"exit codes {codes}, but there is what neither writes ({' | '.join(done)})"


def _pair(name: str, start: Path, first: Sequence[str], second: Sequence[str], alone: Sequence[str] = ()) -> Pair:
    """`alone`: what the second one does in a new place, where that is another command."""
    written = []
    for number, command in enumerate((first, alone or second)):
        here = start.parent.parent / "alone" / f"{slug(name)}-{number}"
        begin(start, here)
        require(run(command, here))
        written.append(contents(here / OUT))

    def judge(here: Path, one: Ended, other: Ended) -> str:
        return one_of(here, list(zip((one, other), written, strict=True)))

    return Pair(name, start, first, second, judge)


def _labelling(lab: Path) -> Iterator[Pair]:
    def command(name: str, *options: str) -> list[str]:
        return label(lab / name / "run" / "best", lab, *PIECES, *options)

    start = lab / "starts" / "empty"
    start.mkdir(parents=True, exist_ok=True)
    yield _pair("labelling twice, --overwrite", start, command("lora"), command("lora2", "--overwrite"))
    yield _pair("labelling twice", start, command("lora"), command("lora2"))
    yield _pair("labelling twice, --resume", start, command("lora"), command("lora", "--resume"))


def _training(lab: Path) -> Iterator[Pair]:
    start = lab / "starts" / "two-recipes"
    start.mkdir(parents=True, exist_ok=True)
    for seed in (0, 1):
        content = recipe(lab, "lora") | {"seed": seed, "output_dir": OUT}
        (start / f"{seed}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    first = ["finetune", "0.yaml"]
    yield _pair("training twice, --overwrite", start, first, ["finetune", "1.yaml", "--overwrite"])
    yield _pair("training twice", start, first, ["finetune", "1.yaml"])
    yield _pair("training twice, --resume", start, first, [*first, "--resume"])


def _mixed(lab: Path) -> Pair:
    """A run is trained anew while its best checkpoint labels."""
    start = lab / "starts" / "finished-run"
    begin(lab / "starts" / "two-recipes", start)
    require(run(["finetune", "1.yaml"], start))
    first = ["finetune", "0.yaml", "--overwrite"]
    second = ["predict", f"{OUT}/best", f"{lab}/scene.tif", "-o", "map/m.tif", *PIECES]
    alone, checkpoints = lab / "alone" / "mixed", _checkpoints(lab, start, first)
    begin(start, alone)
    require(run(first, alone))
    written = contents(alone / OUT)
    maps = []
    for checkpoint in checkpoints:
        require(run([second[0], str(checkpoint), *second[2:]], checkpoint))
        maps.append(checkpoint / "map")

    def judge(here: Path, one: Ended, other: Ended) -> str:
        wrong = difference(contents(here / OUT), written) if one.code == 0 else f"the training ended: {one.tail}"
        if wrong or other.code:
            return wrong or refused(other, "second")
        if not any(_same_maps(here / "map", known) for known in maps):
            return "a map that none of the checkpoints makes"
        names = _names(here / "map" / "m.tif")
        if names == _fingerprint(start / OUT / "best") and not _same_maps(here / "map", maps[0]):
            return "a map of the new run that names the old one"
        if names == _fingerprint(here / OUT / "best") and not _same_maps(here / "map", maps[-1]):
            return "a map of another checkpoint than it names"
        return ""

    return Pair("labelling from a run that trains, --overwrite", start, first, second, judge)


def _checkpoints(lab: Path, start: Path, command: Sequence[str]) -> list[Path]:
    """Copies of `best/` as it is before a training and after each epoch that made a better one."""
    here, kept = lab / "counted" / "mixed", [lab / "checkpoints" / "0"]
    begin(start, here)
    shutil.copytree(start / OUT / "best", kept[0])
    renamed: list[str] = []

    def decide(number: int, call: Call) -> Decision:
        if renamed:  # the call before has given `best/` its name
            renamed.clear()
            kept.append(lab / "checkpoints" / str(len(kept)))
            shutil.copytree(here / OUT / "best", kept[-1])
        renamed.extend([call.path] * (call.name == "rename" and call.path.startswith(".best")))
        return "go"

    if usable():
        run_watched(command, here, here / OUT, decide)
    else:
        require(run(command, here))
        shutil.copytree(here / OUT / "best", lab / "checkpoints" / "1")
        kept.append(lab / "checkpoints" / "1")
    return kept


def _same_maps(folder: Path, known: Path) -> bool:
    names = sorted(path.name for path in known.iterdir())
    there = sorted(path.name for path in folder.iterdir())
    return there == names and all(map_of(folder / name) == map_of(known / name) for name in names)


def _names(path: Path) -> str:
    import rasterio

    with rasterio.open(path) as file:
        return str(file.tags()["vfmseg_checkpoint"])


def _fingerprint(folder: Path) -> str:
    from vfmseg.checkpoint.folder import fingerprint_of

    return fingerprint_of(folder)
