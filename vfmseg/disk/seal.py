"""A seal at the end of a file: one line that says of what the file is a part, with a checksum of every byte before it.

    vfmseg seal MARK 64-HEX-DIGITS

It is appended, so that it comes, goes and moves with the file. What reads TIFF files and zip archives does not look
behind their end.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

_SEAL = re.compile(rb"\nvfmseg seal (\S+) ([0-9a-f]{64})\n\Z")
_LONGEST = 256  # bytes at the end of a file in which the seal lies
_READ = 2**20


def seal(path: Path, mark: str) -> None:
    """Append the seal. mark: of what the file is a part; a word of at most 100 letters."""
    digest = _digest(path, path.stat().st_size, mark)  # of the mark as well: another mark is damage, too
    with path.open("ab") as file:
        file.write(f"\nvfmseg seal {mark} {digest}\n".encode("ascii"))


def mark_of_seal(path: Path) -> str | None:
    """The mark of a sealed file, at the cost of opening it; None for one without a seal, or cut short, or missing."""
    found = _seal_in(path)
    return None if found is None else found[1].decode("ascii", "replace")


def is_intact(path: Path) -> bool:
    """Whether every byte of a sealed file is as it was when it was sealed."""
    found = _seal_in(path)
    if found is None:
        return False
    size, mark, digest = found
    return _digest(path, size, mark.decode("ascii", "replace")) == digest.decode("ascii")


def _seal_in(path: Path) -> tuple[int, bytes, bytes] | None:
    """(number of bytes before the seal, mark, digest); None for a file without a seal, or none at all."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LONGEST))
            end = file.read()
    except FileNotFoundError:
        return None
    found = _SEAL.search(end)
    return None if found is None else (size - len(end) + found.start(), found[1], found[2])


def _digest(path: Path, size: int, mark: str) -> str:
    """Of the first `size` bytes and the mark: BLAKE2, which takes half the time of SHA-256 where no chip helps."""
    digest = hashlib.blake2b(mark.encode("ascii", "replace"), digest_size=32)
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(_READ, size))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()
