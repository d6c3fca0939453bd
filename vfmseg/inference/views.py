"""Test-time augmentation: the model sees each tile turned, mirrored or resized, and its answers are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmseg.inference.contracts import Predictor

VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, mirror) for mirror in (False, True) for turns in range(4)),
}
"""(quarter turns, mirrored left-right) of each view; d4 are the eight symmetries of the square."""


def averaged(vote: Predictor, views: str, scales: Sequence[float]) -> Predictor:
    """A predictor that averages `vote` over views and scales, turned back onto the tile."""
    chosen = VIEWS[views]
    if chosen == VIEWS["none"] and tuple(scales) == (1.0,):
        return vote

    def predict(images: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        total: Tensor | None = None
        for scale in scales:
            for turns, mirror in chosen:
                seen = {name: _turn(_resize(image, scale), turns, mirror) for name, image in images.items()}
                masks = {name: _turn(_resize_mask(mask, scale), turns, mirror) for name, mask in valid.items()}
                answer = _turn_back(vote(seen, masks), turns, mirror)
                side = next(iter(images.values())).shape[-2:]
                if answer.shape[-2:] != side:
                    answer = F.interpolate(answer, size=side, mode="bilinear", antialias=scale > 1)
                total = answer if total is None else total + answer
        assert total is not None
        return total / (len(scales) * len(chosen))

    return predict


def _turn(x: Tensor, turns: int, mirror: bool) -> Tensor:
    turned = torch.rot90(x, turns, dims=(-2, -1))
    return turned.flip(-1) if mirror else turned


def _turn_back(x: Tensor, turns: int, mirror: bool) -> Tensor:
    return torch.rot90(x.flip(-1) if mirror else x, -turns, dims=(-2, -1))


def _resize(image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image
    return F.interpolate(image, size=_sides(image, scale), mode="bilinear", antialias=scale < 1)


def _resize_mask(mask: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return mask
    # valid where all that an enlarged or reduced pixel is made of is valid
    share = F.interpolate(mask[:, None].float(), size=_sides(mask, scale), mode="bilinear", antialias=scale < 1)
    return share[:, 0] > 1 - 1e-4


def _sides(x: Tensor, scale: float) -> list[int]:
    return [max(1, round(side * scale)) for side in x.shape[-2:]]
