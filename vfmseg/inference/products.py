"""What is written of a labelled scene: class ids, and on request how sure the model is.

Values v in 0..1 are stored in 8 bits as round(254 v), with the scale 1/254 in the file; 255 is nodata. 0.5 is stored as
127 and 0.8 as 203, which reads as 0.7992: the error is 0.002 at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vfmseg.geo.layer import Layer, label_layer, label_type
from vfmseg.inference.contracts import Finished

STEPS = 254
"""The number that 1.0 is stored as."""

NODATA = 255
ROWS = 8
"""Pixel rows that become products at a time. Probabilities of K classes in float32 take 4 K bytes a pixel, and some
copies on the way; what is stored of them may be 1 byte."""

EXTRAS = ("confidence", "uncertainty", "probabilities")


@dataclass(frozen=True)
class Products:
    """Turns the votes of finished rows into {product: array}.

    ids: the class id of each of the K votes, in their order. extras: of EXTRAS. logits: the votes are logits, so that
    their mean has yet to become probabilities.
    """

    ids: tuple[int, ...]
    extras: tuple[str, ...] = ()
    logits: bool = False

    def __call__(self, finished: Finished) -> dict[str, np.ndarray]:
        """labels (1, h, w) in the smallest type of the ids; extras uint8 (1, h, w), probabilities (K, h, w)."""
        dtype, nodata = label_type(self.ids)
        shape = finished.valid.shape
        arrays = {"labels": np.empty((1, *shape), dtype=dtype)}
        for name in self.extras:
            arrays[name] = np.empty((len(self.ids) if name == "probabilities" else 1, *shape), dtype=np.uint8)
        for top in range(0, shape[0], ROWS):
            rows = slice(top, top + ROWS)
            part = Finished(finished.sums[:, rows], finished.weights[rows], finished.valid[rows])
            # the largest sum is the largest mean, as all classes of a pixel are divided by the same weight; argmax
            # gives the same and is five times slower along this axis
            index = part.sums.max(dim=0).indices.to(torch.int32).cpu().numpy()
            arrays["labels"][0, rows] = np.where(part.valid, np.array(self.ids, dtype=dtype)[index], nodata)
            if self.extras:
                self._measure({name: arrays[name][:, rows] for name in self.extras}, part)
        return arrays

    def _measure(self, into: Mapping[str, np.ndarray], part: Finished) -> None:
        """Fill {extra: uint8 (bands, h, w)}; the probabilities go with the call, before those of the next rows come."""
        shares = self.shares(part)
        for name, rows in into.items():
            rows[:] = _stored(_measure(name, shares), part.valid)

    @property
    def bytes_a_pixel(self) -> int:
        """Bytes of all products at one pixel; labels of fewer than 256 ids take 1, probabilities K."""
        extras = sum(len(self.ids) if name == "probabilities" else 1 for name in self.extras)
        return np.dtype(label_type(self.ids)[0]).itemsize + extras

    def shares(self, finished: Finished) -> Tensor:
        """Class probabilities float32 (K, h, w) in 0..1 of finished rows; of no meaning where no tile was run.

        The mean of probabilities, or the softmax of the mean of logits.
        """
        means = (finished.sums / torch.where(finished.weights > 0, finished.weights, 1.0)).float()
        return means.softmax(dim=0) if self.logits else means

    def layers(
        self, names: Sequence[str], colors: Sequence[tuple[int, int, int]], tags: Mapping[str, str]
    ) -> dict[str, Layer]:
        """{product: how its file is written}; `names` and `colors` of the classes in the order of the ids."""
        layers = {"labels": label_layer(self.ids, names, colors, tags)}
        titles = {"confidence": ("probability of the label",), "uncertainty": ("entropy, as a share of its maximum",)}
        for name in self.extras:
            bands = tuple(names) if name == "probabilities" else titles[name]
            layers[name] = Layer("uint8", NODATA, bands, 1 / STEPS, tags)
        return layers


def _measure(name: str, shares: Tensor) -> Tensor:
    """One product (bands, h, w) in 0..1 out of probabilities (K, h, w)."""
    if name == "confidence":
        return shares.amax(dim=0, keepdim=True)
    if name == "uncertainty":
        # -sum p log p / log K: 0 = one class is certain, 1 = all are equally likely; 0.8 and 0.2 of two make 0.72
        kept = shares.clamp(min=0)
        entropy = torch.special.entr(kept, out=kept).sum(dim=0, keepdim=True)
        return entropy / math.log(max(2, len(shares)))
    return shares


def _stored(values: Tensor, valid: np.ndarray) -> np.ndarray:
    """Values 0..1 (bands, h, w) as uint8 0..254, and 255 where `valid` (h, w) is False."""
    stored = (values * STEPS).round_().clamp_(0, STEPS).to(torch.uint8).cpu().numpy()
    return np.where(valid, stored, np.uint8(NODATA))
