"""Fusion with reconstruction: small decoders must rebuild features from others, so that streams learn what they share.

`self`: each stream's own features from the fused ones. `cross`: each stream's features from every other stream's. The
targets are not moved by this loss. With `recover` the cross decoders are kept, and stand in for a stream that is
missing or has nodata; without, they exist in training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.encoders.tokens import Features
from vfmseg.fusion.contract import Fusion, fused_features
from vfmseg.fusion.linear import Linear

FUSED = "+"
"""The fused features, beside the names of streams, which are letters, digits and _."""


class Reconstruction(Fusion):
    """A weighted mean of the streams, and in training the error of features rebuilt from others."""

    def __init__(
        self,
        streams: Sequence[str],
        channels: Sequence[int],
        mode: Literal["self", "cross"],
        width: int,
        recover: bool,
    ) -> None:
        """`width` of the decoders' inner layer. `recover` needs mode cross."""
        super().__init__(streams, channels)
        self.mode = mode
        self.join = Linear(streams, channels, "weighted", "all")
        pairs = [(FUSED, to) for to in streams] if mode == "self" else []
        if mode == "cross":
            pairs = [(of, to) for of in streams for to in streams if of != to]
        self.tasks = [(of, to, level) for of, to in pairs for level in self.levels]
        decoders = nn.ModuleDict({name_of(*task): _decoder(channels[task[2]], width) for task in self.tasks})
        self.kept = decoders if recover else None
        self.auxiliary = None if recover else decoders

    @property
    def decoders(self) -> nn.ModuleDict | None:
        """The decoders, if there are any: without `recover` a trained segmenter has none."""
        return self.kept if self.kept is not None else cast("nn.ModuleDict | None", self.auxiliary)

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: features} -> features of the same shapes."""
        if self.kept is None:
            return self.join(found)
        whole = self._recovered(found)
        fused: Features = self.join(whole)
        return fused_features(fused.maps, found, self.levels)  # what was rebuilt has still not been seen

    def terms(self, found: Mapping[str, Features], fused: Features) -> dict[str, Tensor]:
        """`reconstruction`: (B,) mean over the decoders of the squared error of what they rebuild.

        Over the cells that both streams have seen wholly. Targets are normed, so a guess of zero has an error of 1.
        Decoders of a missing stream count as 0, as those of one that has seen nothing: it is the same loss.
        """
        assert self.decoders is not None
        errors = []
        sources = {**found, FUSED: fused}
        for of, to, level in self.tasks:
            if to not in found or of not in sources:
                continue
            source = sources[of]
            target = normed(found[to].maps[level]).detach()
            both = (found[to].seen[level] >= 1) & (source.seen[level] >= 1)
            errors.append(error_of(self.decoders[name_of(of, to, level)](source.maps[level]), target, both))
        if not errors:
            return {"reconstruction": next(iter(found.values())).maps[0].flatten(1).sum(dim=1) * 0.0}
        return {"reconstruction": torch.stack(errors).sum(dim=0) / len(self.decoders)}

    def _recovered(self, found: Mapping[str, Features]) -> dict[str, Features]:
        """All streams: where one has not seen a cell, it is the mean of what the others' decoders rebuild there."""
        whole: dict[str, Features] = {}
        for to in self.streams:
            maps, seen = [], []
            for level in self.levels:
                own, share, rebuilt, weight = self._at(found, to, level)
                # decoders learn to rebuild normed features, whatever the scale of those that a small encoder makes
                maps.append(normed(own) * share[:, None] + rebuilt * (1 - share)[:, None])
                seen.append(torch.maximum(share, weight))
            whole[to] = Features(tuple(maps), tuple(seen), next(iter(found.values())).strides)
        return whole

    def _at(self, found: Mapping[str, Features], to: str, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of one stream and level: own features, the share seen, what others rebuild of it, and the share they saw."""
        assert self.kept is not None
        some = next(iter(found.values()))
        own = found[to].maps[level] if to in found else torch.zeros_like(some.maps[level])
        share = found[to].seen[level] if to in found else torch.zeros_like(some.seen[level])
        rebuilt, total, most = torch.zeros_like(own), torch.zeros_like(share), torch.zeros_like(share)
        for of, features in found.items():
            if of != to:
                seen = features.seen[level]
                rebuilt = rebuilt + self.kept[name_of(of, to, level)](features.maps[level]) * seen[:, None]
                total, most = total + seen, torch.maximum(most, seen)
        return own, share, rebuilt / torch.where(total > 0, total, 1.0)[:, None], most


def name_of(of: str, to: str, level: int) -> str:
    """Name of the decoder that rebuilds stream `to` from `of` at a level; no two have one."""
    return f"{level}-{of}-{to}"


def _decoder(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU(), nn.Conv2d(width, channels, 1))


def normed(values: Tensor) -> Tensor:
    """(B, D, h, w) with mean 0 and variance 1 over the channels of each cell."""
    return F.layer_norm(values.movedim(1, -1), values.shape[1:2]).movedim(-1, 1)


def error_of(guess: Tensor, target: Tensor, cells: Tensor) -> Tensor:
    """(B,): mean squared error over the channels and bool `cells` (B, h, w); 0 without any."""
    error = (guess - target).square().mean(dim=1) * cells
    return error.sum(dim=(1, 2)) / cells.sum(dim=(1, 2)).clamp(min=1)
