"""How overlapping tiles are joined: strictly positive tile weights, divided by their exact sum at every pixel.

A weight that reaches zero at the tile's edge leaves pixels without any vote at the border of the scene, and an
epsilon in the division pulls values there towards zero; both show as frames in the map. So windows are sampled
at pixel centres (never at the zero of the curve) and each pixel is divided by the sum of what it received.
"""

from __future__ import annotations

import numpy as np

from vfmseg.geo.grid import Tile

BLENDS = ("hann", "gaussian", "average", "none")


def profile(blend: str, tile: int) -> np.ndarray:
    """Weights of one tile along one axis, float32 (tile,), every value > 0.

    hann: sin^2(pi (i + 1/2) / tile); gaussian: standard deviation tile / 8 about the centre; average and none: 1.
    """
    centres = np.arange(tile, dtype=np.float64) + 0.5
    if blend == "hann":
        weights = np.sin(np.pi * centres / tile) ** 2
    elif blend == "gaussian":
        weights = np.exp(-0.5 * ((centres - tile / 2) / (tile / 8)) ** 2)
    elif blend in ("average", "none"):
        weights = np.ones(tile)
    else:
        raise ValueError(f"blend = {blend!r}; expected one of {', '.join(BLENDS)}")
    return weights.astype(np.float32)


def tile_weights(blend: str, tile: Tile) -> np.ndarray:
    """Weights of one tile, float32 (tile, tile). With `none` only the tile's own core counts."""
    window = tile.window
    if blend == "none":
        weights = np.zeros(window.shape, dtype=np.float32)
        top, left = tile.core.row - window.row, tile.core.col - window.col
        weights[top : top + tile.core.height, left : left + tile.core.width] = 1.0
        return weights
    return np.outer(profile(blend, window.height), profile(blend, window.width))
