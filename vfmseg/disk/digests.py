"""What a folder says of its own files: a SHA-256 of each, so that one that is not as it was written is told by name.

    {"classes": ..., "files": {"head.safetensors": "9f86d0...", ...}, "sha256": "2c26b4..."}

They stand in one JSON record in the folder, beside what else it says; "sha256" is that of all the rest of the record.
That finds damage, and files of another folder; it keeps nobody from changing both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILES, _OWN = "files", "sha256"
_READ = 2**20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ):
            digest.update(part)
    return digest.hexdigest()


def signed(record: Mapping[str, Any], folder: Path, names: set[str]) -> dict[str, Any]:
    """The record with the digests of these files of the folder (names from there), and its own."""
    # as it will be read: JSON makes lists of tuples and text of keys
    content: dict[str, Any] = json.loads(json.dumps({key: value for key, value in record.items() if key != _OWN}))
    content[_FILES] = {name: sha256_of(folder / name) for name in sorted(names)}
    return content | {_OWN: _digest(content)}


def changed(record: Mapping[str, Any], folder: Path) -> tuple[str | None, dict[str, str]]:
    """(what is not as the record says, {name: digest} of the files read so far).

    The first is the name of a file that is missing or other, "" for the record itself, or None if all is well. A record
    of before there were digests says nothing, and nothing is read then.
    """
    if _OWN not in record and _FILES not in record:
        return None, {}
    noted = record.get(_FILES)
    if record.get(_OWN) != _digest({k: v for k, v in record.items() if k != _OWN}) or not isinstance(noted, dict):
        return "", {}
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found: dict[str, str] = {}
    for name, digest in noted.items():
        if name not in there:
            return name, found
        found[name] = sha256_of(there[name])
        if found[name] != digest:
            return name, found
    return None, found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
