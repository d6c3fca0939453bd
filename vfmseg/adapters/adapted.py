"""A backbone run from block to block, with the hooks of its adapter round each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vfmseg.adapters.attached import Attached
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.tokens import StreamRows, Tokens


def run_blocks(
    backbone: Backbone, attached: Attached, tokens: Tokens, rows: StreamRows, training: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Maps (B, D, rows, columns) of the layers that are asked for, and the share that each cell has seen (B, ...).

    `rows`: whose rows of the batch are whose. `training`: with gradient checkpointing, blocks are then run again for
    their gradients.
    """
    maps: list[Tensor] = []
    for depth, behind in _behind_blocks(backbone, attached, tokens, rows, training):
        if depth in backbone.layers:
            maps.append(backbone.tap(behind))
    return tuple(maps), behind.seen.unflatten(1, (behind.groups, *behind.grid))[:, 0]  # groups see the same


def last_tokens(backbone: Backbone, attached: Attached, tokens: Tokens, rows: StreamRows, training: bool) -> Tokens:
    """The tokens behind the last block that is asked for, not normed yet; patches may have been left out.

    `rows` and `training` as in `run_blocks`.
    """
    *_, (_, last) = _behind_blocks(backbone, attached, tokens, rows, training)
    return last


def _behind_blocks(
    backbone: Backbone, attached: Attached, tokens: Tokens, rows: StreamRows, training: bool
) -> Iterator[tuple[int, Tokens]]:
    """(depth, the tokens behind that block) of each block in turn."""
    again = backbone.gradient_checkpointing and training and torch.is_grad_enabled()
    for depth in range(1, backbone.layers[-1] + 1):
        if again:
            # the reentrant kind returns no gradient when the input of the block needs none
            tokens = checkpoint(_block, backbone, attached, depth, tokens, rows, use_reentrant=False)
        else:
            tokens = _block(backbone, attached, depth, tokens, rows)
        yield depth, tokens


def _block(backbone: Backbone, attached: Attached, depth: int, tokens: Tokens, rows: StreamRows) -> Tokens:
    """Tokens behind block `depth` and the hooks round it.

    Hooks are run again where the block is, for its gradients: then too they tell its layers the rows of this batch.
    """
    for hook in attached.before:
        tokens = hook(depth, tokens, rows)
    tokens = backbone.step(depth, tokens)
    for hook in attached.after:
        tokens = hook(depth, tokens, rows)
    return tokens
