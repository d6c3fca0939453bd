"""What glibc's heap does with memory that was freed: on the CPU it decides over a tenth of a model's time.

A model allocates and frees tensors of the same sizes with every tile. glibc hands the end of its heap back to the
system once 64 MB of it are free, and asks for it again a moment later, page by page. Systems without glibc are left as
they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

KEPT = 2**29
"""Bytes at the end of the heap that a program of ours keeps until `give_back`."""
LARGEST_IN_HEAP = 2**25
"""Larger blocks are mapped, and given back one by one; glibc allows no larger number."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed() -> None:
    """Let this process keep up to 512 MiB of freed memory for its next tile; called by programs, not by the library.

    Two tiles of 448 px in a ViT-S/14 take 1.9 times the time of one with it and 2.1 times without: `python
    benchmarks/fusion.py cost`, and the same with MALLOC_ARENA_MAX=1 set. What somebody has set by glibc's own variables
    stays.
    """
    if any(key.startswith("MALLOC_") for key in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    _call("mallopt", _MMAP_THRESHOLD, LARGEST_IN_HEAP)
    _call("mallopt", _TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Hand all freed memory back to the system."""
    _call("malloc_trim", 0)


def _call(function: str, *numbers: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than glibc
            getattr(ctypes.CDLL(None), function)(*numbers)
