"""What adapters with parameters of their own for each stream share: whose rows are whose, and how updates are mixed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vfmseg.encoders.tokens import StreamRows, Tokens


def key(stream: str) -> str:
    """The name of what a stream owns inside a module; a stream may be called like something every module has."""
    return f"of_{stream}"


class Route:
    """The batch that runs now: whose rows are whose, and how much of each token has been seen.

    All layers of an adapter hold the same route, and `tell` is the hook that sets it before each block. It is no
    module, so it adds nothing to the names of parameters; a copied or pickled network has a route of its own.
    """

    def __init__(self) -> None:
        self.rows: StreamRows = {}
        self.seen = torch.zeros(0, 0)  # (B, P + N), 0 to 1

    def tell(self, depth: int, tokens: Tokens, rows: StreamRows) -> Tokens:
        """The tokens as they are. A class, register or prompt token has seen what the patches have on average."""
        patches = tokens.seen.detach()
        self.seen = torch.cat([patches.mean(dim=1, keepdim=True).expand(-1, tokens.prefix), patches], dim=1)
        self.rows = rows
        return tokens

    def rows_of(self, x: Tensor) -> dict[str, slice]:
        """{stream: its rows of x}, whose first axis is the batch, or batch and windows.

        SAM's blocks cut each image into windows, those of one image one after another: for 9 windows, the rows of a
        stream that has the images 4 to 7 are 36 to 71.
        """
        total = sum(mine.stop - mine.start for mine in self.rows.values())
        times, rest = divmod(len(x), total) if total else (0, 1)
        if rest:
            raise ValueError(f"{len(x)} rows in a layer for {total} images of {', '.join(self.rows) or 'no stream'}")
        return {name: slice(mine.start * times, mine.stop * times) for name, mine in self.rows.items()}

    def seen_of(self, x: Tensor) -> dict[str, Tensor]:
        """{stream: (..., 1), the share of each of its tokens that is valid}, in the shape of x (B, ..., width)."""
        seen = self.seen.view(*x.shape[:-1], 1)
        return {name: seen[mine] for name, mine in self.rows.items()}


class Mix(nn.Module):
    """What each stream gets of the updates of all, token by token.

        u_m = L_m + (1 - w_m) * sum_k s_k (L_k - L_m) / max(1, sum_k s_k)        k: the other streams that are present

    L are the streams' own updates, s what they have seen at this place, 0 to 1, and w_m learns, from 0.5. For two
    streams that have seen all, u_m = w_m L_m + (1 - w_m) L_k. A stream that is missing, and one that has seen nothing
    here, take no part: alone, u_m is exactly L_m. So it is with w_m = 1.
    """

    def __init__(self, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.shares = nn.ParameterDict({key(name): nn.Parameter(torch.tensor(0.5)) for name in streams})

    def forward(self, updates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{stream: L (B, ..., width)} and {stream: s (B, ..., 1)} -> {stream: u}."""
        return {name: self._mixed(name, updates, seen) for name in updates}

    def _mixed(self, name: str, updates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> Tensor:
        mine, others = updates[name], [other for other in updates if other != name]
        if not others:
            return mine
        # in the type of the updates: float32 shares would make float32 of what autocast computes in bfloat16
        weights = {other: seen[other].to(mine.dtype) for other in others}
        drawn = sum((weights[other] * (updates[other] - mine) for other in others), torch.zeros_like(mine))
        if len(others) > 1:
            drawn = drawn / sum(weights.values(), torch.zeros_like(weights[others[0]])).clamp(min=1)
        return mine + (1 - self.shares[key(name)]) * drawn


def mix_of(streams: tuple[str, ...]) -> Mix | None:
    """The mix of these streams; None for one, whose share would never learn."""
    return Mix(streams) if len(streams) > 1 else None


def shares_by_name(place: str, mix: Mix | None, streams: tuple[str, ...]) -> dict[str, Tensor]:
    """The shares of the mix at `place`, by the names that they have in files."""
    return {} if mix is None else {f"{place}.{name}.w": mix.shares[key(name)] for name in streams}


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `network` has the part with this dotted name, on the device of what it replaces."""
    parent, _, leaf = name.rpartition(".")
    device = next(network.get_submodule(name).parameters()).device
    network.get_submodule(parent).add_module(leaf, layer.to(device))
