"""How the feature maps of several streams become those of one: a contract, and its parts by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from vfmseg.data.image import Known
from vfmseg.encoders.tokens import Features


class Fuse(Protocol):
    """A module (nn.Module) that joins the features of streams which lie on one grid."""

    known: Known
    """Which pixels get a label: where all modalities are valid, or where any of them is."""

    def __call__(self, found: Mapping[str, Features]) -> Features:
        """{stream: its features} of any of the streams, at least one -> features of the same shapes.

        What a stream has not seen (`seen` is 0 there) must change nothing.
        """
        ...


class FuseClass(Protocol):
    """What builds a fusion: a class with its rule."""

    known: Known

    def __call__(self, streams: tuple[str, ...], channels: tuple[int, ...], **options: Any) -> Fuse:
        """`channels` of each map; options as the section of the recipe names them."""
        ...


FUSIONS: dict[str, FuseClass] = {}
"""Fusions of features by the name in the recipe.

`stack` is none of them: it puts the bands of all modalities into one stream, so that there is nothing to join.
"""
