"""Two versions of vfmseg against each other: the same bytes, how fast a scene is labelled, and a step of training.

    git worktree add ../before COMMIT
    python benchmarks/versions.py same ../before .                          # a minute
    python benchmarks/scene.py make FOLDER --sizes 4096 8192
    python benchmarks/versions.py speed ../before . FOLDER --sizes 4096,8192 --rounds 5
    python benchmarks/versions.py step ../before . --rounds 5               # some minutes of a quiet machine, too

`same` gives one recipe of each kind to both versions: 8-bit RGB with everything learned, 16 bit with a frame of nodata
and LoRA, floating point with NaN and bottleneck adapters, and RGB with heights on a grid of their own. Both train and
label; the newer one also labels with the segmenters of the older, which must give the same files byte for byte, and
goes on with its interrupted runs or refuses them in one line. Weights are compared by shape and content, not by name.
It ends with 1 if anything differs.

`speed` measures `scene_peers.py vfmseg --model conv` of each tree, `step` a short training on one thread; each
measurement in a process of its own, rounds and order alternating. Both print median (least to most) and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from scene import answer, environment, read_through, scene_file, size  # noqa: E402
from versions_make import make, make_step  # noqa: E402

OF_THE_VERSION = {"vfmseg_version", "vfmseg_work"}  # tags; the second is a digest of the first and more
OF_THE_SEGMENTER = {"vfmseg_checkpoint"}


# --------------------------------------------------------------------------------------------------------------- same


def same(options: argparse.Namespace) -> int:
    """Compare what both versions make."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        found = {}
        for who, tree in (("before", options.before), ("now", options.now)):
            command = [sys.executable, str(HERE / "versions_child.py"), str(folder), who]
            child = subprocess.run(command, env=alone(tree), capture_output=True, text=True, check=False)
            if child.returncode:
                raise SystemExit(f"{who}: {child.stderr[-3000:]}")
            found[who] = json.loads((folder / f"{who}.json").read_text(encoding="utf-8"))
    wrong = 0
    for what, verdict in compared(found["before"], found["now"]):
        print(f"{what:<58}{verdict}")
        wrong += "DIFFERS" in verdict
    print(f"{wrong} of them differ" if wrong else "nothing differs")
    return int(bool(wrong))


def alone(tree: Path, **more: str) -> dict[str, str]:
    """Environment of a process that imports the vfmseg of a tree, computes on one thread and downloads nothing."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads, "PYTHONPATH": str(tree), **more}


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, verdict) line by line; a verdict with DIFFERS is one too many."""
    for kind, then in before.items():
        for what, digest in then["run"].items():
            yield f"{kind}: {what} of the training", "same" if now[kind]["run"][what] == digest else "DIFFERS"
        maps = then["maps by before"]
        for whose, may, made in (
            ("older", OF_THE_VERSION, now[kind]["maps by before"]),
            ("own", OF_THE_VERSION | OF_THE_SEGMENTER, now[kind]["maps by now"]),
        ):
            for product in sorted({*maps, *made}):
                verdict = alike(maps.get(product), made.get(product), may)
                yield f"{kind}: {product} of the {whose} segmenter", verdict
        yield f"{kind}: the older state.pt", went_on(now[kind]["resumed"], then["run"])


def alike(then: dict[str, Any] | None, now: dict[str, Any] | None, may_differ: set[str]) -> str:
    """How a product of one version compares with that of the other; a few tags may differ."""
    if then is None or now is None:
        return f"DIFFERS: made by {'one version only' if then or now else 'neither version'}"
    if then["file"] == now["file"]:
        return "same, byte for byte"
    before, after = (one.get("tags", {}) for one in (then, now))
    tags = {tag for tag in {*before, *after} if before.get(tag) != after.get(tag)}
    parts = ("pixels", "form") if "pixels" in then else ("file",)
    others = [part for part in parts if then[part] != now[part]]
    if others or tags - may_differ:
        return f"DIFFERS: {', '.join([*others, *sorted(tags - may_differ)])}"
    return f"same pixels and form; other {', '.join(sorted(tags)) or 'bytes round them'}"


def went_on(resumed: Mapping[str, Any], run: Mapping[str, str]) -> str:
    """What became of a run of the older version that the newer one was to go on with."""
    lines = [line for line in resumed["told"].splitlines() if line.startswith("vfmseg: ")]
    if resumed["code"] == 0:
        same = resumed["run"] == run
        return "goes on, and ends like the uninterrupted run" if same else "DIFFERS: goes on, and ends otherwise"
    if resumed["code"] == 2 and len(lines) == 1 and "Traceback" not in resumed["told"]:
        return f"refused: {lines[0][lines[0].find('state.pt') :]}"
    return f"DIFFERS: exit code {resumed['code']}, {resumed['told'][-300:]}"


