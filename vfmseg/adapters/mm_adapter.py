"""MMAdapter of MFNet (Ma et al. 2024): streams share the frozen blocks; each has two bottlenecks in each.

    after the attention    y = a + A_m(a),  a = attention(x)
    beside the MLP         y = MLP(x) + u_m,  u_m a mix of A_m(x) of all streams (`Mix`)

A(x) = up(gelu(down(x))), and `up` starts at zero, so a fresh adapter changes nothing. x of the MLP is normed; where a
block scales what comes of attention and MLP (DINOv2), it scales these sums.

It cannot be merged: a bottleneck is no linear layer, and differs from stream to stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.adapters.attached import Attached
from vfmseg.adapters.bottleneck import mlps, start_at_zero
from vfmseg.adapters.sites import linear_sites
from vfmseg.adapters.streams import Mix, Route, key, mix_of, replace_layer, shares_by_name
from vfmseg.adapters.tensorfile import load_tensors, save_tensors
from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import AdapterError


class Bottleneck(nn.Module):
    """(..., width) -> (..., width) through `hidden` numbers; zero at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        start_at_zero(self.down, self.up)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the frozen layer's answer."""
        return self.up(F.gelu(self.down(x)))


class OwnBottlenecks(nn.Module):
    """A frozen part of a block with a bottleneck for each stream."""

    def __init__(self, part: nn.Module, route: Route, streams: tuple[str, ...], width: int, hidden: int) -> None:
        super().__init__()
        self.part = part
        self.route = route
        self.own = nn.ModuleDict({key(name): Bottleneck(width, hidden) for name in streams})

    def updates(self, x: Tensor) -> dict[str, Tensor]:
        """{stream: what its bottleneck makes of its rows of x}."""
        return {name: self.own[key(name)](x[mine]) for name, mine in self.route.rows_of(x).items()}


class AfterAttention(OwnBottlenecks):
    """The last linear layer of the attention, whose answer is the attention's, followed by the bottlenecks."""

    def forward(self, x: Tensor) -> Tensor:
        """What the attention answers, and what its stream adds."""
        found = self.part(x)
        return found + torch.cat(list(self.updates(found).values()))


class BesideMlp(OwnBottlenecks):
    """The MLP with the bottlenecks beside it; their answers are mixed."""

    def __init__(
        self, part: nn.Module, route: Route, streams: tuple[str, ...], width: int, hidden: int, mix: Mix | None
    ) -> None:
        super().__init__(part, route, streams, width, hidden)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP answers, and what the streams add."""
        updates = self.updates(x)
        if self.mix is not None:
            updates = self.mix(updates, self.route.seen_of(x))
        return self.part(x) + torch.cat(list(updates.values()))


def attach(backbone: Backbone, streams: tuple[str, ...], ratio: float) -> Attached:
    """Put the bottlenecks into every block; all else of the backbone is frozen.

    `ratio`: their inner width, as a share of the tokens' width.
    """
    hidden = round(ratio * backbone.width)
    if hidden < 1:
        raise AdapterError(
            f"model.adapter: ratio = {ratio} of tokens of width {backbone.width}; expected a bottleneck of at least "
            "one number, try 0.25"
        )
    backbone.network.requires_grad_(False)
    route, width = Route(), backbone.width
    placed: dict[str, AfterAttention | BesideMlp] = {}
    for name in outputs_of_attention(backbone):
        placed[name] = AfterAttention(backbone.network.get_submodule(name), route, streams, width, hidden)
    for name, _, mlp in mlps(backbone):
        placed[name] = BesideMlp(mlp, route, streams, width, hidden, mix_of(streams))
    for name, part in placed.items():
        replace_layer(backbone.network, name, part)
    tensors, settings = tensors_of(placed, streams), {"ratio": float(ratio)}
    return Attached(
        "mm_adapter",
        sites=tuple(placed),
        added=tuple(parameter for parameter in backbone.network.parameters() if parameter.requires_grad),
        before=(route.tell,),
        save=partial(save_tensors, tensors, settings),
        load=partial(load_tensors, tensors, settings),
    )


def outputs_of_attention(backbone: Backbone) -> list[str]:
    """Dotted name of the last linear layer of each block's attention; AdapterError for a block without one."""
    outputs = [name for name, role in linear_sites(backbone).items() if role == "o"]
    for prefix, block in backbone.blocks:
        if sum(name.startswith(f"{prefix}.") for name in outputs) != 1:
            layers = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
            raise AdapterError(
                f"model.adapter: block {prefix} has no one layer at the end of its attention; its linear layers are "
                f"{', '.join(layers) or 'none'}; choose mm_lora for this encoder"
            )
    return outputs


def tensors_of(placed: Mapping[str, AfterAttention | BesideMlp], streams: tuple[str, ...]) -> dict[str, Tensor]:
    """The adapter's own tensors by the names of its file: `SITE.STREAM.down.weight` and so on, `SITE.STREAM.w`."""
    found: dict[str, Tensor] = {}
    for site, part in placed.items():
        for stream in streams:
            found |= {f"{site}.{stream}.{name}": tensor for name, tensor in part.own[key(stream)].named_parameters()}
        found |= shares_by_name(site, part.mix if isinstance(part, BesideMlp) else None, streams)
    return found
