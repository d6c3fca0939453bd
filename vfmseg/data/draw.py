"""A few bands of many, drawn for each sample: how an encoder of three bands is pretrained on hyperspectral cubes.

Bands that are drawn change from sample to sample, so they are normalised here, each by its own mean and std; the model
takes them in these units. It is not told their numbers: they come in increasing order, and that is all it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from vfmseg.data.image import Image, Images
from vfmseg.data.inputs import Inputs


@dataclass(frozen=True)
class BandDraw:
    """How many bands of which modalities a sample shows, and what all of their bands are normalised by."""

    counts: Mapping[str, int]  # {modality: bands of a sample}
    inputs: Inputs

    def shown(self) -> Inputs:
        """What the model takes: of these modalities as many bands as are drawn, normalised already."""
        return tuple(
            replace(one, count=count, dtype="float32", normalize="dataset", mean=(0.0,) * count, std=(1.0,) * count)
            if (count := self.counts.get(one.name))
            else one
            for one in self.inputs
        )

    def numbers(self, draws: np.random.Generator) -> dict[str, list[int]]:
        """{modality: the bands drawn, from 0, increasing}; any are equally likely."""
        return {
            one.name: sorted(int(band) for band in draws.permutation(one.count)[: self.counts[one.name]])
            for one in self.inputs
            if one.name in self.counts
        }

    def __call__(self, images: Images, draws: np.random.Generator) -> dict[str, Image]:
        """Images of one sample, of which some may be missing -> the same with the bands that are drawn alone."""
        numbers, by_name = self.numbers(draws), {one.name: one for one in self.inputs}
        return {
            name: self._drawn(image, numbers[name], by_name[name].mean, by_name[name].std) if name in numbers else image
            for name, image in images.items()
        }

    def _drawn(self, image: Image, numbers: list[int], mean: tuple[float, ...], std: tuple[float, ...]) -> Image:
        middle, spread = (torch.tensor([of[band] for band in numbers])[:, None, None] for of in (mean, std))
        return Image(torch.where(image.valid, (image.pixels[numbers] - middle) / spread, 0.0), image.valid)
