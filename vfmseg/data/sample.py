"""One training sample and a batch of them: tensors only, no paths and no CRS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vfmseg.data.image import Image, Known, known
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE


@dataclass
class Sample:
    """One window: images of (C, h, w) pixels, and labels int64 (h, w), class indexes 0..K-1 or IGNORE.

    labels None: an unlabelled window, which only objectives without labels can learn from. hidden: modalities that the
    model shall not see (`train.modality_dropout`); their images are kept whole, as who learns from the model that sees
    everything needs them. frame (2, 2): how augmentation has turned the window; a way of (rows, columns) pixels in the
    scene is frame @ way here. Of a window mirrored left-right it is [[1, 0], [0, -1]]. mask bool (rows, columns) of
    patches, for masked pretraining: those that the encoder does not see, in any modality; (groups, rows, columns) where
    groups of bands have masks of their own. pixel_mask bool (h, w): the
    pixels that it does not see, where some of a hidden patch stay visible; None: all of the hidden patches. band_mask
    {modality: bool (C,)}: the bands that it does not see, where bands are hidden instead of patches.
    """

    images: dict[str, Image]
    labels: Tensor | None
    hidden: frozenset[str] = frozenset()
    frame: Tensor = field(default_factory=lambda: torch.eye(2))
    mask: Tensor | None = None
    pixel_mask: Tensor | None = None
    band_mask: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Batch:
    """Stacked samples: images of (B, C, h, w) pixels, labels (B, h, w) or None.

    hidden {modality: bool (B,), in which samples it is hidden}, of those that are hidden in any. frames (B, 2, 2): how
    each sample was turned; None: none of them was. absent: modalities of which no sample shows a single valid pixel, as
    far as is known without asking the device. mask (B, [groups,] rows, columns), pixel_mask (B, h, w), band_mask
    {modality: (B, C)}: as in `Sample`; every sample hides the same number of patches, so that the visible ones stack.
    """

    images: dict[str, Image]
    labels: Tensor | None
    hidden: dict[str, Tensor] = field(default_factory=dict)
    frames: Tensor | None = None
    absent: frozenset[str] = frozenset()
    mask: Tensor | None = None
    pixel_mask: Tensor | None = None
    band_mask: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.images.values())).valid)

    def shown(self) -> dict[str, Image]:
        """What the model shall see: `images`, in which hidden ones are zero and nowhere valid."""
        return {
            name: _without(image, self.hidden[name]) if name in self.hidden else image
            for name, image in self.images.items()
        }

    def present(self) -> dict[str, Image]:
        """`shown` without the modalities that are absent in the whole batch; all if that would leave none."""
        shown = self.shown()
        return {name: image for name, image in shown.items() if name not in self.absent} or shown

    def targets(self, rule: Known) -> Tensor:
        """Labels int64 (B, h, w) to learn from and to score: IGNORE wherever what is shown has no answer.

        The map has no label there either, so nodata reaches neither a loss nor a metric.
        """
        if self.labels is None:
            raise DataError("this batch has no labels to learn from; expected labelled scenes")
        return torch.where(known(self.shown(), rule), self.labels, IGNORE)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (from pinned memory the copy runs beside the host)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images = {name: image.each(change) for name, image in self.images.items()}
        hidden = {name: change(rows) for name, rows in self.hidden.items()}
        labels, frames, mask, pixel_mask = (
            None if one is None else change(one) for one in (self.labels, self.frames, self.mask, self.pixel_mask)
        )
        bands = {name: change(rows) for name, rows in self.band_mask.items()}
        return Batch(images, labels, hidden, frames, self.absent, mask, pixel_mask, bands)


def _without(image: Image, rows: Tensor) -> Image:
    """An image of (B, C, h, w) pixels that is zero and nowhere valid in the samples of `rows`, bool (B,)."""
    return Image(torch.where(rows[:, None, None, None], 0.0, image.pixels), image.valid & ~rows[:, None, None])


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
        hidden={
            name: torch.tensor([name in sample.hidden for sample in samples])
            for name in samples[0].images
            if any(name in sample.hidden for sample in samples)
        },
        frames=torch.stack([sample.frame for sample in samples]),
        absent=frozenset(
            name
            for name in samples[0].images
            if all(name in sample.hidden or not bool(sample.images[name].valid.any()) for sample in samples)
        ),
        mask=_masks([sample.mask for sample in samples]),
        pixel_mask=_masks([sample.pixel_mask for sample in samples]),
        band_mask={
            name: mask
            for name in samples[0].images
            if (mask := _masks([sample.band_mask.get(name) for sample in samples])) is not None
        },
    )


def _masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Masks of all samples as one, or None; DataError if some have none, or they differ in size."""
    given = [mask for mask in masks if mask is not None]
    sizes = sorted({tuple(mask.shape) for mask in given})
    if not given:
        return None
    if len(given) < len(masks) or len(sizes) > 1:
        raise DataError(
            f"{len(given)} of {len(masks)} samples of one batch have a mask, of {' and '.join(map(str, sizes))}; "
            "expected one for each, all of one size: let one source draw them"
        )
    return torch.stack(given)


def _layout(sample: Sample) -> str:
    shapes = [f"{name} {tuple(image.pixels.shape)}" for name, image in sample.images.items()]
    return ", ".join([*shapes, "no labels" if sample.labels is None else f"labels {tuple(sample.labels.shape)}"])
