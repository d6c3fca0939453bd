"""MMLoRA of MFNet (Ma et al. 2024): streams share the frozen weights, and each has a low-rank update of its own.

    y = W x + u_m(x),  L_m(x) = (alpha / rank) B_m A_m x        for the rows x of stream m

In the attention u_m = L_m. In the linear layers of the MLP u_m mixes the updates of all streams (`Mix`), so there they
learn of each other. B starts at zero, so a fresh adapter changes nothing.

It cannot be merged into W: one W serves all rows of a batch, and the update differs from stream to stream, and in the
MLP with what the others hold at the same place.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vfmseg.adapters.attached import Attached
from vfmseg.adapters.lora import require_lora
from vfmseg.adapters.sites import chosen_sites, linear_sites
from vfmseg.adapters.streams import Mix, Route, key, mix_of, replace_layer, shares_by_name
from vfmseg.adapters.tensorfile import load_tensors, save_tensors
from vfmseg.encoders.backbone import Backbone


class LowRank(nn.Module):
    """(..., width_in) -> (..., width_out): scale * B A x, with dropout before A in training."""

    def __init__(self, width_in: int, width_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Linear(width_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, width_out, bias=False)
        self.drop = nn.Dropout(dropout)
        self.scale = scale
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The update for x."""
        return self.lora_B(self.scale * self.lora_A(self.drop(x)))


class StreamLora(nn.Module):
    """A frozen linear layer with an update for each stream.

    A fused qkv layer has pairs A, B for those of its thirds that are adapted; the others stay as published.
    """

    def __init__(
        self,
        layer: nn.Linear,
        route: Route,
        streams: tuple[str, ...],
        thirds: tuple[str, ...],
        mix: Mix | None,
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        """`thirds`: some of q, k, v for a fused layer; empty for one that is adapted as a whole."""
        super().__init__()
        self.layer = layer
        self.route = route
        self.thirds = thirds
        self.mix = mix
        width = layer.out_features // 3 if thirds else layer.out_features
        self.own = nn.ModuleDict(
            {
                key(name): nn.ModuleDict(
                    {part: LowRank(layer.in_features, width, rank, scale, dropout) for part in thirds or ("whole",)}
                )
                for name in streams
            }
        )

    def pairs(self, stream: str) -> dict[str, LowRank]:
        """{q, k, v, or whole: the pair A, B of this stream}."""
        return dict(self.own[key(stream)].items())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., width_in) -> (B, ..., width_out), each row by the parameters of its stream."""
        updates = {name: self._update(name, x[mine]) for name, mine in self.route.rows_of(x).items()}
        if self.mix is not None:
            updates = self.mix(updates, self.route.seen_of(x))
        return self.layer(x) + torch.cat(list(updates.values()))

    def _update(self, stream: str, x: Tensor) -> Tensor:
        found = {part: pair(x) for part, pair in self.pairs(stream).items()}
        if not self.thirds:
            return found["whole"]
        nothing = torch.zeros_like(next(iter(found.values())))
        return torch.cat([found.get(part, nothing) for part in "qkv"], dim=-1)


def attach(
    backbone: Backbone,
    streams: tuple[str, ...],
    rank: int,
    alpha: float | None,
    dropout: float,
    targets: tuple[str, ...],
    mix: bool,
) -> Attached:
    """Put the updates on the linear layers `targets` (some of q, k, v, o, mlp) of every block; all else is frozen.

    `alpha`: None for that of the rank, so that updates are scaled by 1. Without `mix`, and with a single stream, each
    stream has a LoRA for itself in the MLP too.
    """
    alpha = float(rank if alpha is None else alpha)
    require_lora(rank, alpha, dropout)
    backbone.network.requires_grad_(False)
    route, roles = Route(), linear_sites(backbone)
    placed: dict[str, StreamLora] = {}
    for name, thirds in chosen_sites(backbone, targets).items():
        layer = backbone.network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        mixed = mix_of(streams) if mix and roles[name] == "mlp" else None
        placed[name] = StreamLora(layer, route, streams, thirds, mixed, rank, alpha / rank, dropout)
        replace_layer(backbone.network, name, placed[name])
    tensors = tensors_of(placed, streams)
    settings = {"alpha": alpha}
    return Attached(
        "mm_lora",
        sites=tuple(placed),
        added=tuple(parameter for parameter in backbone.network.parameters() if parameter.requires_grad),
        moving=tuple(pair.drop for layer in placed.values() for name in streams for pair in layer.pairs(name).values()),
        before=(route.tell,),
        save=partial(save_tensors, tensors, settings),
        load=partial(load_tensors, tensors, settings),
    )


def tensors_of(placed: dict[str, StreamLora], streams: tuple[str, ...]) -> dict[str, Tensor]:
    """The adapter's own tensors by the names of its file: `SITE.STREAM.lora_A.weight`, or `SITE.STREAM.q.lora_A.weight`
    where q, k and v are one layer; `SITE.STREAM.w` in the MLP.
    """
    found: dict[str, Tensor] = {}
    for site, layer in placed.items():
        for stream in streams:
            for part, pair in layer.pairs(stream).items():
                place = f"{site}.{stream}" if part == "whole" else f"{site}.{stream}.{part}"
                found[f"{place}.lora_A.weight"] = pair.lora_A.weight
                found[f"{place}.lora_B.weight"] = pair.lora_B.weight
        found |= shares_by_name(site, layer.mix, streams)
    return found
