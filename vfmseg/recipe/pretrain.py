"""The recipe of `vfmseg pretrain`: unlabelled scenes, an encoder, and what it learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from vfmseg.errors import nearest
from vfmseg.recipe.base import Name, Number, Problem, RecipePath, Section, Whole
from vfmseg.recipe.model import FullAdapter, LoraAdapter, PretrainedEncoder, PublishedSection
from vfmseg.recipe.train import RunSection
from vfmseg.recipe.unlabelled import UnlabelledSection

Weight = Annotated[Number, Field(ge=0)]


class PretrainedSection(Section):
    """What is trained."""

    encoder: Annotated[PretrainedEncoder, Field(examples=[{"name": "new"}])]
    """A new one, or published weights to go on from."""
    adapter: Annotated[FullAdapter | LoraAdapter, Field(discriminator="name")] = FullAdapter(name="full")
    """full: all of the encoder learns; lora: the weights stay, and low-rank updates are merged into what is written."""

    def _problems(self) -> Iterator[Problem]:
        if self.encoder.name == "new" and self.adapter.name != "full":
            yield Problem(
                "adapter", "= 'lora' is for published weights; random ones learn as a whole: use {name: full}"
            )


class DistillSection(Section):
    """The tokens follow those of a frozen teacher."""

    weight: Weight = 1.0
    teacher: PublishedSection
    """Its `layers` are the ones to follow, as many as those of the encoder."""


class ObjectivesSection(Section):
    """What is minimised: one or several, each with its weight."""

    distill: DistillSection | None = None

    def _problems(self) -> Iterator[Problem]:
        if self.distill is None:
            yield Problem("", "names nothing to learn; add distill")


class PretrainRecipe(Section):
    """One run from unlabelled scenes to an encoder."""

    name: Annotated[Name, Field(examples=["aerial-vit"])]
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Everything random derives from it."""
    data: UnlabelledSection
    model: PretrainedSection
    objectives: ObjectivesSection
    train: RunSection = RunSection()
    output_dir: Annotated[RecipePath, Field(examples=["runs/aerial-vit"])]
    """Folder of the run: encoders, metrics, the resolved recipe."""

    def _problems(self) -> Iterator[Problem]:
        for name in self.train.augment.radiometry:
            if name not in self.data.modalities:
                place = f"train.augment.radiometry.{name}"
                yield Problem(place, f"is not one of data.modalities; {nearest(name, self.data.modalities)}")
