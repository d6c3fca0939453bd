"""Decision fusion: each stream has a decoder of its own, and their answers are joined pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vfmseg.data.image import Known
from vfmseg.fusion.refine import Refine


class Decision(nn.Module):
    """Class scores of several streams -> those of all.

    `mean`: the mean of the probabilities. `weighted`: the same with a learned weight for each stream and class.
    `product` (product of experts, Hinton 2002): the sum of log-probabilities, each stream times a learned trust that
    starts at 1. A pixel hears only the streams that are valid there.
    """

    known: Known = "any"

    def __init__(
        self,
        streams: Sequence[str],
        classes: int,
        op: Literal["mean", "weighted", "product"],
        refine: Refine | None = None,
    ) -> None:
        """`refine`: smooths the joined scores along a modality's edges."""
        super().__init__()
        self.streams = tuple(streams)
        self.op = op
        self.weights = nn.Parameter(torch.zeros(len(streams), classes)) if op == "weighted" else None
        self.trust = nn.Parameter(torch.zeros(len(streams))) if op == "product" else None  # exp of it
        self.refine = refine

    def forward(
        self, logits: Mapping[str, Tensor], valid: Mapping[str, Tensor], images: Mapping[str, Tensor]
    ) -> Tensor:
        """{stream: (B, K, H, W)}, {stream: bool (B, H, W)} -> log-probabilities or logits (B, K, H, W).

        `images` {stream: normalised pixels (B, C, H, W)}, for what is smoothed along them.
        """
        rows = [self.streams.index(name) for name in logits]
        logs = torch.stack([one.float().log_softmax(dim=1) for one in logits.values()])  # (S, B, K, H, W)
        heard = torch.stack([valid[name] for name in logits])[:, :, None]
        # where no stream is valid the answer is thrown away, but it must be a number
        heard = heard | ~heard.any(dim=0)
        if self.trust is not None:
            trust = self.trust[rows].exp()[:, None, None, None, None]
            joined = (torch.where(heard, logs, 0.0) * trust).sum(dim=0)
        else:
            shares = torch.zeros_like(logs[:, :1, :, :1, :1])  # (S, 1, K, 1, 1)
            if self.weights is not None:
                shares = self.weights[rows][:, None, :, None, None]
            shares = shares.masked_fill(~heard, -torch.inf).log_softmax(dim=0)
            joined = torch.logsumexp(logs + shares, dim=0)
        if self.refine is not None and self.refine.guide in images:
            joined = self.refine(joined, images[self.refine.guide], valid[self.refine.guide])
        return joined


class DecoderPerStream(nn.Module):
    """A decoder for each stream."""

    def __init__(self, decoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.decoders = nn.ModuleDict({f"of_{name}": decoder for name, decoder in decoders.items()})

    def of(self, stream: str) -> nn.Module:
        """The decoder of a stream."""
        return self.decoders[f"of_{stream}"]
