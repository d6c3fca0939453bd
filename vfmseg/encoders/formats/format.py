"""How the files of an encoder are read: one record a form in which people keep them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vfmseg.encoders.backbone import BaseRecord, Family


@dataclass(frozen=True)
class Format:
    """One form, such as that in which transformers saves models.

    reads(checkpoint): whether a folder, file or hub id is of this form, told by what is there.
    load(family, checkpoint, revision): the whole image encoder in float32, strictly, and what it is (CheckpointError).
    config(network): its architecture as plain JSON values.
    random(family, config, seed, place, most, blocks): the architecture of a config with random weights. `place`: what
    messages call the config; `most`: parameters that it may claim, of all blocks or the first `blocks`.
    """

    reads: Callable[[str], bool]
    load: Callable[[Family, str, str | None], tuple[nn.Module, BaseRecord]]
    config: Callable[[nn.Module], dict[str, Any]]
    random: Callable[[Family, dict[str, Any], int, str, float, int | None], nn.Module]
