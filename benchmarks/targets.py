"""What a teacher's tokens hold that is not the same in all of them, and how much of that a student has learned.

    python benchmarks/targets.py TEACHER_FOLDER --layers 9 12 --fit "PLACE_ONE/*.jpg" --score "PLACE_TWO/*.jpg"
    python benchmarks/targets.py TEACHER_FOLDER --layers 9 12 ... --students RUN/last RANDOM_FOLDER

Folders are of Dinov2 encoders in transformers' form; images are cut into tiles of 112 px. Of each layer of the
teacher, its tokens normed over their channels as distillation takes them, it prints the mean cosine of a token of
`--score` to the mean token of `--fit`: near 1 little is left to tell tokens apart. Of each student it prints how much
of the variance of these tokens a ridge regression on its last tokens explains, fitted on `--fit`: 1 is all of it, 0 is
what the mean explains, and below 0 what was fitted does not hold in the other place.
"""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor
from torch.nn import functional as F

if __name__ == "__main__" and __package__ is None:  # started as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vfmseg.catalog import IMAGENET
from vfmseg.encoders.backbone import plain_norm
from vfmseg.encoders.build import build_backbone

SIDE = 112
RIDGE = 1e-2
"""Of the squared weights, beside the mean square of standardised features."""


def tiles(pattern: str, most: int) -> Tensor:
    """float32 (N, 3, SIDE, SIDE), normalised: whole tiles of the images, at most so many, spread over all of them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    found = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        pixels = torch.from_numpy(np.array(Picture.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
        rows, columns = (side // SIDE for side in pixels.shape[1:])
        whole = ((pixels - mean) / std)[:, : rows * SIDE, : columns * SIDE]
        found += list(
            whole.unflatten(1, (rows, SIDE)).unflatten(3, (columns, SIDE)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        )
    if not found:
        raise SystemExit(f"{pattern}: no image of at least {SIDE} x {SIDE} pixels")
    return torch.stack(found[:: -(-len(found) // most)])


@torch.no_grad()
def tokens(folder: str, layers: list[int] | None, images: Tensor) -> list[Tensor]:
    """float64 (tokens, channels) of each layer, the last if none are named: normed over the channels."""
    backbone = build_backbone("dinov2", folder, layers)
    found: list[list[Tensor]] = [[] for _ in backbone.layers]
    for batch in images.split(16):
        now = backbone.embed(batch, None, torch.ones(len(batch), SIDE, SIDE))
        for depth in range(1, backbone.layers[-1] + 1):
            now = backbone.step(depth, now)
            if depth in backbone.layers:
                found[backbone.layers.index(depth)].append(plain_norm(backbone.tap(now).movedim(1, -1)).flatten(0, 2))
    return [torch.cat(one).double() for one in found]


def explained(features: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> float:
    """Share of the variance of the second targets that a regression on the first ones explains."""
    mean, std = features[0].mean(dim=0), features[0].std(dim=0)
    one, two = ((part - mean) / std for part in features)
    centre = targets[0].mean(dim=0)
    square = one.T @ one + RIDGE * len(one) * torch.eye(one.shape[1], dtype=one.dtype)
    guess = two @ torch.linalg.solve(square, one.T @ (targets[0] - centre)) + centre
    return float(1 - (targets[1] - guess).square().sum() / (targets[1] - centre).square().sum())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--layers", nargs="+", type=int, required=True)
    parser.add_argument("--fit", required=True, help="pattern of images")
    parser.add_argument("--score", required=True, help="pattern of images, of another place")
    parser.add_argument("--students", nargs="*", default=[])
    parser.add_argument("--tiles", type=int, default=200, help="of each pattern, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = [tiles(pattern, options.tiles) for pattern in (options.fit, options.score)]
    fit, score = (tokens(options.teacher, options.layers, part) for part in images)
    print(
        f"| tokens of {len(images[0])} and {len(images[1])} tiles | "
        + " | ".join(f"layer {n}" for n in options.layers)
        + " |"
    )
    print("|---|" + "--:|" * len(options.layers))
    near = [
        F.cosine_similarity(one.mean(dim=0).expand_as(two), two).mean() for one, two in zip(fit, score, strict=True)
    ]
    print("| cosine to the mean token | " + " | ".join(f"{value:.2f}" for value in near) + " |")
    for student in options.students:
        mine = [tokens(student, None, part)[-1] for part in images]
        found = [explained((mine[0], mine[1]), pair) for pair in zip(fit, score, strict=True)]
        print(f"| explained by {student} | " + " | ".join(f"{value:.2f}" for value in found) + " |", flush=True)


if __name__ == "__main__":
    main()
