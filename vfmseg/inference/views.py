"""Test-time augmentation: the model sees each tile turned, mirrored or resized, and its answers are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.data.image import Image, Images, known
from vfmseg.inference.contracts import Predictor, Tiles

VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, mirror) for mirror in (False, True) for turns in range(4)),
}
"""(quarter turns, mirrored left-right) of each view; d4 are the eight symmetries of the square."""


BLIND = 1e-6
"""Weight of a view that shows nothing valid: none beside views that do, and where no view does all count alike."""


def averaged(vote: Predictor, views: str, scales: Sequence[float]) -> Predictor:
    """A predictor that averages `vote` over views and scales, turned back onto the tile.

    At a scale that leaves a tile no valid pixel the model sees nothing, and its answer is not counted.
    """
    chosen = VIEWS[views]
    if chosen == VIEWS["none"] and tuple(scales) == (1.0,):
        return vote

    def predict(tiles: Tiles) -> Tensor:
        side = next(iter(tiles.images.values())).valid.shape[-2:]
        total: Tensor | None = None
        weights = torch.zeros(())
        for scale in scales:
            resized = {name: _resize(image, scale) for name, image in tiles.images.items()}
            weight = _weight(resized)
            for turns, mirror in chosen:
                seen = {name: image.each(partial(_turn, turns=turns, mirror=mirror)) for name, image in resized.items()}
                answer = _turn_back(vote(Tiles(seen, tiles.windows)), turns, mirror)
                if answer.shape[-2:] != side:
                    answer = F.interpolate(answer, size=side, mode="bilinear", antialias=scale > 1)
                answer = answer * weight.to(answer.device)
                total = answer if total is None else total + answer
                weights = weights + weight
        assert total is not None
        return total / weights.to(total.device)

    return predict


def _weight(images: Images) -> Tensor:
    """What the answer to each tile counts (B, 1, 1, 1): 1 where any modality has a valid pixel."""
    sees = known(images, "any").flatten(1).any(dim=1)
    return torch.where(sees, 1.0, BLIND)[:, None, None, None]


def _turn(x: Tensor, turns: int, mirror: bool) -> Tensor:
    turned = torch.rot90(x, turns, dims=(-2, -1))
    return turned.flip(-1) if mirror else turned


def _turn_back(x: Tensor, turns: int, mirror: bool) -> Tensor:
    return torch.rot90(x.flip(-1) if mirror else x, -turns, dims=(-2, -1))


def _resize(image: Image, scale: float) -> Image:
    """An image of (B, C, h, w) pixels at a scale: means of valid pixels, where these are more than a half."""
    if scale == 1:
        return image
    pixels, valid = image.pixels, image.valid
    sides = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
    # what is invalid may hold NaN, which times 0 is no 0
    kept = torch.where(valid[:, None], pixels, 0.0)
    sums, share = (
        F.interpolate(x, size=sides, mode="bilinear", antialias=scale < 1) for x in (kept, valid[:, None].float())
    )
    enough = share > 0.5
    return Image(torch.where(enough, sums / share, 0.0), enough[:, 0])
