"""The segmentation model: encoder, adapter and decoder wired together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.adapters.attach import Attached
from vfmseg.data.image import Images
from vfmseg.encoders.base import Encoder


class SegmentationModel(nn.Module):
    """Images in, one logit per class and pixel out.

    The modalities share one grid and are stacked as channels, in the order of `modalities`; the encoder normalises
    them and sets invalid pixels to zero. Frozen parts stay in evaluation mode whatever `train()` is asked for.
    """

    def __init__(
        self, encoder: Encoder, attached: Attached, decoder: nn.Module, modalities: Mapping[str, int], classes: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.attached = attached
        self.modalities = dict(modalities)  # name -> number of bands
        self.classes = classes
        self.train(False)

    def forward(self, images: Images) -> Tensor:
        """{modality: image of (B, C, H, W) pixels} -> logits (B, K, H, W)."""
        stacked = torch.cat([images[name].pixels for name in self.modalities], dim=1)
        masks = [images[name].valid[:, None].expand(-1, bands, -1, -1) for name, bands in self.modalities.items()]
        features = self.encoder(stacked, torch.cat(masks, dim=1))
        logits = self.decoder(features)  # (B, K, h, w)
        # The token grid may reach beyond the image (padding up to a whole patch). Logits are enlarged to the
        # ground that the grid really covers and cut, so that every pixel keeps its place.
        height, width = stacked.shape[-2:]
        rows, cols = features.maps[0].shape[-2:]
        stride = features.strides[0]
        # where rounding an image made smaller lost less than half a pixel of it, the grid does cover all of it
        covered = (max(height, round(rows * stride)), max(width, round(cols * stride)))
        logits = F.interpolate(logits, size=covered, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def train(self, mode: bool = True) -> SegmentationModel:
        """Switch the parts that learn; everything frozen keeps its evaluation mode (dropout, statistics)."""
        super().train(mode)
        return self

    def trainable(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def head_state(self) -> dict[str, Tensor]:
        """Trained tensors outside the encoder's backbone, with the buffers of those parts (normalisation too)."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("encoder.backbone.")}
