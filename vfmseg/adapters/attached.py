"""What an adapter has put into a backbone: data that the network, the files and the optimizer ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vfmseg.encoders.tokens import StreamRows, Tokens

Hook = Callable[[int, Tokens, StreamRows], Tokens]
"""(depth of the block, tokens, which rows of the batch are whose) -> tokens, before or after that block.

A method of a module that lies in `beside` or in the backbone: a copy of the network then has hooks of its own, while a
function that holds parameters would go on with those of the original. With gradient checkpointing a hook is called
again in the backward pass, before its block is run again.
"""


def _nothing(folder: Path) -> None:
    """Neither written nor read: there is nothing beside what the backbone's own files hold."""


@dataclass(frozen=True)
class Attached:
    """An adapter in a backbone.

    sites: names of the adapted layers inside the upstream module. added: parameters that are no part of what was
    published. beside: a module with those that do not lie inside the backbone, such as prompts. moving: what behaves
    otherwise in training (dropout). before, after: called round each block, in order. save, load: the folder that the
    adapter has in a segmenter, which `save` makes; `load` is strict (CheckpointError for tensors or settings that
    do not fit).
    """

    name: str
    sites: tuple[str, ...] = ()
    added: tuple[nn.Parameter, ...] = ()
    beside: nn.Module | None = None
    moving: tuple[nn.Module, ...] = ()
    before: tuple[Hook, ...] = ()
    after: tuple[Hook, ...] = ()
    save: Callable[[Path], None] = _nothing
    load: Callable[[Path], None] = _nothing
