"""Attention fusion: the cells of one modality look at those of the others, inside windows of the map.

In windows of w x w cells the cost grows with the area of a tile and not with its square. Levels with an even number
(the second, the fourth) have windows moved by half their side, so that no border is one at all levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.encoders.tokens import Features
from vfmseg.errors import RecipeError
from vfmseg.fusion.contract import Fusion, Voices, fused_features, key, weighted_mean


class Attention(Fusion):
    """Features plus what they find in the other streams.

    `single`: one stream asks (`query`), the others answer; where it has seen nothing, their mean stands alone.
    `mutual`: each stream asks all others, and the mean of the streams is handed on, as in FTransUNet (Ma et al. 2024)
    and CMFNet. The last layer starts at zero, so training begins with the plain features.
    """

    def __init__(
        self,
        streams: Sequence[str],
        channels: Sequence[int],
        mode: Literal["single", "mutual"],
        query: str | None,
        window: int,
        width: int,
        heads: int,
    ) -> None:
        """`query`: the stream that asks (mode single; the first if None). `window`: cells a side. `width`: of q, k, v.

        RecipeError for a query that is no stream, or a width that the heads do not divide.
        """
        super().__init__(streams, channels)
        if query is not None and query not in streams:
            raise RecipeError(f"model.fusion.query = '{query}' is no modality; expected one of {', '.join(streams)}")
        if width % heads:
            raise RecipeError(f"model.fusion.width = {width} must be a multiple of heads = {heads}")
        self.mode = mode
        self.asking = tuple(streams) if mode == "mutual" else (query or streams[0],)
        self.window = window
        self.voices = Voices(streams, self.channels)
        names = [(name, i, c) for name in streams for i, c in enumerate(self.channels)]
        self.looks = nn.ModuleDict({key(name, i): Look(c, width, heads) for name, i, c in names if name in self.asking})
        self.shows = nn.ModuleDict(
            {
                key(name, i): nn.Conv2d(c, 2 * width, 1)
                for name, i, c in names
                if mode == "mutual" or name not in self.asking
            }
        )

    def forward(self, found: Mapping[str, Features]) -> Features:
        """{stream: features} -> features of the same shapes."""
        return fused_features([self._level(found, level) for level in self.levels], found, self.levels)

    def _level(self, found: Mapping[str, Features], level: int) -> Tensor:
        spoken = {name: self.voices(name, level, f.maps[level]) for name, f in found.items()}
        seen = {name: f.seen[level] for name, f in found.items()}
        asked = {name: self._asked(name, found, level) for name in self.asking if name in found}
        values = {name: spoken[name] + asked[name] if name in asked else spoken[name] for name in found}
        weights = torch.stack(list(seen.values()))[:, :, None]
        mean = weighted_mean(torch.stack(list(values.values())), weights)
        if self.mode == "mutual" or self.asking[0] not in found:
            return mean
        return torch.where(seen[self.asking[0]][:, None] > 0, values[self.asking[0]], mean)

    def _asked(self, name: str, found: Mapping[str, Features], level: int) -> Tensor:
        """(B, D, h, w): what the stream finds in the others, 0 where they have seen nothing."""
        others = {other: f for other, f in found.items() if other != name}
        mine = found[name].maps[level]
        if not others:
            return torch.zeros_like(mine)
        shown = [self.shows[key(other, level)](f.maps[level]) for other, f in others.items()]
        masks = [f.seen[level] for f in others.values()]
        look: Tensor = self.looks[key(name, level)](mine, shown, masks, self.window, moved=level % 2 == 1)
        return look


class Look(nn.Module):
    """Queries of one stream on the keys and values of others, and the way back to its channels."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Conv2d(channels, width, 1)
        self.out = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(
        self, mine: Tensor, shown: Sequence[Tensor], seen: Sequence[Tensor], window: int, moved: bool
    ) -> Tensor:
        """`mine` (B, D, h, w); `shown`: (B, 2 * width, h, w) of each other stream, `seen` (B, h, w) of it."""
        side = min(window, max(mine.shape[-2:]))
        offset = side // 2 if moved and max(mine.shape[-2:]) > side else 0
        queries = windows(self.query(mine), side, offset)  # (B * windows, side * side, width)
        pairs = [windows(one, side, offset) for one in shown]
        keys = torch.cat([pair.chunk(2, dim=-1)[0] for pair in pairs], dim=1)
        values = torch.cat([pair.chunk(2, dim=-1)[1] for pair in pairs], dim=1)
        open_ = torch.cat([windows(one[:, None], side, offset)[..., 0] for one in seen], dim=1) > 0
        found = masked_attention(queries, keys, values, open_, self.heads)
        back: Tensor = self.out(unwindowed(found, mine.shape[-2:], side, offset))
        reached = unwindowed(open_.any(dim=1)[:, None, None].expand(-1, side * side, 1), mine.shape[-2:], side, offset)
        return torch.where(reached, back, 0.0)  # the shift of `out` is nothing that was found


def masked_attention(queries: Tensor, keys: Tensor, values: Tensor, open_: Tensor, heads: int) -> Tensor:
    """(N, Q, W), (N, K, W), (N, K, W), bool (N, K) -> (N, Q, W): softmax(q k / sqrt(W / heads)) v over open keys.

    0 where no key is open.
    """
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (queries, keys, values))
    some = open_.any(dim=1)
    mask = (open_ | ~some[:, None])[:, None, None, :]  # a row without any open key would be 0 / 0
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return found.transpose(1, 2).flatten(-2) * some[:, None, None]


def windows(values: Tensor, side: int, offset: int) -> Tensor:
    """(B, D, h, w) -> (B * windows, side * side, D); the first window starts `offset` cells outside the map.

    A map of 5 x 5 cells in windows of 4 with offset 2: cells 0-1 are in the first window of an axis, 2-4 in the second.
    Cells beyond the map hold 0.
    """
    height, width = values.shape[-2:]
    bottom, right = -(height + offset) % side, -(width + offset) % side
    padded = F.pad(values, (offset, right, offset, bottom))
    cut = padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # (B, D, rows, side, columns, side)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)


def unwindowed(values: Tensor, size: Sequence[int], side: int, offset: int) -> Tensor:
    """(B * windows, side * side, D) -> (B, D, h, w) of this size: what `windows` has cut, put together again."""
    height, width = size
    rows, columns = (-(-(length + offset) // side) for length in (height, width))
    tiled = values.unflatten(0, (-1, rows, columns)).unflatten(3, (side, side))  # (B, rows, columns, side, side, D)
    whole = tiled.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return whole[..., offset : offset + height, offset : offset + width]
