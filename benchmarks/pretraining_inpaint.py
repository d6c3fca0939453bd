"""What MAE rebuilds of imagery of other places than it has learned from, beside what needs no learning.

A small ViT learns by `vfmseg pretrain` from open imagery with `normalise: none`, so that its decoder tells pixels. Then
windows of unseen places are masked as in training, and the error is taken over the hidden pixels: of each band the mean
squared error over the variance of that band in the windows of the place, so that 1 is the error of the place's mean
colour. Three seeds of masks; the encoder is of one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TILE, PATCH, RATIO = 112, 8, 0.75
SEEDS = (0, 1, 2)
WIDTH, DEPTH, HEADS = 192, 6, 3
EPOCHS, SAMPLES = 24, 2048
WINDOWS = 128
"""Of a place, at most, evenly among all that are whole."""
BATCH = 16

LEARNED: list[tuple[int, list[str]]] = [
    (4, ["dubai_train_scenes", "oam_manila", "oam_nairobi", "oam_zanzibar", "odm_boruszyn"]),
    (3, ["nrw_koeln", "zurich_canton", "massgis", "massgis2", "geonb", "netherlands_ortho", "usgs_hro_colorado"]),
    (2, ["neon_harv", "neon_osbs", "neon_sjer", "odm_brighton_beach", "odm_caliterra", "usgs_california_coast"]),
    (2, ["sentinel2_korea", "s2_carolina_coast", "s2_denmark"]),
]
"""(weight, folders of open imagery)."""
UNSEEN = {
    "Banepa, town, 0.15 m": "oam_buildings/test/images",
    "Emirates, other scenes": "aerial_multiclass/test/images",
    "Teakettle, conifers, 0.1 m": "open_imagery/neon_teak",
    "India, Sentinel-2, 10 m": "open_imagery/sentinel2_india",
}
"""{place: its folder}; nothing of these places is learned from, but of the Emirates other scenes."""


# ------------------------------------------------------------------------------------------------------------ training


def recipe_of(data: Path, work: Path, epochs: int, samples: int) -> dict[str, Any]:
    """The recipe of the pretraining."""
    scenes = [
        {"rgb": [str(data / "open_imagery" / folder) for folder in folders], "weight": weight}
        for weight, folders in LEARNED
    ]
    return {
        "name": "inpaint",
        "data": {"modalities": {"rgb": {"bands": [1, 2, 3]}}, "scenes": scenes, "tile": TILE, "scale": [0.7, 2.0],
                 "samples_per_epoch": samples},
        "model": {"encoder": {"name": "new", "patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS}},
        "objectives": {"mae": {"ratio": RATIO, "normalise": "none"}},
        "train": {"epochs": epochs, "batch_size": BATCH, "optimizer": {"lr": 1.0e-3}},
        "pictures": 4,
        "output_dir": str(work / "run"),
    }  # fmt: skip


def train(data: Path, work: Path, epochs: int, samples: int) -> None:
    """Train, or go on with what has been trained there."""
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps(recipe_of(data, work, epochs, samples), indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "vfmseg.cli", "pretrain", str(recipe)]
    command += ["--resume"] if (work / "run" / "state.pt").is_file() else []
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env={**os.environ, **threads}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def trained(work: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The encoder and the objective with its decoder, as the run has left them, and where the run is."""
    import torch

    from vfmseg.build.pretraining import build_encoder, objectives_of
    from vfmseg.data.inputs import Input
    from vfmseg.disk.tensors import load_strictly
    from vfmseg.geo.bands import Bands
    from vfmseg.recipe import load_pretrain_recipe
    from vfmseg.training.step import Step

    path = work / "run" / "state.pt"
    content = torch.load(path, map_location="cpu", weights_only=True)
    of = content["origin"]["inputs"]["rgb"]
    inputs = (Input("rgb", Bands((1, 2, 3)), 3, of["dtype"], "dataset", tuple(of["mean"]), tuple(of["std"])),)
    recipe = load_pretrain_recipe(work / "recipe.yaml", [])
    model = build_encoder(recipe, inputs)
    step = Step(model, objectives_of(recipe, inputs, model))
    load_strictly(content["tensors"], step.kept(), path)
    state, steps = content["state"], [one for one in content["state"]["records"] if one["kind"] == "step"]
    about = {
        "epochs": state["epoch"], "of": recipe.train.epochs, "samples": BATCH * state["step"],
        "minutes": round(state["seconds"] / 60, 1), "seed": recipe.seed,
        "loss": round(statistics.mean(one["loss"] for one in steps[-50:]), 4) if steps else None,
    }  # fmt: skip
    return model.eval(), step.objectives["mae"].eval(), about


