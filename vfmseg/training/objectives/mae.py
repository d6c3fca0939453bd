"""Masked pretraining (He et al. 2022): the pixels of hidden patches, told from the patches that are visible.

Where blocks take any patches (DINOv2, CLIP), only the visible ones go through the encoder. SAM's windows need the whole
grid: there a learned token stands for each hidden patch. With masks that leave pixels of a hidden patch visible
(RingMo), all patches go through, the hidden pixels are zero, and no token stands for anything.

Hidden pixels count as invalid before they enter a stem, which makes zeros of them like of nodata; so they reach the
encoder in no way, whatever a stem does.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vfmseg.adapters.adapted import last_tokens
from vfmseg.adapters.attached import Attached
from vfmseg.data.image import Images, known
from vfmseg.data.masks import covered, hidden_patches
from vfmseg.data.sample import Batch
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.stem import Stem
from vfmseg.encoders.tokens import StreamRows, Tokens
from vfmseg.errors import DataError, RecipeError
from vfmseg.model import joined
from vfmseg.training.objectives.patches import Normalise, chosen, from_patches, moments, split, to_patches
from vfmseg.training.objectives.pixels import START, PixelDecoder
from vfmseg.training.step import Term


class Pretrained(Protocol):
    """What is asked of a model, beside being an `nn.Module`."""

    streams: tuple[str, ...]
    backbone: Backbone
    attached: Attached
    training: bool

    def stem(self, stream: str) -> nn.Module:
        """The stem of a stream; streams with another way in than a `Stem` are not reconstructed."""
        ...


class MaskedAutoencoder(nn.Module):
    """Mean squared error of the hidden patches that are wholly valid; patches with nodata count nowhere.

    The masks come with the batch, and hide the same patches of all its modalities.
    """

    def __init__(
        self,
        model: Pretrained,
        width: int,
        depth: int,
        heads: int,
        normalise: Normalise | None = "patch",
        incomplete: bool = False,
        source: str = "unlabelled",
        weight: float = 1.0,
    ) -> None:
        """`width`, `depth`, `heads` of the decoder. `normalise`: None compares with what the stem normalises.

        `incomplete`: batches come with a `pixel_mask`, and errors are of the hidden pixels alone. RecipeError if images
        are enlarged on their way in, as then a patch is no square of their pixels.
        """
        super().__init__()
        stems = {name: stem for name in model.streams if isinstance(stem := model.stem(name), Stem)}
        for name, stem in stems.items():
            if stem.upscale != 1:
                raise RecipeError(
                    f"objective mae: the images of {name} are enlarged {stem.upscale:g} times before they are cut into "
                    "patches; expected model.encoder.upscale = 1, as the pixels themselves are to be told"
                )
        self.modalities = {name: dict(stem.modalities) for name, stem in stems.items()}
        self.patch = model.backbone.patch
        self.normalise = normalise
        self.incomplete = incomplete
        self.source = source
        self.weight = weight
        self.visible_only = model.backbone.family.any_patches and not incomplete
        outputs = {name: self.patch**2 * sum(bands.values()) for name, bands in self.modalities.items()}
        self.decoder = PixelDecoder(model.backbone.width, outputs, width, depth, heads, self.visible_only)
        self.mask_token: nn.Parameter | None = None
        if not self.visible_only and not incomplete:
            self.mask_token = nn.Parameter(START * torch.randn(1, 1, model.backbone.width))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`patches`: number of hidden patches that are wholly valid, over all streams."""
        images, hidden = batch.shown(), self._hidden(batch)
        names = [name for name, bands in self.modalities.items() if set(bands) <= set(images)]
        whole = [(self._whole(images, name) & hidden).sum() for name in names]
        return {"patches": torch.stack([*whole, torch.zeros_like(hidden.sum())]).sum().double()}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """`pixels`: the mean squared errors of the patches, added up."""
        network, images = cast(Pretrained, model), batch.present()
        hidden = self._hidden(batch)
        _, asked = split(hidden)
        sums = []
        for name, predicted in self._predicted(network, images, batch).items():
            target = chosen(self._pixels(network, images, name), asked)
            mean, spread = moments(target, self.normalise)
            error = (predicted - (target - mean) / spread).square().mean(dim=3)  # (B, H, patch * patch)
            if self.incomplete:
                inside = chosen(to_patches(_pixel_mask(batch)[:, None], self.patch), asked)[..., 0]
                error = (error * inside).sum(dim=2) / inside.sum(dim=2).clamp(min=1)
            else:
                error = error.mean(dim=2)
            sums.append((error * chosen(self._whole(images, name), asked)).sum())
        return {"pixels": Term(torch.stack(sums).sum(), self.weight, "patches")}

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing: this objective keeps no averages."""

    @torch.no_grad()
    def rebuilt(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{stream: (B, C, h, w)}: pixels as the stem normalises them, in which hidden patches are as predicted.

        A prediction of normalised targets gets the mean and spread of what it stands for, which nobody predicts: this
        is for pictures, not for scores.
        """
        network, images = cast(Pretrained, model), batch.present()
        _, asked = split(self._hidden(batch))
        height, width = next(iter(images.values())).valid.shape[-2:]
        found = {}
        for name, predicted in self._predicted(network, images, batch).items():
            patches = self._pixels(network, images, name)
            mean, spread = moments(chosen(patches, asked), self.normalise)
            patches = patches.scatter(1, asked[..., None, None].expand_as(predicted), predicted * spread + mean)
            found[name] = from_patches(patches, height, width)
        return found

    def _predicted(self, network: Pretrained, images: Images, batch: Batch) -> dict[str, Tensor]:
        """{stream: float32 (B, H, patch * patch, C)}: the hidden patches, in the order of `split`."""
        names = [name for name, bands in self.modalities.items() if set(bands) <= set(images)]
        if not names:
            needed = " or ".join(" + ".join(bands) for bands in self.modalities.values())
            raise DataError(f"the images are of {', '.join(images) or 'nothing'}; expected those of {needed}")
        hidden = self._hidden(batch)
        kept, asked = (numbers.repeat(len(names), 1) for numbers in split(hidden))
        tokens, rows = self._embedded(network, names, covered(images, batch, self.patch), hidden)
        if self.visible_only:
            tokens = tokens.only(kept)
        tokens = last_tokens(network.backbone, network.attached, tokens, rows, network.training)
        told = self.decoder(network.backbone.finish(tokens), tokens.kept, asked, tokens.grid, rows)
        return {name: one.unflatten(2, (self.patch**2, -1)).float() for name, one in told.items()}

    def _embedded(
        self, network: Pretrained, names: list[str], images: Images, hidden: Tensor
    ) -> tuple[Tokens, StreamRows]:
        """Tokens before the first block, of all these streams as one batch, and whose rows are whose."""
        born: dict[str, Tokens] = {}
        for name in names:
            rgb, extra, valid = network.stem(name)(images)
            if self.mask_token is not None:  # the pixels there are zero, so the token stands for the patch
                token = hidden[..., None] * self.mask_token
                extra = token if extra is None else extra + token
            born[name] = network.backbone.embed(rgb, extra, valid)
        return joined(born)

    def _pixels(self, network: Pretrained, images: Images, name: str) -> Tensor:
        """float32 (B, N, patch * patch, C): what a stream's stem normalises, whole."""
        return to_patches(cast(Stem, network.stem(name)).normalised(images).float(), self.patch)

    def _whole(self, images: Images, name: str) -> Tensor:
        """Bool (B, N): patches of which every pixel is valid in all modalities of the stream."""
        valid = known({modality: images[modality] for modality in self.modalities[name]}, "all")
        return to_patches(valid[:, None], self.patch).all(dim=3).all(dim=2)

    def _hidden(self, batch: Batch) -> Tensor:
        """Bool (B, N); DataError if the batch has no masks, or those of other patches."""
        mask = hidden_patches(batch)
        height, width = next(iter(batch.images.values())).valid.shape[-2:]
        grid = (-(-height // self.patch), -(-width // self.patch))
        if mask.shape[1:] != grid:
            raise DataError(
                f"masks of {mask.shape[1]} x {mask.shape[2]} patches for images of {height} x {width} pixels; expected "
                f"{grid[0]} x {grid[1]}, as patches of this encoder have {self.patch} pixels a side"
            )
        return mask.flatten(1)


def _pixel_mask(batch: Batch) -> Tensor:
    if batch.pixel_mask is None:
        raise DataError("this batch has no masks of hidden pixels; expected a source of incomplete masks")
    return batch.pixel_mask
