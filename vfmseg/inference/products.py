"""What a labelled scene is written as: class ids, and on request how sure the model is, as stored numbers.

Shares in 0..1 are stored as whole numbers 0..254 with the scale 1/254 in the file; 255 is nodata.
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
NODATA = 255
ROWS = 8
"""Rows that are turned into products at a time: shares of all classes in float32 take far more than what is stored."""

EXTRAS = ("confidence", "uncertainty", "probabilities")


@dataclass(frozen=True)
class Products:
    """Turns votes into arrays. ids: class id of each vote, in order. logits: the votes are averaged logits."""

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
            # division by the weights changes no order between classes; argmax along this axis is five times slower
            index = part.sums.max(dim=0).indices.to(torch.int32).cpu().numpy()
            arrays["labels"][0, rows] = np.where(part.valid, np.array(self.ids, dtype=dtype)[index], nodata)
            if self.extras:
                self._measure({name: arrays[name][:, rows] for name in self.extras}, part)
        return arrays

    def _measure(self, into: Mapping[str, np.ndarray], part: Finished) -> None:
        """Fill {extra: uint8 (bands, h, w)}. Shares end with the call: no two parts have theirs at the same time."""
        shares = self.shares(part)
        for name, rows in into.items():
            rows[:] = _stored(_measure(name, shares), part.valid)

    @property
    def bytes_a_pixel(self) -> int:
        """Bytes of all products at one pixel."""
        extras = sum(len(self.ids) if name == "probabilities" else 1 for name in self.extras)
        return np.dtype(label_type(self.ids)[0]).itemsize + extras

    def shares(self, finished: Finished) -> Tensor:
        """Class probabilities float32 (K, h, w) of finished rows; any number where no tile was run."""
        means = (finished.sums / torch.where(finished.weights > 0, finished.weights, 1.0)).float()
        return means.softmax(dim=0) if self.logits else means

    def layers(
        self, names: Sequence[str], colors: Sequence[tuple[int, int, int]], tags: Mapping[str, str]
    ) -> dict[str, Layer]:
        """The map file of each product; `names` and `colors` of the classes in the order of the ids."""
        layers = {"labels": label_layer(self.ids, names, colors, tags)}
        titles = {"confidence": ("probability of the label",), "uncertainty": ("entropy, as a share of its maximum",)}
        for name in self.extras:
            bands = tuple(names) if name == "probabilities" else titles[name]
            layers[name] = Layer("uint8", NODATA, bands, 1 / STEPS, tags)
        return layers


def _measure(name: str, shares: Tensor) -> Tensor:
    """One product in 0..1 (bands, h, w) out of probabilities (K, h, w)."""
    if name == "confidence":
        return shares.amax(dim=0, keepdim=True)
    if name == "uncertainty":
        # entropy over log K: 0 = one class is certain, 1 = all are equally likely
        kept = shares.clamp(min=0)
        entropy = torch.special.entr(kept, out=kept).sum(dim=0, keepdim=True)
        return entropy / math.log(max(2, len(shares)))
    return shares


def _stored(values: Tensor, valid: np.ndarray) -> np.ndarray:
    stored = (values * STEPS).round_().clamp_(0, STEPS).to(torch.uint8).cpu().numpy()
    return np.where(valid, stored, np.uint8(NODATA))
