"""What `vfmseg pretrain` leaves beside the tensors of an encoder, for the training that starts from it.

encoder.json         what the encoder was made from, a checksum of every file, and what lies beside it:
stems.safetensors    the ways in that have learned, of modalities with other than three bands
adapter/             the low-rank update that is merged into model.safetensors, in peft's form
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vfmseg.disk.digests import changed
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.tensors import load_strictly
from vfmseg.encoders.groups import GroupKernels
from vfmseg.encoders.stem import Project, Stem, Widen
from vfmseg.errors import CheckpointError, show

MARK, STEMS, ADAPTER = "encoder.json", "stems.safetensors", "adapter"

_WAYS: dict[str, type[nn.Module]] = {"input: widen": Widen, "input: project": Project, "groups": GroupKernels}


@dataclass(frozen=True)
class StemKind:
    """By what a stem is known again: its one modality, the bands of that, and its way in, in words of a recipe.

    Ways in are "input: widen", "input: project", and such as "groups: [[1, 2, 3], [4, 5]]".
    """

    modality: str
    bands: int
    input: str


@dataclass(frozen=True)
class Pretrained:
    """The folder of a pretrained encoder, read and found to be as it was written."""

    folder: Path
    base: Mapping[str, Any]  # id and sha256 of the encoder that training began with
    tensors: str  # SHA-256 of the encoder's tensors now
    stems: tuple[StemKind, ...]
    adapter: Mapping[str, Any] | None  # its section of the recipe; None if there is none


def kind_of(stem: Stem) -> StemKind | None:
    """By what a stem with tensors that learn is known again; None if it has none, or stacks several modalities."""
    way = next((name for name, kind in _WAYS.items() if isinstance(stem.mix, kind)), None)
    if way is None or len(stem.modalities) != 1 or not stem.mix.state_dict():
        return None
    ((modality, bands),) = stem.modalities.items()
    if isinstance(stem.mix, GroupKernels):
        way = f"groups: {[[band + 1 for band in group] for group in stem.groups]}"
    return StemKind(modality, bands, way)


def stem_tensors(stems: Mapping[str, Stem]) -> dict[str, Tensor]:
    """{name in `stems.safetensors`: tensor} of the stems {modality: stem} that have any."""
    return {f"{name}.{key}": value for name, stem in stems.items() for key, value in stem.mix.state_dict().items()}


def read_pretrained(folder: Path) -> Pretrained | None:
    """What `vfmseg pretrain` has left in a folder; None if it has not written that one.

    CheckpointError for a record that says something else than was written. Files are not read: `require_whole`.
    """
    path = folder / MARK
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        stems = tuple(StemKind(name, int(one["bands"]), str(one["input"])) for name, one in _mapping(record, "stems"))
        adapter = dict(_mapping(record, "adapter")) or None
        base = {"id": str(record["base"]["id"]), "sha256": str(record["base"]["sha256"])}
        return Pretrained(folder, base, str(record["tensors"]), stems, adapter)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is not the record of a pretrained encoder ({type(error).__name__}: {error}); copy the folder "
            "again"
        ) from None


def require_whole(found: Pretrained) -> None:
    """CheckpointError unless every file of the folder is as it was written."""
    name, _ = changed(read_json(found.folder / MARK), found.folder)
    if name is not None:
        raise CheckpointError(
            f"{found.folder / (name or MARK)}: is not what was written with this encoder (its SHA-256 is another): it "
            "is damaged, or of another run; copy the folder again"
        )


def start_stem(stem: Stem, found: Pretrained) -> None:
    """Give a stem the tensors of its kind, which must be one of those found."""
    path, name = found.folder / STEMS, next(iter(stem.modalities))
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error}); copy the folder again") from None
    expected = stem_tensors({name: stem})
    load_strictly({key: value for key, value in stored.items() if key in expected}, expected, path)


def _mapping(record: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """What the record says under a key, in pairs; nothing where it lacks the key, as those of before do."""
    value = record.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} = {show(value)}")
    return list((value or {}).items())
