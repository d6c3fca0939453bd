"""Trials: labelling and training are killed, or find the disk full, at every call that changes a file.

Held: what has its final name is whole, old or new; the command that the program names goes on and ends with exit code
0; every file is then byte-equal to one of an undisturbed run, and nothing else lies beside it. On a full disk the
command ends with exit code 2 or 3 and one message.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from faults_bits import OUT, PIECES, label, stopped_labelling
from faults_calls import Call, Decision, places, usable
from faults_lab import Skipped, Trial, calls_of, contents, difference, recipe, require, run, run_watched


@dataclass(frozen=True)
class Situation:
    """A command, the folder that it starts in, and how one goes on when it was stopped.

    whole: empty if what has a final name in a folder is whole, else what is not.
    """

    name: str
    start: Path
    command: Sequence[str]
    again: Sequence[str]
    finished: dict[str, str]  # contents of OUT after an undisturbed run
    calls: list[Call]
    whole: Callable[[Path], str]
    anew: Sequence[str] = ()  # where `again` may be refused because the older run is still there


def kills(lab: Path) -> Iterator[Trial]:
    """A kill at each call of each situation."""
    for situation in situations(lab):
        for number in places(situation.calls):
            call = situation.calls[number - 1]
            yield Trial(
                f"{situation.name}: killed before {call.name} {call.path} ({number})", killed(situation, number)
            )


def full_disks(lab: Path) -> Iterator[Trial]:
    """A disk that is full from each call on that takes room."""
    for situation in situations(lab):
        kept = places([call for call in situation.calls if call.takes_room])
        numbers = [number for number, call in enumerate(situation.calls, start=1) if call.takes_room]
        for number in (numbers[i - 1] for i in kept):
            call = situation.calls[number - 1]
            yield Trial(f"{situation.name}: disk full at {call.name} {call.path} ({number})", full(situation, number))


def killed(situation: Situation, at: int) -> Callable[[Path], str]:
    """A trial: killed before the call of this number, the command leaves whole files and can be gone on with."""

    def act(here: Path) -> str:
        begin(situation.start, here)

        def decide(number: int, call: Call) -> Decision:
            return "kill" if number == at else "go"

        run_watched(situation.command, here, here / OUT, decide)
        return situation.whole(here / OUT) or goes_on(situation, here)

    return act


def full(situation: Situation, at: int) -> Callable[[Path], str]:
    """A trial: the disk takes nothing from the call of this number on; else as after a kill."""

    def act(here: Path) -> str:
        begin(situation.start, here)

        def decide(number: int, call: Call) -> Decision:
            return "full" if number >= at and call.takes_room else "go"

        ended = run_watched(situation.command, here, here / OUT, decide)
        if ended.code == 0:  # it could do without
            return difference(contents(here / OUT), situation.finished)
        return ended.refusal(seconds=60) or situation.whole(here / OUT) or goes_on(situation, here)

    return act


def begin(start: Path, here: Path) -> None:
    """Make the folder of a trial what it is before."""
    shutil.copytree(start, here, dirs_exist_ok=True)


def goes_on(situation: Situation, here: Path) -> str:
    """Empty if the command that goes on ends as an undisturbed run does; else what is different."""
    ended = run(situation.again, here)
    if ended.code == 2 and situation.anew:
        lost = difference(contents(here / OUT), contents(situation.start / OUT))
        if lost:
            return f"neither the old run nor the new one can go on ({lost}): {ended.tail}"
        ended = run(situation.anew, here)
    if ended.code:
        return f"cannot go on, exit code {ended.code}: {ended.tail}"
    return difference(contents(here / OUT), situation.finished)


def slug(name: str) -> str:
    """A name for a folder; one with spaces would be folded in a recipe."""
    return re.sub(r"\W+", "-", name)


# --------------------------------------------------------------------------------------------------------- situations

_made: list[Situation] = []


def situations(lab: Path) -> list[Situation]:
    """All of them, made once: each command is run without disturbance, and its calls are counted."""
    if not usable():
        raise Skipped("processes cannot be watched here (Linux on x86-64 with ptrace and seccomp)")
    if not _made:
        _made.extend([*_labelling(lab), *_training(lab)])
    return _made


def _labelling(lab: Path) -> Iterator[Situation]:
    def command(name: str, *options: str) -> list[str]:
        return label(lab / name / "run" / "best", lab, *options)

    extras, polygons = ("--confidence", "--uncertainty"), ("--polygons", ".gpkg")
    cases = [("new", ()), ("COG", ("--cog",)), ("extras", extras), ("polygons", polygons)]
    for name, options in cases:
        yield _situation(f"labelling, {name}", lab, None, command("lora", *options))
    for name, options in [("", ()), (" with polygons, extras, COG", ("--cog", *extras[:1], *polygons))]:
        yield _situation(
            f"labelling, --overwrite{name}", lab, command("lora2", *options), command("lora", *options, "--overwrite")
        )
    yield _situation("labelling, --resume", lab, stopped_labelling(lab), command("lora", *PIECES, "--resume"))


def _training(lab: Path) -> Iterator[Situation]:
    for name, before in (("new", None), ("--overwrite", "lora2")):
        start = lab / "starts" / slug(f"training {name}")
        start.mkdir(parents=True)
        for seed, file in ((1, "old.yaml"), (0, "r.yaml")):
            content = recipe(lab, "lora") | {"seed": seed, "output_dir": OUT}
            (start / file).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        if before:
            require(run(["finetune", "old.yaml"], start))
        options = [name] if before else []
        yield _situation(f"training, {name}", lab, start, ["finetune", "r.yaml", *options], training=True)


def _situation(
    name: str, lab: Path, before: Sequence[str] | Path | None, command: list[str], training: bool = False
) -> Situation:
    """With `before`: a command that was run first, or a folder to start from."""
    start = before if isinstance(before, Path) else lab / "starts" / slug(name)
    start.mkdir(parents=True, exist_ok=True)
    if before is not None and not isinstance(before, Path):
        require(run(before, start))
    finished, counted = lab / "finished" / slug(name), lab / "counted" / slug(name)
    begin(start, finished)
    require(run(command, finished))
    begin(start, counted)
    calls = calls_of(command, counted, counted / OUT)
    old, new = (contents(folder / OUT) if (folder / OUT).is_dir() else {} for folder in (start, finished))
    plain = [word for word in command if word not in ("--resume", "--overwrite")]
    return Situation(
        name, start, command,
        again=[*(plain if training else [word for word in command if word != "--resume"]), "--resume"],
        finished=new, calls=calls,
        whole=whole_runs(new) if training else whole_maps(old, new),
        anew=command if training and "--overwrite" in command else (),
    )  # fmt: skip


def whole_maps(old: dict[str, str], new: dict[str, str]) -> Callable[[Path], str]:
    """Whether each map of a folder is the old or the new one, by their digests: what is not, in words."""

    def whole(folder: Path) -> str:
        found = contents(folder) if folder.is_dir() else {}
        broken = [name for name in new if name in found and found[name] not in (old.get(name), new[name])]
        lost = [name for name in old if not name.startswith(".") and name not in found]
        return _told(broken, "half written") or _told(lost, "lost before the new one was there")

    return whole


def whole_runs(new: dict[str, str]) -> Callable[[Path], str]:
    """Whether the segmenters of a run folder have all their files, and these can be read: what is not, in words."""

    def whole(folder: Path) -> str:
        broken = []
        for name in ("best", "last"):
            files = {file for file in new if file.startswith(f"{name}/")}
            there = {f"{name}/{path.relative_to(folder / name).as_posix()}" for path in (folder / name).rglob("*")}
            if (folder / name).exists() and (there != files or not all(_readable(folder / file) for file in files)):
                broken.append(name)
        return _told(broken, "half written")

    return whole


def _told(names: list[str], what: str) -> str:
    return f"{what}: {', '.join(sorted(names)[:4])}" if names else ""


def _readable(path: Path) -> bool:
    """Whether a file of a segmenter is as long as it says."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        head = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + head])
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        return len(data) == 8 + head + max(ends, default=0)
    if path.suffix == ".json":
        return bool(json.loads(path.read_text(encoding="utf-8")))
    return True