# ------------------------------------------------------------------------------------------------------------- scoring


def windows_of(folder: Path) -> np.ndarray:
    """float32 (N, 3, TILE, TILE) in image units: windows side by side, none with invalid pixels."""
    from vfmseg.build.unlabelled import open_scenes
    from vfmseg.geo.grid import Window
    from vfmseg.recipe.unlabelled import UnlabelledSection

    section = UnlabelledSection.model_validate(
        {"modalities": {"rgb": {"bands": [1, 2, 3]}}, "scenes": {"rgb": str(folder)}, "tile": TILE}
    )
    found = []
    for scene in open_scenes(section):
        for top in range(0, scene.grid.height - TILE + 1, TILE):
            for left in range(0, scene.grid.width - TILE + 1, TILE):
                chip = scene.read(Window(top, left, TILE, TILE))["rgb"]
                if chip.valid.all():
                    found.append(np.asarray(chip.pixels, dtype=np.float32))
    chosen = np.linspace(0, len(found) - 1, min(WINDOWS, len(found))).round().astype(int)
    return np.stack([found[number] for number in chosen])


def masks_of(count: int, seed: int) -> np.ndarray:
    """Bool (count, rows, columns) of patches, drawn as in training; True is hidden."""
    from vfmseg.data.masks import hidden_count, random_mask

    side = TILE // PATCH
    hidden = hidden_count(RATIO, side * side, "patches")
    return np.stack([random_mask(side, side, hidden, np.random.default_rng([seed, number])) for number in range(count)])


