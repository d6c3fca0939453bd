"""The published encoders that a segmenter stands on and does not store: found, and proved to be the same by hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vfmseg.build.own import own_backbone
from vfmseg.checkpoint.folder import MARK
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.builtin import BUILTIN
from vfmseg.errors import CheckpointError, nearest
from vfmseg.recipe import Recipe

Moved = str | Mapping[str, str] | None
"""Where base encoders lie now: that of model.encoder, or {modality: that of its own}, where "" is model.encoder's."""

SHARED = ""


def moved_bases(folder: Path, recipe: Recipe, given: Moved) -> dict[str, str]:
    """{modality: where its own encoder lies now}, that of model.encoder under `SHARED`; CheckpointError for others."""
    found = {SHARED: given} if isinstance(given, str) else dict(given or {})
    own = recipe.model.own_encoders
    for name in found:
        if name != SHARED and name not in own:
            some = f"{nearest(name, own)}" if own else "no modality of it has one; leave the name out"
            raise CheckpointError(
                f"{folder}: encoder {name}={found[name]}: {name} is no modality with a published encoder of its own; "
                f"{some}"
            )
    return found


def own_base(
    folder: Path, recipe: Recipe, modality: str, stored: Mapping[str, Any], shared: Backbone, moved: str | None
) -> Backbone:
    """The published encoder of a modality, with the recorded hash."""
    return same_base(folder, modality, stored, lambda: own_backbone(recipe, modality, shared, instead=moved))


def same_base(folder: Path, modality: str, stored: Mapping[str, Any], read: Callable[[], Backbone]) -> Backbone:
    """What `read` finds, if it has the recorded hash; `modality` is `SHARED` for that of model.encoder."""
    whose = f" of {modality}" if modality else ""
    remedy = (
        f'pass encoder={{"{modality}": FOLDER}} (--encoder {modality}=FOLDER)'
        if modality
        else "pass encoder=FOLDER (--encoder FOLDER)"
    )
    try:
        backbone = read()
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{folder} needs this base encoder{whose}; if it lies elsewhere, {remedy}"
        ) from None
    if backbone.base.sha256 != stored["sha256"]:
        raise CheckpointError(
            f"{folder}: the base encoder{whose} {backbone.base.id} has SHA-256 {backbone.base.sha256[:12]}..., but "
            f"this checkpoint was trained on {stored['sha256'][:12]}...; {_same_again(folder, stored['id'], remedy)}"
        )
    return backbone


def _same_again(folder: Path, base: str, elsewhere: str) -> str:
    """How to come by the encoder that a segmenter was trained on; `elsewhere`: how another place of it is said."""
    if base != BUILTIN.name:
        return f"use the encoder it was trained on ({base})"
    return (
        "that one came with another vfmseg: install the version that it was trained with (versions.vfmseg in "
        f"{folder / MARK}), or take vfmseg/assets/builtin from there and {elsewhere}"
    )
