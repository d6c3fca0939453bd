"""How far a modality lies beside the labels: what training learns for `model.fusion.coregister`.

A few convolutions guess the classes from the modality's own pixels. Their guesses are held against the labels at every
shift up to the limit at once (a cross-correlation, by Fourier transforms); where they fit best, the modality belongs.
The guesses are trained on the shifts in proportion to how well each fits, so that both get sharper together. The shift
of the model is drawn towards the mean of the shifts, weighted in the same way: with a modality that says little about
the classes all fit alike, and it stays where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.sample import Batch
from vfmseg.geo.classes import IGNORE
from vfmseg.training.step import Term

if TYPE_CHECKING:
    from vfmseg.model import Network

SHARPNESS = 200.0
"""Shifts weigh exp(200 x mean log-likelihood): one that fits worse by 0.02 a pixel has 2 % of the best's weight."""
PRIOR = 1e-3
"""Taken from the log-likelihood of the largest shift, and in proportion to the square from others: none is likelier."""
MEMORY = 0.9
"""Share of what was known that each step keeps."""
FEWEST = 0.1
"""A shift counts if it leaves labelled pixels this share of the most partners that any leaves them.

Of a shift that takes the modality off the labels nothing is known: its mean is one of few pixels, or of none.
"""


class Coregistration(nn.Module):
    """Finds the shift of each modality of the model's `coregister`, on the batches that segmentation learns from."""

    source = "train"

    def __init__(self, bands: Mapping[str, int], classes: int, limit: float) -> None:
        """`bands` {modality that is moved: how many it has}; `limit`: the largest shift in pixels."""
        super().__init__()
        self.reach = math.ceil(limit)  # 40 m of pixels that measure 10.001 m are 3.9996 pixels
        self.guesses = nn.ModuleDict({f"of_{name}": _guesses(count, classes) for name, count in bands.items()})
        self.modalities = tuple(bands)
        side = 2 * self.reach + 1
        for name in bands:
            self.register_buffer(f"fit_of_{name}", torch.zeros(side, side))  # sums over pixels, and how many
            self.register_buffer(f"partners_of_{name}", torch.zeros(side, side))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`samples`: number of samples with labels."""
        labels = _labels(batch)
        return {"samples": (labels != IGNORE).flatten(1).any(dim=1).sum().double()}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """`guess/NAME`: of the guesses on the best shifts; `pull/NAME`: squared distance of the shift to them."""
        network = cast("Network", model)
        assert network.coregister is not None
        labels = _labels(batch)
        found: dict[str, Term] = {}
        labelled = (labels != IGNORE).flatten(1).any(dim=1)  # (B,)
        samples = labelled.sum()
        for name in self.modalities:
            image = batch.images[name]
            pixels = network.stem(name).normalised(batch.images).float()
            logs = self.guesses[f"of_{name}"](pixels).float().log_softmax(dim=1)
            sums, partners = fits(logs, image.valid, labels, self.reach)
            sums, partners = (in_scene(one, batch.frames)[labelled] for one in (sums, partners))
            shares = self._shares(self._remembered(name, sums.detach(), partners))
            fit = sums / partners.clamp(min=1.0)
            # the sum of all guesses, times nothing: a batch without labels has a gradient of zero, and not none
            found[f"guess/{name}"] = Term(logs.sum() * 0.0 - (shares * fit).sum(), 1.0, "samples")
            away = network.coregister.shift(name) - self._mean(shares)
            found[f"pull/{name}"] = Term(away.square().sum() * samples, 1.0, "samples")
        return found

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing: what is remembered is noted with each batch."""

    def _remembered(self, name: str, sums: Tensor, partners: Tensor) -> Tensor:
        """How well each shift fits a pixel, over the batches so far; -inf where too little is known.

        `sums` and `partners` (samples, S, S) of this batch, as `fits` gives them.
        """
        known, count = self.get_buffer(f"fit_of_{name}"), self.get_buffer(f"partners_of_{name}")
        if self.training and partners.sum() > 0:
            known.mul_(MEMORY).add_(sums.sum(dim=0), alpha=1 - MEMORY)
            count.mul_(MEMORY).add_(partners.sum(dim=0), alpha=1 - MEMORY)
        return (known / torch.where(count > 0, count, 1.0)).masked_fill(count < FEWEST * count.amax(), -torch.inf)

    def _shares(self, fit: Tensor) -> Tensor:
        """The weight of each shift; they sum to 1."""
        lags = self._lags(fit)
        far = (lags[:, None].square() + lags[None].square()) / self.reach**2
        return (SHARPNESS * (fit - PRIOR * far)).flatten().softmax(dim=0).unflatten(0, fit.shape)

    def _mean(self, shares: Tensor) -> Tensor:
        lags = self._lags(shares)
        return torch.stack([(shares.sum(dim=1) * lags).sum(), (shares.sum(dim=0) * lags).sum()])

    def _lags(self, like: Tensor) -> Tensor:
        return torch.arange(-self.reach, self.reach + 1, device=like.device, dtype=like.dtype)


def fits(logs: Tensor, valid: Tensor, labels: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The sum of logs[label(r, c)] at (r + down, c + right) over labelled pixels, and over how many.

    Both (B, 2 reach + 1, 2 reach + 1); entry [b, reach + down, reach + right] is of image b and the shift (down,
    right). `logs` (B, K, H, W) are log-probabilities, `valid` bool (B, H, W) says where, and `labels` (B, H, W) are
    class indexes or IGNORE. Pixels without a partner do not count.
    """
    classes = logs.shape[1]
    hot = torch.stack([labels == number for number in range(classes)], dim=1).to(logs.dtype)
    size = [side + reach for side in labels.shape[-2:]]  # zeros between the ends, so that nothing goes round
    truth = torch.fft.rfft2(hot, s=size).conj()
    known = torch.where(valid[:, None], logs, 0.0)
    sums = torch.fft.irfft2((truth * torch.fft.rfft2(known, s=size)).sum(dim=1), s=size)
    seen = torch.fft.rfft2(valid.to(logs.dtype), s=size)
    counts = torch.fft.irfft2(truth.sum(dim=1) * seen, s=size)
    lags = torch.arange(-reach, reach + 1, device=logs.device)
    rows, columns = lags % size[0], lags % size[1]
    total, count = (one[:, rows][:, :, columns] for one in (sums, counts.round()))
    return total, count


def in_scene(fit: Tensor, frames: Tensor | None) -> Tensor:
    """(B, S, S) of shifts in turned windows, sums or numbers -> of shifts in the scene; `frames` as in `Batch`."""
    if frames is None:
        return fit
    lags = torch.linspace(-1, 1, fit.shape[-1], device=fit.device)
    ways = torch.stack(torch.meshgrid(lags, lags, indexing="ij"), dim=-1)  # (S, S, 2) as (rows, columns)
    # no matrix product: autocast would round it to half precision
    turned = (frames.to(fit)[:, None, None] * ways[..., None, :]).sum(dim=-1).flip(-1)  # grid_sample takes (x, y)
    return F.grid_sample(fit[:, None], turned, padding_mode="border", align_corners=True)[:, 0]


def _guesses(bands: int, classes: int) -> nn.Module:
    """Convolutions that see 11 x 11 pixels."""
    return nn.Sequential(
        nn.Conv2d(bands, 16, 7, padding=3),
        nn.GELU(),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.GELU(),
        nn.Conv2d(16, classes, 1),
    )


def _labels(batch: Batch) -> Tensor:
    """Labels (B, H, W), also where the modalities have no answer: a shift is about other pixels than those."""
    assert batch.labels is not None
    return batch.labels
