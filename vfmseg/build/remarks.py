"""What a person is told of the data before a run: what is absent, hidden, shared, or read otherwise than expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch.nn import Parameter

from vfmseg.data.scene import Scene
from vfmseg.data.survey import Survey
from vfmseg.errors import DataError
from vfmseg.geo.footprints import ground_shared
from vfmseg.recipe import Recipe
from vfmseg.terminal import say_once

SHARED = 0.1
"""Share of a scene that must lie in another one to be told: boxes of neighbours may overlap a little."""

PLAUSIBLE = 1e10
"""Means and standard deviations beyond are told: 32-bit numbers stay below."""

MOST_HIDDEN = 0.5
"""Share of a class's labelled pixels from which it is told that they are hidden."""


def tell_absent(recipe: Recipe, split: str, counts: Mapping[int, int], pixels: int) -> None:
    """Say which classes have no label in a split, what follows from it, and what may hide them.

    counts: labelled pixels by class id, of so many pixels in all. DataError where only one of several classes is there
    to be learned.
    """
    named = {i: f"{i} ({recipe.data.classes[i].name})" for i in counts}
    absent, found = ([named[i] for i in counts if bool(counts[i]) == there] for there in (False, True))
    if not absent:
        return
    ignored, hidden = recipe.data.ignore_index, 1 - sum(counts.values()) / pixels
    remedy = "check data.classes against the label files"
    if hidden:
        remedy = (
            f"{max(hidden, 0.0001):.2%} of its label pixels count as unlabelled (data.ignore_index = {ignored}, nodata "
            f"or a mask): if {ignored} is a class in the files, name it in data.classes and choose another "
            f"data.ignore_index; else {remedy}"
        )
    if split == "train" and len(found) == 1:
        raise DataError(
            f"data.train: every labelled pixel is of class {found[0]}, none of {', '.join(absent)}: there is nothing "
            f"to tell apart and so nothing to learn; {remedy}"
        )
    if split == "train":
        follows = "which so cannot be learned"
    elif len(found) == 1:
        follows = (
            f"all labels are {found[0]}: a model that predicts nothing else scores 1, so the score says nothing, and "
            "the last epoch is kept as the best"
        )
    else:
        follows = "which no score is about; the best epoch is chosen by the mean IoU of the other classes"
    say_once(f"data.{split}: no pixel of class {', '.join(absent)}, {follows}; {remedy}")


def tell_missing(recipe: Recipe, split: str, scenes: Sequence[Scene]) -> None:
    """Say how many scenes of a split have each optional modality."""
    for name, modality in recipe.data.modalities.items():
        found = sum(name in scene.bands() for scene in scenes)
        if modality.optional:
            say_once(f"data.{split}: {found} of {len(scenes)} scenes have {name}, which is optional")


def tell_portions(places: Iterable[str], scenes: Sequence[int], shares: Sequence[float]) -> None:
    """Say how many scenes each source of a list has given, and of which part of the windows of an epoch they are."""
    told = [
        f"data.{place} has {count} scenes and {share:.1%} of the windows"
        for place, count, share in zip(places, scenes, shares, strict=True)
    ]
    say_once("; ".join(told))


def tell_survey(split: str, found: Survey, classes: Sequence[str]) -> None:
    """Say what is hidden and by what, which classes that takes, and which numbers look like a filling."""
    for name, hidden in found.hidden.items():
        if hidden.causes:
            say_once(f"data.{split}: of the pixels of {name}, hidden are {hidden.text()}")
    causes = " and ".join(sorted({cause for hidden in found.hidden.values() for cause in hidden.causes}))
    for name, labelled, visible in zip(classes, found.labelled, found.visible, strict=True):
        if labelled and visible < (1 - MOST_HIDDEN) * labelled:
            say_once(
                f"data.{split}: {1 - visible / labelled:.0%} of the pixels labelled {name} are hidden by {causes}, and "
                "count in no loss and no score; if they are measurements, mend the files' nodata or mask, or name the "
                "bands in data.modalities.NAME.bands"
            )
    for fill in found.fills:
        say_once(
            f"data.{split}: {fill.share:.1%} of the pixels of {fill.modality} hold {fill.value:g} in band {fill.band}, "
            f"far from all others ({fill.low:g} to {fill.high:g}); if that means that nothing was measured, set "
            f"data.modalities.{fill.modality}.nodata to the stored number"
        )


def tell_implausible(statistics: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Say which bands have a mean or standard deviation that no measurement has: a filling was taken for one."""
    for name, (means, stds) in statistics.items():
        for number, (mean, std) in enumerate(zip(means, stds, strict=True), 1):
            if max(abs(mean), std) > PLAUSIBLE:
                say_once(
                    f"{name}: band {number} has mean {mean:g} and std {std:g}, which no sensor measures; if some "
                    f"number stands for nothing, set data.modalities.{name}.nodata to it"
                )


def tell_shared_ground(splits: Mapping[str, Sequence[Scene]], below: str = "data.") -> None:
    """Say where a split lies on ground of one before it: its scores say little about other places then.

    Not an error: the same place at another time, or a strip that neighbours share, may be meant. `below`: where the
    splits are in the recipe.
    """
    for split, scenes in splits.items():
        for other in splits:
            if other == split:
                break
            shares, which = ground_shared([s.grid for s in scenes], [s.grid for s in splits[other]])
            found = int((shares > SHARED).sum())
            if found:
                worst = int(np.argmax(shares))
                say_once(
                    f"{below}{split}: {found} of {len(scenes)} scenes lie on ground of {below}{other} (most of all "
                    f"{scenes[worst].name}: {shares[worst]:.0%} is in {splits[other][which[worst]].name}); scores "
                    "there do not tell how well other places are labelled"
                )


def tell_idle_loss(recipe: Recipe, parts: Mapping[str, Mapping[str, Parameter]]) -> None:
    """Say so where a fusion's own loss has hardly anything to shape: no part before the fusion learns.

    parts: those of the network. With `recover` the loss trains decoders that prediction needs.
    """
    fusion = recipe.model.joins
    if fusion is None or fusion.name not in ("reconstruction", "alignment"):
        return
    if fusion.name == "reconstruction" and fusion.recover:
        return
    if not any(one.requires_grad for part in ("encoder", "adapter", "stem") for one in parts[part].values()):
        say_once(
            f"model.fusion = {fusion.name}: its loss shapes the features, but nothing before the fusion learns, so it "
            "moves a scale and a shift of each channel at most; take an adapter (lora, mm_lora, ...) or small encoders "
            "(model.modalities) for it"
        )


def tell_notes(scenes: Sequence[Scene]) -> None:
    """Say what is read otherwise than somebody may expect: once for each kind, with the number of scenes."""
    first: dict[tuple[str, str], str] = {}
    count: dict[tuple[str, str], int] = {}
    for scene in scenes:
        for key, text in scene.notes().items():
            first.setdefault(key, text)
            count[key] = count.get(key, 0) + 1
    for key, text in first.items():
        more = f" (and so {count[key] - 1} more)" if count[key] > 1 else ""
        say_once(f"{key[0]}: {text}{more}")
