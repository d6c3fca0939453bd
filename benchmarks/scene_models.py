"""The modules of the scene benchmark, in plain torch, so that every environment can import them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BANDS = 4
CLASSES = 10
MEAN, SPREAD = 2000.0, 450.0  # of the stored numbers; used inside the module, so that nobody scales in another way


class Conv(nn.Module):
    """Two 3 x 3 convolutions: so little work that everything round the model shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(BANDS, 32, 3, padding=1)
        self.last = nn.Conv2d(32, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Stored numbers (B, C, H, W) -> logits (B, K, H, W)."""
        return self.last(F.relu(self.first((x - MEAN) / SPREAD)))


class Block(nn.Module):
    """A transformer layer as in DINOv2: norm first, scaled branches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.scale1 * self.proj(seen)
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """ViT-S/14 (384 wide, 12 layers, 6 heads, a class token) with a linear decoder, enlarged to the tile."""

    def __init__(self, patch: int = 14, width: int = 384, layers: int = 12, heads: int = 6, grid: int = 16) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(BANDS, width, patch, patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decode = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Stored numbers (B, C, H, W) -> logits (B, K, H, W); padded to whole patches in between."""
        height, width = x.shape[-2:]
        maps = self.embed(F.pad((x - MEAN) / SPREAD, (0, -width % self.patch, 0, -height % self.patch)))
        rows, cols = maps.shape[-2:]
        places = self.positions
        if places.shape[-2:] != maps.shape[-2:]:
            places = F.interpolate(places, size=(rows, cols), mode="bicubic", align_corners=False)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), (maps + places).flatten(2).transpose(1, 2)], dim=1)
        seen = self.norm(self.blocks(tokens))[:, 1:].transpose(1, 2).unflatten(2, (rows, cols))
        logits = F.interpolate(self.decode(seen), scale_factor=self.patch, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


MODELS = {"conv": Conv, "vit": Vit}


def build(model: str) -> nn.Module:
    """The module, with the same weights in every process."""
    torch.manual_seed(0)
    return MODELS[model]().eval().requires_grad_(False)
