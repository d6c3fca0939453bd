"""The demo: train on real imagery that ships with the package, measure on an unseen place, label it, show it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from vfmseg.disk.files import whole_file, write_json
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.lock import LOCK, held
from vfmseg.errors import CheckpointError, RecipeError
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.terminal import say

ASSETS = Path(__file__).parent / "assets" / "demo"
SCENE = "banepa_b"  # what is labelled and shown: dense town and fields, of a place that is not trained on


def run_demo(output: Path, encoder: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """The content of `metrics.json`: scores on the unseen place, what training has told, minutes.

    Writes that file, `labels.tif` and `preview.png` into `output`, and the training run into `output/run`. `encoder`: a
    folder or hub id of a SAM, DINOv2 or CLIP encoder; None: the one in the package. It stays frozen and learns through
    LoRA. RecipeError if `output` holds anything and `overwrite` is not said.
    """
    started = time.perf_counter()
    with held(output / LOCK, output, "the demo"):
        if not overwrite and set(output.iterdir()) - {output / LOCK}:
            raise RecipeError(
                f"--output {output} is not empty; replace an earlier demo by --overwrite, or choose another"
            )
        return _run(output, encoder, overwrite, started)


def _run(output: Path, encoder: str | None, overwrite: bool, started: float) -> dict[str, Any]:
    """Train, measure, label, draw; see `run_demo`."""
    recipe = demo_recipe(output, encoder)
    from vfmseg.finetune import finetune

    trained = finetune(recipe, overwrite=overwrite)
    from vfmseg.metrics import mean_text
    from vfmseg.segmenter import Segmenter

    segmenter = Segmenter.from_pretrained(recipe.output_dir / "best")
    scores = segmenter.evaluate(recipe, "test")
    labels = output / "labels.tif"
    segmenter.predict(ASSETS / "images" / f"{SCENE}.tif", output=labels, overwrite=overwrite)
    draw_preview(output / "preview.png", recipe, labels)
    result = {"test": scores, "training": trained, "minutes": round((time.perf_counter() - started) / 60, 2)}
    write_json(output / "metrics.json", result)
    building = scores["classes"]["building"]["iou"]
    say(
        f"unseen place (Banepa, Nepal): mean IoU {mean_text(scores)}, building IoU {building:.3f}, after "
        f"{result['minutes']} minutes\nlook at {output / 'preview.png'} and {labels}"
    )
    return result


def demo_recipe(output: Path, encoder: str | None = None) -> Recipe:
    """The recipe of the demo, for another encoder with a shorter schedule if one is named."""
    # changes are read as YAML, and JSON is YAML: in its quotes a path may hold a colon, a # or a quote
    changes = [f"output_dir={json.dumps(str((output / 'run').absolute()), ensure_ascii=False)}"]
    if encoder is not None:
        local = Path(encoder).expanduser()
        checkpoint = local.absolute() if local.is_dir() else encoder
        # tiles of 256 px are seen as 336 px, which is whole patches of 14 (DINOv2, CLIP) and of 16 px (SAM, CLIP)
        section = {"name": encoder_family(encoder), "checkpoint": str(checkpoint), "upscale": 1.3125}
        changes += [
            f"model.encoder={json.dumps(section, ensure_ascii=False)}",
            "model.decoder={name: fpn, channels: 64}",
            "train.epochs=2",
            "train.optimizer.lr=1.0e-3",
        ]
    return load_recipe(ASSETS / "recipe.yaml", changes)


def encoder_family(encoder: str) -> str:
    """Name of the family of an encoder (sam, dinov2, clip), told without loading it.

    Of a folder by its config.json, of a hub id by the catalog, or by the name of a family in it.
    """
    from vfmseg.catalog import CATALOG, FAMILIES, PUBLISHED_FAMILIES

    folder = Path(encoder).expanduser()
    if (folder / "config.json").is_file():
        try:
            kind = read_json(folder / "config.json")["model_type"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{folder / 'config.json'}: not the config of an encoder; copy it again") from None
        known = {kind: name for name in PUBLISHED_FAMILIES for kind in FAMILIES[name].model_types}
        if kind in known:
            return known[kind]
        raise CheckpointError(f"{folder}: model_type = {kind}; expected one of {', '.join(known)}")
    if encoder in CATALOG:
        return CATALOG[encoder].family
    found = [family for family in PUBLISHED_FAMILIES if family in encoder.lower()]
    hub_id = encoder.count("/") == 1 and not encoder.startswith((".", "~", "/"))
    if not found or not hub_id or folder.is_dir():
        raise RecipeError(
            f"--encoder {encoder}: neither a folder with a config.json nor a known hub id; see checkpoints.md"
        )
    return found[0]


def draw_preview(path: Path, recipe: Recipe, labels: Path) -> None:
    """Write a PNG of about 1500 x 560 pixels: image, true labels and predicted labels side by side."""
    import matplotlib

    matplotlib.use("Agg")  # draws into memory; other ways need a display
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from vfmseg.build.data import bands_of, label_map_of
    from vfmseg.geo.classes import IGNORE
    from vfmseg.geo.grid import Window
    from vfmseg.geo.labels import LabelRaster
    from vfmseg.geo.reader import Raster

    label_map = label_map_of(recipe)
    with Raster(str(ASSETS / "images" / f"{SCENE}.tif"), bands_of(recipe)["rgb"]) as raster:
        whole = Window(0, 0, raster.grid.height, raster.grid.width)
        image = raster.read(whole).pixels.transpose(1, 2, 0).astype(np.uint8)
    truth = LabelRaster(str(ASSETS / "labels" / f"{SCENE}.tif"), label_map).read(whole)
    predicted = LabelRaster(str(labels), label_map).read(whole)
    classes = [recipe.data.classes[i] for i in label_map.ids]
    # white last, so that index -1 is white: pixels without a label
    colors = np.array([*(c.color for c in classes), (255, 255, 255)], dtype=np.uint8)
    figure = Figure(figsize=(15, 5.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    pictures = {"image": image, "truth": colors[np.where(truth == IGNORE, -1, truth)]}
    pictures["prediction"] = colors[np.where(predicted == IGNORE, -1, predicted)]
    for panel, (title, picture) in zip(panels, pictures.items(), strict=True):
        panel.imshow(picture)
        panel.set_title(title)
        panel.set_axis_off()
    handles = [Patch(color=np.array(c.color) / 255, label=c.name) for c in classes]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with whole_file(path) as aside:
        figure.savefig(aside, format="png")
