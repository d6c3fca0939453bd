"""Where the scenes of a split come from: files, a table of files, or a Hugging Face data set.

All three are written flat: beside their own keys they hold one key per modality.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic import ValidationInfo as Info

from vfmseg.errors import show
from vfmseg.recipe.base import LocalOrHub, Name, Number, Problem, RecipePath, Section, beside_recipe, recipe_folder

# Keys that some source has for itself: no modality may be called so.
SOURCE_KEYS = ("labels", "table", "dataset", "split", "split_column", "revision", "config", "weight")


def _text_or_texts(value: Any) -> Any:
    texts = value if isinstance(value, (list, tuple)) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("must be a glob, a file, a folder, or a list of files")
    return value if isinstance(value, str) else list(texts)


def _resolve_files(value: str | list[str], info: Info) -> str | list[str]:
    base = recipe_folder(info)
    if isinstance(value, str):
        return beside_recipe(value, base, glob=True)
    return [beside_recipe(text, base, glob=True) for text in value]


# A plain union would report "no text" and "no list" as two errors; one check says it in one line.
Files = Annotated[
    str | list[str],
    AfterValidator(_resolve_files),
    BeforeValidator(_text_or_texts),
    WithJsonSchema(
        {
            "description": "Glob, file, folder, or list of files, relative to the recipe.",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ],
        }
    ),
]


# Beside other sources in a list: parts of the draws. It needs no unit, so its bounds only keep sums of it finite.
Weight = Annotated[Number | None, Field(gt=0, le=1e9, examples=[2])]


def foreign_keys(own: Sequence[str]) -> dict[str, Any]:
    """JSON Schema: keys of the other kinds of source are not modalities."""
    return {"propertyNames": {"not": {"enum": [key for key in SOURCE_KEYS if key not in own]}}}


class FlatSource(Section):
    """What all sources share: a key that is not their own is a modality."""

    @property
    def images(self) -> dict[str, Any]:
        """{modality: where its images are}: files, a column or template, or a column."""
        return dict(self.__pydantic_extra__ or {})

    def in_order(self, modalities: Sequence[str]) -> Any:
        """The same source with its modalities in this order (all that it names, no others)."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate(own | {name: self.images[name] for name in modalities})

    def _problems(self) -> Iterator[Problem]:
        if not self.images:
            yield Problem("", "names no images; add one key for every modality")


class _AnySource(FlatSource):
    """What the three kinds of labelled sources share."""

    kind: ClassVar[Literal["files", "table", "dataset"]]

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        for name in self.images:
            if name in SOURCE_KEYS:
                own = ", ".join(type(self).model_fields)
                yield Problem(
                    name,
                    f"is not a key of a source by {self.kind} ({own}, and one key per modality); "
                    "a source by table has the key table, one by data set the key dataset",
                )


class FileSource(_AnySource):
    """Images and labels named by globs, files, folders or lists; paired by the stem of their names."""

    model_config = ConfigDict(extra="allow", json_schema_extra=foreign_keys(["labels", "weight"]))
    __pydantic_extra__: dict[str, Files]
    kind: ClassVar[Literal["files", "table", "dataset"]] = "files"

    labels: Annotated[Files, Field(examples=["train_labels/*.tif"])]
    weight: Weight = None
    """In a list of sources: its part of the windows drawn; left out: as its area."""


