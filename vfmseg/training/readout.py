"""What features of cells say about classes: a linear classifier, nearest neighbours, and how many directions they use.

Features are float (N, C) on the CPU, labels int64 (N,). Nothing is random here: the same numbers give the same answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTY = 1e-3
"""Of half the squared weights beside the mean cross-entropy; with standardised features it keeps the fit from diverging
where classes can be told apart without error."""

ITERATIONS = 100
"""Of LBFGS, at most."""

ROWS = 1024
"""Cells whose neighbours are searched at once: 20,000 similarities each, 80 MB."""


def linear(train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
    """Class indexes (M,) of `val`, told by multinomial logistic regression on standardised features."""
    mean, std = train.double().mean(dim=0), train.double().std(dim=0, correction=0)
    # what is constant says nothing; rounding leaves some 1e-17 of it, which must not be blown up
    scale = torch.where(std > 1e-9 * (1 + mean.abs()), 1 / std, 0.0)
    inputs = (train.double() - mean) * scale
    with torch.enable_grad():
        weight = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        fit = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            fit.zero_grad()
            value = F.cross_entropy(inputs @ weight + bias, labels) + PENALTY / 2 * weight.square().sum()
            value.backward()
            return value

        fit.step(loss)
    return (((val.double() - mean) * scale) @ weight.detach() + bias.detach()).argmax(dim=1)


def nearest_neighbours(train: Tensor, labels: Tensor, val: Tensor, classes: int, count: int) -> Tensor:
    """Class indexes (M,) of `val`: of the `count` cells of `train` with the largest cosine, the class of most.

    Each votes with its cosine.
    """
    known = F.normalize(train.float(), dim=1)
    found = []
    for rows in F.normalize(val.float(), dim=1).split(ROWS):
        cosine, which = (rows @ known.T).topk(min(count, len(known)), dim=1)
        votes = torch.zeros(len(rows), classes).scatter_add(1, labels[which], cosine.clamp(min=0))
        found.append(votes.argmax(dim=1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def effective_rank(features: Tensor) -> float:
    """exp(entropy of the singular values, normed to sum 1) of (N, C): 1 to min(N, C) (Roy and Vetterli 2007).

    1 where all cells have one direction, so an encoder that has collapsed shows.
    """
    # C x C instead of N x C: eigenvalues are the squares of the singular values
    squares = torch.linalg.eigvalsh(features.double().T @ features.double()).clamp(min=0)
    values = squares.sqrt()
    if not bool(values.sum() > 0):
        return 1.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())
