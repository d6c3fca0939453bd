"""`data.only`: the recipe of some of its modalities, so that a sensor can be left out without writing a second file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic_core import PydanticCustomError

from vfmseg.errors import nearest, show
from vfmseg.recipe.base import Problem
from vfmseg.recipe.data import SPLITS
from vfmseg.recipe.fusion import SideEncoderSection
from vfmseg.recipe.model import MmLoraAdapter

Mapped = Mapping[Any, Any]


def with_only(recipe: Mapped) -> Mapped:
    """The recipe, as it was read, without the modalities that `data.only` leaves out, and without that key.

    What speaks of them goes too: their files in each split, encoders, radiometry and chances to be hidden; with one
    modality left also the fusion and all about missing ones. Alone, a modality with a published encoder of its own has
    that one, and one with a small encoder that of all; mm_lora is lora, mm_adapter is adapter. What does not fit
    together then is left for the checks of the sections.
    """
    data = recipe.get("data")
    if not isinstance(data, Mapping) or data.get("only") is None or not isinstance(data.get("modalities"), Mapping):
        return recipe
    names = [data["only"]] if isinstance(data["only"], str) else data["only"]
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise _refused(f"= {show(names)} must be a list of some of data.modalities")
    for name in names:
        if name not in data["modalities"]:
            raise _refused(f"= {show(name)} is not one of data.modalities; {nearest(name, data['modalities'])}")
    gone = [name for name in data["modalities"] if name not in names]
    found = {**recipe, "data": _data(data, gone)}
    left = [name for name in data["modalities"] if name in names]
    found = _changed(found, "model", lambda model: _model(model, gone, left))
    return _changed(found, "train", lambda train: _train(train, gone, names))


def _refused(text: str) -> PydanticCustomError:
    return PydanticCustomError("problems", "data.only does not fit", {"problems": [Problem("data.only", text)]})


def _data(data: Mapped, gone: list[str]) -> Mapped:
    found = _without({**data, "modalities": _without(data["modalities"], gone)}, ["only"])
    for split in SPLITS:
        source = found.get(split)
        if isinstance(source, list | tuple):
            found = {**found, split: _sources(source, list(found["modalities"]), gone)}
        else:
            found = _changed(found, split, lambda source: _without(source, gone))
    if len(found["modalities"]) == 1:
        ((name, section),) = found["modalities"].items()
        found["modalities"] = {name: _without(section, ["optional"]) if isinstance(section, Mapping) else section}
    return found


def _sources(sources: Sequence[Any], names: list[str], gone: list[str]) -> list[Any]:
    """Those of a list that have more to give than images of other sensors; a weight against none of them goes."""

    def weighed(some: Sequence[Any]) -> int:
        return sum(isinstance(one, Mapping) and one.get("weight") is not None for one in some)

    def foreign(one: Any) -> bool:
        return isinstance(one, Mapping) and bool(set(gone) & set(one)) and not set(names) & set(one)

    left = [one for one in sources if not foreign(one)]
    drop = [*gone, *(["weight"] if weighed(left) == 1 < weighed(sources) else [])]
    return [_without(one, drop) if isinstance(one, Mapping) else one for one in left]


def _model(model: Mapped, gone: list[str], names: Sequence[str]) -> Mapped:
    found = _changed(model, "modalities", lambda own: _without(own, gone))
    own = found.get("modalities")
    if len([name for name in names if not isinstance(own, Mapping) or name not in own]) <= 1:
        found = _changed(found, "adapter", _of_one)
    if len(names) > 1:
        return _changed(found, "fusion", lambda fusion: _fusion(fusion, [*gone, names[0]]))
    sections = own.get(names[0]) if isinstance(own, Mapping) else None
    if isinstance(sections, Mapping) and not _is_small(sections.get("encoder")):
        found = {**_without(found, ["modalities"]), **{key: one for key, one in sections.items() if one is not None}}
        shared = model.get("adapter")
        passed = not isinstance(shared, Mapping) or shared.get("name") in ("none", "lora", "adapter")
        if sections.get("adapter") is None and not passed:  # as ModelSection.adapter_of
            found = {**found, "adapter": {"name": "none"}}
    return _without(found, ["fusion", "modalities"])


def _is_small(encoder: Any) -> bool:
    """Whether it is one that learns from nothing, which needs a published one beside it."""
    return isinstance(encoder, Mapping) and encoder.get("name") in get_args(
        SideEncoderSection.model_fields["name"].annotation
    )


def _of_one(adapter: Mapped) -> Mapped:
    """What an adapter of several modalities is where one of them goes through the encoder."""
    if adapter.get("name") == "mm_lora":
        said = {key: value for key, value in adapter.items() if value is not None and key != "mix"}
        rank = said.get("rank", MmLoraAdapter.model_fields["rank"].default)
        targets = list(MmLoraAdapter.model_fields["targets"].default)
        return {"rank": rank, "alpha": rank, "targets": targets, **said, "name": "lora"}
    return {"name": "adapter"} if adapter.get("name") == "mm_adapter" else adapter


def _train(train: Mapped, gone: list[str], names: Sequence[str]) -> Mapped:
    found = _unlabelled(train, gone, names)
    found = _changed(found, "augment", lambda how: _changed(how, "radiometry", lambda some: _without(some, gone)))
    if len(set(names)) == 1:
        return _without(found, ["modality_dropout", "distill"])
    found = _changed(found, "modality_dropout", lambda chances: _without(chances, gone))
    emptied = found.get("modality_dropout") == {} != train.get("modality_dropout")
    return _without(found, ["modality_dropout", "distill"]) if emptied else found


def _unlabelled(train: Mapped, gone: list[str], names: Sequence[str]) -> Mapped:
    """The same without scenes of what is left out, and without that section where no other scenes are named."""
    section = train.get("unlabelled")
    scenes = section.get("scenes") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or scenes is None:
        return train
    several = isinstance(scenes, list | tuple)
    left = _sources(scenes if several else [scenes], list(names), gone)
    if not left:
        return _without(train, ["unlabelled"])
    return {**train, "unlabelled": {**section, "scenes": left if several else left[0]}}


def _fusion(fusion: Mapped, unmoved: list[str]) -> Mapped:
    """The same, of which `coregister` moves none of these, and is left out where it would move nothing."""
    moved = fusion.get("coregister")
    names = moved.get("modalities") if isinstance(moved, Mapping) else None
    if not isinstance(moved, Mapping) or not isinstance(names, list) or not set(unmoved) & set(map(str, names)):
        return fusion
    left = [name for name in names if name not in unmoved]
    return {**fusion, "coregister": {**moved, "modalities": left}} if left else _without(fusion, ["coregister"])


def _changed(mapping: Mapped, key: str, change: Callable[[Mapped], Mapped]) -> dict[Any, Any]:
    """The same with the section `key` changed, if there is one."""
    section = mapping.get(key)
    return {**mapping, key: change(section)} if isinstance(section, Mapping) else dict(mapping)


def _without(mapping: Mapped, keys: list[str]) -> dict[Any, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
