"""From tokens of the visible patches to pixels of the hidden ones: the light decoder of masked pretraining.

The architecture of He et al. 2022: a linear layer to the decoder's width, one learned mask token at every hidden place,
fixed 2-D sine-cosine positions, transformer blocks that norm first, a norm, a linear layer to the pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.encoders.groups import Groups
from vfmseg.encoders.tokens import StreamRows

NORM_EPS = 1e-6
START = 0.02
"""Standard deviation of fresh mask tokens."""


class PixelDecoder(nn.Module):
    """Tokens as they leave the encoder -> pixels of hidden patches, for each stream by a last layer of its own.

    Class and register tokens go through the blocks too, with a position of zeros. Where a patch has tokens of several
    groups of bands, to each is added what stands for its group, and it is asked for the bands of its group alone.
    """

    def __init__(
        self,
        inner: int,
        outputs: Mapping[str, int],
        width: int,
        depth: int,
        heads: int,
        mask_token: bool,
        groups: Mapping[str, Groups] | None = None,
    ) -> None:
        """`inner`: width of the encoder's tokens; `outputs` {stream: numbers of a patch}; `depth` blocks.

        `mask_token`: stands for the patches that the encoder has left out; False where it leaves none out. `groups`
        {stream: its groups of bands}, as many in each; None: a patch has one token, of all bands.
        """
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(
                f"a decoder of width {width} with {heads} heads; expected a multiple of 4 and of the heads"
            )
        self.width = width
        self.embed = nn.Linear(inner, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token else None
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.heads = nn.ModuleDict({f"of_{name}": nn.Linear(width, count) for name, count in outputs.items()})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=START)
        self.groups = groups
        self.codes: nn.Parameter | None = None
        if groups is not None:  # as loud as positions, which the tokens of a patch have in common
            self.codes = nn.Parameter(torch.randn(len(next(iter(groups.values()))), width) / 2**0.5)

    def forward(
        self, tokens: Tensor, kept: Tensor | None, asked: Tensor, grid: tuple[int, int], rows: StreamRows
    ) -> dict[str, list[Tensor]]:
        """{stream: [(B, H, numbers of a patch)]} of the H patches `asked`, int64 (rows of the batch, H).

        `tokens` (rows of the batch, P + M, D); `kept` int64 (rows of the batch, M), which patches of the grid the
        last M are, None: all of them in order. `rows`: whose rows are whose. Of G groups of bands `asked` holds as many
        numbers of each, one group after another, and there is a tensor (B, H / G, numbers of the group) for each.
        """
        count = grid[0] * grid[1] * (1 if self.codes is None else len(self.codes))
        x = self.embed(tokens)
        prefix = x.shape[1] - (count if kept is None else kept.shape[1])
        patches = x[:, prefix:] if kept is None else self._filled(x[:, prefix:], kept, count)
        positions = sine_cosine(*grid, self.width).to(device=x.device, dtype=self.embed.weight.dtype)
        if self.codes is not None:
            positions = (positions + self.codes[:, None]).flatten(0, 1)
        x = torch.cat([x[:, :prefix], patches + positions], dim=1)
        for block in self.blocks:
            x = block(x)
        # only what is asked for: norm and last layer look at each token alone
        x = self.norm(x.gather(1, (asked + prefix)[..., None].expand(-1, -1, self.width)))
        return {name: self._told(name, x[mine]) for name, mine in rows.items()}

    def _told(self, stream: str, x: Tensor) -> list[Tensor]:
        """Of each group its rows of the stream's last layer, whose numbers are all bands of a pixel, then the next."""
        head = self.heads[f"of_{stream}"]
        if self.groups is None:
            return [head(x)]
        groups = [list(group) for group in self.groups[stream]]
        bands = sum(map(len, groups))
        weight, bias = (head.get_parameter(name).unflatten(0, (-1, bands)) for name in ("weight", "bias"))
        return [
            F.linear(part, weight[:, group].flatten(0, 1), bias[:, group].flatten())
            for part, group in zip(x.chunk(len(groups), dim=1), groups, strict=True)
        ]

    def _filled(self, patches: Tensor, kept: Tensor, count: int) -> Tensor:
        """(B, count, width): the patches at their places `kept`, and the mask token at all others."""
        assert self.mask_token is not None
        empty = self.mask_token.expand(len(patches), count, -1)
        return empty.scatter(1, kept[..., None].expand(-1, -1, self.width), patches.to(empty.dtype))


class Block(nn.Module):
    """A transformer block that norms first; all tokens attend to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.count = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.count, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@lru_cache(16)
def sine_cosine(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): each patch's place, row by row; the first half tells the column, the second the row.

    Of a place t each half holds sin(t / 10000^(i / n)) and then cos(t / 10000^(i / n)), i = 0 .. n - 1, n = width / 4.
    """
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
