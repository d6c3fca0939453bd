"""A simple feature pyramid over a plain ViT."""

from __future__ import annotations

from torch import Tensor, nn

from vfmseg.decoders.pyramid import LEVELS, Pyramid, add_downwards, convolution
from vfmseg.encoders.tokens import Features


class Fpn(nn.Module):
    """Four levels joined from coarse to fine, smoothed, classified, and their logits summed on the finest grid.

    After Kirillov et al., Panoptic Feature Pyramid Networks, 2019, on the pyramid of ViTDet. One 3x3 convolution a
    level is all that works on the fine grid.
    """

    def __init__(
        self, in_channels: tuple[int, ...], strides: tuple[float, ...], classes: int, channels: int = 128
    ) -> None:
        super().__init__()
        self.stride = strides[0] / 4  # pixels of the input image per cell of the logits
        self.pyramid = Pyramid(in_channels, channels)
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in range(LEVELS))
        self.classify = nn.ModuleList(nn.Conv2d(channels, classes, 1, bias=level == 0) for level in range(LEVELS))

    def forward(self, features: Features) -> Tensor:
        """Features -> logits (B, K, 4h, 4w) for a first map of h x w cells."""
        levels = add_downwards(self.pyramid(features.maps))
        # Classified before they are enlarged and summed: the same as after, with K channels to enlarge.
        scores = [
            classify(smooth(level)) for classify, smooth, level in zip(self.classify, self.smooth, levels, strict=True)
        ]
        return add_downwards(scores)[0]
