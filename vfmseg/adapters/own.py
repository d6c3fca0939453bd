"""A published encoder that one modality has for itself, frozen, with an adapter of its own.

Its maps lie on the cells of the shared encoder's and have its channels, so that any fusion takes both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vfmseg.adapters.adapted import run_blocks
from vfmseg.adapters.attached import Attached
from vfmseg.data.image import Images, known
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.regrid import regrid, shares
from vfmseg.encoders.stem import Stem
from vfmseg.encoders.tokens import Features


class OwnEncoder(nn.Module):
    """Images of one stream -> features (B, D, h, w) on a given grid of cells.

    What is published stays frozen and in evaluation mode; the adapter, the way in for other than three bands and a 1x1
    convolution for each map learn.
    """

    def __init__(
        self, stream: str, stem: Stem, backbone: Backbone, attached: Attached, channels: Sequence[int]
    ) -> None:
        """`stem` leads into `backbone`, in which `attached` sits; `channels` of each map, as the shared encoder's."""
        super().__init__()
        if len(channels) != len(backbone.layers):
            raise ValueError(f"{len(backbone.layers)} maps for {len(channels)} numbers of channels; expected as many")
        self.stream = stream
        self.stem = stem
        self.backbone = backbone
        self.adapter = attached.beside
        self.attached = attached
        self.heads = nn.ModuleList(nn.Conv2d(backbone.width, count, 1) for count in channels)

    @property
    def modalities(self) -> dict[str, int]:
        """{modality: number of bands}."""
        return self.stem.modalities

    @property
    def std(self) -> Tensor:
        """(C,) in image units."""
        return self.stem.std

    def forward(self, images: Images, cells: tuple[int, int], strides: Sequence[float]) -> Features:
        """`cells`: rows and columns; `strides`: pixels per cell of each map."""
        tokens = self.backbone.embed(*self.stem(images))
        rows = {self.stream: slice(0, len(tokens.values))}
        maps, seen = run_blocks(self.backbone, self.attached, tokens, rows, self.training)
        have, want = (tokens.grid, self.backbone.patch / self.stem.upscale), (cells, strides[0])
        valid = known({name: images[name] for name in self.modalities}, "all")
        share = shares(valid, want).to(seen.dtype)
        moved = tuple(head(regrid(found, seen, have, want)) for head, found in zip(self.heads, maps, strict=True))
        return Features(moved, (share,) * len(moved), tuple(strides))

    def normalised(self, images: Images) -> Tensor:
        """{modality: image} -> (B, C, H, W): the bands of its modalities with zero, the mean, where invalid."""
        return self.stem.normalised(images)

    def train(self, mode: bool = True) -> OwnEncoder:
        """Switch the parts that learn; everything frozen keeps its evaluation mode."""
        super().train(mode)
        self.backbone.network.train(False)
        for module in self.attached.moving:
            module.train(mode)
        return self

    def part_of(self, name: str, parameter: nn.Parameter) -> str:
        """The part of a network that its parameter of this name belongs to: encoder (as published), adapter or stem."""
        child = name.partition(".")[0]
        if child == "adapter" or any(parameter is added for added in self.attached.added):
            return "adapter"
        return "encoder" if child == "backbone" else "stem"

    def state_elsewhere(self) -> set[str]:
        """Names of its tensors that are not stored with the heads: the published ones and those of the adapter."""
        return {name for name in self.state_dict() if name.partition(".")[0] in ("backbone", "adapter")}
