"""One version's part of `versions.py same`, in a process of its own: trains, labels, goes on, by the command line.

    PYTHONPATH=TREE python benchmarks/versions_child.py FOLDER before       # then the same with `now`

FOLDER is one of versions_make.py. `before` also keeps what a kill in the second epoch would leave of each run; `now`
labels with the segmenters of `before` too, and goes on with those runs. FOLDER/WHO.json tells the digests.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import rasterio
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from versions_make import KINDS  # noqa: E402

EXTRAS = ("--confidence", "--uncertainty", "--probabilities")
VECTOR = importlib.util.find_spec("pyogrio") is not None
_stops: dict[Path, Path] = {}  # {run folder: where its copy goes}


def digest(content: bytes) -> str:
    """Short SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Digest of tensors as a set: by shape and bytes, whatever they are called and in whatever order they come."""
    parts = sorted((tuple(t.shape), t.detach().contiguous().numpy().tobytes()) for t in tensors)
    return digest(b"".join(repr(shape).encode() + content for shape, content in parts))


def vfmseg(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; exit code, stdout, stderr."""
    from vfmseg.cli import main

    said, told = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(said), redirect_stderr(told):
        sys.argv = ["vfmseg", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            code = end.code
        except Exception as error:  # a bug: the command would end with a traceback
            told.write(f"{type(error).__name__}: {error}\n")
            code = 1
    return int(code or 0), said.getvalue(), told.getvalue()


def done(*arguments: object) -> str:
    """The same for what must work: stdout."""
    code, said, told = vfmseg(*arguments)
    if code:
        raise SystemExit(f"vfmseg {' '.join(map(str, arguments))} ended with {code}:\n{told}")
    return said


def keep_stopped(event: str, _: tuple[object, ...]) -> None:
    """An audit hook: the first rename after the first epoch is that of the second one, and a copy is kept."""
    if event == "os.rename":
        for run, copy in list(_stops.items()):
            if (run / "best").is_dir() and (run / "state.pt").is_file():
                del _stops[run]
                shutil.copytree(run, copy)


def reached(run: Path) -> dict[str, str]:
    """{what: digest} of a finished run: its tensors, and the losses and scores of its way."""
    files = (run / "last").rglob("*.safetensors")
    trained = [tensor for file in files for tensor in load_file(file).values()]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    way = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    return {"weights": digest_of(trained), "losses and scores": digest(json.dumps(way).encode())}


def labelled(folder: Path, kind: str, segmenter: Path, target: Path) -> dict[str, Any]:
    """{product: digests of pixels and of the whole file, tags} of the maps of a scene, and the outlines."""
    arguments: list[object] = [segmenter, folder / kind / "scene.tif", "-o", target / "labels.tif", "--tile", 64]
    arguments += [*EXTRAS, *KINDS[kind].predict]
    if KINDS[kind].heights:
        arguments += ["--modality", f"dem={folder / kind / 'dem.tif'}"]
    if VECTOR:
        arguments += ["--polygons", ".geojson"]
    target.mkdir(parents=True)
    done("predict", *arguments)
    found: dict[str, Any] = {}
    for path in sorted(target.iterdir()):
        found[path.name] = {"file": digest(path.read_bytes())}
        if path.suffix == ".tif":
            with rasterio.open(path) as file:
                form = (file.crs.to_string(), tuple(file.transform), file.nodata, file.dtypes, file.descriptions)
                bands = [file.tags(band) for band in file.indexes]
                colors = digest(repr(file.colormap(1)).encode()) if path.name == "labels.tif" else None
                found[path.name] |= {
                    "pixels": digest(file.read().tobytes() + file.dataset_mask().tobytes()),
                    "form": repr((form, bands, colors)),
                    "tags": file.tags(),
                }
    return found


def main() -> None:
    """Do the part of one version."""
    folder, who = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    sys.addaudithook(keep_stopped)
    found: dict[str, Any] = {}
    for kind in KINDS:
        recipe, run, stopped = folder / f"{kind}.yaml", folder / f"{who}-{kind}", folder / f"stopped-{kind}"
        if who == "before":
            _stops[run] = stopped
        done("finetune", recipe, f"output_dir={run}")
        found[kind] = {"run": reached(run)}
        for by in sorted({"before", who}):
            best = folder / f"{by}-{kind}" / "best"
            found[kind][f"maps by {by}"] = labelled(folder, kind, best, folder / f"maps-{who}-{by}" / kind)
            scores = done("evaluate", best, recipe, "--split", "val", "--json")
            found[kind][f"maps by {by}"]["scores"] = {"file": digest(scores.encode())}
        if who == "now":
            code, _, told = vfmseg("finetune", recipe, f"output_dir={stopped}", "--resume")
            found[kind]["resumed"] = {"code": code, "told": told, "run": {} if code else reached(stopped)}
    (folder / f"{who}.json").write_text(json.dumps(found, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
