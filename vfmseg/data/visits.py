"""Which scene each draw of an epoch visits: by area, or, where sources have weights, in the shares that these give."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil

import numpy as np

from vfmseg.data.windows import Draw, Purpose, rng

MOST_WINDOWS = 10**7
"""Of an epoch: the order of that many fits in memory."""

GOLDEN = 0.5 * (5**0.5 - 1)
"""Steps of this length modulo 1 spread more evenly than any other, however many there are."""


@dataclass(frozen=True)
class Portion:
    """How many of the scenes, which lie one after another in their list, are of one source, and what it weighs.

    weight None: its share of the draws is that of its area.
    """

    scenes: int
    weight: float | None = None


class Visits:
    """The visits of an epoch, each of one scene.

    In proportion to their area scenes are visited as often as their numbers say. Sources with weights give the shares
    of the draws that `shares_of` says, exactly but for rounding in each epoch, and in proportion over many.
    """

    def __init__(
        self, counts: Sequence[int], seed: int, length: int | None = None, portions: Sequence[Portion] = ()
    ) -> None:
        """`counts`: visits that cover each scene once. `length`: draws of an epoch; None: as many as cover all scenes.

        `portions`: the sources of the scenes, in their order; left out, and without any weight, all are one source.
        """
        self.seed = seed
        self._ends = list(accumulate(counts))
        self._length = length or self._ends[-1]
        portions = portions or [Portion(len(counts))]
        behind = list(accumulate(portion.scenes for portion in portions))  # each source, in scenes
        if behind[-1] != len(counts):
            raise ValueError(f"sources of {behind[-1]} scenes in all, but there are {len(counts)}")
        weights = [portion.weight for portion in portions]
        self._bounds = [0, *(self._ends[end - 1] for end in behind)]  # of each source, in visits
        self.shares = shares_of([end - first for first, end in pairwise(self._bounds)], weights)
        if not any(weights):
            self._bounds = [0, self._ends[-1]]
        self._begun: tuple[int, list[int]] | None = None  # (epoch, what `_begins` says of it)
        self._shuffled: dict[int, tuple[int, np.ndarray]] = {}  # {source: (epoch, permutation of its visits)}

    def __len__(self) -> int:
        return self._length

    def scene(self, draw: Draw) -> int:
        """Number of the scene that this draw is of."""
        return bisect_right(self._ends, self.slot(draw))

    def slot(self, draw: Draw) -> int:
        """The place in the list of visits that this draw stands for."""
        begins = self._begins(draw.epoch)
        source = bisect_right(begins, draw.index) - 1
        first, slots = self._bounds[source], self._bounds[source + 1] - self._bounds[source]
        place, count = draw.index - begins[source], begins[source + 1] - begins[source]
        if place < count // slots * slots:
            return first + place % slots
        if slots > MOST_WINDOWS:  # too many to be put into an order
            return first + int(rng(Purpose.SCENE, self.seed, draw.epoch, draw.index).integers(slots))
        # A part of the list is left for the rest of the draws; another part each epoch, so that every scene is seen.
        if source not in self._shuffled or self._shuffled[source][0] != draw.epoch:
            purpose = Purpose.SOURCE if source else Purpose.SCENE
            order = rng(purpose, self.seed, draw.epoch, source).permutation(slots)
            self._shuffled[source] = (draw.epoch, order)
        return first + int(self._shuffled[source][1][place % slots])

    def _begins(self, epoch: int) -> list[int]:
        """The index from which each source is drawn in this epoch, and that behind the last.

        Draw i is at (i + u) / length, and of the source whose share of 0..1 that is in. u is another from 0 to 1 in
        each epoch, spread evenly over them: of 10 draws a share of 0.25 is 2 in half of the epochs, 3 in the others.
        """
        if len(self._bounds) == 2:
            return [0, self._length]
        if self._begun is None or self._begun[0] != epoch:
            moved = (float(rng(Purpose.SOURCE, self.seed, 0).random()) + GOLDEN * epoch) % 1.0
            inner = [ceil(round(self._length * share, 6) - moved) for share in accumulate(self.shares[:-1])]
            self._begun = (epoch, [0, *inner, self._length])
        return self._begun[1]


def shares_of(areas: Sequence[int], weights: Sequence[float | None]) -> list[float]:
    """The share of the draws (0..1) of each source: without a weight that of its area, the rest in parts by weight.

    Areas 10, 30 and 60 with weights None, 1 and 2: 0.1, 0.3 and 0.6 of all. With weights 2, 1 and 1: 0.5, 0.25, 0.25.
    """
    total = sum(areas)
    left = sum(area for area, weight in zip(areas, weights, strict=True) if weight is not None) / total
    weighed = sum(weight for weight in weights if weight is not None)
    return [
        area / total if weight is None else left * weight / weighed for area, weight in zip(areas, weights, strict=True)
    ]
