"""Where the groups of bands of a recipe meet an encoder: that streams fit together, and what they cost is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from vfmseg.encoders.stem import Stem
from vfmseg.errors import RecipeError
from vfmseg.terminal import say_once


def require_same_groups(stems: Mapping[str, nn.Module]) -> None:
    """RecipeError if streams that share an encoder, whose tokens are one batch, have other numbers of groups."""
    counts = {name: len(stem.groups) for name, stem in stems.items() if isinstance(stem, Stem)}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise RecipeError(
            f"data.modalities: of groups of bands {found} (1: all bands together), and these share an encoder, where "
            "their tokens are one batch; give each as many groups, or an encoder of its own (model.modalities)"
        )


def tell_groups(stems: Iterable[Stem]) -> None:
    """Say so where a patch has several tokens."""
    for stem in stems:
        if len(stem.groups) > 1:
            (name,) = stem.modalities
            say_once(
                f"data.modalities.{name}.groups: the encoder gets {len(stem.groups)} tokens of each patch instead of "
                f"one; its time and memory grow by at least as much"
            )