class TableSource(_AnySource):
    """A CSV with one row per scene. Paths in it, and templates, are relative to its folder."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra=foreign_keys(["table", "split", "split_column", "labels", "weight"])
    )
    __pydantic_extra__: dict[str, Name]
    kind: ClassVar[Literal["files", "table", "dataset"]] = "table"

    table: Annotated[RecipePath, Field(examples=["data/split.csv"])]
    """CSV file with a header."""
    split: Annotated[Name, Field(examples=["train"])]
    """Which rows: their value in the split column."""
    split_column: Name = "split"
    labels: Annotated[Name, Field(examples=["label"])]
    """Column that holds the label file, or a template over columns such as "{split}/labels/{name}.png"."""
    weight: Weight = None
    """In a list of sources: its part of the windows drawn; left out: as its area."""

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        for key, value in {"labels": self.labels, **self.images}.items():
            try:
                columns = []
                for _, column, form, _ in string.Formatter().parse(value):
                    columns.append(column)
                    format("", form or "")  # cells are text: {id:03d} would fail at the first row
            except ValueError as error:
                yield Problem(key, f"= {show(value)} is not a template: {error}; write columns as {{name}}")
                continue
            if "" in columns:
                yield Problem(key, f"= {show(value)} has a {{}} without a column; write columns as {{name}}")


class DatasetSource(_AnySource):
    """A data set of the `datasets` library: local folder, parquet file or hub id; columns are named."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra=foreign_keys(["dataset", "split", "config", "revision", "labels", "weight"])
    )
    __pydantic_extra__: dict[str, Name]
    kind: ClassVar[Literal["files", "table", "dataset"]] = "dataset"

    dataset: Annotated[LocalOrHub, Field(examples=["owner/name"])]
    """Local folder, parquet file, or id on the Hugging Face hub."""
    split: Annotated[Name, Field(examples=["train"])]
    config: Name | None = None
    revision: Name | None = None
    labels: Annotated[Name, Field(examples=["label"])]
    """Column of the labels."""
    weight: Weight = None
    """In a list of sources: its part of the windows drawn; left out: as its area."""

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if self.revision and os.path.isabs(self.dataset):
            yield Problem("revision", f"is not used: {self.dataset} is no hub id; drop it")
        if self.config and os.path.isfile(self.dataset):
            yield Problem("config", f"is not used: {self.dataset} is a single file; drop it")


def _kind(value: Any) -> str:
    """Which kind of source a mapping is, told by its keys; also the tag of a source that exists already."""
    if isinstance(value, _AnySource):
        return value.kind
    keys = value if isinstance(value, dict) else ()
    return "table" if "table" in keys else "dataset" if "dataset" in keys else "files"


Source = Annotated[
    Annotated[FileSource, Tag("files")]
    | Annotated[TableSource, Tag("table")]
    | Annotated[DatasetSource, Tag("dataset")],
    Discriminator(_kind),
]


AnySource = FileSource | TableSource | DatasetSource
MOST_SOURCES = 64

Sources = Annotated[
    Annotated[FileSource, Tag("files")]
    | Annotated[TableSource, Tag("table")]
    | Annotated[DatasetSource, Tag("dataset")]
    | Annotated[tuple[Source, ...], Field(min_length=1, max_length=MOST_SOURCES), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, (list, tuple)) else _kind(value)),
]
"""One source, or several in a list."""


def same_scenes(first: _AnySource, second: _AnySource) -> str:
    """What two sources share, in words; empty if nothing can be told from the recipe alone."""
    if isinstance(first, FileSource) and isinstance(second, FileSource):
        shared = _labels(first) & _labels(second)
        return sorted(shared)[0] if shared else ""
    if isinstance(first, TableSource) and isinstance(second, TableSource):
        alike = all(getattr(first, key) == getattr(second, key) for key in ("table", "split", "split_column"))
        return f"split {first.split} of {first.table}" if alike else ""
    if isinstance(first, DatasetSource) and isinstance(second, DatasetSource):
        alike = all(getattr(first, key) == getattr(second, key) for key in ("dataset", "config", "revision"))
        shared_split = _shared_split(first.split, second.split) if alike else ""
        return f"split {shared_split} of {first.dataset}" if shared_split else ""
    return ""


def _labels(source: FileSource) -> set[str]:
    labels = [source.labels] if isinstance(source.labels, str) else source.labels
    return {os.path.normpath(path) for path in labels}


def _shared_split(first: str, second: str) -> str:
    """The part that two split expressions share: `train` and `train[:10%]+test` share `train`."""
    for a in first.split("+"):
        for b in second.split("+"):
            whole = "[" not in a or "[" not in b
            if a.strip() == b.strip() or (whole and a.split("[")[0].strip() == b.split("[")[0].strip()):
                return a.strip()
    return ""
