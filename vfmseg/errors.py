"""Every error that vfmseg raises on purpose, in one flat list.

A message names the place, what was found there, what was expected and what to do about it. The command line
turns each class into its exit code; anything else that escapes is a bug and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class VfmsegError(Exception):
    """Base class: the input is wrong (recipe, data, checkpoint or arguments)."""

    exit_code = 2


class RecipeError(VfmsegError):
    """A recipe, or an override of it, does not describe a run."""


class DataError(VfmsegError):
    """Images or labels are missing, unreadable or do not fit together."""


class DamagedError(DataError):
    """Part of a file cannot be read, though the file can be opened; it may be asked to leave the part out."""


class OutsideError(DataError):
    """An area of interest holds nothing of a scene; in a list of scenes it is left out."""


class BusyError(DataError):
    """Another run writes the same files at this moment; the message names it."""


class CheckpointError(VfmsegError):
    """A checkpoint or encoder is missing, damaged, or belongs to something else."""


class AdapterError(VfmsegError):
    """An adapter finds nothing to attach to, or does not fit the encoder."""


class MachineError(VfmsegError):
    """The input is fine, but this machine could not do it: disk full, out of memory, missing extra."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known name, else the list of known names, the first 30 of many."""
    names = [str(item) for item in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return f"known: {', '.join(names[:30])}{more}" if names else "nothing is known here"


SHOWN = 60
"""Characters of a value that a message shows."""


def show(value: Any) -> str:
    """A value of a recipe on one line, as YAML would have it (flow style), cut at 60 characters."""
    text = ""
    for piece in _pieces(value):  # a huge value is cut before all of it is text
        text += piece
        if len(text) > SHOWN:
            return f"{text[: SHOWN - 3]}..."
    return text


def _pieces(value: Any) -> Iterator[str]:
    if value is None:
        yield "null"
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, dict):
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield f"{', ' * (number > 0)}{key}: "
            yield from _pieces(item)
        yield "}"
    elif isinstance(value, (list, tuple)):
        yield "["
        for number, item in enumerate(value):
            yield ", " * (number > 0)
            yield from _pieces(item)
        yield "]"
    else:
        yield repr(str(value)) if isinstance(value, (str, Path)) else str(value)
