"""What a fresh model starts from beside published weights: ways in and adapters that `vfmseg pretrain` has trained.

Only models that are to be trained are started so. What a segmenter has learned lies in its own folder, which is read
without the one that training began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfmseg.adapters.attached import Attached
from vfmseg.adapters.lora import start_lora
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.builtin import BUILTIN
from vfmseg.encoders.pretrained import ADAPTER, MARK, Pretrained, kind_of, read_pretrained, require_whole, start_stem
from vfmseg.encoders.stem import Stem
from vfmseg.errors import RecipeError, show
from vfmseg.model import Network
from vfmseg.recipe import Recipe
from vfmseg.recipe.base import Section
from vfmseg.recipe.model import LoraAdapter, PublishedEncoder
from vfmseg.terminal import say


def start_network(recipe: Recipe, model: Network) -> None:
    """Start the stems and adapters of a fresh network from what its recipe names.

    RecipeError for an adapter that was trained otherwise, CheckpointError for files that are not as they were written.
    """
    section = recipe.model
    shared = {name: stem for name in model.streams if isinstance(stem := model.stem(name), Stem)}
    start(model.backbone, model.attached, shared, section.encoder, section.adapter, "model")
    for name, own in model.own_encoders.items():
        place = f"model.modalities.{name}"
        start(own.backbone, own.attached, {name: own.stem}, section.own_encoders[name], section.adapter_of(name), place)


def start(
    backbone: Backbone,
    attached: Attached,
    stems: Mapping[str, Stem],
    encoder: Section,
    adapter: Section,
    place: str,
) -> None:
    """The same for one backbone with its adapter and stems {stream: stem}; `encoder` and `adapter` are their sections.

    `place`: of both sections in the recipe. Stems are looked for beside the adapter first, then beside the encoder.
    """
    sources = []
    if isinstance(adapter, LoraAdapter) and adapter.start is not None:
        sources.append(_start_adapter(backbone, attached, adapter, encoder, place))
    if isinstance(encoder, PublishedEncoder):
        found = read_pretrained(Path(encoder.checkpoint).expanduser())
        sources += [] if found is None else [found]
    for stem in stems.values():
        if sources and stem.mix.state_dict():
            _start_stem(stem, sources)
        elif sources and (grouped := next((one for one in sources[0].stems if one.input.startswith("groups")), None)):
            say(
                f"{' + '.join(stem.modalities)} enters by the kernel of red, green and blue, which was not trained in "
                f"{sources[0].folder}: there {grouped.modality} has data.modalities.{grouped.modality}.{grouped.input}"
            )


def _start_stem(stem: Stem, sources: list[Pretrained]) -> None:
    """Give a stem what the first fitting folder has for it, and say so; else say why it starts untrained."""
    kind = kind_of(stem)
    whose = f"the way in of {' + '.join(stem.modalities)} ({sum(stem.modalities.values())} bands)"
    for found in sources:
        if kind in found.stems:
            require_whole(found)
            start_stem(stem, found)
            say(f"{whose} starts as it was pretrained in {found.folder}")
            return
    say(f"{whose} starts untrained: {_why(stem, sources[0])}")


def _why(stem: Stem, found: Pretrained) -> str:
    """Why a folder has nothing for a stem."""
    kind, there = kind_of(stem), {one.modality: one for one in found.stems}
    known = ", ".join(f"{one.modality} of {one.bands} bands" for one in found.stems) or "none"
    if kind is None:
        return f"it takes several modalities at once, and those of {found.folder} are of one each ({known})"
    if kind.modality not in there:
        return f"{found.folder} has ways in of other modalities ({known}); a modality is known by its name"
    one = there[kind.modality]
    if one.bands != kind.bands:
        return f"it was pretrained with {one.bands} bands in {found.folder}"
    return f"it was pretrained with {one.input} in {found.folder}, and here with {kind.input}"


def _start_adapter(
    backbone: Backbone, attached: Attached, adapter: LoraAdapter, encoder: Section, place: str
) -> Pretrained:
    """Fill the attached LoRA from the folder that the recipe names, and return what that holds."""
    folder, key = adapter.start, f"{place}.adapter"
    assert folder is not None
    found = read_pretrained(folder)
    if found is None or found.adapter is None:
        raise RecipeError(f"{key}.start = {folder}: {_no_adapter(folder, found)}")
    if found.base["sha256"] != backbone.base.sha256:
        merged = backbone.base.sha256 == found.tensors
        raise RecipeError(
            f"{key}.start = {folder}: its adapter was trained on {found.base['id']} (SHA-256 "
            f"{found.base['sha256'][:12]}...), but {place}.encoder is {backbone.base.id} "
            f"({backbone.base.sha256[:12]}...)"
            + (", into which it is merged already" if merged else "")
            + f"; {_same_again(found, backbone.base.id, place)}"
            + (f", or drop {key}.start" if merged else "")
        )
    for name, here, there in _differences(adapter, found.adapter):
        raise RecipeError(
            f"{key}.{name} = {show(here)}, but the adapter of {key}.start = {folder} was trained with {show(there)}; "
            f"set {name}: {show(there)}"
        )
    require_whole(found)
    start_lora(backbone, folder / ADAPTER, adapter.rank, attached.sites)
    say(f"{key} starts as it was pretrained in {folder}")
    return found


def _same_again(found: Pretrained, here: str, place: str) -> str:
    """How a recipe comes by the encoder that an adapter was trained on; `here`: the id of the one that it names."""
    base = found.base["id"]
    if base == here == BUILTIN.name:
        return (
            "that one came with another vfmseg: install the version that it was trained with (versions.vfmseg in "
            f"{found.folder / MARK})"
        )
    section = "{name: builtin}" if base == BUILTIN.name else f"{{name: ..., checkpoint: {base}}}"
    return f"set {place}.encoder to {section}"


def _no_adapter(folder: Path, found: Pretrained | None) -> str:
    """Why nothing can be started from a folder, and what to do."""
    expected = "expected a folder that vfmseg pretrain has written with model.adapter lora, such as runs/NAME/best"
    if found is not None:
        return f"holds an encoder without an adapter, to be named as checkpoint of the encoder instead; {expected}"
    for other in (folder / "best", folder.parent):
        if (other / MARK).is_file():
            return f"has no {MARK}; name {other}"
    return f"has no {MARK}; {expected}"


def _differences(adapter: LoraAdapter, trained: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, its value in the recipe, its value then) of what must be the same; dropout and order may be another."""
    here, there = adapter.settings(), dict(trained)
    for one in (here, there):
        targets = one.get("targets")
        one["targets"] = sorted(map(str, targets)) if isinstance(targets, list | tuple) else targets
    return [(key, here[key], there.get(key)) for key in ("rank", "alpha", "targets") if here[key] != there.get(key)]
