"""The published segmenter folder: what was trained, and how to find the rest.

    recipe.yaml           the resolved recipe, classes and colours
    segmenter.json        format, base encoder with the hash of its tensors, bands and statistics, metrics, versions,
                          and the SHA-256 of all other files here but the model card
    adapters/<modality>/  the adapter, in peft's own format where peft made it
    head.safetensors      trained tensors outside the encoder, with their buffers (normalisation too)
    encoder.safetensors   only if the run trained the encoder itself
    README.md             a model card

Everything is written beside its target, flushed and renamed: a folder or file under its final name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfmseg.adapters.attach import ADAPTERS, load_adapter, merge_lora, save_adapter
from vfmseg.build.model import published_encoder, with_decoder
from vfmseg.catalog import CATALOG
from vfmseg.checkpoint.record import encoder_of, input_entry, inputs_in
from vfmseg.data.inputs import Inputs
from vfmseg.disk.digests import changed, sha256_of, signed
from vfmseg.disk.files import require_own, whole_folder
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.paths import require_file
from vfmseg.disk.tensors import load_strictly, plain_tensors
from vfmseg.encoders.base import Encoder
from vfmseg.encoders.build import build_encoder_from_config
from vfmseg.errors import CheckpointError, MachineError, VfmsegError, show
from vfmseg.metrics import mean_text
from vfmseg.model import SegmentationModel
from vfmseg.recipe import Recipe, dump_recipe, load_recipe

FORMAT = 1
MARK = "segmenter.json"  # a folder that holds it is a segmenter, and may be replaced by one
OWN = frozenset({MARK, "recipe.yaml", "adapters", "head.safetensors", "encoder.safetensors", "README.md"})
LIBRARIES = ("torch", "torchvision", "transformers", "peft", "accelerate", "rasterio", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Versions of vfmseg, Python and the libraries a result depends on."""
    found = {"python": platform.python_version(), "vfmseg": version("vfmseg")}
    return found | {name: version(name) for name in LIBRARIES}


