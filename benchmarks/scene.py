"""How fast, and in how much memory, a large scene is labelled: vfmseg, a floor, a hand loop and other packages.

    python benchmarks/scene.py make FOLDER --sizes 2048 4096 8192 8192x131072
    python benchmarks/scene.py run FOLDER --model conv --sizes 4096 8192 --pairs 5 --peer terratorch=PYTHON
    python benchmarks/scene.py write
    python benchmarks/scene.py plot rss.png --model conv --sizes 8192 8192x131072 --only vfmseg

A size is the side of a square in pixels, or WIDTHxHEIGHT. `run` starts every measurement in a process of its own, one
at a time: the first round of all contenders, then the second of all, and so on, with the same threads, environment,
module and weights (scene_peers.py says what each does). `floor` is the model alone, on batches that are in memory
already. A peer needs an interpreter that has it: --peer NAME=PYTHON, NAME terratorch, torchgeo or geoai. Each result
is a JSON file in benchmarks/results/scene/; what is there is not measured again, so an interrupted run goes on: delete
files to measure anew. `write` puts the tables into docs/scenes.md. The first round compares every map with that of the
hand loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rasterio
from rasterio.windows import Window

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from scene_make import BLOCK, write_scene  # noqa: E402

RESULTS = HERE / "results" / "scene"
PAGE = HERE.parent / "docs" / "scenes.md"
BELOW = "<!-- tables: python benchmarks/scene.py write -->"
BRIGHTEST = 4000  # about the largest stored number
RING = 8  # pixels at the scene's edge that `interior` leaves out: libraries pad differently there

TITLES = {
    "floor": "floor: the model alone",
    "hand": "hand loop, not blended",
    "vfmseg": "vfmseg, Hann blend",
    "vfmseg-cut": "vfmseg, not blended",
    "terratorch": "TerraTorch `tiled_inference`",
    "torchgeo": "TorchGeo grid sampler loop, not blended",
    "geoai": "geoai `predict_geotiff`",
}
PEERS = ("terratorch", "torchgeo", "geoai")


class Size(NamedTuple):
    """Of a scene, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height


def size(text: str) -> Size:
    """`8192` or `8192x131072` (width x height)."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected the side in pixels, or WIDTHxHEIGHT")
    return Size(int(found[1]), int(found[2] or found[1]))


class Case(NamedTuple):
    """What is the same for all contenders of a comparison."""

    model: str
    size: Size
    tile: int
    stride: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model}.{self.size}.t{self.tile}-s{self.stride}-b{self.batch}"

    def result(self, contender: str, pair: int) -> Path:
        """The file of one measurement."""
        return RESULTS / f"{self}.{contender}.{pair}.json"


# ------------------------------------------------------------------------------------------------------------- scenes


def scene_file(folder: Path, pixels: Size) -> Path:
    """Where a scene lies."""
    return folder / f"scene-{pixels}.tif"


def make(options: argparse.Namespace) -> None:
    """Write the scenes that are not there yet."""
    options.folder.mkdir(parents=True, exist_ok=True)
    for pixels in options.sizes:
        target = scene_file(options.folder, pixels)
        if not target.is_file():
            print(target, file=sys.stderr, flush=True)
            write_scene(target, pixels.width, pixels.height)


# ---------------------------------------------------------------------------------------------------------------- run


def run(options: argparse.Namespace) -> None:
    """Measure what is not in `benchmarks/results/scene/` yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    interpreters = {name: sys.executable for name in TITLES if name not in PEERS} | dict(options.peer)
    contenders = [name for name in TITLES if name in interpreters and name in (options.only or TITLES)]
    for pixels in options.sizes:
        case = Case(options.model, pixels, options.tile, options.stride, options.batch)
        scene = scene_file(options.folder, pixels)
        if not scene.is_file():
            raise SystemExit(f"{scene}: no such file; make it: scene.py make {options.folder} --sizes {pixels}")
        warmed = False
        for pair in range(1, options.pairs + 1):
            for name in contenders:
                if case.result(name, pair).is_file() or failed(case, name):
                    continue
                if not warmed:
                    read_through(scene)
                    warmed = True
                measure(case, name, pair, interpreters[name], scene, options)
        for name in contenders:
            if not options.keep:
                labels_file(options.folder, case, name).unlink(missing_ok=True)


def failed(case: Case, contender: str) -> bool:
    """Whether a contender could not do a case: it is not asked again."""
    first = case.result(contender, 1)
    return first.is_file() and "failed" in json.loads(first.read_text())


def labels_file(folder: Path, case: Case, contender: str) -> Path:
    """Where the map of a contender goes."""
    return folder / f"labels-{case}.{contender}.tif"


def read_through(path: Path) -> None:
    """Bring a file into the machine's cache, so that the first contender finds it as the others do."""
    with path.open("rb") as stream:
        while stream.read(2**24):
            pass


