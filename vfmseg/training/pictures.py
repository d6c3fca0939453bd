"""What masked pretraining rebuilds, as pictures: each window as it is, as the encoder sees it, and as rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vfmseg.data.sample import collate
from vfmseg.data.windows import Draw
from vfmseg.disk.files import whole_file
from vfmseg.encoders.stem import Stem
from vfmseg.model import Encoder
from vfmseg.training.loop import Stream
from vfmseg.training.objectives.hidden import hidden_in
from vfmseg.training.objectives.mae import MaskedAutoencoder
from vfmseg.training.probe import due

GAP = 4
"""White pixels between the columns and rows."""

GREY = 0.5
"""Of what is hidden, between black (0) and white (1)."""

EXTREMES = 0.02
"""Share of a band's pixels that may be brighter than white, or darker than black."""

MEASURED = 100_000
"""Pixels of which these are found, about."""


@dataclass(frozen=True)
class Pictures:
    """Draws the same windows, with the same masks, after each epoch that is due, so that epochs can be compared."""

    accelerator: Accelerator
    model: Encoder
    objective: MaskedAutoencoder
    windows: Stream
    count: int
    every: int
    epochs: int
    folder: Path

    def __call__(self, epoch: int) -> None:
        """Write `epoch-0003.png` after epoch 3."""
        if not due(epoch, self.every, self.epochs):
            return
        from PIL import Image as Picture

        modes = [(module, module.training) for module in (self.model, self.objective)]
        for module, _ in modes:
            module.eval()
        rows = [row for index in self._indexes() for row in self._rows(index)]
        for module, training in modes:
            module.train(training)
        white = torch.ones(GAP, rows[0].shape[1], 3)
        whole = torch.cat([part for row in rows for part in (row, white)][:-1])
        with whole_file(self.folder / f"epoch-{epoch:04}.png") as aside:
            Picture.fromarray((255 * whole).round().byte().numpy()).save(aside, format="png")

    def _indexes(self) -> list[int]:
        """Windows spread over all sources."""
        count = min(self.count, len(self.windows))
        return [number * len(self.windows) // count for number in range(count)]

    @torch.no_grad()
    def _rows(self, index: int) -> list[Tensor]:
        """One (h, 3 w + gaps, 3) for each stream of a window, values 0 to 1."""
        batch = collate([self.windows[Draw(0, index)]]).to(self.accelerator.device)
        with self.accelerator.autocast():
            rebuilt = self.objective.rebuilt(self.model, batch)
        objective = self.objective
        hidden = hidden_in(batch, objective.hides, objective.patch, objective.groups)
        rows = []
        for name, told in rebuilt.items():
            stem = self.model.stem(name)
            assert isinstance(stem, Stem)
            images = batch.present()
            true = stem.normalised(images).float()
            covered = torch.zeros_like(true, dtype=torch.bool)
            covered |= hidden.in_bands(stem)
            valid = stem.valid(images)[0, 0] > 0
            rows.append(_row(true[0].cpu(), covered[0].cpu(), told[0].float().cpu(), valid.cpu()))
        return rows


def _row(true: Tensor, covered: Tensor, told: Tensor, valid: Tensor) -> Tensor:
    """Three images (C, h, w) side by side, all stretched by what is valid of the true one."""
    chosen = [0, 1, 2] if len(true) >= 3 else [0, 0, 0]
    true, covered, told = true[chosen], covered[chosen], told[chosen]
    measured = true[:, valid] if bool(valid.any()) else true.flatten(1)
    measured = measured[:, :: -(-measured.shape[1] // MEASURED)]
    low, high = (measured.quantile(q, dim=1)[:, None, None] for q in (EXTREMES, 1 - EXTREMES))
    seen, rebuilt = (((one - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) for one in (true, told))
    white = torch.ones(3, true.shape[1], GAP)
    masked = torch.where(covered, GREY, seen)
    return torch.cat([seen, white, masked, white, rebuilt], dim=2).permute(1, 2, 0)
