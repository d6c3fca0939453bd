"""Reading a segmenter folder, strictly: what does not fit, or is not what was written, is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vfmseg.adapters.attach import ADAPTERS, attach_none
from vfmseg.adapters.attached import Attached
from vfmseg.build.model import around, inside, published_backbone, stems_of
from vfmseg.checkpoint.bases import SHARED, Moved, moved_bases, own_base, same_base
from vfmseg.checkpoint.folder import MARK, fingerprint_of, read_record, require_unchanged
from vfmseg.checkpoint.record import encoder_of, inputs_in, own_encoders_of
from vfmseg.data.inputs import Inputs
from vfmseg.disk.paths import require_file
from vfmseg.disk.tensors import load_strictly
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.build import build_backbone_from_config
from vfmseg.errors import CheckpointError, VfmsegError
from vfmseg.model import Network
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.recipe.model import AdapterSection


@dataclass(frozen=True)
class Loaded:
    """A segmenter read from its folder."""

    model: Network
    recipe: Recipe
    inputs: Inputs
    record: dict[str, Any]
    fingerprint: str  # of the files that it was read from


def load_segmenter(folder: Path, encoder: Moved = None, merge: bool = True) -> Loaded:
    """Read a segmenter folder strictly, all of it from one checkpoint: a training run may replace it meanwhile.

    `encoder` replaces where the base encoder is looked for (a folder or hub id), or with {modality: folder} that of a
    modality with one of its own; its tensors must still have the recorded hash. With `merge` a LoRA is added into the
    frozen weights (faster, and peft is not imported); without, the adapter stays a part of its own. Raises
    CheckpointError for anything that does not fit.
    """
    for last in (False, False, True):
        found = _identity(folder)
        try:
            loaded = _load(folder, encoder, merge)
        except (VfmsegError, OSError):
            if last or found == _identity(folder):
                raise
        else:
            if found == _identity(folder):
                return loaded
    raise CheckpointError(f"{folder}: was replaced three times while it was read; copy it, and load the copy")


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What is another once the folder has been replaced."""
    try:
        found = (folder / MARK).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _load(folder: Path, encoder: Moved, merge: bool) -> Loaded:
    for path in folder.rglob("*"):
        require_file(path)
    record = read_record(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    inputs = inputs_in(folder / MARK, record, recipe)
    moved = moved_bases(folder, recipe, encoder)
    backbone = _load_backbone(folder, recipe, record, moved.get(SHARED))
    own: dict[str, tuple[Backbone, Attached]] = {}
    for name, stored in own_encoders_of(folder / MARK, record, recipe).items():
        base = own_base(folder, recipe, name, stored, backbone, moved.get(name))
        own[name] = base, _adapted(recipe.model.adapter_of(name), base, (name,), folder / "adapters" / name, merge)
    stems = stems_of(recipe, inputs, backbone, own)
    place = folder / "adapters" / "+".join(one.name for one in inputs)
    attached = _adapted(recipe.model.adapter, backbone, inside(stems), place, merge)
    model = around(recipe, backbone, stems, attached).without_auxiliary()
    path = folder / "head.safetensors"
    tensors = _read_tensors(path)
    if record["format"] == 1:
        tensors = of_format_1(tensors, model.streams[0])
    load_strictly(tensors, model.head_state(), path)
    if not all((stem.std > 0).all() for stem in stems.values()):
        raise CheckpointError(f"{path}: std of a modality must be above 0; copy the checkpoint again")
    known = require_unchanged(folder, record)  # last: what is wrong in a file is told better by who reads it
    return Loaded(model.eval(), recipe, inputs, record, fingerprint_of(folder, known))


def _adapted(
    section: AdapterSection, backbone: Backbone, streams: tuple[str, ...], folder: Path, merge: bool
) -> Attached:
    """The saved adapter: merged into the frozen weights where it can be and shall be, else a part of its own."""
    if folder.is_symlink() or folder.parent.is_symlink():  # there may be anything behind it, such as a pipe
        raise CheckpointError(
            f"{folder}: is reached by a link to a folder; expected it here: copy the segmenter with what its links "
            "lead to (cp -rL)"
        )
    options = section.settings()
    adapter = ADAPTERS[section.name]
    if merge and adapter.merge is not None:
        adapter.merge(backbone, folder, **options)
        return attach_none(backbone, streams)
    attached = adapter.attach(backbone, streams, **options)
    attached.load(folder)
    return attached


def of_format_1(tensors: Mapping[str, Tensor], stream: str) -> dict[str, Tensor]:
    """Tensors of a head as they are called now; before, one encoder held mean, std and stem of the only stream."""
    names = {"encoder.mean": f"stems.of_{stream}.mean", "encoder.std": f"stems.of_{stream}.std"}
    return {
        names.get(name) or name.replace("encoder.stem.", f"stems.of_{stream}.mix.", 1): tensor
        for name, tensor in tensors.items()
    }


def _load_backbone(folder: Path, recipe: Recipe, record: dict[str, Any], override: str | None) -> Backbone:
    section = recipe.model.encoder
    stored = encoder_of(folder / MARK, record)
    if stored["name"] != section.name:
        raise CheckpointError(
            f"{folder}: segmenter.json names a {stored['name']} encoder, recipe.yaml a {section.name} encoder; "
            "the folder mixes two checkpoints, copy it again"
        )
    if stored["stored"]:
        if override is not None:
            raise CheckpointError(f"{folder}: this run trained its encoder and stores it; leave out encoder={override}")
        path = folder / "encoder.safetensors"
        most = path.stat().st_size if path.is_file() else 0
        backbone = build_backbone_from_config(section.name, stored["config"], section.layers, most)
        load_strictly(_read_tensors(path), backbone.network.state_dict(), path)
        return backbone
    return same_base(folder, SHARED, stored, lambda: published_backbone(recipe, instead=override))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, copy it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error}); copy it again") from None
