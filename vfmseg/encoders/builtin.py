"""The encoder in the box: a pretrained ViT in the layout of DINOv2 that comes with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from vfmseg.encoders.backbone import BaseRecord
from vfmseg.encoders.dinov2 import DINOV2
from vfmseg.encoders.formats.transformers import TRANSFORMERS
from vfmseg.errors import CheckpointError

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "builtin"
"""In transformers' form; its README.md is the model card, and its config.json says how large the encoder is."""

BUILTIN = replace(DINOV2, name="builtin")


def load_builtin() -> tuple[nn.Module, BaseRecord]:
    """The whole encoder in float32, and what it is; CheckpointError if this installation does not hold it whole."""
    if not FOLDER.is_dir():
        raise _broken("there is no such folder")
    try:
        network, base = TRANSFORMERS.load(BUILTIN, str(FOLDER), None)
    except CheckpointError as error:
        raise _broken(str(error).removeprefix(f"{FOLDER}: ")) from None
    return network, replace(base, id=BUILTIN.name)  # wherever it is installed


def _broken(found: str) -> CheckpointError:
    return CheckpointError(
        f"{FOLDER}: should hold the encoder that comes with vfmseg, so this installation is broken: install vfmseg "
        f"again ({found})"
    )
