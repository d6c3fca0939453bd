"""What the trials of faults.py stand on: tiny scenes and segmenters, and commands run in forks of one process.

Starting Python and torch takes seconds, a fork none: this process imports everything, runs no verb, makes no thread,
and each command runs in a fork of it, from the parsing of its arguments to its exit code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import yaml
from faults_calls import Alarm, Call, Decision, watched
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

GIBI = 2**30
ROOM = 6 * GIBI  # of addresses, beside those of the imports: a fault must not take the machine
PATIENCE = 30.0  # seconds after which a command counts as hung
QUICK = 10.0  # seconds within which broken input has to be refused
MODEST = 2 * GIBI  # resident bytes, beside what the imports take, that a refusal may need

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GDAL_VRT_ENABLE_PYTHON": "YES",  # a user may have set it for other work; no scene may make use of it
    "OGR_CURRENT_DATE": "2000-01-01T00:00:00.000Z",  # a GeoPackage holds the time at which it was made
}


class Trial(NamedTuple):
    """Something that is tried: `act` does it in an empty folder and says what did not hold, or nothing."""

    name: str
    act: Callable[[Path], str]


class Skipped(Exception):
    """A kind of trials that this machine does not allow."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    code: of its exit, or minus the signal. seconds: of a processor, as another process may hold the clock up. peak:
    resident bytes beyond those at its start.
    """

    code: int
    said: str
    seconds: float
    peak: int

    @property
    def tail(self) -> str:
        """The last line that it said."""
        lines = [line for line in self.said.splitlines() if any(sign.isalnum() for sign in line)]
        return lines[-1][:300] if lines else "(nothing said)"

    def refusal(self, seconds: float = QUICK, names: str = "") -> str:
        """Empty if it ended with exit code 2 or 3 and a message that names `names`, soon and modestly; else why not."""
        if self.code not in (2, 3) or "Traceback" in self.said:
            return f"ended with {self.code} after {self.seconds:.1f} s: {self.tail}"
        if "out of memory" in self.said or "cannot allocate" in self.said:
            return f"asked for more than {ROOM / GIBI:.0f} GiB: {self.tail}"
        if names and names not in self.said:
            return f"the message does not name {names}: {self.tail}"
        return self.dear(seconds)

    def dear(self, seconds: float = QUICK) -> str:
        """Empty if it took little time and memory; else what it took."""
        if self.seconds > seconds or self.peak > MODEST:
            return f"took {self.seconds:.1f} s and {self.peak / GIBI:.1f} GiB before it said: {self.tail}"
        return ""


def imports() -> None:
    """Everything that the verbs import, so that forks have it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is tried is the package beside this file
    os.environ.update(SETTINGS)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    import pyogrio  # noqa: F401
    import shapely  # noqa: F401
    from transformers.models.dinov2 import Dinov2Model  # noqa: F401

    import vfmseg.build.data
    import vfmseg.cli
    import vfmseg.finetune
    import vfmseg.predict
    import vfmseg.segmenter  # noqa: F401


def started(
    arguments: Sequence[str], here: Path, log: Path, around: Mapping[str, str] | None = None, closed: int | None = None
) -> Callable[[], None]:
    """What a fork has to do: run the command line in a folder, write what it says to a file, and end.

    around: more of its environment. closed: its output (1) or messages (2) go to a reader that has left.
    """

    def work() -> None:
        code: Any = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            if closed:
                reading, writing = os.pipe()
                os.close(reading)
                os.dup2(writing, closed)
            os.environ.update(around or {})
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
            os.chdir(here)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            room = _pages(0) + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["vfmseg", *arguments]
            from vfmseg.cli import main

            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(code)

    return work


class Running:
    """A command in a fork of this process."""

    def __init__(
        self,
        arguments: Sequence[str],
        here: Path,
        around: Mapping[str, str] | None = None,
        closed: int | None = None,
    ) -> None:
        handle, name = tempfile.mkstemp(prefix="said", dir=here.parent)
        os.close(handle)
        self.log = Path(name)
        self.pid = os.fork()
        if self.pid == 0:
            started(arguments, here, self.log, around, closed)()

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for it; after `patience` seconds it is killed."""
        with Alarm(self.pid, patience):
            _, status, usage = os.wait4(self.pid, 0)
        return _ended(status, usage, self.log)


def run(
    arguments: Sequence[str],
    here: Path,
    patience: float = PATIENCE,
    around: Mapping[str, str] | None = None,
    closed: int | None = None,
) -> Ended:
    """A command, to its end."""
    return Running(arguments, here, around, closed).end(patience)


def run_watched(arguments: Sequence[str], here: Path, below: Path, decide: Callable[[int, Call], Decision]) -> Ended:
    """The same, with a decision before each change to files (see faults_calls.py)."""
    handle, name = tempfile.mkstemp(prefix="said", dir=here.parent)
    os.close(handle)
    stopped = watched(started(arguments, here, Path(name)), below, decide)
    return _ended(stopped.status, stopped.usage, Path(name))


def calls_of(arguments: Sequence[str], here: Path, below: Path) -> list[Call]:
    """The changes to files that an undisturbed run makes."""
    seen: list[Call] = []

    def go(number: int, call: Call) -> Decision:
        seen.append(call)
        return "go"

    require(run_watched(arguments, here, below, go))
    return seen


def require(ended: Ended) -> None:
    """An end of everything if the command did not do what it does on every machine."""
    if ended.code:
        raise SystemExit(f"an undisturbed command ended with {ended.code}:\n{ended.said}")


def _ended(status: int, usage: Any, log: Path) -> Ended:
    code = os.waitstatus_to_exitcode(status)
    said = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    return Ended(code, said, usage.ru_utime + usage.ru_stime, max(0, usage.ru_maxrss * 1024 - _pages(1)))


def _pages(which: int) -> int:
    """Bytes of this process: 0 of its address space, 1 resident."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize()


