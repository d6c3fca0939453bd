"""The contract of every encoder: images of any size in, feature maps out.

This file knows tokens and grids. What differs between families (how tokens are born, how a block is called, which
norm ends them) comes in as a `Family`; where weights come from is the business of build.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Features:
    """Feature maps of one batch, shallow to deep."""

    maps: tuple[Tensor, ...]  # each (B, D_i, h_i, w_i)
    strides: tuple[float, ...]  # pixels of the model's input image per cell of each map


@dataclass(frozen=True)
class BaseRecord:
    """Which published tensors an encoder stands on."""

    id: str  # hub id or folder, as the recipe names it
    revision: str | None
    sha256: str  # of all tensors of the upstream image encoder; empty if it was built from a config alone


@dataclass(frozen=True)
class Family:
    """What one family of transformers models does its own way. `backbone` is the transformers module.

    `embed(backbone, rgb, extra)`: (B, 3, H, W), H and W multiples of the patch, and (B, N, D) or None, which is added
    to the patch tokens -> tokens (B, P + N, D), row-major, P prefix tokens first.
    `step(block, tokens, (rows, columns))`: one block. `finish(backbone, tokens)`: the norm before tokens leave.
    `trim(backbone, depth)`: removes blocks after `depth` and everything else that `embed`, `step` and `finish` never
    touch, so that each parameter left gets a gradient when all are trained.
    """

    name: str
    model_types: tuple[str, ...]  # values of `model_type` in config.json that this family reads
    model_class: Callable[[str], Any]  # model_type -> transformers class; imports it
    other_parts: tuple[str, ...]  # how names of tensors start that published files hold beside the image encoder
    blocks: str  # dotted name of the list of blocks
    patch_kernel: str  # dotted name of the patch convolution
    prefix: Callable[[Any], int]  # CLS and register tokens before the patch tokens
    embed: Callable[[Any, Tensor, Tensor | None], Tensor]
    step: Callable[[Any, Tensor, tuple[int, int]], Tensor]
    window: Callable[[Any], int]  # tokens a side of the windows in which a block attends; 0: it attends to all
    finish: Callable[[Any, Tensor], Tensor]
    trim: Callable[[Any, int], None]


class Encoder(nn.Module):
    """(B, C, H, W) in image units, any H and W -> `Features`. Normalises its own input; starts wholly frozen.

    `backbone` keeps its upstream parameter names; `stem` holds what maps C bands to the encoder's three. Maps cover
    ceil(H * upscale / patch) rows and as many columns: the last cell may reach beyond the image, so enlarge logits
    by the stride and cut, instead of stretching them to H x W.
    """

    mean: Tensor  # (C,) in image units
    std: Tensor

    def __init__(
        self,
        family: Family,
        backbone: nn.Module,
        stem: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        layers: Sequence[int],
        upscale: float,
        gradient_checkpointing: bool,
        base: BaseRecord,
    ) -> None:
        """`layers`: blocks passed (1-based, increasing); the backbone is trimmed after the last of them."""
        super().__init__()
        self.anatomy = family
        self.family = family.name
        self.layers = tuple(layers)
        self.upscale = upscale
        self.gradient_checkpointing = gradient_checkpointing
        self.base = base
        self.in_channels = len(mean)
        family.trim(backbone, self.layers[-1])
        self.backbone = backbone.requires_grad_(False)
        self.stem = stem
        kernel = backbone.get_submodule(family.patch_kernel)
        assert isinstance(kernel, nn.Conv2d)
        self.patch = int(kernel.stride[0])
        self.prefix = family.prefix(backbone)
        self.channels = (kernel.out_channels,) * len(self.layers)
        self.strides = (self.patch / upscale,) * len(self.layers)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        # what an adapter trains; everything else in the backbone stays in evaluation mode
        self.moving: tuple[nn.Module, ...] = ()
        self.eval()

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Transformer blocks in order, with their dotted names inside `backbone`."""
        place = self.anatomy.blocks
        return [(f"{place}.{i}", block) for i, block in self.backbone.get_submodule(place).named_children()]

    def config(self) -> dict[str, Any]:
        """Upstream configuration as plain JSON values: what `build_encoder_from_config` needs."""
        backbone: Any = self.backbone
        values: dict[str, Any] = backbone.config.to_diff_dict()
        return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}

    @property
    def window(self) -> int:
        """Tokens a side of the largest windows in which blocks attend; 0 if every block attends to all tokens."""
        return max(self.anatomy.window(block) for _, block in self.blocks)

    def padded_share(self, height: int, width: int) -> float:
        """Share (0..1) of the tokens in attention windows that are padding, for images of height x width pixels."""
        if not self.window:
            return 0.0
        cells = [math.ceil(self._enlarged(side) / self.patch) for side in (height, width)]
        whole = [math.ceil(count / self.window) * self.window for count in cells]
        return 1.0 - math.prod(cells) / math.prod(whole)

    def train(self, mode: bool = True) -> Encoder:
        """Switch stem and adapters; frozen parts keep evaluation mode (dropout, drop path)."""
        super().train(mode)
        self.backbone.train(False)
        for module in self.moving:
            module.train(mode)
        return self

    def forward(self, images: Tensor, valid: Tensor) -> Features:
        """images (B, C, H, W) in image units, valid (B, C, H, W) bool -> maps (B, D, h, w), h = ceil(H / stride)."""
        pixels = self.prepare(images, valid)
        rows, columns = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        rgb, extra = self.stem(pixels)
        tokens = self.anatomy.embed(self.backbone, rgb, extra)  # (B, P + rows * columns, D)
        maps: list[Tensor] = []
        saves_memory = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for depth, (_, block) in enumerate(self.blocks, start=1):
            if saves_memory:
                # the reentrant kind returns no gradient when the input of the block needs none
                tokens = checkpoint(self.anatomy.step, block, tokens, (rows, columns), use_reentrant=False)
            else:
                tokens = self.anatomy.step(block, tokens, (rows, columns))
            if depth in self.layers:
                patches = self.anatomy.finish(self.backbone, tokens)[:, self.prefix :]
                maps.append(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        return Features(tuple(maps), self.strides)

    def prepare(self, images: Tensor, valid: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W'): normalised, invalid values zero (the mean), enlarged, padded to the patch.

        Padding is zero and at the right and bottom, so every pixel keeps its place.
        """
        mean, std = self.mean.float()[:, None, None], self.std.float()[:, None, None]
        pixels = torch.where(valid, (images.float() - mean) / std, 0.0).to(self.mean.dtype)
        if self.upscale != 1:
            size = [self._enlarged(side) for side in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=self.upscale < 1)
        bottom, right = (-side % self.patch for side in pixels.shape[-2:])
        return F.pad(pixels, (0, right, 0, bottom))

    def _enlarged(self, side: int) -> int:
        """Pixels of a side after `upscale`."""
        return max(1, round(side * self.upscale))


def plain_norm(tokens: Tensor) -> Tensor:
    """Zero mean and unit variance over the channels of each token, without parameters."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def add_to_patches(tokens: Tensor, extra: Tensor | None, prefix: int) -> Tensor:
    """Add (B, N, D) to the patch tokens of (B, prefix + N, D)."""
    if extra is None:
        return tokens
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:] + extra], dim=1)


def quarter_points(depth: int) -> tuple[int, ...]:
    """Default layers: a quarter, a half, three quarters and all of the blocks; fewer where depth < 4."""
    return tuple(sorted({math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)}))


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), types, shapes and bytes of tensors; independent of file format and order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
