"""What every section of a recipe shares: strictness, exact value types, own cross checks, paths beside the recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from glob import escape, has_magic
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError

from vfmseg.disk.paths import elsewhere, files_behind, made_absolute

# Numbers are taken as written: `true` is no number, "8" no whole number, 3.5 no number of epochs.
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]

MOST_BLOCKS = 256  # of an encoder; the deepest published one has 48
LARGEST_WIDTH = 8192  # of a decoder, adapter or fusion, several times that of any encoder

TOLD = 20
"""Findings that are told in full: who reads of more has none of them in view."""


class Problem(NamedTuple):
    """One finding of a cross check: which key below the section, and the rest of the line after the key's path."""

    key: str
    text: str


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys, and checks over several of its keys in `_problems`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def _problems(self) -> Iterator[Problem]:
        """What does not fit together in this section, once every single value is right."""
        yield from ()

    @model_validator(mode="after")
    def _raise_problems(self) -> Section:
        found = list(islice(self._problems(), TOLD + 1))
        if found:
            raise PydanticCustomError("problems", "the keys do not fit together", {"problems": found})
        return self


def recipe_folder(info: Info) -> Path | None:
    """The folder of the recipe file, which relative paths start from; None while nothing is loaded from a file."""
    return info.context["base"] if info.context else None


def beside_recipe(text: str, base: Path | None, glob: bool = False) -> str:
    """An absolute path for a relative one; an address (`https://...`) stays as it is.

    A glob stays a glob: characters of the recipe's own folder that it would interpret are escaped. A file of just
    that name is none, also if the name holds brackets. Of a data set inside a file the file starts from there.
    """
    if base is None:
        return text
    if elsewhere(text):
        return made_absolute(text, str(base))
    text = os.path.expanduser(text)
    if os.path.isabs(text):
        return text
    path = os.path.normpath(base / text)
    if not os.path.exists(path) and files_behind(text, str(base)):
        return made_absolute(text, str(base))
    if glob and has_magic(text) and not os.path.exists(path):
        return os.path.normpath(os.path.join(escape(str(base)), text))
    return path


def _resolve_path(path: Path, info: Info) -> Path:
    return Path(beside_recipe(str(path), recipe_folder(info)))


def _local(value: Any) -> Any:
    # Path("") is the current folder, and Path("s3://a") is one called s3: that would silently be made there
    if isinstance(value, str) and not value.strip():
        raise ValueError("must be a path, not empty text")
    if isinstance(value, str) and "://" in value:
        raise ValueError("must be a path on this machine")
    return value


RecipePath = Annotated[Path, BeforeValidator(_local), AfterValidator(_resolve_path)]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _local_or_hub(text: str, info: Info) -> str:
    """A folder or file beside the recipe becomes an absolute path, anything else must be able to be a hub id."""
    base = recipe_folder(info)
    if base is None:
        return text
    if text.startswith((".", "~")) or os.path.isabs(text) or os.path.exists(base / text):
        return os.path.normpath(base / os.path.expanduser(text))
    if not _HUB_ID.fullmatch(text):
        raise ValueError(f"must be a hub id (owner/name), or a folder or file; {base / text} does not exist")
    return text


LocalOrHub = Annotated[str, Field(min_length=1), AfterValidator(_local_or_hub)]