# -------------------------------------------------------------------------------------------------------- tiny things


def write_raster(path: Path, bands: np.ndarray) -> None:
    """(C, H, W) as a GeoTIFF with pixels of 10 m."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, crs="EPSG:32633",
        transform=from_origin(5e5, 5e6, 10, 10),
    ) as target:  # fmt: skip
        target.write(bands)


def disc(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright, noisy disc on a dark ground: uint8 (3, H, W), and its labels (1, H, W)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    cy, cx = random.uniform(0.3, 0.7, 2) * (height, width)
    inside = (y - cy) ** 2 + (x - cx) ** 2 < (0.3 * min(height, width)) ** 2
    image = np.where(inside, 170, 70)[None] + random.normal(0, 20, (3, height, width))
    return image.clip(0, 255).astype(np.uint8), inside[None].astype(np.uint8)


def recipe(lab: Path, name: str) -> dict[str, Any]:
    """Of the segmenters that the trials use: lora, lora2 (another seed), adapter, full."""
    adapter = {
        "lora": {"name": "lora", "rank": 2},
        "adapter": {"name": "adapter", "hidden": 4},
        "full": {"name": "full"},
    }
    sources = {
        split: {"rgb": f"{lab}/data/{split}/images/*.tif", "labels": f"{lab}/data/{split}/labels/*.tif"}
        for split in ("train", "val")
    }
    return {
        "name": name,
        "seed": int(name == "lora2"),
        "data": {"classes": {0: "ground", 1: "disc"}, "modalities": {"rgb": {}}, "tile": 32, **sources},
        "model": {
            "encoder": {"name": "dinov2", "checkpoint": f"{lab}/encoder"},
            "adapter": adapter[name.rstrip("2")],
            "decoder": {"name": "linear"},
        },
        "train": {"epochs": 2, "batch_size": 2, "optimizer": {"lr": 0.01}},
        "output_dir": "run",
    }


def make(lab: Path) -> None:
    """Scenes, an encoder and four finished runs in a new folder."""
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            image, labels = disc(10 * count + i, 48, 48)
            write_raster(lab / "data" / split / "images" / f"s{i}.tif", image)
            write_raster(lab / "data" / split / "labels" / f"s{i}.tif", labels)
    write_raster(lab / "scene.tif", disc(7, 96, 96)[0])
    pid = os.fork()
    if pid == 0:  # a fork, as this process makes no thread
        try:
            _save_encoder(lab / "encoder")
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("no encoder could be made")
    for name in ("lora", "lora2", "adapter", "full"):
        here = lab / name
        here.mkdir()
        (here / "r.yaml").write_text(yaml.safe_dump(recipe(lab, name), sort_keys=False), encoding="utf-8")
        require(run(["finetune", "r.yaml"], here))


def _save_encoder(folder: Path) -> None:
    import torch
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------- what there is then


def contents(folder: Path) -> dict[str, str]:
    """{file or folder: what it holds}, hidden ones too; without times and the name of a run's folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = "folder" if path.is_dir() else _content(path)
    return found


def _content(path: Path) -> str:
    if path.name == "state.pt":  # holds seconds; what it is good for is seen when the run goes on
        return "state"
    data = path.read_bytes()
    if path.suffix == ".gpkg" and data[:6] == b"SQLite":  # its counters of changes mean nothing
        where = f"{path.as_uri()}?mode=ro&immutable=1"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(where, uri=True)) as tables:
            data = "".join(tables.iterdump()).encode()
    elif path.name == "recipe.yaml":
        data = re.sub(rb"(?m)^output_dir: .*", b"", data)
    elif path.name == "segmenter.json":  # its digests tell the folder's name, by that of recipe.yaml
        record = json.loads(data)
        record.get("files", {}).pop("recipe.yaml", None)
        record.pop("sha256", None)
        data = json.dumps(record).encode()
    elif path.name == "metrics.jsonl":
        data = json.dumps([_timeless(json.loads(line)) for line in data.splitlines()]).encode()
    elif path.name == "metrics.json":
        data = json.dumps(_timeless(json.loads(data))).encode()
    return hashlib.sha256(data).hexdigest()


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "minutes")}


_RECORDED = ("vfmseg_checkpoint", "vfmseg_work", "vfmseg_encoder")  # tags that repeat what a segmenter's files say


def map_of(path: Path) -> list[Any]:
    """What a map says: pixels, place, colours, names; all but the bytes of its segmenter's files."""
    with rasterio.open(path) as file:
        tags = {key: value for key, value in file.tags().items() if key not in _RECORDED}
        colours = file.colormap(1) if file.colorinterp[0] == ColorInterp.palette else None
        return [file.profile, tags, colours, file.read().tobytes()]


def difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """Empty if both hold the same; else what is missing, too much, or different."""
    parts = {
        "missing": sorted(set(expected) - set(found)),
        "left over": sorted(set(found) - set(expected)),
        "different": sorted(name for name in expected if name in found and found[name] != expected[name]),
    }
    return "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts.items() if names)
