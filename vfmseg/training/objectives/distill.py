"""Feature distillation: a student's tokens follow those of a frozen teacher, without labels.

Each pair of layers has a linear projection from the student's channels to the teacher's. The teacher's tokens are
normed over their channels, and each channel is then brought to mean 0 and variance 1 over the cells: what all cells
have in common is most of a token (docs/pretrain.md), and a student that learns it knows nothing. The loss of a cell is
(1 - cosine) + 0.5 * smooth L1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.image import Images, known
from vfmseg.data.sample import Batch
from vfmseg.encoders.backbone import plain_norm
from vfmseg.encoders.tokens import Features
from vfmseg.errors import RecipeError
from vfmseg.training.objectives.hidden import Hides, hidden_in
from vfmseg.training.step import Term

if TYPE_CHECKING:
    from vfmseg.encoders.stem import Stem
    from vfmseg.model import Encoder

SMOOTH = 0.5
"""Weight of the smooth L1 loss beside the cosine."""
SMALLEST_STD = 0.01
"""Of a channel, of tokens whose channels have variance 1: one that hardly changes is not blown up."""
SAME_SIDE = 1e-4
"""Of two sides of cells, the share by which they may differ: less than half a pixel in a window of 4,000 px."""


class Distillation(nn.Module):
    """The maps of `model.backbone.layers` learn to predict the teacher's maps, layer by layer."""

    source = "unlabelled"

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        weight: float = 1.0,
        hides: Hides | None = None,
        place: str = "objectives.distill.teacher",
    ) -> None:
        """`teacher` has the same streams, as many layers, and nothing that learns. It is not saved with the run.

        `weight` of the loss; `hides`: what of a batch's masks the student does not see; `place` of the teacher in the
        recipe, for messages.

        RecipeError if its cells are not the student's.
        """
        super().__init__()
        pairs = len(student.backbone.layers), len(teacher.backbone.layers)
        if pairs[0] != pairs[1]:
            raise RecipeError(
                f"{place}.layers: {pairs[1]} layers for {pairs[0]} of the student "
                f"({list(student.backbone.layers)}); name as many"
            )
        # as the factor is written with six digits in a recipe: 16 / 14 as 1.14286
        if not math.isclose(student.strides[0], teacher.strides[0], rel_tol=SAME_SIDE):
            ratio = student.reference.upscale * teacher.backbone.patch / student.backbone.patch
            raise RecipeError(
                f"{place}: its cells are {teacher.strides[0]:g} px wide, those of the student "
                f"{student.strides[0]:g} px; set {place}.upscale = {ratio:g}, or take a student "
                f"of patch {teacher.backbone.patch}"
            )
        # in a list: what is not registered is neither saved with the run nor counted among what learns
        self._teacher = [teacher]
        self.weight = weight
        self.hides = hides
        self.projections = nn.ModuleList(
            nn.Linear(ours, theirs)
            for ours, theirs in zip(student.backbone.channels, teacher.backbone.channels, strict=True)
        )
        for level, channels in enumerate(teacher.backbone.channels):  # until `measure` has seen something
            self.register_buffer(f"mean{level}", torch.zeros(channels))
            self.register_buffer(f"std{level}", torch.ones(channels))

    @property
    def teacher(self) -> Encoder:
        """The frozen encoder."""
        return self._teacher[0]

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> None:
        """Take mean and std of the teacher's channels from the whole cells of these batches; kept with the run.

        One batch after another, as all their tokens may be gigabytes.
        """
        count, sums = 0, [torch.zeros(2, channels, dtype=torch.float64) for channels in self.teacher.backbone.channels]
        for batch in batches:
            images = batch.present()
            for name, target in self._on(batch).encode(images).items():
                whole = self._whole(name, images) > 0
                count += int(whole.sum())
                for found, one in zip(sums, target.maps, strict=True):
                    tokens = plain_norm(one.movedim(1, -1).float())[whole].double()
                    found += torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)]).cpu()
        for level, (total, squares) in enumerate(sums):
            if count > 1:
                self.get_buffer(f"mean{level}").copy_(total / count)
                variance = (squares - total.square() / count) / (count - 1)
                self.get_buffer(f"std{level}").copy_(variance.clamp(min=SMALLEST_STD**2).sqrt())

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`cells`: cells that are wholly valid, of all streams."""
        images = batch.present()
        return {"cells": torch.stack([self._whole(name, images).sum() for name in self._streams(images)]).sum()}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """`features`: the loss summed over whole cells, in the mean of the layers. Hidden cells are learned too."""
        student, images = cast("Encoder", model), batch.present()
        with torch.no_grad():
            targets = self._on(batch).encode(images)
        found = student.encode(self._shown(student, images, batch))
        each = [self._loss(found[name], target, self._whole(name, images)) for name, target in targets.items()]
        return {"features": Term(torch.stack(each).sum(), self.weight, "cells")}

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing: the teacher stays as it is."""

    def _shown(self, student: Encoder, images: Images, batch: Batch) -> Images:
        """What of the images the student sees."""
        if self.hides is None:
            return images
        hidden = hidden_in(batch, self.hides, round(student.strides[0]), len(student.reference.groups))
        stems = [cast("Stem", student.stem(name)) for name in self._streams(images)]
        return {name: image for stem in stems for name, image in hidden.covered(images, stem).items()}

    def _loss(self, found: Features, target: Features, whole: Tensor) -> Tensor:
        # a last row or column of cells that one of them has more holds less than a pixel of what the other sees
        grids = zip(found.maps[0].shape[-2:], target.maps[0].shape[-2:], strict=True)
        rows, columns = (slice(min(counts)) for counts in grids)
        whole, losses = whole[:, rows, columns], []
        for level, layer in enumerate(self.projections):
            ours, theirs = (one.maps[level][..., rows, columns].movedim(1, -1).float() for one in (found, target))
            guess = layer(plain_norm(ours)).float()
            wanted = (plain_norm(theirs) - self.get_buffer(f"mean{level}")) / self.get_buffer(f"std{level}")
            away = 1 - F.cosine_similarity(guess, wanted, dim=-1)
            smooth = F.smooth_l1_loss(guess, wanted, reduction="none").mean(dim=-1)
            losses.append(((away + SMOOTH * smooth) * whole).sum())
        return torch.stack(losses).mean()

    def _streams(self, images: Images) -> list[str]:
        return [name for name in self.teacher.streams if set(self.teacher.stem(name).modalities) <= set(images)]

    def _whole(self, stream: str, images: Images) -> Tensor:
        """(B, rows, columns) as 0 or 1: the cells of which every pixel is valid; padding at the edges is not."""
        mine = known({name: images[name] for name in self.teacher.stem(stream).modalities}, "all")
        rows, columns = self.teacher.reference.cells(*mine.shape[-2:])
        side = self.teacher.strides[0]
        size = (round(rows * side), round(columns * side))
        padded = F.pad(mine.float(), (0, max(0, size[1] - mine.shape[2]), 0, max(0, size[0] - mine.shape[1])))
        return (F.adaptive_avg_pool2d(padded[:, None], (rows, columns))[:, 0] >= 1).float()

    def _on(self, batch: Batch) -> Encoder:
        """The teacher on the device of the batch, where it stays."""
        self.teacher.to(next(iter(batch.images.values())).valid.device)
        return self.teacher
