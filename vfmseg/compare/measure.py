"""What is measured of a trained segmenter, each once: time and memory of one tile, and the test split if asked for."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vfmseg.checkpoint.folder import fingerprint_of
from vfmseg.compare.runs import Run
from vfmseg.data.image import Image, Images
from vfmseg.data.inputs import Inputs
from vfmseg.disk.files import write_json
from vfmseg.disk.jsonfile import read_json
from vfmseg.inference.ranks import own_device
from vfmseg.progress import SceneProgress
from vfmseg.segmenter import Segmenter
from vfmseg.terminal import say

KEPT = "measured.json"
_WORDS = {"cost": "time and memory", "test": "the test split", "missing": "the test split without each modality"}
WARM_UP, TIMES = 2, 7
"""Forwards before, and those of which the median is taken."""


def machine() -> str:
    """The device that is used: the name of the GPU, or the CPU and how many threads torch takes of it."""
    device = own_device()
    if device != "cpu":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def measured(run: Run, cost: bool, test: bool, missing: bool = False) -> dict[str, Any]:
    """{"cost": {ms, mib, ...}, "test": {scores, ...}, "missing": {scores: {modality: ...}}}, as far as asked for.

    Of a finished run; `missing`: on the test split without each modality, which a stack cannot answer for.

    What was measured before is read from the file beside the run, if it was of the same segmenter, machine and
    question; the rest is measured and added there. The test split is opened for `test` and `missing` alone.
    """
    path = run.folder / KEPT
    known = _known(path, fingerprint_of(run.best))
    asked: dict[str, dict[str, Any]] = {}
    if cost:
        asked["cost"] = {"machine": machine(), "torch": torch.__version__, "tile": run.recipe.data.tile}
    source, how = run.recipe.data.test, run.recipe.predict
    about_test = {
        "source": None if source is None else source.model_dump(mode="json"),
        "predict": how.model_dump(mode="json"),
    }
    asked |= {name: about_test for name, wanted in (("test", test), ("missing", missing)) if wanted}
    to_do = [name for name, about in asked.items() if known.get(name, {}).get("about") != about]
    if to_do:
        say(f"measuring {run.cell}, seed {run.recipe.seed}: {', '.join(_WORDS[name] for name in to_do)}")
        segmenter = Segmenter.from_pretrained(run.best)
        ways = {"cost": lambda: _cost(segmenter, run.recipe.data.tile), "test": lambda: _test(segmenter, run)}
        ways["missing"] = lambda: _missing(segmenter, run)
        for name in to_do:
            known[name] = {"about": asked[name], **ways[name]()}
            write_json(path, known)
    return {name: known[name] for name in asked}


def _known(path: Path, fingerprint: str) -> dict[str, Any]:
    """What the file says of this segmenter; of another, or where it is damaged, nothing."""
    try:
        found = read_json(path) if path.is_file() else {}
    except ValueError:
        found = {}
    if not isinstance(found, dict) or found.get("segmenter") != fingerprint:
        return {"segmenter": fingerprint}
    return found


def _test(segmenter: Segmenter, run: Run) -> dict[str, Any]:
    with SceneProgress("test scenes") as progress:
        return {"scores": segmenter.evaluate(run.recipe, "test", progress)}


def _missing(segmenter: Segmenter, run: Run) -> dict[str, Any]:
    names = list(run.recipe.data.modalities)
    scores = {}
    for gone in names:
        with SceneProgress(f"test scenes without {gone}") as progress:
            scores[gone] = segmenter.evaluate(run.recipe, "test", progress, [name for name in names if name != gone])
    return {"scores": scores}


def _cost(segmenter: Segmenter, tile: int) -> dict[str, Any]:
    """{"ms", "mib"} of one forward of the model on one tile, without reading or blending."""
    images = a_tile(segmenter.inputs, tile, segmenter.device)

    def forward() -> None:
        with torch.inference_mode():
            segmenter.model(images)

    ms = milliseconds(forward, segmenter.device)
    peak = peak_bytes(forward, segmenter.device)
    return {"ms": ms, "mib": None if peak is None else peak / 2**20}


def a_tile(inputs: Inputs, tile: int, device: torch.device) -> Images:
    """A batch of one tile, (1, C, tile, tile) for each modality: random values about the mean, all valid."""
    random = torch.Generator().manual_seed(0)
    images = {}
    for one in inputs:
        mean, std = (torch.tensor(values)[:, None, None] for values in (one.mean, one.std))
        pixels = (mean + std * torch.randn(1, one.count, tile, tile, generator=random)).float()
        images[one.name] = Image(pixels, torch.ones(1, tile, tile, dtype=torch.bool)).each(lambda t: t.to(device))
    return images


def milliseconds(forward: Callable[[], None], device: torch.device) -> float:
    """Median time of a forward, after warm-up; what it started on the device has ended."""
    times = []
    for _ in range(WARM_UP + TIMES):
        _wait(device)
        started = time.perf_counter()
        forward()
        _wait(device)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[WARM_UP:])


def peak_bytes(forward: Callable[[], None], device: torch.device) -> int | None:
    """The most that a forward holds at a time beyond what was allocated before; None on devices that cannot tell.

    On CUDA by the counters of torch's allocator. On the CPU by the profiler's record of each allocation and release:
    the highest running sum. It holds the tensors between layers, also inside an operator; weights are there before,
    and buffers that the libraries of the operators (oneDNN, BLAS) keep for themselves are not seen.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))  # the only public form that lists single allocations
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        held += record["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