def save_segmenter(
    folder: Path, model: SegmentationModel, recipe: Recipe, inputs: Inputs, metrics: Mapping[str, Any]
) -> None:
    """Write a segmenter folder that `load_segmenter` and a stranger can use; replaces an older one whole."""
    encoder = model.encoder
    trains_encoder = recipe.model.adapter.name == "full"
    record: dict[str, Any] = {
        "format": FORMAT,
        "encoder": {"name": encoder.family, **asdict(encoder.base), "stored": trains_encoder},
        "input": {one.name: input_entry(one) for one in inputs},
        "parameters": {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "metrics": dict(metrics),
        "versions": versions(),
    }
    with segmenter_folder(folder) as aside:
        (aside / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if trains_encoder:
            record["encoder"]["config"] = encoder.config()
            save_file(plain_tensors(encoder.backbone.state_dict()), aside / "encoder.safetensors")
        save_file(plain_tensors(model.head_state()), aside / "head.safetensors")
        save_adapter(model.attached, aside / "adapters" / adapter_folder(inputs))
        names = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
        (aside / MARK).write_text(json.dumps(signed(record, aside, names), indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_card(recipe, record), encoding="utf-8")


@contextlib.contextmanager
def segmenter_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a segmenter into; it replaces an older segmenter at the end, and nothing else there."""
    require_own(folder, MARK)
    try:
        with whole_folder(folder, OWN) as aside:
            yield aside
    except SafetensorError as error:  # how safetensors reports a full disk
        raise MachineError(
            f"{folder}: could not be written ({error}); what was there is kept: free some space or choose another "
            "folder"
        ) from None


def adapter_folder(inputs: Inputs) -> str:
    """Name of the adapter's folder: the modality it serves; stacked modalities share one."""
    return "+".join(one.name for one in inputs)


def saved_epoch(folder: Path) -> int | None:
    """The epoch after which a segmenter folder was written; None if it is not there, or not whole."""
    try:
        record = _read_record(folder)
        for name in ("recipe.yaml", "head.safetensors"):  # of a folder without digests
            if not (folder / name).is_file():
                return None
        _require_unchanged(folder, record)
        return int(record["metrics"]["epoch"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def fingerprint_of(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 of everything in a segmenter folder that decides its labels; the base encoder by its recorded hash.

    known {name: SHA-256}: of files that were read already.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.safetensors"), folder / "recipe.yaml", folder / MARK]):
        name = path.relative_to(folder).as_posix()
        digest.update(name.encode())
        digest.update(bytes.fromhex((known or {}).get(name) or sha256_of(path)))
    return digest.hexdigest()


def _require_unchanged(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file that the record names; CheckpointError for one that is not as it was written."""
    name, found = changed(record, folder)
    if name is None:
        return found
    moved = "; an encoder that lies elsewhere now is named by --encoder FOLDER" if name == "recipe.yaml" else ""
    raise CheckpointError(
        f"{folder / (name or MARK)}: is not what was written with this segmenter (its SHA-256 is another): it is "
        f"damaged, or of another checkpoint; copy the folder again{moved}"
    )


@dataclass(frozen=True)
class Loaded:
    """A segmenter read from its folder."""

    model: SegmentationModel
    recipe: Recipe
    inputs: Inputs
    record: dict[str, Any]
    fingerprint: str  # of the files that it was read from


def load_segmenter(folder: Path, encoder: str | None = None, merge: bool = True) -> Loaded:
    """Read a segmenter folder strictly, all of it from one checkpoint: a training run may replace it meanwhile.

    `encoder` replaces where the base encoder is looked for (a folder or hub id); its tensors must still have the
    recorded hash. With `merge` a LoRA is added into the frozen weights (faster, and peft is not imported);
    without, the adapter stays a part of its own. Raises CheckpointError for anything that does not fit.
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


def _load(folder: Path, encoder: str | None, merge: bool) -> Loaded:
    for path in folder.rglob("*"):
        require_file(path)
    record = _read_record(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    inputs = inputs_in(folder / MARK, record, recipe)
    built = _load_encoder(folder, recipe, inputs, record, encoder)
    adapter = recipe.model.adapter
    place = folder / "adapters" / adapter_folder(inputs)
    if place.is_symlink() or place.parent.is_symlink():  # there may be anything behind it, such as a pipe
        raise CheckpointError(
            f"{place}: is reached by a link to a folder; expected it here: copy the segmenter with what its links lead "
            "to (cp -rL)"
        )
    if merge and adapter.name == "lora":
        attached = merge_lora(built, place, adapter.rank, adapter.alpha, adapter.targets)
    else:
        attached = ADAPTERS[adapter.name](built, **adapter.model_dump(exclude={"name"}))
        load_adapter(built, attached, place)
    model = with_decoder(recipe, built, attached, inputs)
    load_strictly(_read_tensors(folder / "head.safetensors"), model.head_state(), folder / "head.safetensors")
    if not (built.std > 0).all():
        raise CheckpointError(f"{folder / 'head.safetensors'}: encoder.std must be above 0; copy the checkpoint again")
    known = _require_unchanged(folder, record)  # last: what is wrong in a file is told better by who reads it
    return Loaded(model.eval(), recipe, inputs, record, fingerprint_of(folder, known))


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / MARK
    if not path.is_file():
        found = "it does not exist" if not folder.is_dir() else "it has no segmenter.json"
        remedy = "expected a folder written by a training run, such as runs/NAME/best"
        if (folder / "best" / MARK).is_file():
            remedy = f"it is the folder of a run: name {folder / 'best'}"
        elif (folder / "config.json").is_file():
            remedy = "it is an encoder, which labels nothing before a segmenter is trained on it (vfmseg finetune)"
        raise CheckpointError(f"{folder}: not a segmenter: {found}; {remedy}")
    try:
        record: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy the checkpoint again") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: is not the record of a segmenter; copy the checkpoint again")
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format = {show(record.get('format'))}, but this version of vfmseg reads format {FORMAT}; "
            "update vfmseg, or train again"
        )
    return record


def _load_encoder(
    folder: Path, recipe: Recipe, inputs: Inputs, record: dict[str, Any], override: str | None
) -> Encoder:
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
        mean, std = ([v for one in inputs for v in values(one)] for values in (attrgetter("mean"), attrgetter("std")))
        path = folder / "encoder.safetensors"
        encoder = build_encoder_from_config(
            section.name, stored["config"], len(mean), mean, std, section.layers, section.upscale, section.input,
            most=path.stat().st_size if path.is_file() else 0,
        )  # fmt: skip
        load_strictly(_read_tensors(path), encoder.backbone.state_dict(), path)
        return encoder
    try:
        encoder = published_encoder(recipe, inputs, instead=override)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{folder} needs this base encoder; if it lies elsewhere, pass encoder=FOLDER (--encoder FOLDER)"
        ) from None
    if encoder.base.sha256 != stored["sha256"]:
        raise CheckpointError(
            f"{folder}: the base encoder {encoder.base.id} has SHA-256 {encoder.base.sha256[:12]}..., but this "
            f"checkpoint was trained on {stored['sha256'][:12]}...; use the encoder it was trained on ({stored['id']})"
        )
    return encoder


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, copy it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error}); copy it again") from None


def _card(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """A short model card: what it labels, on what it stands, how good it was on validation."""
    base = record["encoder"]
    published = CATALOG.get(str(base["id"]))
    licence = f" ({published.licence})" if published else ""
    scores = record["metrics"].get("validation") or {}
    inputs = ", ".join(f"{name} ({entry['bands']} bands)" for name, entry in record["input"].items())
    lines = [
        f"# {recipe.name}",
        "",
        "A segmentation model made with vfmseg.",
        "",
        f"- Classes: {', '.join(f'{i} {c.name}' for i, c in recipe.data.classes.items())}",
        f"- Input: {inputs}",
        f"- Base encoder: {base['name']} `{base['id']}`{licence}, SHA-256 `{base['sha256'][:16]}`",
        f"- Adapter: {recipe.model.adapter.name}; decoder: {recipe.model.decoder.name}",
        f"- Trainable parameters: {record['parameters']['trainable']:,} of {record['parameters']['total']:,}",
    ]
    if scores:
        lines.append(f"- Validation mIoU: {mean_text(scores, 4)} (epoch {record['metrics'].get('epoch')})")
    lines += [
        "",
        "```python",
        "from vfmseg import Segmenter",
        'segmenter = Segmenter.from_pretrained("this-folder")',
        'segmenter.predict("scene.tif", output="labels.tif")',
        "```",
        "",
    ]
    return "\n".join(lines)
