"""Test-time augmentation: the model sees each tile turned, mirrored or resized, and its answers are averaged.

A *view* is a quarter turn or mirror image of a tile, a *scale* the size at which it is shown; each scale is seen in
each view. Eight views at two scales are 16 calls of the model for a batch.
"""

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
"""(quarter turns against the clock, then mirrored left-right) of each view.

flips: as it is, left-right, half a turn, upside down. d4: all eight symmetries of the square.
"""


BLIND = 1e-6
"""Weight of an answer to a tile that shows no valid pixel at that scale.

Beside answers of weight 1 it is nothing; where all have this weight, they still have a mean. A weight of 0 would make
that 0 / 0.
"""


def averaged(vote: Predictor, views: str, scales: Sequence[float]) -> Predictor:
    """A predictor like `vote` whose answer is the mean over views and scales, turned and resized back onto the tile.

    `views`: a key of VIEWS. `scales`: 0.5 shows a tile of 512 px as one of 256. An answer counts as nothing where a
    scale leaves a tile no valid pixel: the model has seen nothing then.
    """
    chosen = VIEWS[views]
    if chosen == VIEWS["none"] and tuple(scales) == (1.0,):
        return vote

    def predict(tiles: Tiles) -> Tensor:
        side = next(iter(tiles.images.values())).valid.shape[-2:]
        total: Tensor | None = None  # (B, K, t, t)
        weights = torch.zeros(())  # (B, 1, 1, 1) after the first view
        for scale in scales:
            resized = {name: _resize(image, scale) for name, image in tiles.images.items()}
            weight = _weight(resized)
            for turns, mirror in chosen:
                seen = {name: image.each(partial(_turn, turns=turns, mirror=mirror)) for name, image in resized.items()}
                frame = _frame(turns, mirror, side, next(iter(resized.values())).valid.shape[-2:])
                answer = _turn_back(vote(Tiles(seen, tiles.windows, frame)), turns, mirror)
                if answer.shape[-2:] != side:
                    answer = F.interpolate(answer, size=side, mode="bilinear", antialias=scale > 1)
                answer = answer * weight.to(answer.device)
                total = answer if total is None else total + answer
                weights = weights + weight
        assert total is not None
        return total / weights.to(total.device)

    return predict


def _weight(images: Images) -> Tensor:
    """Weight (B, 1, 1, 1) of the answer to each tile: 1 if any modality has a valid pixel in it, else BLIND."""
    sees = known(images, "any").flatten(1).any(dim=1)
    return torch.where(sees, 1.0, BLIND)[:, None, None, None]


def _turn(x: Tensor, turns: int, mirror: bool) -> Tensor:
    """A view of (..., h, w)."""
    turned = torch.rot90(x, turns, dims=(-2, -1))
    return turned.flip(-1) if mirror else turned


def _frame(turns: int, mirror: bool, side: Sequence[int], resized: Sequence[int]) -> Tensor:
    """(2, 2) of `Tiles.frame`, for tiles of `side` pixels (rows, columns) that were `resized` and then turned."""
    zoom = torch.diag(torch.tensor([after / before for before, after in zip(side, resized, strict=True)]))
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    flip = torch.diag(torch.tensor([1.0, -1.0 if mirror else 1.0]))
    return flip @ torch.linalg.matrix_power(quarter, turns) @ zoom


def _turn_back(x: Tensor, turns: int, mirror: bool) -> Tensor:
    """The inverse of `_turn`: mirrored back first, as that was done last."""
    return torch.rot90(x.flip(-1) if mirror else x, -turns, dims=(-2, -1))


def _resize(image: Image, scale: float) -> Image:
    """An image of (B, C, h, w) pixels at a scale; valid where valid pixels have more than half of the weight.

    Pixels are means of valid pixels alone: sum of w * pixel over sum of w, w = 0 where a pixel is invalid. Without the
    division, nodata would darken the pixels beside it.
    """
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
