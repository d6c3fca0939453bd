"""The folder of a segmenter: what belongs to it, whether it is whole, and which of its files decide its labels."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vfmseg.disk.digests import changed, sha256_of
from vfmseg.disk.files import require_own, whole_folder
from vfmseg.disk.jsonfile import read_json
from vfmseg.errors import CheckpointError, MachineError, show

FORMATS = (1, 2)
"""Forms of the folder that can be read; the last is written. In 1 the tensors of stems have other names."""

MARK = "segmenter.json"  # a folder that holds it is a segmenter, and may be replaced by one
OWN = frozenset({MARK, "recipe.yaml", "adapters", "head.safetensors", "encoder.safetensors", "README.md"})


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


def saved_epoch(folder: Path) -> int | None:
    """The epoch after which a segmenter folder was written; None if it is not there, or not whole."""
    try:
        record = read_record(folder)
        for name in ("recipe.yaml", "head.safetensors"):  # of a folder without digests
            if not (folder / name).is_file():
                return None
        require_unchanged(folder, record)
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


def require_unchanged(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file that the record names; CheckpointError for one that is not as it was written."""
    name, found = changed(record, folder)
    if name is None:
        return found
    moved = "; an encoder that lies elsewhere now is named by --encoder FOLDER" if name == "recipe.yaml" else ""
    raise CheckpointError(
        f"{folder / (name or MARK)}: is not what was written with this segmenter (its SHA-256 is another): it is "
        f"damaged, or of another checkpoint; copy the folder again{moved}"
    )


def read_record(folder: Path) -> dict[str, Any]:
    """What segmenter.json says, not yet checked; CheckpointError where there is none, or one of another version."""
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
    if record.get("format") not in FORMATS:
        raise CheckpointError(
            f"{path}: format = {show(record.get('format'))}, but this version of vfmseg reads the formats "
            f"{' and '.join(map(str, FORMATS))}; update vfmseg, or train again"
        )
    return record
