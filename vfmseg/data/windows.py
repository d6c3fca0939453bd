"""Which sample is drawn when, and by which process: pure arithmetic on (seed, epoch, index).

The order of an epoch is a function of the seed and the epoch alone, so a resumed run goes on exactly where it was,
and any number of processes walk through the same global order. `rng` is the one place where numbers become a
random generator; nothing here touches a global random state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    ORDER = 1
    SCENE = 2
    WINDOW = 3
    AUGMENT = 4
    MODALITY = 5
    SOURCE = 6
    MASK = 7
    PROBE = 8
    BANDS = 9
    FRACTION = 10


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of one epoch. A filler only keeps a process in step: its labels count nowhere."""

    epoch: int
    index: int
    filler: bool = False


def rng(purpose: Purpose, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """The random generator of one sample (or of a whole epoch), the same in every worker and process."""
    # the purpose leads: SeedSequence pads with zeros, so (seed, epoch) and (seed, epoch, 0) alone would be one stream
    return np.random.default_rng([int(purpose), abs(seed), int(seed < 0), epoch, index])


def epoch_order(length: int, seed: int, epoch: int, source: int = 0) -> list[int]:
    """A permutation of 0..length-1 that depends on (seed, epoch, source) only; source 0 is the first of a run."""
    return [int(i) for i in rng(Purpose.ORDER, seed, epoch, source).permutation(length)]


def epoch_draws(length: int, count: int, seed: int, epoch: int, source: int = 0) -> list[Draw]:
    """The `count` samples that a source of `length` samples gives in one epoch of a run, in order.

    The source goes round: a lap visits each sample once, in an order of its own, and an epoch begins where the one
    before has ended. `Draw.epoch` is the number of the lap, so that a sample met again is another window of its scene.
    Of 3 samples, 2 an epoch, the epochs are (lap 0, lap 0), (lap 0, lap 1), (lap 1, lap 1). With count == length every
    epoch is one lap of the same number.
    """
    first, last = epoch * count, (epoch + 1) * count
    laps = range(first // length, (last - 1) // length + 1)
    draws = [Draw(lap, index) for lap in laps for index in epoch_order(length, seed, lap, source)]
    return draws[first - laps.start * length :][:count]


def alike_together(draws: Sequence[Draw], batch_size: int, kind: Callable[[Draw], Hashable]) -> list[Draw]:
    """The same draws in an order in which batches are of one kind, as far as the draws of a kind fill them.

    Full batches come in the order in which their last sample was drawn, so kinds stay mixed over the epoch; what is
    left of each kind comes at the end. Of A B A B B with batches of 2: A A, B B, B. One kind alone keeps its order. It
    does not depend on the number of processes, of which each takes whole batches.
    """
    found: list[Draw] = []
    waiting: dict[Hashable, list[Draw]] = {}
    for draw in draws:
        alike = waiting.setdefault(kind(draw), [])
        alike.append(draw)
        if len(alike) == batch_size:
            found += alike
            alike.clear()
    return found + [draw for alike in waiting.values() for draw in alike]


def rank_batches(draws: Sequence[Draw], batch_size: int, rank: int, world: int) -> list[list[Draw]]:
    """The batches of one process, of the draws of one epoch.

    Global step i takes draws[i * batch_size * world : (i + 1) * batch_size * world]; process `rank` of `world`
    takes the rank-th run of at most batch_size of it. Nothing is drawn twice and nothing is dropped. In a short
    last step a process left without samples gets one filler, so that all processes take the same number of steps.
    """
    if batch_size < 1 or world < 1 or not 0 <= rank < world:
        raise ValueError(f"batch_size = {batch_size}, rank = {rank}, world = {world}: expected 0 <= rank < world")
    batches = []
    for start in range(0, len(draws), batch_size * world):
        first = start + rank * batch_size
        taken = list(draws[first : min(first + batch_size, start + batch_size * world)])
        batches.append(taken or [replace(draws[start], filler=True)])
    return batches
