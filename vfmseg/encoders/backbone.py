"""A published vision transformer that knows tokens and blocks, and neither bands nor statistics.

What differs between families (how tokens are born, how a block is called, which norm ends them) comes in as a `Family`;
where weights come from is the business of formats/.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.encoders.tokens import Tokens


@dataclass(frozen=True)
class BaseRecord:
    """Which published tensors a backbone stands on."""

    id: str  # hub id or folder, as the recipe names it
    revision: str | None
    sha256: str  # of all tensors of the upstream image encoder; empty if it was built from a config alone


@dataclass(frozen=True)
class Family:
    """What one family of vision transformers does its own way. `network` is the upstream module.

    `embed(network, rgb, extra)`: (B, 3, H, W), H and W multiples of the patch, and (B, N, D) or None, which is added
    to the patch tokens -> tokens (B, P + N, D), row by row, P prefix tokens first.
    `step(block, tokens, (rows, columns))`: one block. `finish(network, tokens)`: the norm before tokens leave.
    `trim(network, depth)`: removes blocks after `depth` and everything else that `embed`, `step` and `finish` never
    touch, so that each parameter left gets a gradient when all are trained. `any_patches`: `step` takes some of the
    patches as well as all, as nothing in a block asks where on the grid a token lies.
    """

    name: str
    model_class: Callable[[str], Any]  # model_type of config.json -> transformers class; imports it
    other_parts: tuple[str, ...]  # how names of tensors start that published files hold beside the image encoder
    blocks: str  # dotted name of the list of blocks
    patch_kernel: str  # dotted name of the patch convolution
    prefix: Callable[[Any], int]  # CLS and register tokens before the patch tokens
    embed: Callable[[Any, Tensor, Tensor | None], Tensor]
    step: Callable[[Any, Tensor, tuple[int, int]], Tensor]
    window: Callable[[Any], int]  # tokens a side of the windows in which a block attends; 0: it attends to all
    finish: Callable[[Any, Tensor], Tensor]
    trim: Callable[[Any, int], None]
    any_patches: bool = False


class Backbone(nn.Module):
    """Pixels of three bands -> tokens, block by block -> maps. Starts wholly frozen.

    `network` keeps its upstream parameter names, so that files fit the upstream model too.
    """

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        layers: Sequence[int],
        gradient_checkpointing: bool,
        base: BaseRecord,
    ) -> None:
        """`layers`: blocks whose tokens are asked for (1-based, increasing); later blocks are removed.

        `gradient_checkpointing`: who runs the blocks shall run each again for its gradients, which takes less memory.
        """
        super().__init__()
        self.family = family
        self.layers = tuple(layers)
        self.gradient_checkpointing = gradient_checkpointing
        self.base = base
        family.trim(network, self.layers[-1])
        self.network = network.requires_grad_(False)
        kernel = network.get_submodule(family.patch_kernel)
        assert isinstance(kernel, nn.Conv2d)
        self.patch = int(kernel.stride[0])
        self.width = kernel.out_channels  # D of the tokens
        self.prefix = family.prefix(network)
        self.eval()

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return (self.width,) * len(self.layers)

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Transformer blocks in order, with their dotted names inside `network`."""
        place = self.family.blocks
        return [(f"{place}.{i}", block) for i, block in self.network.get_submodule(place).named_children()]

    @property
    def window(self) -> int:
        """Tokens a side of the largest windows in which blocks attend; 0 if every block attends to all tokens."""
        return max(self.family.window(block) for _, block in self.blocks)

    def padded_share(self, rows: int, columns: int) -> float:
        """Share (0..1) of the tokens in attention windows that are padding, for a grid of rows x columns patches."""
        if not self.window:
            return 0.0
        whole = [math.ceil(count / self.window) * self.window for count in (rows, columns)]
        return 1.0 - rows * columns / math.prod(whole)

    def freeze_kernel(self) -> None:
        """Where no bands enter by the published kernel it would only decay."""
        self.network.get_submodule(self.family.patch_kernel).get_parameter("weight").requires_grad_(False)

    def embed(self, rgb: Tensor, extra: Tensor | None, valid: Tensor) -> Tokens:
        """(B, 3, H, W), multiples of the patch, (B, N, D) or None to add, and valid (B, H, W) as 0 to 1 -> tokens.

        Of G groups of bands `extra` is (B, G, N, D), and `rgb` one for all; prefix tokens are then those of one.
        """
        seen = F.avg_pool2d(valid[:, None], self.patch).flatten(1)
        grid = (rgb.shape[-2] // self.patch, rgb.shape[-1] // self.patch)
        if extra is None or extra.ndim == 3:
            return Tokens(self.family.embed(self.network, rgb, extra), seen, grid, self.prefix)
        groups = extra.shape[1]
        each = self.family.embed(self.network, rgb, extra.flatten(0, 1)).unflatten(0, (-1, groups))
        values = torch.cat([each[:, 0, : self.prefix], each[:, :, self.prefix :].flatten(1, 2)], dim=1)
        return Tokens(values, seen.repeat(1, groups), grid, self.prefix, groups=groups)

    def step(self, depth: int, tokens: Tokens) -> Tokens:
        """Tokens behind block `depth` (1-based), from those before it."""
        if tokens.kept is not None and not self.family.any_patches:
            raise ValueError(
                f"blocks of {self.family.name} need the whole grid of patches, and patches have been left out; "
                "expected all of them, with mask tokens in place of the hidden ones"
            )
        _, block = self.blocks[depth - 1]
        return replace(tokens, values=self.family.step(block, tokens.values, tokens.grid))

    def finish(self, tokens: Tokens) -> Tensor:
        """(B, P + N, D): all tokens, normed as they leave the family's blocks."""
        return self.family.finish(self.network, tokens.values)

    def tap(self, tokens: Tokens) -> Tensor:
        """The patches of tokens, normed as they leave the family's blocks, as a map (B, D, rows, columns).

        Of several groups of bands it is their mean.
        """
        if tokens.kept is not None:
            raise ValueError("patches have been left out of these tokens; expected all of the grid, to make a map")
        patches = self.finish(tokens)[:, tokens.prefix :]
        if tokens.groups > 1:
            patches = patches.unflatten(1, (tokens.groups, -1)).mean(dim=1)
        return patches.transpose(1, 2).unflatten(2, tokens.grid)


def plain_norm(tokens: Tensor) -> Tensor:
    """Zero mean and unit variance over the channels of each token, without parameters."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def add_to_patches(tokens: Tensor, extra: Tensor | None, prefix: int) -> Tensor:
    """Add (B, N, D) to the patch tokens of (B, prefix + N, D), or of (1, prefix + N, D) for all."""
    if extra is None:
        return tokens
    tokens = tokens.expand(len(extra), -1, -1)
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:] + extra], dim=1)


def quarter_points(depth: int, count: int = 4) -> tuple[int, ...]:
    """Default layers: a quarter, a half, three quarters and all of the blocks; fewer where depth < 4.

    For another `count` so many parts instead of quarters.
    """
    return tuple(sorted({math.ceil(depth * part / count) for part in range(1, count + 1)}))


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), types, shapes and bytes of tensors; independent of file format and order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
