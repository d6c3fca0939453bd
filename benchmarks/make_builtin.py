"""The encoder in the box, made from open imagery and a larger ViT: `vfmseg/assets/builtin`.

    python benchmarks/make_builtin.py cut DATA_FOLDER TEACHER_FOLDER RUNS
    python benchmarks/make_builtin.py train DATA_FOLDER TEACHER_FOLDER RUNS     (goes on where it was stopped)
    python benchmarks/make_builtin.py score DATA_FOLDER TEACHER_FOLDER RUNS
    python benchmarks/make_builtin.py ship DATA_FOLDER TEACHER_FOLDER RUNS

`cut` takes the first blocks of the teacher and a part of the neurons of each MLP, and solves for the weights behind
them, so that each block answers as the teacher's does (`builtin_cut.py`), for several numbers of blocks. `train` is
`vfmseg pretrain` from there: the tokens follow the teacher's, layer by layer. `score` compares what came out with what
it came from, and with random weights. `ship` writes the best epoch in half precision, with its card
(`builtin_card.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and __package__ is None:  # started as a script, from anywhere
    sys.path.insert(0, str(ROOT))

BOX = ROOT / "vfmseg" / "assets" / "builtin"
MOST_BYTES = 14_000_000
# {folder: (blocks, neurons of an MLP for each channel)} of about the same number of parameters
CUTS = {"cut-4x3": (4, 3), "cut-5x2": (5, 2), "cut-7x1": (7, 1)}
CHOSEN = "cut-7x1"  # the best by nearest neighbours before training; by the linear score 5 blocks are, see the card
CUT_WINDOWS = 256

# {folders of DATA_FOLDER/open_imagery whose licences let weights be shipped: their part of the windows}. Towns weigh
# more, as forest and parkland prevail. Left out: oam_banepa, the place of the test tiles of oam_buildings, and false
# colour.
SOURCES: dict[str, float] = {
    "oam_zanzibar oam_nairobi oam_manila": 3,
    "dubai_train_scenes zurich_canton nrw_koeln netherlands_ortho": 4,
    "massgis massgis2 geonb usgs_hro_colorado": 1,
    "odm_boruszyn odm_mosaic_previews": 2,
    "odm_caliterra odm_garfield odm_lewis odm_brighton_beach usgs_california_coast": 1.5,
    "neon_aop neon_blan neon_harv neon_osbs neon_sjer neon_teak": 1.5,
    "sentinel2_korea sentinel2_india s2_carolina_coast s2_denmark s2_jambi_overview": 1,
    "naip_north_dakota naip_various landsat7_olinda landsat_bahamas landsat8_overview": 1,
}
# images, without labels, of the training tiles of labelled sets
LABELLED: dict[str, float] = {"oam_buildings/train/images": 5}


def recipe_of(data: Path, teacher: Path, runs: Path) -> dict[str, Any]:
    """The recipe of `vfmseg pretrain`."""
    scenes = [
        {"rgb": [f"{data}/open_imagery/{name}/*.jpg" for name in names.split()], "weight": weight}
        for names, weight in SOURCES.items()
    ]
    scenes += [{"rgb": f"{data}/{name}/*.jpg", "weight": weight} for name, weight in LABELLED.items()]
    return {
        "name": "builtin",
        "seed": 0,
        "data": {
            "modalities": {"rgb": {"bands": [1, 2, 3]}},
            "scenes": scenes,
            "tile": 224,
            "scale": [0.35, 1.4],
            "samples_per_epoch": 2048,
            "workers": 1,
        },
        "model": {"encoder": {"name": "dinov2", "checkpoint": str(runs / CHOSEN), "layers": [4, 7]}},
        "objectives": {
            "distill": {"teacher": {"name": "dinov2", "checkpoint": str(teacher), "layers": [4, 9]}},
        },
        "train": {
            "epochs": 11,
            "batch_size": 16,
            "precision": "bf16",
            "optimizer": {"lr": 1.0e-3, "encoder_lr": 3.0e-4, "warmup": 0.05},
            "augment": {"radiometry": {"rgb": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}}},
        },
        "probe": {
            "sets": {name: probe_set(data / name, classes) for name, classes in PROBES.items()},
            "every": 5,
        },
        "output_dir": str(runs / "run"),
    }


PROBES: dict[str, dict[int, str]] = {
    "oam_buildings": {0: "other", 1: "building"},
    "aerial_multiclass": {0: "building", 1: "land", 2: "road", 3: "vegetation", 4: "water"},
}


def probe_set(folder: Path, classes: dict[int, str]) -> dict[str, Any]:
    """A labelled set: what of it is fitted on, and what is scored on. Its test tiles are not among them."""
    table = {"table": str(folder / "split.csv"), "rgb": "image", "labels": "label"}
    splits = {split: {**table, "split": split} for split in ("train", "val")}
    return {"classes": classes, "ignore_index": 255, **splits}


def cut_teacher(data: Path, teacher: Path, runs: Path) -> None:
    """Write the candidates that training could start from into `runs`, and one of random numbers."""
    import torch
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    from benchmarks.builtin_cut import cut
    from vfmseg.build.pretraining import statistics_of
    from vfmseg.build.unlabelled import open_unlabelled, windows_of
    from vfmseg.data.windows import Draw
    from vfmseg.recipe import load_pretrain_recipe

    recipe = load_pretrain_recipe(write_recipe(data, teacher, runs))
    opened = open_unlabelled(recipe.data, statistics_of(recipe))
    (rgb,) = opened.inputs
    mean, std = (torch.tensor(values)[:, None, None] for values in (rgb.mean, rgb.std))
    windows = windows_of(recipe.data, opened, recipe.seed, None)
    images = torch.stack([(windows[Draw(0, n)].images["rgb"].pixels - mean) / std for n in range(CUT_WINDOWS)])
    whole = Dinov2Model.from_pretrained(teacher).eval()
    print("share of the variance of the teacher's tokens that is lost, block by block:")
    for name, (depth, ratio) in CUTS.items():
        student, lost = cut(whole, depth, ratio, recipe.data.tile, images)
        student.save_pretrained(runs / name)
        print(f"{name}, {depth} blocks with {ratio} x neurons: {', '.join(f'{share:.3f}' for share in lost)}")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config.from_pretrained(runs / CHOSEN)).save_pretrained(runs / "random")


def write_recipe(data: Path, teacher: Path, runs: Path) -> Path:
    """The file of the recipe."""
    path = runs / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe_of(data, teacher, runs), sort_keys=False), encoding="utf-8")
    return path


def train(data: Path, teacher: Path, runs: Path) -> None:
    """`vfmseg pretrain`, from the start or from where it was stopped."""
    begun = ["--resume"] if (runs / "run").is_dir() else []
    command = [sys.executable, "-m", "vfmseg.cli", "pretrain", str(write_recipe(data, teacher, runs)), *begun]
    raise SystemExit(subprocess.call(command))


def score(data: Path, teacher: Path, runs: Path) -> None:
    """Score candidates and references into `runs/scores.json`, and print them."""
    import torch

    from benchmarks.builtin_score import Candidate, as_table, scores

    torch.set_num_threads(1)
    best = runs / "run" / "best"
    candidates = [
        Candidate("random numbers", runs / "random"),
        *(Candidate(f"cut: {depth} blocks, {ratio} x neurons", runs / name) for name, (depth, ratio) in CUTS.items()),
        *([Candidate("trained: what ships", best)] if best.is_dir() else []),
        *(Candidate(f"the teacher, block {layer}", teacher, layer) for layer in (4, 6, 9, 12)),
    ]
    recipe = write_recipe(data, teacher, runs)
    rows = [(one.title, scores(recipe, one)) for one in candidates]
    (runs / "scores.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(as_table(rows))


def ship(data: Path, teacher: Path, runs: Path) -> None:
    """Write the best epoch into the package, in half precision and with its card."""
    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks.builtin_card import NOTICE, card

    best = runs / "run" / "best"
    tensors = load_file(best / "model.safetensors")
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    config = json.loads((best / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if not key.startswith("_")} | {"dtype": "float16"}
    BOX.mkdir(parents=True, exist_ok=True)
    save_file(half, BOX / "model.safetensors", {"format": "pt"})
    (BOX / "model.safetensors").chmod(0o644)
    (BOX / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (BOX / "NOTICE").write_text(NOTICE, encoding="utf-8")
    recipe = yaml.safe_dump(recipe_of(Path("DATA"), Path("TEACHER"), Path("RUNS")), sort_keys=False)
    (BOX / "README.md").write_text(card(runs, config, half, recipe), encoding="utf-8")
    size = sum(path.stat().st_size for path in BOX.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"{BOX}: {size} bytes, expected {MOST_BYTES} at most")
    print(f"{BOX}: {size / 1e6:.2f} MB")


VERBS = {"cut": cut_teacher, "train": train, "score": score, "ship": ship}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("data", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("runs", type=Path)
    options = parser.parse_args()
    VERBS[options.verb](options.data.resolve(), options.teacher.resolve(), options.runs.resolve())


if __name__ == "__main__":
    main()
