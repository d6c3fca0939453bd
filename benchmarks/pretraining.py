"""The tables of docs/pretrain.md, section Speed: a step of ours beside one written by hand, and what MAE rebuilds.

    python benchmarks/pretraining.py speed [--only small]              # against ViTMAEForPreTraining: 10 minutes
    python benchmarks/pretraining.py lora VIT_FOLDER                   # against transformers + peft: 5 minutes
    python benchmarks/pretraining.py inpaint run --data DATA_FOLDER    # an hour; goes on where it was stopped
    python benchmarks/pretraining.py inpaint score --data DATA_FOLDER  # scores what has been trained so far
    python benchmarks/pretraining.py write

`speed` and `lora` start two processes that do one step each in turn (A B B A ...), on one thread and with the same
heap settings, so that what disturbs the machine hits both; the steps are in pretraining_steps.py. Medians of the
rounds, with lowest and highest. Images/s are of processor time, as other work on the machine would count by the clock;
the ratio is printed by both. VIT_FOLDER is a Dinov2 folder of transformers (ViT-S/14). `inpaint` is in
pretraining_inpaint.py. Each command prints its table and keeps JSON in benchmarks/results/; `write` puts the tables
into docs/pretrain.md, below the line that says so and above the next heading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for place in (HERE, ROOT):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from pretraining_inpaint import EPOCHS, SAMPLES, lines_of_inpaint, score, train  # noqa: E402
from pretraining_steps import LORA_BATCH, SIDE, SIZES  # noqa: E402

from benchmarks.pages import with_tables  # noqa: E402

RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "pretrain.md"
BELOW = "<!-- tables: python benchmarks/pretraining.py write -->"

Steps = Mapping[str, Any]
"""What a process of pretraining_steps.py is to do."""
MAE: dict[str, Any] = {"step": "our mae", "precision": "no"}
GROUPS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
AGAINST: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("ViT 256 x 8, patch 14, decoder 192 x 2, batch 32, float32", {"size": "small", "precision": "no"}),
    "small-bf16": ("the first, bf16", {"size": "small", "precision": "bf16"}),
    "base": ("ViT-B/16, decoder 512 x 8, batch 4, float32", {"size": "base", "precision": "no"}),
    "base-bf16": ("the last, bf16", {"size": "base", "precision": "bf16"}),
}
"""{row of `speed`: title, and what both sides do}."""
OWN: dict[str, tuple[str, Steps, Steps]] = {
    "ratio": (
        "step, `ratio: 0.75` against one hidden patch of 256",
        {**MAE, "size": "small"},
        {**MAE, "size": "small", "ratio": 1 / 256},
    ),
    "groups-step": (
        "step, nine bands in 3 groups against none",
        {**MAE, "size": "small", "bands": 9, "groups": GROUPS},
        {**MAE, "size": "small", "bands": 9},
    ),
    "groups-forward": (
        "forward pass, nine bands in 3 groups against none",
        {**MAE, "step": "forward", "size": "small", "bands": 9, "groups": GROUPS},
        {**MAE, "step": "forward", "size": "small", "bands": 9},
    ),
}
"""{row of `speed`: title, and two things of ours that are compared}."""
LORA = {"lora": ("float32", "no"), "lora-bf16": ("bf16", "bf16")}


# ------------------------------------------------------------------------------------------------------------ measured


def start(steps: Steps) -> subprocess.Popen[str]:
    """A process that has built and warmed up, and waits."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, str(HERE / "pretraining_steps.py"), json.dumps(steps)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if answer(child) != "ready":
        raise SystemExit(f"{steps}: not ready")
    return child


def answer(child: subprocess.Popen[str]) -> Any:
    """The next line of a process; an end with what it has complained of if there is none."""
    assert child.stdout is not None
    assert child.stderr is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit(child.stderr.read()[-3000:])
    return json.loads(line)


def in_turn(one: Steps, two: Steps, rounds: int) -> list[dict[str, list[float]]]:
    """Of both: {"clock", "cpu": [seconds of each round], "peak", "before": [MiB]}."""
    children = [start(steps) for steps in (one, two)]
    found: list[dict[str, list[float]]] = [{"clock": [], "cpu": []} for _ in children]
    for turn in range(rounds):
        pairs = list(zip(children, found, strict=True))
        for child, mine in reversed(pairs) if turn % 2 else pairs:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            for key, value in answer(child).items():
                mine[key].append(round(value, 4))
        last = " ".join(f"{mine['cpu'][-1]:.3f}" for mine in found)
        print(f"    round {turn + 1}: {last}", file=sys.stderr, flush=True)
    for child, mine in zip(children, found, strict=True):
        assert child.stdin is not None
        child.stdin.close()
        mine.update({key: [round(value)] for key, value in answer(child).items()})
        child.wait()
    return found


