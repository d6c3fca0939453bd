"""The few files that stay open, so that a split of thousands of scenes does not run out of file handles."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Protocol, TypeVar


class Closable(Protocol):
    """Something that opens itself when read and can be closed in between."""

    def close(self) -> None:
        """Give back the file handle; the next read opens it again."""
        ...


C = TypeVar("C", bound=Closable)


class Opened:
    """Keeps the `limit` most recently used files open and closes the others; each process has its own."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._recent: OrderedDict[int, Closable] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._recent)

    def use(self, file: C) -> C:
        """Note that `file` is about to be read; closes the one that was not used for longest if there are too many."""
        with self._lock:
            self._recent[id(file)] = file  # held here, so that its id cannot be given to another
            self._recent.move_to_end(id(file))
            old = self._recent.popitem(last=False)[1] if len(self._recent) > self.limit else None
        if old is not None:
            old.close()
        return file


OPENED = Opened()
"""The open files of this process, shared by all scenes."""
