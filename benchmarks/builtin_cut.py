"""A small ViT cut out of a larger one of DINOv2's layout, in closed form: the start of `make_builtin.py`.

The small one has the first blocks of the teacher, with a part of the neurons of each MLP: those through which most
passes, by the variance of a neuron times the square of its weights. The weights behind the neurons that stay are solved
for, block by block, so that after each block the tokens are as near to the teacher's as a linear map of these neurons
can bring them (ridge regression on tokens of unlabelled windows); what earlier blocks lost is made good by later ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-3
"""Beside the mean variance of a neuron: how firmly solved weights are held to those of the teacher."""
BATCH = 16


@torch.no_grad()
def cut(teacher: Any, depth: int, ratio: int, side: int, images: Tensor) -> tuple[Any, list[float]]:
    """A Dinov2Model of the first `depth` blocks, and for each block the share of the variance that it lost.

    `teacher`: a Dinov2Model. `ratio`: neurons of an MLP for each channel, below the teacher's. `side`: of the images
    that its positions are for. `images` float32 (N, 3, side, side), normalised.
    """
    student = _first_blocks(teacher, depth, ratio, side)
    wanted = _batched(
        lambda batch: torch.stack(teacher(batch, output_hidden_states=True).hidden_states[: depth + 1], 1), images
    )
    tokens = _batched(student.embeddings, images)
    lost = []
    for number, (mine, its) in enumerate(zip(student.encoder.layer, teacher.encoder.layer[:depth], strict=True), 1):
        target = wanted[:, number]
        middle = _batched(
            lambda batch, block=mine: batch + block.layer_scale1(block.attention(block.norm1(batch))[0]), tokens
        )
        neurons = _batched(lambda batch, block=its: F.gelu(block.mlp.fc1(block.norm2(batch))), middle)
        _solve(mine, its, neurons.flatten(0, 1), (target - middle).flatten(0, 1))
        tokens = _batched(mine, tokens)
        lost.append(float((tokens - target).square().sum() / (target - target.mean(dim=(0, 1))).square().sum()))
    return student, lost


def _first_blocks(teacher: Any, depth: int, ratio: int, side: int) -> Any:
    """The student with all that it takes over as it is: kernel, positions, attention, norms, scales."""
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    theirs = teacher.config
    config = Dinov2Config(
        hidden_size=theirs.hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=theirs.num_attention_heads,
        mlp_ratio=ratio,
        patch_size=theirs.patch_size,
        image_size=side,
        layerscale_value=1.0,
    )
    student = Dinov2Model(config).eval()
    own, its = student.state_dict(), teacher.state_dict()
    own |= {name: its[name] for name in own if name in its and its[name].shape == own[name].shape}
    grid = torch.zeros(1, 1 + (side // theirs.patch_size) ** 2, theirs.hidden_size)
    own["embeddings.position_embeddings"] = teacher.embeddings.interpolate_pos_encoding(grid, side, side)
    student.load_state_dict(own)
    return student


def _solve(mine: Any, its: Any, neurons: Tensor, wanted: Tensor) -> None:
    """Give the student's MLP the neurons that matter, and weights behind them that bring `wanted` about.

    `neurons` (tokens, all of the teacher's); `wanted` (tokens, channels): what the MLP should add, scaled.
    """
    scale = its.layer_scale2.lambda1
    passes = (its.mlp.fc2.weight * scale[:, None]).square().sum(dim=0) * neurons.var(dim=0)
    kept = passes.topk(mine.mlp.fc1.out_features).indices.sort().values
    hidden, added = neurons[:, kept].double(), (wanted / scale).double()
    centre, mean = hidden.mean(dim=0), added.mean(dim=0)
    square = (hidden - centre).T @ (hidden - centre)
    ridge = RIDGE * square.diagonal().mean()
    product = (hidden - centre).T @ (added - mean) + ridge * its.mlp.fc2.weight[:, kept].double().T
    weights = torch.linalg.solve(square + ridge * torch.eye(len(kept), dtype=square.dtype), product)
    mine.mlp.fc1.weight.copy_(its.mlp.fc1.weight[kept])
    mine.mlp.fc1.bias.copy_(its.mlp.fc1.bias[kept])
    mine.mlp.fc2.weight.copy_(weights.T)
    mine.mlp.fc2.bias.copy_(mean - centre @ weights)


def _batched(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """What a function makes of all values, a few at a time."""
    return torch.cat([function(batch) for batch in values.split(BATCH)])
