"""Groups of bands as a way in (Cong et al. 2022, SatMAE): each has a patch kernel, and a token of each patch.

The tokens of all groups attend to each other as one sequence. A token is what the kernel of its group makes of its
patch, and the position of the patch, and the code of the group. Codes learn, from small random numbers: published
tables of positions use all channels, so a fixed code as loud as they are would drown what the encoder knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import RecipeError

Groups = tuple[tuple[int, ...], ...]
"""Numbers of the bands of each group, from 0."""

START = 0.02
"""Standard deviation of fresh codes, as of fresh tables of positions."""


class GroupKernels(nn.Module):
    """Bands of G groups -> G tokens of each patch, for `Backbone.embed` to add positions to."""

    def __init__(self, groups: Groups, width: int, patch: int) -> None:
        """`width` of the tokens, `patch` in pixels. Kernels and codes are random."""
        super().__init__()
        self.groups = groups
        # no bias: the published kernel's is added with the positions, and invalid pixels must stay zero
        self.kernels = nn.ModuleList(
            nn.Conv2d(len(group), width, patch, stride=patch, bias=False) for group in self.groups
        )
        self.codes = nn.Parameter(START * torch.randn(len(self.groups), width))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> zeros (1, 3, H, W), as nothing enters by the published kernel, and (B, G, N, D)."""
        tokens = [
            kernel(pixels[:, list(group)]).flatten(2).transpose(1, 2)
            for group, kernel in zip(self.groups, self.kernels, strict=True)
        ]
        return pixels.new_zeros(1, 3, *pixels.shape[2:]), torch.stack(tokens, dim=1) + self.codes[:, None]


def group_kernels(
    backbone: Backbone, bands: int, groups: Sequence[Sequence[int]], seed: int, place: str
) -> GroupKernels:
    """The way in of groups of bands, counted from 1, into a backbone; what is random in it is of the seed.

    The group of bands 1, 2 and 3 starts with the published kernel, any other with its mean over red, green and blue,
    times 3 / n for each of n bands: a grey image gives the token that it gave. In an encoder that starts from random
    numbers kernels are random, of the same spread for a token. RecipeError if the groups do not have each band once,
    or blocks need the whole grid. `place`: of the groups in the recipe.
    """
    if not backbone.family.any_patches:
        raise RecipeError(
            f"{place}: blocks of {backbone.family.name} attend in windows of one grid of patches, and each group "
            "makes one; take dinov2 or clip, or leave groups out"
        )
    if sorted(chain.from_iterable(groups)) != list(range(1, bands + 1)):
        raise RecipeError(
            f"{place} = {[list(group) for group in groups]}: expected each of the {bands} bands in one group, as "
            f"numbers from 1 to {bands}; choose with `bands` beside it what is read"
        )
    published = backbone.network.get_submodule(backbone.family.patch_kernel).get_parameter("weight").detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = GroupKernels(
            tuple(tuple(band - 1 for band in group) for group in groups), backbone.width, backbone.patch
        )
        with torch.no_grad():
            for group, kernel in zip(found.groups, found.kernels, strict=True):
                weight = kernel.get_parameter("weight")
                if backbone.base.id == "new":
                    weight.normal_().mul_(published.std() * (3 / len(group)) ** 0.5)
                elif set(group) == {0, 1, 2}:
                    weight.copy_(published[:, list(group)])
                else:
                    weight.copy_(published.mean(dim=1, keepdim=True) * 3 / len(group))
    return found
