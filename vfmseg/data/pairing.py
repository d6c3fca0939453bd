"""Which image belongs to which label: by name, never by the order of a listing.

Files are matched by exact stem (`a.tif` and `a.png`). Where stems differ by a suffix or a folder, the parts of the
names that the patterns' wildcards stand for are matched: `*_ms.tif` and `*_label.tif` pair `x_ms.tif` with
`x_label.tif`, and `*/rgb/*.tif` with `*/label/*.tif` keep the folders apart.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vfmseg.disk.paths import elsewhere, files_behind, readings, require_file
from vfmseg.errors import DataError

RASTER_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt", ".img")
"""What is picked up from a folder that is named without a pattern."""

_SIDECARS = (".aux.xml", ".ovr", ".msk", ".tfw", ".jgw", ".jpgw", ".pgw", ".wld", ".prj", ".xml", ".txt", ".json")
_WILDCARD = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^\]!][^\]]*\]")


@dataclass(frozen=True)
class Found:
    """One file: its path, its stem, what the wildcards stood for, and whether it was named without any."""

    path: str
    stem: str
    wild: str
    literal: bool


@dataclass(frozen=True)
class Pair:
    """The files of one scene: {modality: image}, of those that it has, and its label."""

    name: str
    images: dict[str, str]
    labels: str


def find(entries: str | Sequence[str], place: str) -> list[Found]:
    """Files of a pattern, a folder, a file name or a list of these, each once; `place` is the key in the recipe.

    Raises DataError if an entry finds nothing.
    """
    listed = [entries] if isinstance(entries, str) else list(entries)
    if not listed:
        raise DataError(f"{place}: the list is empty; expected at least one file, folder or pattern")
    found: dict[str, Found] = {}
    for entry in listed:
        for file in _find_one(str(entry), place):
            found.setdefault(os.path.abspath(file.path), file)
    return list(found.values())


def _find_one(entry: str, place: str) -> list[Found]:
    require_file(entry)
    if elsewhere(entry) or os.path.isfile(entry):
        return [Found(entry, Path(entry).stem, Path(entry).stem, literal=True)]
    if files_behind(entry):  # a data set inside a file: GPKG:FILE:TABLE
        file = files_behind(entry)[0]
        inside = entry.partition(file)[2].strip(':"/')
        return [Found(entry, Path(file).stem, inside or Path(file).stem, literal=True)]
    if os.path.isdir(entry):
        names = [name for name in sorted(os.listdir(entry)) if _is_listed(entry, name)]
        if not names:
            raise DataError(
                f"{place}: the folder {entry} holds no image; expected files ending in {', '.join(RASTER_SUFFIXES)}, "
                f"or a pattern such as {os.path.join(entry, '**', '*.tif')} for folders below; {_nearby(entry)}"
            )
        return [Found(os.path.join(entry, name), Path(name).stem, Path(name).stem, literal=False) for name in names]
    if not _WILDCARD.search(entry):
        raise DataError(f"{place}: {entry} does not exist; {_nearby(entry)}")
    for pattern in readings(entry):
        paths = [p for p in sorted(glob.glob(pattern, recursive=True)) if _is_image(p, entry)]
        if paths:
            return [Found(path, Path(path).stem, _wild_part(pattern, path), literal=False) for path in paths]
    raise DataError(f"{place}: the pattern {entry} matches no file; {_nearby(entry)}")


def _is_listed(folder: str, name: str) -> bool:
    """A visible image file: like a glob, a folder leaves out names such as ._a.tif, which macOS writes beside a.tif."""
    return name.lower().endswith(RASTER_SUFFIXES) and name[0] != "." and os.path.isfile(os.path.join(folder, name))


def _is_image(path: str, pattern: str) -> bool:
    """A file, and none of those that programs write beside images (unless the pattern asks for that ending)."""
    name = path.lower()
    beside = name.endswith(_SIDECARS) and not pattern.lower().endswith(_SIDECARS)
    return os.path.isfile(path) and not beside


def _nearby(entry: str) -> str:
    """What there is instead, for the message."""
    folder = entry if os.path.isdir(entry) else os.path.dirname(entry)
    if not os.path.isdir(folder):
        folder = os.path.dirname(_WILDCARD.split(entry)[0]) or "."
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    names = sorted(os.listdir(folder))
    listing = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{folder} holds {listing}" if names else f"the folder {folder} is empty"


def _wild_part(pattern: str, path: str) -> str:
    """What the wildcards of `pattern` stand for in `path`, joined by /, without a file ending."""
    pattern, path = Path(pattern).as_posix(), Path(path).as_posix()
    parts, end = [], 0
    for match in _WILDCARD.finditer(pattern):
        parts.append(re.escape(pattern[end : match.start()]))
        parts.append(_group(match.group()))
        end = match.end()
    tail = pattern[end:]
    hit = re.fullmatch("".join(parts) + re.escape(tail), path)
    if hit is None:  # the file system ignores case, or the like
        return Path(path).stem
    wild = "/".join(group for group in hit.groups() if group)
    return wild if "." in tail else os.path.splitext(wild)[0]


def _group(wildcard: str) -> str:
    """The regular expression of one wildcard, capturing what it stands for."""
    if wildcard == "**/":
        return r"(?:(.*)/)?"
    if wildcard.startswith("["):
        if len(wildcard) == 3:  # one character stands for itself alone: that is how globs escape *, ? and [
            return re.escape(wildcard[1])
        inner = wildcard[1:].replace("\\", "\\\\").replace("[", "\\[")
        return "([" + ("^" + inner[1:] if inner[0] == "!" else inner) + ")"
    return {"**": "(.*)", "*": "([^/]*)", "?": "([^/])"}[wildcard]


def pair(
    images: Mapping[str, list[Found]], labels: list[Found], place: str, optional: Iterable[str] = ()
) -> list[Pair]:
    """One Pair per scene, sorted by name. Raises DataError naming up to five files without a counterpart.

    A scene may lack the modalities in `optional`, but not all that there are; each of their files must have labels.
    """
    roles = {**images, "labels": labels}
    if all(len(files) == 1 and files[0].literal for files in roles.values()):
        # one file each, named outright: there is nothing to mix up
        return [Pair(labels[0].stem, {name: files[0].path for name, files in images.items()}, labels[0].path)]
    by_stem = {role: _index((f.stem, f) for f in files) for role, files in roles.items()}
    by_wild = {role: _index((f.wild, f) for f in files) for role, files in roles.items()}
    for index in (by_stem, by_wild):
        if _complete(index, roles, optional):
            pairs = [
                Pair(
                    name,
                    {m: index[m][name][0].path for m in images if name in index[m]},
                    index["labels"][name][0].path,
                )
                for name in sorted(index["labels"])
            ]
            _require_images(pairs, images, place)
            return pairs
    closest = max((by_stem, by_wild), key=lambda index: _agreement(index, optional))
    remedy = "or a table (data.<split>.table) that says what belongs together"
    raise DataError(f"{place}: {_complaint(closest, optional, 'labels', remedy)}")


def pair_images(images: Mapping[str, list[Found]], place: str, optional: Iterable[str] = ()) -> list[dict[str, str]]:
    """{modality: its file} for each scene without labels, sorted by name; of one modality each file is a scene.

    A scene may lack the modalities in `optional`. DataError naming up to five files without a counterpart.
    """
    if len(images) == 1 or all(len(files) == 1 and files[0].literal for files in images.values()):
        columns = [[(name, file.path) for file in files] for name, files in images.items()]
        return [dict(row) for row in zip(*columns, strict=True)]
    by_stem = {name: _index((f.stem, f) for f in files) for name, files in images.items()}
    by_wild = {name: _index((f.wild, f) for f in files) for name, files in images.items()}
    required = [name for name in images if name not in optional]
    for index in (by_stem, by_wild):
        names = sorted(set().union(*index.values()))
        single = all(len(index[name]) == len(files) for name, files in images.items())
        if single and all(len(index[name]) == len(names) for name in required):
            return [{m: index[m][name][0].path for m in images if name in index[m]} for name in names]
    closest = max((by_stem, by_wild), key=lambda index: sum(len(set(a) & set(b)) for a, b in pairwise(index.values())))
    remedy = "or sources of their own (data.scenes may be a list)"
    raise DataError(f"{place}: {_complaint(closest, optional, None, remedy)}")


def _require_images(pairs: Sequence[Pair], images: Iterable[str], place: str) -> None:
    """DataError if a scene has labels and no image at all."""
    bare = [pair.labels for pair in pairs if not pair.images]
    if bare:
        more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
        raise DataError(
            f"{place}: {len(bare)} of labels without a file of the same name in any of {', '.join(images)}: "
            f"{', '.join(bare[:5])}{more}; modalities may be optional, but a scene needs one of them: add an image, or "
            "remove the labels"
        )


def _index(named: Iterable[tuple[str, Found]]) -> dict[str, list[Found]]:
    index: dict[str, list[Found]] = {}
    for name, file in named:
        index.setdefault(name, []).append(file)
    return index


def _complete(
    index: Mapping[str, dict[str, list[Found]]], roles: Mapping[str, list[Found]], optional: Iterable[str]
) -> bool:
    """Every role has the same names, each once; one in `optional` some of them."""
    names = set(index["labels"])
    return all(
        len(index[role]) == len(files)
        and (set(index[role]) <= names if role in optional else set(index[role]) == names)
        for role, files in roles.items()
    )


def _agreement(index: Mapping[str, dict[str, list[Found]]], optional: Iterable[str]) -> int:
    """How many names the roles share: those that all have, and for each in `optional` those that the labels have."""
    shared = len(set.intersection(*(set(files) for role, files in index.items() if role not in optional)))
    return shared + sum(len(set(index[role]) & set(index["labels"])) for role in index if role in optional)


def _complaint(
    index: Mapping[str, dict[str, list[Found]]], optional: Iterable[str], lead: str | None, remedy: str
) -> str:
    """What does not fit, and what to do; `lead`: the role whose names are those of the scenes, if there is one."""
    for role, files in index.items():
        for name, same in files.items():
            if len(same) > 1:
                return (
                    f"{role} has {len(same)} files named {name!r}: {same[0].path} and {same[1].path}; "
                    f"expected each name once, {remedy}"
                )
    complaints = []
    for role, files in index.items():
        for other, others in index.items():
            if other in optional or (role in optional and lead is not None and other != lead):
                continue  # a scene may lack it; and whatever has labels has the others, or these are told
            lone = [files[name][0].path for name in sorted(set(files) - set(others))]
            if lone:
                more = f" and {len(lone) - 5} more" if len(lone) > 5 else ""
                complaints.append(
                    f"{len(lone)} of {role} without a file of the same name in {other}: {', '.join(lone[:5])}{more}"
                )
    return (
        "; ".join(complaints) + "; expected one file per scene everywhere, of the same name, or patterns whose * "
        f"stands for the same text (*_ms.tif and *_label.tif), {remedy}"
    )
