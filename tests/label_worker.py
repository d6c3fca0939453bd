"""A process that labels a scene with a model of one pixel: label_worker.py SCENE TARGET [--resume] [--slow]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from vfmseg.data.given import open_scene
from vfmseg.geo.bands import Bands
from vfmseg.inference.contracts import Model, Tiles
from vfmseg.inference.job import into_files, prepare
from vfmseg.inference.output import Output, Team
from vfmseg.inference.products import Products
from vfmseg.inference.ranks import joined
from vfmseg.inference.reading import stored_as
from vfmseg.recipe.predict import PredictSection

torch.set_num_threads(1)


def vote(tiles: Tiles) -> torch.Tensor:
    if "--slow" in sys.argv:
        time.sleep(0.01)
    values = tiles.images["x"].pixels[:, 0]
    return torch.stack([-((values - k) ** 2) for k in range(3)], dim=1).softmax(dim=1)


if __name__ == "__main__":
    opened = open_scene({"x": sys.argv[1]}, {"x": Bands()})
    products = Products((0, 1, 2), ("confidence",))
    layers = products.layers(("a", "b", "c"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), {"vfmseg_recipe": "toy"})
    job = prepare(
        [opened],
        stored_as(opened),
        {"x": 1},
        Model(vote, 3),
        products,
        2,
        PredictSection(tile=32),
    )
    with joined() as (rank, ranks):
        report = into_files(
            job, Output(Path(sys.argv[2]), resume="--resume" in sys.argv), layers, {}, Team(rank, ranks)
        )
    # unbuffered, as torchrun starts it, `print` writes a line and its end apart: lines of two processes would mix
    sys.stdout.write(f"rank{rank} {report.tiles}\n")
