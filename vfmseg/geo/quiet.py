"""Files without a place are told by the commands, once; rasterio says so at each of them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rasterio.errors import NotGeoreferencedWarning

_warnings_lock = threading.Lock()  # Python's warning filters belong to the process, not to a thread


@contextmanager
def in_pixels() -> Iterator[None]:
    """rasterio does not warn that pixel numbers are no coordinates."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