def measure(case: Case, contender: str, pair: int, interpreter: str, scene: Path, options: argparse.Namespace) -> None:
    """One measurement in a process of its own, kept as JSON."""
    target = case.result(contender, pair)
    labels = labels_file(options.folder, case, contender)
    labels.unlink(missing_ok=True)
    print(f"{case} {contender} {pair}", file=sys.stderr, flush=True)
    command = [
        interpreter, str(HERE / "scene_peers.py"), contender, str(scene), str(labels), "--model", case.model,
        "--tile", str(case.tile), "--stride", str(case.stride), "--batch", str(case.batch),
        "--threads", str(options.threads), "--most-gib", str(options.most_gib),
    ]  # fmt: skip
    if options.trace and pair == 1:
        command += ["--trace", str(RESULTS / f"{case}.{contender}.trace.json")]
    result = answer(command, environment(options), options.most_minutes)
    if "failed" not in result:
        result["mpx_per_second"] = round(case.size.pixels / 1e6 / result["seconds"], 3)
        hand = labels_file(options.folder, case, "hand")
        if pair == 1 and contender not in ("floor", "hand"):
            result["against_hand"] = compare(labels, hand) if hand.is_file() else None
    result["setting"] = {
        "threads": options.threads, "env": dict(options.env), "machine": platform.machine(), "cores": os.cpu_count()
    }  # fmt: skip
    aside = target.with_suffix(".partial")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    shutil.move(aside, target)
    shown = ("failed", "seconds", "mpx_per_second", "growth_mib", "cpu_seconds", "tiles", "against_hand")
    print("   ", {key: result[key] for key in shown if key in result}, file=sys.stderr, flush=True)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The same for all: threads, no accelerator, no download, the system's allocator with its own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))}
    threads = str(options.threads)
    return kept | {
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
    } | dict(options.env)  # fmt: skip


def answer(command: Sequence[str], env: dict[str, str], minutes: float) -> dict[str, Any]:
    """The last line that a measurement prints, or {"failed": why}."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 * minutes, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {minutes:g} minutes"}
    except OSError as error:
        return {"failed": f"the interpreter does not start: {error.strerror}"}
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    except (IndexError, ValueError):
        tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"exit code {done.returncode}: {tail[0][:200]}"}


def compare(labels: Path, hand: Path) -> dict[str, Any]:
    """Share of pixels with the label of the hand loop: everywhere, and without the ring at the scene's edge."""
    with rasterio.open(labels) as ours, rasterio.open(hand) as theirs:
        if ours.shape != theirs.shape:
            return {"wrong": f"{ours.width}x{ours.height} px instead of {theirs.width}x{theirs.height}"}
        same = inner = 0
        for top in range(0, ours.height, BLOCK):
            window = Window(0, top, ours.width, min(BLOCK, ours.height - top))
            equal = ours.read(1, window=window) == theirs.read(1, window=window)
            same += int(equal.sum())
            inner += int(equal[max(0, RING - top) : ours.height - RING - top, RING:-RING].sum())
        found: dict[str, Any] = {
            "same": same / (ours.width * ours.height),
            "interior": inner / ((ours.width - 2 * RING) * (ours.height - 2 * RING)),
        }
        if (ours.crs, ours.transform) != (theirs.crs, theirs.transform):
            found["wrong"] = "another CRS or transform"
        return found


# -------------------------------------------------------------------------------------------------------------- write


def results() -> dict[Case, dict[str, dict[int, dict[str, Any]]]]:
    """{case: {contender: {pair: result}}} of what was measured."""
    found: dict[Case, dict[str, dict[int, dict[str, Any]]]] = {}
    name = re.compile(r"(\w+)\.(\d+x\d+)\.t(\d+)-s(\d+)-b(\d+)\.([\w-]+)\.(\d+)\.json")
    for path in sorted(RESULTS.glob("*.json")):
        parts = name.fullmatch(path.name)
        if parts:
            case = Case(parts[1], size(parts[2]), int(parts[3]), int(parts[4]), int(parts[5]))
            found.setdefault(case, {}).setdefault(parts[6], {})[int(parts[7])] = json.loads(path.read_text())
    return found


