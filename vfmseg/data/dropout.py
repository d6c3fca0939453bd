"""Hiding modalities at random in training, so that the model learns to answer without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vfmseg.data.sample import Sample
from vfmseg.geo.classes import IGNORE


def hide(sample: Sample, chances: Mapping[str, float], draws: np.random.Generator) -> Sample:
    """The sample with `hidden` filled: each modality that shows anything, with its chance, but never all of them.

    Where no valid, labelled pixel would be left to learn from, one of the modalities that have some is kept, each
    equally likely. A number is drawn for every modality in `images`, whatever its chance: changing one chance leaves
    what is drawn for the others.
    """
    numbers = dict(zip(sample.images, draws.random(len(sample.images)), strict=True))
    showing = [name for name, image in sample.images.items() if bool(image.valid.any())]
    hidden = {name for name in showing if numbers[name] < chances.get(name, 0.0)}
    labelled = None if sample.labels is None else sample.labels != IGNORE
    useful = [
        name for name in showing if labelled is None or bool((sample.images[name].valid & labelled).any())
    ] or showing
    if useful and hidden.issuperset(useful):
        hidden.remove(useful[int(draws.integers(len(useful)))])
    return replace(sample, hidden=frozenset(hidden))
