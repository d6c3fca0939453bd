"""Masked pretraining (He et al. 2022): the pixels of hidden patches, told from the patches that are visible.

Where blocks take any patches (DINOv2, CLIP), only the visible ones go through the encoder. SAM's windows need the whole
grid: there a learned token stands for each hidden patch. With masks that leave something of a hidden patch visible,
some pixels (RingMo) or some bands, all patches go through, what is hidden is zero, and no token stands for anything.
Where a stem makes tokens of several groups of bands of each patch (SatMAE), each of them is hidden or visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vfmseg.adapters.adapted import last_tokens
from vfmseg.adapters.attached import Attached
from vfmseg.data.image import Images, known
from vfmseg.data.sample import Batch
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.groups import Groups
from vfmseg.encoders.stem import Stem
from vfmseg.encoders.tokens import StreamRows, Tokens
from vfmseg.errors import DataError, RecipeError
from vfmseg.model import joined
from vfmseg.training.objectives.hidden import Hidden, Hides, hidden_in, hidden_patches
from vfmseg.training.objectives.patches import Normalise, chosen, from_patches, moments, to_patches
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
    """Mean squared error of what is hidden of patches that are wholly valid; patches with nodata count nowhere.

    The masks come with the batch. Those of patches and pixels hide the same of all its modalities. Of groups of bands a
    patch counts for each group that is hidden there; its target is normalised over the bands of the group.
    """

    source = "unlabelled"

    def __init__(
        self,
        model: Pretrained,
        width: int,
        depth: int,
        heads: int,
        normalise: Normalise | None = "patch",
        hides: Hides = "patches",
        weight: float = 1.0,
    ) -> None:
        """`width`, `depth`, `heads` of the decoder. `normalise`: None compares with what the stem normalises.

        `hides`: what the masks of its batches are of, which for groups of bands must be patches. RecipeError if images
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
        groups = {name: stem.groups for name, stem in stems.items()}
        self.bands: dict[str, list[slice | list[int]]] = {
            name: [slice(None)] if len(of) == 1 else [list(group) for group in of] for name, of in groups.items()
        }
        self.groups = _number_of(groups, hides)
        self.modalities = {name: dict(stem.modalities) for name, stem in stems.items()}
        self.patch = model.backbone.patch
        self.normalise = normalise
        self.hides: Hides = hides
        self.weight = weight
        self.visible_only = hides == "patches" and model.backbone.family.any_patches
        outputs = {name: self.patch**2 * sum(bands.values()) for name, bands in self.modalities.items()}
        self.decoder = PixelDecoder(
            model.backbone.width, outputs, width, depth, heads, self.visible_only, groups if self.groups > 1 else None
        )
        self.mask_token: nn.Parameter | None = None
        if hides == "patches" and not self.visible_only:
            self.mask_token = nn.Parameter(START * torch.randn(1, 1, model.backbone.width))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`patches`: number of patches of which something is hidden and nothing is nodata, over all streams."""
        images, hidden = batch.shown(), hidden_patches(batch, self.hides, self.patch, self.groups)
        names = [name for name, bands in self.modalities.items() if set(bands) <= set(images)]
        whole = [(self._whole(images, name).repeat(1, self.groups) & hidden).sum() for name in names]
        return {"patches": torch.stack([*whole, torch.zeros_like(hidden.sum())]).sum().double()}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """`pixels`: the mean squared errors of the patches, each over what is hidden of it, added up."""
        network, images = cast(Pretrained, model), self._images(batch)
        hidden, pixels = hidden_in(batch, self.hides, self.patch, self.groups), self._pixels(network, images)
        sums = []
        for name, told in self._predicted(network, images, pixels, hidden).items():
            patches, whole = to_patches(pixels[name].float(), self.patch), self._whole(images, name)
            inside = hidden.inside(self.modalities[name], self.patch)
            for predicted, asked, bands in self._of_groups(name, told, hidden, patches.shape[1]):
                target = chosen(patches, asked)[..., bands]
                mean, spread = moments(target, self.normalise)
                error = (predicted - (target - mean) / spread).square()
                if inside is None:
                    each = error.mean(dim=(2, 3))
                else:
                    inside = inside.expand_as(error)
                    each = (error * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)
                sums.append((each * chosen(whole, asked)).sum())
        return {"pixels": Term(torch.stack(sums).sum(), self.weight, "patches")}

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing: this objective keeps no averages."""

    @torch.no_grad()
    def rebuilt(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{stream: (B, C, h, w)}: pixels as the stem normalises them, in which what is hidden is as predicted.

        A prediction of normalised targets gets the mean and spread of what it stands for, which nobody predicts: this
        is for pictures, not for scores.
        """
        network, images = cast(Pretrained, model), self._images(batch)
        hidden, pixels = hidden_in(batch, self.hides, self.patch, self.groups), self._pixels(network, images)
        height, width = next(iter(images.values())).valid.shape[-2:]
        found = {}
        for name, told in self._predicted(network, images, pixels, hidden).items():
            patches = to_patches(pixels[name].float(), self.patch)
            inside = hidden.inside(self.modalities[name], self.patch)
            for predicted, asked, bands in self._of_groups(name, told, hidden, patches.shape[1]):
                true = chosen(patches, asked)[..., bands]
                mean, spread = moments(true, self.normalise)
                one = predicted * spread + mean
                one = one if inside is None else torch.where(inside, one, true)
                patches[..., bands] = patches[..., bands].scatter(1, asked[..., None, None].expand_as(one), one)
            found[name] = from_patches(patches, height, width)
        return found

    def _images(self, batch: Batch) -> Images:
        """What is there of the batch; all of it where no stream is whole in that, whose patches then count nowhere."""
        present = batch.present()
        whole = any(set(bands) <= set(present) for bands in self.modalities.values())
        return present if whole else batch.shown()

    def _of_groups(
        self, name: str, told: list[Tensor], hidden: Hidden, count: int
    ) -> Iterator[tuple[Tensor, Tensor, slice | list[int]]]:
        """Of each group what is told, the numbers of these patches among `count` of the grid, and its bands."""
        asked = hidden.asked.chunk(self.groups, dim=1)
        for number, bands in enumerate(self.bands[name]):
            yield told[number], asked[number] - number * count, bands

    def _pixels(self, network: Pretrained, images: Images) -> dict[str, Tensor]:
        """{stream: (B, C, h, w)}: what its stem normalises, whole, of the streams that are there."""
        names = [name for name, bands in self.modalities.items() if set(bands) <= set(images)]
        if not names:
            needed = " or ".join(" + ".join(bands) for bands in self.modalities.values())
            raise DataError(f"the images are of {', '.join(images) or 'nothing'}; expected those of {needed}")
        return {name: cast(Stem, network.stem(name)).normalised(images) for name in names}

    def _predicted(
        self, network: Pretrained, images: Images, pixels: Mapping[str, Tensor], hidden: Hidden
    ) -> dict[str, list[Tensor]]:
        """{stream: of each group of bands float32 (B, H, patch * patch, C)}: the patches that are asked for."""
        kept, asked = (numbers.repeat(len(pixels), 1) for numbers in (hidden.kept, hidden.asked))
        tokens, rows = self._embedded(network, images, pixels, hidden)
        if self.visible_only:
            tokens = tokens.only(kept)
        tokens = last_tokens(network.backbone, network.attached, tokens, rows, network.training)
        told = self.decoder(network.backbone.finish(tokens), tokens.kept, asked, tokens.grid, rows)
        return {name: [one.unflatten(2, (self.patch**2, -1)).float() for one in of] for name, of in told.items()}

    def _embedded(
        self, network: Pretrained, images: Images, pixels: Mapping[str, Tensor], hidden: Hidden
    ) -> tuple[Tokens, StreamRows]:
        """Tokens before the first block, of all streams of `pixels` as one batch, and whose rows are whose."""
        born: dict[str, Tokens] = {}
        for name, whole in pixels.items():
            stem = cast(Stem, network.stem(name))
            rgb, extra, valid = stem.entered(*hidden.covered_in(stem, whole, stem.valid(images)))
            if self.mask_token is not None:  # the pixels there are zero, so the token stands for the patch
                token = self.mask_token.new_zeros(len(rgb), hidden.kept.shape[1] + hidden.asked.shape[1], 1)
                token = token.scatter(1, hidden.asked[..., None], 1.0) * self.mask_token
                extra = token if extra is None else extra + token
            born[name] = network.backbone.embed(rgb, extra, valid)
        return joined(born)

    def _whole(self, images: Images, name: str) -> Tensor:
        """Bool (B, N): patches of which every pixel is valid in all modalities of the stream."""
        valid = known({modality: images[modality] for modality in self.modalities[name]}, "all")
        return to_patches(valid[:, None], self.patch).flatten(2).all(dim=2)


def _number_of(groups: Mapping[str, Groups], hides: Hides) -> int:
    """How many groups of bands each of these streams has; RecipeError if they differ, or masks are not of patches."""
    counts = {len(of) for of in groups.values()} or {1}
    if len(counts) > 1:
        raise RecipeError(
            "objective mae: "
            + ", ".join(f"{name} has {len(of)} groups of bands" for name, of in groups.items())
            + "; expected the same number in all modalities that share an encoder, whose tokens are one batch"
        )
    if counts != {1} and hides != "patches":
        raise RecipeError(f"objective mae: its masks hide {hides}; expected mask: random or block for groups of bands")
    return counts.pop()
