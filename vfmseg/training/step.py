"""What one training step computes: the model and all objectives as one module, run once for each micro-batch.

Everything that learns sits in one `Step`, because the processes of a run exchange gradients at the end of a backward
pass through one forward pass of one module: an objective that called the model a second time, beside it, would leave
its gradients where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vfmseg.data.sample import Batch


@dataclass(frozen=True)
class Term:
    """One summed loss: it is worth weight * sum / count, `count` being the kind of count that divides it."""

    sum: Tensor  # a scalar, still on the graph
    weight: float
    count: str  # a key of the objective's `counts`, such as "pixels"


class Model(Protocol):
    """What a model must tell of itself, beside being an `nn.Module`."""

    def parts(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """{part: {name: parameter}}: all of them, each in one part, which has a learning rate of its own."""
        ...


class Objective(Protocol):
    """Something to minimise; an `nn.Module`, whose own tensors (a decoder for pixels, a teacher) learn and are saved.

    Sums and counts are apart so that a step may be cut into any number of batches and processes: the counts of all of
    them are added up first, and each sum is divided once.
    """

    source: str
    """Name of the stream whose batches it takes."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """{kind: scalar}: how much there is to learn from; a function of the batch alone, zero where it is empty."""
        ...

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """{name: loss}; the same names whatever the batch holds, with a gradient of zero where it is empty."""
        ...

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called without gradients after optimizer step `step` (1 is the first): for averages of the weights."""
        ...


class Step(nn.Module):
    """A model and what is asked of it. Keys are "objective/kind" for counts and "objective/term" for losses."""

    def __init__(self, model: Model, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = cast(nn.Module, model)
        self.objectives = nn.ModuleDict(cast("dict[str, nn.Module]", dict(objectives)))

    def counts(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """What divides the terms of these batches (one for each source), as scalars to be added over batches."""
        found: dict[str, Tensor] = {}
        for name, objective in self._each().items():
            for kind, count in objective.counts(batches[objective.source]).items():
                found[f"{name}/{kind}"] = count
        return found

    def forward(self, batches: Mapping[str, Batch]) -> dict[str, Term]:
        """The losses of all objectives on one batch of each source."""
        found: dict[str, Term] = {}
        for name, objective in self._each().items():
            for key, term in objective.terms(self.model, batches[objective.source]).items():
                found[f"{name}/{key}"] = replace(term, count=f"{name}/{term.count}")
        if any(batch.absent for batch in batches.values()):
            first = next(iter(found))
            found[first] = replace(found[first], sum=found[first].sum + self._touched())
        return found

    def _touched(self) -> Tensor:
        """Zero, with a gradient of zero for all that learns.

        What belongs to absent modalities may not have been run, and processes wait for the gradients of all others.
        Without it the optimizer would also treat such a tensor otherwise than one whose gradient is zero.
        """
        tensors = [tensor for part in self.parts().values() for tensor in part.values()]
        return torch.stack([tensor.flatten()[:1].float().sum() * 0.0 for tensor in tensors]).sum()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Tell every objective that optimizer step `step` is done."""
        for objective in self._each().values():
            objective.after_step(self.model, step)

    def sources(self) -> set[str]:
        """Names of the streams that the objectives take."""
        return {objective.source for objective in self._each().values()}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """{part: {name: tensor that learns}}: the parts of the model, then each objective with tensors of its own."""
        found = dict(cast(Model, self.model).parts())
        for name, module in self.objectives.items():
            found[f"objectives.{name}"] = dict(module.named_parameters())
        learning: dict[str, dict[str, Tensor]] = {
            part: {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
            for part, tensors in found.items()
        }
        return {part: tensors for part, tensors in learning.items() if tensors}

    def kept(self) -> dict[str, Tensor]:
        """{name: tensor}: all that training changes, what a run must hold to go on exactly.

        Of the model what learns; of an objective everything, as it may change tensors that get no gradient.
        """
        learning = {f"model.{name}": t for name, t in self.model.named_parameters() if t.requires_grad}
        return learning | {f"objectives.{name}": t for name, t in self.objectives.state_dict().items()}

    def _each(self) -> dict[str, Objective]:
        return cast("dict[str, Objective]", dict(self.objectives.items()))


def total(terms: Mapping[str, Term], divisors: Mapping[str, Tensor]) -> Tensor:
    """Sum of weight * sum / count over the terms; a count of zero gives zero."""
    return torch.stack(list(worths(terms, divisors).values())).sum()


def worths(terms: Mapping[str, Term], divisors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name of a term: weight * sum / count}, which add up to `total`."""
    return {name: term.weight * term.sum / divisors[term.count].clamp(min=1e-12) for name, term in terms.items()}


@torch.no_grad()
def shares(worth: Mapping[str, Tensor], objectives: Iterable[str]) -> list[Tensor]:
    """What each objective has in the total, from what the terms "objective/term" are worth."""
    return [
        torch.stack([value.detach() for name, value in worth.items() if name.partition("/")[0] == objective]).sum()
        for objective in objectives
    ]
