"""The `probe` section of pretraining: small labelled sets on which the encoder is scored while it learns."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Annotated

from pydantic import Field

from vfmseg.errors import nearest
from vfmseg.recipe.base import Name, Problem, Section, Whole
from vfmseg.recipe.data import ClassesSection
from vfmseg.recipe.splits import AnySource, Sources, same_scenes


class ProbeSet(ClassesSection):
    """Labelled scenes of some of the modalities: cells of `train` are learned from, cells of `val` are scored."""

    train: Annotated[Sources, Field(examples=[{"rgb": "train/*.tif", "labels": "train_labels/*.tif"}])]
    """As `data.train` of a fine-tuning recipe; sources have no weights, as all scenes are read."""
    val: Annotated[Sources, Field(examples=[{"rgb": "val/*.tif", "labels": "val_labels/*.tif"}])]

    def sources(self, split: str) -> dict[str, AnySource]:
        """{its key below the set: source} in order: `val`, or `val.0`, `val.1` of a list."""
        found = self.train if split == "train" else self.val
        if isinstance(found, tuple):
            return {f"{split}.{number}": source for number, source in enumerate(found)}
        return {split: found}

    def both(self) -> dict[str, AnySource]:
        """The sources of both splits."""
        return self.sources("train") | self.sources("val")

    def modalities(self) -> set[str]:
        """Those that the sources name."""
        return {name for source in self.both().values() for name in source.images}

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        for place, source in self.both().items():
            for name in sorted(self.modalities() - set(source.images)):
                yield Problem(f"{place}.{name}", "is missing, and another source of this set has it; name it in all")
            if source.weight is not None:
                yield Problem(f"{place}.weight", "is not used: all scenes of a probe are read; drop it")
        for (place, first), (_, second) in product(self.sources("train").items(), self.sources("val").items()):
            if shared := same_scenes(first, second):
                yield Problem("val", f"names the same scenes as {place} ({shared}); give val scenes of its own")


class ProbeSection(Section):
    """How good the features of the frozen encoder are: by a linear classifier, and by nearest neighbours.

    The best encoder is the one with the highest linear score, in the mean of the sets.
    """

    sets: Annotated[dict[Name, ProbeSet], Field(min_length=1, max_length=64)]
    """Labelled sets, by a name of yours; several, as one set is mostly noise."""
    every: Annotated[Whole, Field(ge=1, le=10**6)] = 1
    """Epochs from one score to the next; the first and the last one are always scored."""
    neighbours: Annotated[Whole, Field(ge=1, le=1000)] = 20
    """How many cells of `train` vote on a cell of `val`."""

    def _problems(self) -> Iterator[Problem]:
        for name in self.sets:
            if "." in name or "/" in name:
                yield Problem(f"sets.{name}", "has a name with . or /; choose another, as it names curves and messages")

    def unknown(self, modalities: Collection[str]) -> Iterator[Problem]:
        """Images of modalities that the pretraining recipe does not have."""
        for title, one in self.sets.items():
            for place, source in one.both().items():
                for name in source.images:
                    if name not in modalities:
                        text = f"is not one of data.modalities; {nearest(name, modalities)}"
                        yield Problem(f"probe.sets.{title}.{place}.{name}", text)
