"""One training sample and a batch of them: tensors only, no paths and no CRS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE


@dataclass
class Sample:
    """One tile.

    images: {modality: float32 (C, H, W)}, values as stored * scale + offset, 0 where invalid.
    valid: {modality: bool (H, W)}, False where that modality says nothing.
    labels: int64 (H, W), class indexes 0..K-1 or IGNORE.
    """

    images: dict[str, Tensor]
    valid: dict[str, Tensor]
    labels: Tensor


@dataclass
class Batch:
    """Stacked samples: images {modality: (B, C, H, W)}, valid {modality: (B, H, W)}, labels (B, H, W)."""

    images: dict[str, Tensor]
    valid: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def targets(self) -> Tensor:
        """Labels int64 (B, H, W) to learn from and to score: IGNORE wherever any modality is invalid.

        The map has no label there either, so nodata reaches neither a loss nor a metric.
        """
        seen = torch.stack(list(self.valid.values())).all(dim=0)
        return torch.where(seen, self.labels, IGNORE)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (from pinned memory the copy runs beside the host)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            images={name: change(tensor) for name, tensor in self.images.items()},
            valid={name: change(tensor) for name, tensor in self.valid.items()},
            labels=change(self.labels),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one tile size and one set of modalities; a single sample keeps its batch axis."""
    if not samples:
        raise DataError("cannot make a batch of no samples")
    layouts = {_layout(sample): sample for sample in samples}
    if len(layouts) > 1:
        one, two = list(layouts)[:2]
        raise DataError(
            f"samples of one batch differ in bands or size: {one} and {two}; "
            "expected the same bands in every scene: name them in the recipe (data.modalities.<name>.bands)"
        )
    return Batch(
        images={name: torch.stack([s.images[name] for s in samples]) for name in samples[0].images},
        valid={name: torch.stack([s.valid[name] for s in samples]) for name in samples[0].valid},
        labels=torch.stack([sample.labels for sample in samples]),
    )


def _layout(sample: Sample) -> str:
    shapes = [f"{name} {tuple(image.shape)}" for name, image in sample.images.items()]
    return ", ".join([*shapes, f"labels {tuple(sample.labels.shape)}"])