# ------------------------------------------------------------------------------------------------------------ measured


def in_turn(rounds: int, trees: Mapping[str, Path], measure: Callable[[Path], dict[str, float]]) -> dict[str, Any]:
    """{version: {figure: [one of each round]}}; the order alternates, so that no version always comes first."""
    found: dict[str, dict[str, list[float]]] = {who: {} for who in trees}
    for turn in range(rounds):
        for who in sorted(trees, reverse=bool(turn % 2)):
            for figure, value in measure(trees[who]).items():
                found[who].setdefault(figure, []).append(value)
        last = [f"{who} {values[-1]:.2f} {figure}" for who, one in found.items() for figure, values in one.items()]
        print(f"    round {turn + 1}: {', '.join(last)}", file=sys.stderr, flush=True)
    return found


def show(what: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A line for each figure: median (least to most) of both versions, and the ratio of the medians."""
    for figure in found["now"]:
        middle = {who: statistics.median(one[figure]) for who, one in found.items()}
        shown = [
            f"{who} {middle[who]:.2f} ({min(one[figure]):.2f} to {max(one[figure]):.2f})" for who, one in found.items()
        ]
        ratio = middle["now"] / middle["before"] if middle["before"] else float("nan")
        print(f"{what}, {figure}: {', '.join(shown)}, ratio {ratio:.3f}", flush=True)


def speed(options: argparse.Namespace) -> int:
    """Measure how both versions label scenes."""
    child = argparse.Namespace(threads=options.threads, env=[])
    for pixels in options.sizes:
        scene = scene_file(options.folder, pixels)
        if not scene.is_file():
            raise SystemExit(f"{scene}: no such file; make it: scene.py make {options.folder} --sizes {pixels}")
        read_through(scene)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            labels = Path(name) / "labels.tif"

            def measure(tree: Path, scene: Path = scene, labels: Path = labels) -> dict[str, float]:
                labels.unlink(missing_ok=True)
                command = [sys.executable, str(tree / "benchmarks" / "scene_peers.py"), "vfmseg", str(scene)]
                command += [str(labels), "--model", "conv", "--threads", str(options.threads)]
                result = answer(command, environment(child) | {"PYTHONPATH": str(tree)}, 60)
                if "failed" in result:
                    raise SystemExit(f"{tree}: {result['failed']}")
                return {"s": result["seconds"], "MiB more RSS": result["growth_mib"]}

            show(f"conv {pixels}", in_turn(options.rounds, options.trees, measure))
    return 0


def step(options: argparse.Namespace) -> int:
    """Measure a short training of both versions."""
    with tempfile.TemporaryDirectory() as name:
        for what, recipe, images in make_step(Path(name)):

            def measure(tree: Path, recipe: Path = recipe, images: int = images) -> dict[str, float]:
                output = recipe.with_suffix("")
                command = [sys.executable, "-m", "vfmseg.cli", "finetune", str(recipe), f"output_dir={output}"]
                with tempfile.TemporaryFile() as told:
                    child = subprocess.Popen(
                        [*command, "--overwrite"], env=alone(tree), stderr=told, stdout=subprocess.DEVNULL, cwd=name
                    )
                    _, status, used = os.wait4(child.pid, 0)
                    child.returncode = os.waitstatus_to_exitcode(status)
                    if child.returncode:
                        told.seek(0)
                        raise SystemExit(f"{tree}: {told.read().decode()[-3000:]}")
                records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
                seconds = [record["seconds"] for record in records if record["kind"] == "epoch"]
                # the first epoch warms up
                return {"images/s": images * len(seconds[1:]) / sum(seconds[1:]), "MiB peak RSS": used.ru_maxrss / 1024}

            show(what, in_turn(options.rounds, options.trees, measure))
    return 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("same", "speed", "step"):
        options = verbs.add_parser(verb)
        options.add_argument("before", type=lambda text: Path(text).resolve(), help="tree of the older version")
        options.add_argument("now", type=lambda text: Path(text).resolve(), help="tree of the newer version")
        if verb == "speed":
            options.add_argument("folder", type=lambda text: Path(text).resolve(), help="of the scenes of scene.py")
            options.add_argument("--sizes", type=lambda text: [size(one) for one in text.split(",")], default="4096")
            options.add_argument("--threads", type=int, default=os.cpu_count())
        if verb != "same":
            options.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    chosen.trees = {"before": chosen.before, "now": chosen.now}
    verbs_of: dict[str, Callable[[argparse.Namespace], int]] = {"same": same, "speed": speed, "step": step}
    return verbs_of[chosen.verb](chosen)


if __name__ == "__main__":
    sys.exit(main())
