"""Two versions of vfmseg against each other: the same bytes, and how fast a large scene is labelled.

    git worktree add ../before COMMIT
    python benchmarks/versions.py same ../before .                          # a minute
    python benchmarks/scene.py make FOLDER --sizes 4096
    python benchmarks/versions.py speed ../before . FOLDER --rounds 5       # some minutes of a quiet machine

`same` trains three small segmenters (8-bit RGB, 16 bit with a frame of nodata, floating point with NaN) and labels a
scene of each with both versions, the newer one also with the segmenters of the older; it prints which digests differ,
and ends with 1 if any does. `speed` measures both in turn, rounds and order alternating, by `scene.py run --model conv
--sizes 4096 --only vfmseg` of each tree, and prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.transform import from_origin

KINDS = ("rgb8", "u16", "f32")
RESULT = "conv.4096x4096.*.vfmseg.*.json"


def picture(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on dark ground: uint8 (3, H, W), and its labels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = (y - height * random.uniform(0.3, 0.7)) ** 2 + (x - width * random.uniform(0.3, 0.7)) ** 2 < height**2 / 12
    image = np.where(disc, 170, 70)[None] + random.normal(0, 20, (3, height, width))
    return image.clip(1, 254).astype(np.uint8), disc.astype(np.uint8)


def stored(kind: str, image: np.ndarray) -> tuple[np.ndarray, float | None]:
    """The picture in one of the kinds, and its nodata value."""
    if kind == "rgb8":
        return image, None
    if kind == "u16":
        wide = np.concatenate([image, image[:1]]).astype(np.uint16) * 40
        wide[:, :5] = 0
        return wide, 0
    real = image.astype(np.float32) / 7
    real[0, :4] = np.nan
    return real, None


def save(path: Path, array: np.ndarray, place: int, nodata: float | None = None) -> None:
    """Write a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = array[None] if array.ndim == 2 else array
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2], dtype=bands.dtype,
        crs="EPSG:32633", transform=from_origin(500000 + 10000 * place, 5000000, 10, 10), nodata=nodata,
    ) as file:  # fmt: skip
        file.write(bands)


def make(folder: Path) -> None:
    """Scenes of all kinds: two to train on, one to choose by, one to label."""
    for kind in KINDS:
        for number, split in enumerate(("train", "train", "val")):
            image, labels = picture(number, 64, 64)
            array, nodata = stored(kind, image)
            save(folder / kind / split / "images" / f"s{number}.tif", array, number, nodata)
            save(folder / kind / split / "labels" / f"s{number}.tif", labels, number)
        array, nodata = stored(kind, picture(9, 300, 411)[0])
        save(folder / kind / "scene.tif", array, 9, nodata)


def digests(folder: Path, who: str) -> dict[str, str]:
    """{what: digest} of trainings and maps by the vfmseg that this process imports."""
    import torch

    torch.set_num_threads(1)
    from vfmseg.finetune import finetune
    from vfmseg.inference.how import How
    from vfmseg.recipe import load_recipe
    from vfmseg.segmenter import Segmenter

    found = {}
    for kind in KINDS:
        sources = {
            s: {"rgb": f"{kind}/{s}/images/*.tif", "labels": f"{kind}/{s}/labels/*.tif"} for s in ("train", "val")
        }
        recipe: dict[str, Any] = {
            "name": "same",
            "data": {"classes": {0: "ground", 1: "disc"}, "modalities": {"rgb": {}}, "tile": 32, **sources},
            "model": {"encoder": {"name": "builtin"}, "adapter": {"name": "full"}, "decoder": {"name": "fpn"}},
            "train": {"epochs": 1, "batch_size": 4},
            "output_dir": f"{who}-{kind}",
        }
        (folder / f"{who}-{kind}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        finetune(load_recipe(folder / f"{who}-{kind}.yaml"))
        state = torch.load(folder / f"{who}-{kind}" / "state.pt", map_location="cpu", weights_only=True)["model"]
        tensors = b"".join(state[name].numpy().tobytes() for name in sorted(state))
        found[f"{kind}: tensors"] = hashlib.sha256(tensors).hexdigest()
        for by in sorted({"before", who}):
            segmenter = Segmenter.from_pretrained(folder / f"{by}-{kind}" / "best")
            target = folder / f"{who}-{by}-{kind}.tif"
            files = segmenter.label(folder / kind / "scene.tif", target, How(tile=64), extras=["confidence"]).files
            for name, file in files.items():
                with rasterio.open(file) as stored_map:
                    role = "own" if by == who else "older"
                    found[f"{kind}: {name} of the {role} segmenter"] = hashlib.sha256(stored_map.read()).hexdigest()
    return found


def same(options: argparse.Namespace) -> int:
    """Compare what both versions make."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        found = {}
        for who, tree in (("before", options.before), ("now", options.now)):
            command = [sys.executable, __file__, "digests", str(folder), who]
            subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, check=True, stdout=subprocess.DEVNULL)
            found[who] = json.loads((folder / f"{who}.json").read_text(encoding="utf-8"))
    wrong = 0
    for what, digest in found["now"].items():
        expected = found["before"][what.replace("older", "own")]
        wrong += digest != expected
        print(f"{what:<45}{'same' if digest == expected else 'DIFFERS'}")
    return int(bool(wrong))


def speed(options: argparse.Namespace) -> int:
    """Measure both versions in turn."""
    trees = {"before": options.before, "now": options.now}
    seconds: dict[str, list[float]] = {who: [] for who in trees}
    for turn in range(options.rounds):
        for who in sorted(trees, reverse=bool(turn % 2)):
            results = trees[who] / "benchmarks" / "results" / "scene"
            kept = {file: file.read_bytes() for file in results.glob(RESULT)}
            for file in kept:
                file.unlink()
            command = [sys.executable, "benchmarks/scene.py", "run", str(options.folder), "--model", "conv"]
            command += ["--sizes", "4096", "--pairs", "1", "--only", "vfmseg"]
            try:
                environment = {**os.environ, "PYTHONPATH": str(trees[who])}
                subprocess.run(command, cwd=trees[who], env=environment, check=True, capture_output=True)
                seconds[who] += [json.loads(file.read_text())["seconds"] for file in results.glob(RESULT)]
            finally:
                for file in results.glob(RESULT):
                    file.unlink()
                for file, content in kept.items():
                    file.write_bytes(content)
        print(
            f"round {turn + 1}: " + ", ".join(f"{who} {times[-1]:.2f} s" for who, times in seconds.items()), flush=True
        )
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    ratio = medians["now"] / medians["before"]
    print(f"medians: before {medians['before']:.2f} s, now {medians['now']:.2f} s, ratio {ratio:.3f}")
    return 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("same", "speed"):
        options = verbs.add_parser(verb)
        options.add_argument("before", type=lambda text: Path(text).resolve())
        options.add_argument("now", type=lambda text: Path(text).resolve())
        if verb == "speed":
            options.add_argument("folder", type=lambda text: Path(text).resolve())
            options.add_argument("--rounds", type=int, default=5)
    child = verbs.add_parser("digests")  # for `same`, in a process of its own
    child.add_argument("folder", type=Path)
    child.add_argument("who")
    chosen = parser.parse_args()
    if chosen.verb == "digests":
        found = digests(chosen.folder, chosen.who)
        (chosen.folder / f"{chosen.who}.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    return same(chosen) if chosen.verb == "same" else speed(chosen)


if __name__ == "__main__":
    sys.exit(main())