def by_mae(model: Any, objective: Any, windows: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Windows as MAE rebuilds them, in image units."""
    import torch

    from vfmseg.data.image import Image
    from vfmseg.data.sample import Batch

    stem, found = model.stem("rgb"), []
    mean, std = (one.numpy()[:, None, None] for one in (stem.mean, stem.std))
    for first in range(0, len(windows), BATCH):
        pixels = torch.from_numpy(windows[first : first + BATCH])
        image = Image(pixels, torch.ones(len(pixels), TILE, TILE, dtype=torch.bool))
        batch = Batch({"rgb": image}, None, mask=torch.from_numpy(masks[first : first + BATCH]))
        found.append(objective.rebuilt(model, batch)["rgb"].numpy() * std + mean)
    return np.concatenate(found)


def mean_colour(window: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean of the visible patches, everywhere."""
    visible = ~of_pixels(mask)
    return np.broadcast_to(window[:, visible].mean(axis=1)[:, None, None], window.shape)


def nearest_patch(window: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of each patch the mean of the nearest visible one."""
    from scipy.ndimage import distance_transform_edt

    means = window.reshape(len(window), TILE // PATCH, PATCH, TILE // PATCH, PATCH).mean(axis=(2, 4))
    nearest = distance_transform_edt(mask, return_distances=False, return_indices=True)
    return means[:, nearest[0], nearest[1]].repeat(PATCH, 1).repeat(PATCH, 2)


def nearest_pixel(window: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of each pixel the nearest visible one."""
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(of_pixels(mask), return_distances=False, return_indices=True)
    return window[:, nearest[0], nearest[1]]


def linear(window: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Linear interpolation between visible pixels (scipy's griddata); beyond them the nearest one."""
    from scipy.interpolate import griddata

    hidden = of_pixels(mask)
    found = nearest_pixel(window, mask).copy()
    inside = griddata(np.argwhere(~hidden), window[:, ~hidden].T, np.argwhere(hidden), method="linear").T
    found[:, hidden] = np.where(np.isnan(inside), found[:, hidden], inside)
    return found


def harmonic(window: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each hidden pixel the mean of its neighbours (Laplace's equation), solved exactly."""
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import splu

    hidden = of_pixels(mask)
    numbers = np.arange(TILE * TILE).reshape(TILE, TILE)
    pairs = np.concatenate(
        [np.stack([a.ravel(), b.ravel()]) for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]))],
        axis=1,
    )
    beside = coo_matrix((np.ones(2 * pairs.shape[1]), np.concatenate([pairs, pairs[::-1]], axis=1))).tocsr()
    laplace = (diags(np.asarray(beside.sum(axis=1)).ravel()) - beside).tocsr()[hidden.ravel()]
    known = window.reshape(len(window), -1)[:, ~hidden.ravel()].T.astype(np.float64)
    solved = splu(laplace[:, hidden.ravel()].tocsc()).solve(-laplace[:, ~hidden.ravel()] @ known)
    found = window.copy()
    found[:, hidden] = solved.T
    return found


def of_pixels(mask: np.ndarray) -> np.ndarray:
    """Bool (TILE, TILE) of a mask of patches."""
    return mask.repeat(PATCH, 0).repeat(PATCH, 1)


PLAIN: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean of the visible patches": mean_colour,
    "nearest visible patch, its mean": nearest_patch,
    "nearest visible pixel": nearest_pixel,
    "linear between visible pixels (griddata)": linear,
    "harmonic (Laplace)": harmonic,
}
"""{method: one window and its mask -> the window rebuilt}."""


def score(data: Path, work: Path) -> dict[str, Any]:
    """{"sets": {place: {method: [of each seed, of each band the error]}}, and how it was trained}."""
    model, objective, about = trained(work)
    found: dict[str, Any] = {"training": about, "seeds": list(SEEDS), "ratio": RATIO, "windows": {}, "sets": {}}
    for place, folder in UNSEEN.items():
        windows = windows_of(data / folder)
        variance = windows.var(axis=(0, 2, 3))
        found["windows"][place] = len(windows)
        errors: dict[str, list[list[float]]] = {}
        for seed in SEEDS:
            masks = masks_of(len(windows), seed)
            hidden = np.stack([of_pixels(mask) for mask in masks])
            rebuilt = {"MAE": by_mae(model, objective, windows, masks)}
            for method, how in PLAIN.items():
                rebuilt[method] = np.stack([how(*pair) for pair in zip(windows, masks, strict=True)])
            for method, told in rebuilt.items():
                squares = np.square(told - windows, dtype=np.float64).transpose(1, 0, 2, 3)[:, hidden].mean(axis=1)
                errors.setdefault(method, []).append([round(float(one), 5) for one in squares / variance])
        found["sets"][place] = errors
        print(f"    {place}", file=sys.stderr, flush=True)
    return found


def lines_of_inpaint(found: Mapping[str, Any]) -> Iterator[str]:
    """The table."""
    if not found:
        return
    of, setting = found["training"], found["setting"]
    yield (
        f"What is rebuilt of unseen places: squared error of the hidden pixels over the variance of the place, mean of "
        f"the bands; {found['ratio']:.0%} of the {PATCH}-px patches of {TILE}-px windows hidden, masks of the seeds "
        f"{', '.join(map(str, found['seeds']))} (mean ± their standard deviation). A ViT ({WIDTH} x {DEPTH}) has seen "
        f"{of['samples']:,} windows of other places in {of['minutes']:g} minutes ({of['epochs']} of {of['of']} epochs, "
        f"seed {of['seed']}); {setting['machine']}, torch {setting['torch']}:"
    )
    yield ""
    heads = [f"{place} ({found['windows'][place]} windows)" for place in found["sets"]]
    yield f"| | {' | '.join(heads)} |"
    yield f"|---|{'--:|' * len(found['sets'])}"
    for method in ("MAE", *PLAIN):
        cells = []
        for errors in found["sets"].values():
            each = [statistics.mean(bands) for bands in errors[method]]
            cells.append(f"{statistics.mean(each):.3f} ± {statistics.stdev(each):.3f}")
        yield f"| {method} | {' | '.join(cells)} |"
