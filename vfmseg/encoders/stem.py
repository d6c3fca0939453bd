"""From the bands of one or several modalities to the three that published encoders were trained with.

A stem normalises its own input, so that training and prediction cannot do it in two ways. At the start it adds nothing:
training begins from what the encoder makes of the first three bands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.data.image import Images, known
from vfmseg.encoders.groups import GroupKernels, Groups


class NormalisedBands(nn.Module):
    """The bands of some modalities and how they are normalised: how every kind of stem begins."""

    mean: Tensor  # (C,) in image units
    std: Tensor

    def __init__(self, modalities: Mapping[str, int], mean: Sequence[float], std: Sequence[float]) -> None:
        """`modalities` {name: number of bands}, C in all; `mean`, `std` of each band."""
        super().__init__()
        self.modalities = dict(modalities)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def normalised(self, images: Images) -> Tensor:
        """{modality: image} -> (B, C, H, W): (value - mean) / std, and 0, the mean, where an image is invalid.

        In float32, and then in the type of `mean`: half precision could not hold raw 16-bit values.
        """
        mine = [images[name] for name in self.modalities]
        stacked = _stacked([image.pixels for image in mine])
        valid = _stacked([image.valid[:, None].expand(-1, image.pixels.shape[1], -1, -1) for image in mine])
        scaled = (stacked.float() - self.mean.float()[:, None, None]).div_(self.std.float()[:, None, None])
        return torch.where(valid, scaled, 0.0).to(self.mean.dtype)

    def valid(self, images: Images) -> Tensor:
        """{modality: image} -> (B, 1, H, W): 1 where all of its modalities are valid, else 0."""
        mine = {name: images[name] for name in self.modalities}
        valid: Tensor = known(mine, "all")[:, None].to(self.mean.dtype)
        return valid


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """(B, C_i, H, W) of several modalities as channels of one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class Stem(NormalisedBands):
    """Images of one stream -> pixels for the published patch kernel, (B, 3, H', W').

    With them come (B, N, D) to add to the patch tokens, or None, and the valid share (B, H', W') of each pixel. Several
    modalities are stacked as channels. Of G groups of bands they are (B, G, N, D), and the pixels (1, 3, H', W') zero.
    H' and W' are multiples of `patch`; what is added at the right and bottom is zero, so every pixel keeps its place.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        mean: Sequence[float],
        std: Sequence[float],
        mix: nn.Module,
        upscale: float,
        patch: int,
    ) -> None:
        """`modalities` {name: number of bands}; `mix` maps their C normalised bands to three; `upscale` enlarges."""
        super().__init__(modalities, mean, std)
        self.upscale = upscale
        self.patch = patch
        self.mix = mix

    @property
    def groups(self) -> Groups:
        """The bands of each token of a patch: one group of all, if the way in is not `GroupKernels`."""
        return self.mix.groups if isinstance(self.mix, GroupKernels) else (tuple(range(len(self.mean))),)

    def forward(self, images: Images) -> tuple[Tensor, Tensor | None, Tensor]:
        """{modality: image of (B, C, H, W) pixels in image units} -> pixels, what to add to tokens, valid share."""
        return self.entered(self.normalised(images), self.valid(images))

    def entered(self, normalised: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same of what `normalised` and `valid` have made, for who has it already."""
        rgb, extra = self.mix(self._fitted(normalised))
        return rgb, extra, self._fitted(valid)[:, 0]

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width pixels; the last ones may reach beyond it."""
        rows, columns = (-(-self._enlarged(side) // self.patch) for side in (height, width))
        return rows, columns

    def _fitted(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) enlarged, and padded to whole patches: (B, C, H', W')."""
        if self.upscale != 1:
            size = [self._enlarged(side) for side in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=self.upscale < 1)
        return padded(pixels, self.patch)

    def _enlarged(self, side: int) -> int:
        """Pixels of a side after `upscale`."""
        return max(1, round(side * self.upscale))


def padded(pixels: Tensor, patch: int) -> Tensor:
    """(..., H, W), zero or False beyond the right and bottom edge up to whole patches; where none is cut, the same."""
    bottom, right = (-side % patch for side in pixels.shape[-2:])
    # a pad of nothing would be a copy
    return F.pad(pixels, (0, right, 0, bottom)) if bottom or right else pixels


class ThreeBands(nn.Module):
    """Three bands, as the weights were published for: nothing to do."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> the same, None."""
        return pixels, None


class Widen(nn.Module):
    """Bands beyond the third get a patch kernel of their own, zero at the start; one or two bands are repeated."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.extra: nn.Conv2d | None = None
        if in_channels > 3:
            self.extra = nn.Conv2d(in_channels - 3, width, patch, stride=patch, bias=False)
            nn.init.zeros_(self.extra.weight)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> (B, 3, H, W) and (B, N, D) of the other bands, or None."""
        bands = pixels.shape[1]
        if bands == 1:
            return pixels.expand(-1, 3, -1, -1), None
        if bands == 2:
            return torch.cat([pixels, pixels.mean(dim=1, keepdim=True)], dim=1), None
        if self.extra is None:
            return pixels, None
        return pixels[:, :3], self.extra(pixels[:, 3:]).flatten(2).transpose(1, 2)


class Project(nn.Module):
    """A trainable 1x1 convolution from C bands to three; at the start it passes the first three (or repeats)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        # no bias: invalid pixels are zero and must stay zero
        self.mix = nn.Conv2d(in_channels, 3, 1, bias=False)
        start = torch.zeros(3, in_channels)
        for row in range(3):
            if row < in_channels:
                start[row, row] = 1.0
            else:
                start[row] = 1.0 / in_channels  # a missing band is the mean of those there
        with torch.no_grad():
            self.mix.weight.copy_(start[:, :, None, None])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> (B, 3, H, W), None."""
        return self.mix(pixels), None
