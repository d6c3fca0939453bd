"""One training sample and a batch of them: tensors only, no paths and no CRS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfmseg.data.image import Image, Known, known
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE


@dataclass
class Sample:
    """One window: images of (C, h, w) pixels, and labels int64 (h, w), class indexes 0..K-1 or IGNORE.

    labels None: an unlabelled window, which only objectives without labels can learn from.
    """

    images: dict[str, Image]
    labels: Tensor | None


@dataclass
class Batch:
    """Stacked samples: images of (B, C, h, w) pixels, labels (B, h, w) or None."""

    images: dict[str, Image]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.images.values())).valid)

    def targets(self, rule: Known) -> Tensor:
        """Labels int64 (B, h, w) to learn from and to score: IGNORE wherever the modalities have no answer.

        The map has no label there either, so nodata reaches neither a loss nor a metric.
        """
        if self.labels is None:
            raise DataError("this batch has no labels to learn from; expected labelled scenes")
        return torch.where(known(self.images, rule), self.labels, IGNORE)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (from pinned memory the copy runs beside the host)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images = {name: image.each(change) for name, image in self.images.items()}
        return Batch(images, None if self.labels is None else change(self.labels))


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size and one set of modalities, all with labels or none; one sample keeps its batch axis."""
    if not samples:
        raise DataError("cannot make a batch of no samples")
    layouts = {_layout(sample): sample for sample in samples}
    if len(layouts) > 1:
        one, two = list(layouts)[:2]
        raise DataError(
            f"samples of one batch differ in bands or size: {one} and {two}; "
            "expected the same bands in every scene: name them in the recipe (data.modalities.<name>.bands)"
        )
    labels = [sample.labels for sample in samples if sample.labels is not None]
    return Batch(
        images={
            name: Image(
                torch.stack([sample.images[name].pixels for sample in samples]),
                torch.stack([sample.images[name].valid for sample in samples]),
            )
            for name in samples[0].images
        },
        labels=torch.stack(labels) if labels else None,
    )


def _layout(sample: Sample) -> str:
    shapes = [f"{name} {tuple(image.pixels.shape)}" for name, image in sample.images.items()]
    return ", ".join([*shapes, "no labels" if sample.labels is None else f"labels {tuple(sample.labels.shape)}"])