def rows_of_speed() -> dict[str, tuple[Steps, Steps, int]]:
    """{row: one, the other, images of a step}."""
    rows: dict[str, tuple[Steps, Steps, int]] = {
        name: ({"step": "our mae", **of}, {"step": "their mae", **of}, SIZES[of["size"]]["batch"])
        for name, (_, of) in AGAINST.items()
    }
    return rows | {name: (one, two, SIZES[one["size"]]["batch"]) for name, (_, one, two) in OWN.items()}


def rows_of_lora(vit: str) -> dict[str, tuple[Steps, Steps, int]]:
    """The same of fine-tuning."""
    return {
        name: ({"step": "our lora", "vit": vit, "precision": precision},
               {"step": "their lora", "vit": vit, "precision": precision}, LORA_BATCH)
        for name, (_, precision) in LORA.items()
    }  # fmt: skip


def measure(
    target: Path, rows: Mapping[str, tuple[Steps, Steps, int]], only: Sequence[str], pairs: int, rounds: int
) -> None:
    """Measure rows by some pairs of processes, and keep them; what was kept of a row before is replaced."""
    kept = json.loads(target.read_text()) if target.is_file() else {}
    for name, (one, two, batch) in rows.items():
        if only and name not in only:
            continue
        print(f"{name}:", file=sys.stderr, flush=True)
        ours: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        for _ in range(pairs):
            for mine, found in zip((ours, theirs), in_turn(one, two, rounds), strict=True):
                for key, values in found.items():
                    mine.setdefault(key, []).extend(values)
        kept[name] = {"one": ours, "two": theirs, "batch": batch, "pairs": pairs, "setting": setting()}
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def setting() -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, one thread",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


# ------------------------------------------------------------------------------------------------------------- tables


def tables() -> str:
    """All tables that there are results for."""
    parts = [lines_of_speed(read("speed")), lines_of_own(read("speed")), lines_of_lora(read("lora"))]
    parts.append(lines_of_inpaint(read("inpaint")))
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part)


def read(name: str) -> dict[str, Any]:
    """What is kept of a command; nothing if it has not been run."""
    path = RESULTS / f"pretraining.{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(row: Mapping[str, Any], key: str) -> list[float]:
    """Of each round what one took over what the other took."""
    return [a / b for a, b in zip(row["one"][key], row["two"][key], strict=True)]


def compared(title: str, row: Mapping[str, Any]) -> str:
    """Ours beside theirs."""
    rates = [spread([row["batch"] / seconds for seconds in row[who]["cpu"]], 2) for who in ("one", "two")]
    return (
        f"| {title} | {rates[0]} | {rates[1]} | {spread(ratios(row, 'cpu'), 3)} | "
        f"{statistics.median(ratios(row, 'clock')):.3f} | {mib(row['one'])} | {mib(row['two'])} |"
    )


def mib(of: Mapping[str, Any]) -> str:
    """Peak memory in MiB: median (least to most)."""
    peaks = of["peak"]
    return f"{statistics.median(peaks):,.0f}" + (f" ({min(peaks):,} to {max(peaks):,})" if len(peaks) > 1 else "")


HEAD = [
    "| | images/s, ours | by hand | time, ours / by hand | by the clock | peak MiB, ours | by hand |",
    "|---|--:|--:|--:|--:|--:|--:|",
]


def lines_of_speed(found: Mapping[str, Any]) -> Iterator[str]:
    """MAE against transformers'."""
    yield from beside(
        "A step of masked pretraining at 224 px and `ratio: 0.75` against transformers' `ViTMAEForPreTraining` in a "
        "plain loop",
        {name: title for name, (title, _) in AGAINST.items()},
        found,
    )


def beside(what: str, titles: Mapping[str, str], found: Mapping[str, Any]) -> Iterator[str]:
    """The table of what is measured beside something written by hand; nothing if no row was measured."""
    rows = {title: found[name] for name, title in titles.items() if name in found}
    if rows:
        yield from (f"{what}; {about(rows.values())}:", "", *HEAD)
        yield from (compared(title, row) for title, row in rows.items())