def show() -> str:
    """The tables as Markdown."""
    blocks = []
    for case, contenders in sorted(results().items(), key=lambda item: (item[0].model, item[0].size.pixels)):
        first = next(r for runs in contenders.values() for r in runs.values())
        blocks += [
            "",
            f"### {case.model}, {case.size.width} x {case.size.height} px",
            "",
            f"Tile {case.tile}, stride {case.stride}, batch {case.batch}, {first['setting']['threads']} threads.",
            "",
            "| contender | version | pairs | s | Mpx/s | x floor | growth of RSS (peak), MiB "
            "| CPU s beside the model | tiles run | same label as hand loop |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        compared = any(name in contenders for name in PEERS)
        blocks += [
            _row(case, contenders, name) for name in TITLES if name in contenders or (compared and name in PEERS)
        ]
    return "\n".join(blocks).strip()


def page() -> str:
    """The page of the documentation with the tables as they are now."""
    written = PAGE.read_text(encoding="utf-8")
    return f"{written[: written.index(BELOW)]}{BELOW}\n\n{show()}\n"


def _row(case: Case, contenders: dict[str, dict[int, dict[str, Any]]], name: str) -> str:
    runs = contenders.get(name, {})
    reason = next((r["failed"] for r in runs.values() if "failed" in r), None if runs else "no interpreter given")
    version = next((r["versions"].get("contender") for r in runs.values() if "versions" in r), None) or "-"
    if reason is not None:
        return f"| {TITLES[name]} | {version} | not run: {reason} |" + " - |" * 7
    floors = contenders.get("floor", {})
    pairs = [(r, floors[p]) for p, r in runs.items() if p in floors and "failed" not in floors[p]]
    beside = name != "floor" and bool(pairs)
    ratio = f"{statistics.median(r['seconds'] / f['seconds'] for r, f in pairs):.2f}" if beside else "-"
    extra = f"{statistics.median(r['cpu_seconds'] - f['cpu_seconds'] for r, f in pairs):.1f}" if beside else "-"
    middle = {
        key: statistics.median(r[key] for r in runs.values())
        for key in ("seconds", "mpx_per_second", "growth_mib", "tiles")
    }
    peak = statistics.median(r["loaded_mib"] + r["growth_mib"] for r in runs.values())
    return (
        f"| {TITLES[name]} | {version} | {len(runs)} | {middle['seconds']:.1f} | {middle['mpx_per_second']:.2f} "
        f"| {ratio} | {middle['growth_mib']:.0f} ({peak:.0f}) | {extra} | {middle['tiles']:.0f} | {_agreement(runs)} |"
    )


def _agreement(runs: dict[int, dict[str, Any]]) -> str:
    found = runs.get(1, {}).get("against_hand")
    if not found:
        return "-"
    shares = f"{100 * found['same']:.2f} % (interior {100 * found['interior']:.2f} %)" if "same" in found else ""
    return " ".join(filter(None, (shares, found.get("wrong"))))


def plot(options: argparse.Namespace) -> None:
    """RSS over time of the runs that were measured with --trace, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    drawn = 0
    for path in sorted(RESULTS.glob("*.trace.json")):
        model, pixels, _, name = path.name.removesuffix(".trace.json").split(".")
        wanted = model == options.model and (not options.sizes or size(pixels) in options.sizes)
        if wanted and (not options.only or name in options.only):
            trace = json.loads(path.read_text())
            label = f"{name}, {pixels.replace('x', ' x ')} px"
            axes.plot(trace["seconds"], trace["growth_mib"], label=label, linewidth=1.2)
            drawn += 1
    if not drawn:
        raise SystemExit(f"no traces of {options.model}; measure with --trace first")
    axes.set(xlabel="seconds", ylabel="RSS over the loaded process, MiB", title=f"Labelling a scene, `{options.model}`")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(options.target, dpi=150)


# ------------------------------------------------------------------------------------------------------- command line


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def _peer(text: str) -> tuple[str, str]:
    name, value = _pair(text)
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"{name!r}: expected one of {', '.join(PEERS)}")
    return name, value


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make", help="write the scenes")
    runner = verbs.add_parser("run", help="measure")
    for verb in (maker, runner):
        verb.add_argument("folder", type=Path, help="of the scenes")
        verb.add_argument("--sizes", nargs="+", type=size, default=[size("2048")])
    runner.add_argument("--model", choices=["conv", "vit"], default="conv")
    runner.add_argument("--pairs", type=int, default=5)
    runner.add_argument("--peer", action="append", default=[], type=_peer, metavar="NAME=PYTHON")
    runner.add_argument("--only", nargs="+", choices=list(TITLES), help="contenders; all when left out")
    runner.add_argument("--tile", type=int, default=224)
    runner.add_argument("--stride", type=int, default=192)
    runner.add_argument("--batch", type=int, default=8)
    runner.add_argument("--threads", type=int, default=os.cpu_count())
    runner.add_argument("--most-gib", type=float, default=20.0, help="RSS at which a contender is given up")
    runner.add_argument("--most-minutes", type=float, default=120.0, help="after which a contender is given up")
    runner.add_argument("--env", action="append", default=[], type=_pair, metavar="NAME=VALUE", help="for all")
    runner.add_argument("--trace", action="store_true", help="keep RSS over time of the first round")
    runner.add_argument("--keep", action="store_true", help="keep the maps, beside the scenes")
    verbs.add_parser("write", help="tables into docs/scenes.md")
    drawer = verbs.add_parser("plot", help="RSS over time as PNG")
    drawer.add_argument("target", type=Path)
    drawer.add_argument("--model", choices=["conv", "vit"], default="conv")
    drawer.add_argument("--sizes", nargs="+", type=size)
    drawer.add_argument("--only", nargs="+", choices=list(TITLES))
    options = parser.parse_args(arguments)
    if options.verb == "write":
        PAGE.write_text(page(), encoding="utf-8")
    else:
        {"make": make, "run": run, "plot": plot}[options.verb](options)


if __name__ == "__main__":
    main()