def lines_of_own(found: Mapping[str, Any]) -> Iterator[str]:
    """What of ours is compared with ours."""
    rows = {name: title for name, (title, _, _) in OWN.items() if name in found}
    if not rows:
        return
    yield f"Ours (ViT 256 x 8, patch 14, 224 px, batch 32, float32); {about([found[name] for name in rows])}:"
    yield ""
    yield "| | images/s | other | time over the other's | encoder tokens over the other's | peak MiB | other |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name, title in rows.items():
        row = found[name]
        one, two = (spread([row["batch"] / seconds for seconds in row[who]["cpu"]], 2) for who in ("one", "two"))
        _, left, right = OWN[name]
        yield (
            f"| {title} | {one} | {two} | {spread(ratios(row, 'cpu'), 2)} | {tokens(left) / tokens(right):.2f} | "
            f"{mib(row['one'])} | {mib(row['two'])} |"
        )


def tokens(steps: Steps) -> int:
    """Tokens of an image that go through the encoder, the class token too."""
    patches = (SIDE // SIZES[steps["size"]]["patch"]) ** 2
    seen = patches if steps["step"] == "forward" else patches - round(steps.get("ratio", 0.75) * patches)
    return 1 + seen * len(steps.get("groups") or [0])


def lines_of_lora(found: Mapping[str, Any]) -> Iterator[str]:
    """Fine-tuning against transformers and peft."""
    yield from beside(
        f"A step of fine-tuning (ViT-S/14, LoRA of rank 8 on q and v, `fpn`, cross-entropy + Dice, 224 px, batch "
        f"{LORA_BATCH}) against a plain loop of transformers + peft with the same decoder and loss",
        {name: title for name, (title, _) in LORA.items()},
        found,
    )


def about(rows: Collection[Mapping[str, Any]]) -> str:
    """Rounds, machine and versions of the rows of a table; each that there is where rows differ."""
    counts = sorted({(len(row["one"]["cpu"]), row["pairs"]) for row in rows})
    told = [
        f"{steps} steps of each in turn, by {pairs} pair{'s' * (pairs > 1)} of processes" for steps, pairs in counts
    ]
    of = [
        f"{one['machine']}, Python {one['python']}, torch {one['torch']}, transformers {one['transformers']}, peft "
        f"{one['peft']}"
        for one in (row["setting"] for row in rows)
    ]
    return f"{' or '.join(told)}; {' or '.join(dict.fromkeys(of))}"


def page() -> str:
    """The page with the tables as they are now; what stands above the line and from the next heading on stays."""
    return with_tables(PAGE, BELOW, tables())


# -------------------------------------------------------------------------------------------------------- command line


def speed(options: argparse.Namespace) -> None:
    """Measure and print."""
    measure(RESULTS / "pretraining.speed.json", rows_of_speed(), options.only, options.pairs, options.rounds)
    print("\n".join([*lines_of_speed(read("speed")), "", *lines_of_own(read("speed"))]))


def lora(options: argparse.Namespace) -> None:
    """Measure and print."""
    measure(RESULTS / "pretraining.lora.json", rows_of_lora(options.vit), options.only, options.pairs, options.rounds)
    print("\n".join(lines_of_lora(read("lora"))))


def inpaint(options: argparse.Namespace) -> None:
    """Train, score and print."""
    if options.what == "run":
        train(options.data, options.work, options.epochs, options.samples)
    found = score(options.data, options.work) | {"setting": setting()}
    (RESULTS / "pretraining.inpaint.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines_of_inpaint(found)))


def write(options: argparse.Namespace) -> None:
    """Put the tables into the page."""
    PAGE.write_text(page(), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in (("speed", [*AGAINST, *OWN]), ("lora", list(LORA))):
        one = verbs.add_parser(verb)
        if verb == "lora":
            one.add_argument("vit", type=lambda text: str(Path(text).resolve()), help="folder of the ViT-S/14")
        one.add_argument("--only", nargs="+", default=[], choices=names)
        one.add_argument("--pairs", type=int, default=3, help="of processes, one after the other")
        one.add_argument("--rounds", type=int, default=5, help="steps of each process that are measured")
    painting = verbs.add_parser("inpaint")
    painting.add_argument("what", choices=("run", "score"))
    painting.add_argument("--data", type=lambda text: Path(text).resolve(), required=True)
    painting.add_argument("--work", type=lambda text: Path(text).resolve(), default=Path("runs/inpaint").resolve())
    painting.add_argument("--epochs", type=int, default=EPOCHS, help="of a run that is begun")
    painting.add_argument("--samples", type=int, default=SAMPLES, help="windows of an epoch")
    verbs.add_parser("write")
    options = parser.parse_args()
    verbs_of: dict[str, Callable[[argparse.Namespace], None]] = {
        "speed": speed, "lora": lora, "inpaint": inpaint, "write": write,
    }  # fmt: skip
    verbs_of[options.verb](options)


if __name__ == "__main__":
    main()
