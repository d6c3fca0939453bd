"""Writing so that nothing is half there: into a temporary file beside the target, flushed, checked, then renamed.

    .labels.tif.4711.partial   what process 4711 is writing: a file, or a folder to make the file in
    labels.tif                 complete whenever it is there: `publish` renames the other one last

A rename is all or nothing on one disk, so whoever reads the target finds the old content or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from vfmseg.disk.paths import SIDECARS, elsewhere, files_behind
from vfmseg.errors import CheckpointError, DataError

_ASIDE = 30
"""Bytes by which the names of temporary files beside a file are longer than its own (.NAME.PID.partial.ovr.tmp)."""


def aside_of(target: Path) -> Path:
    """The temporary name beside a target, `.NAME.PID.partial`: on the same disk, and of this process alone."""
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def flush(path: Path) -> None:
    """Wait until a file, or what a folder says of the names in it, is on the disk; OSError for what failed late.

    A full or broken disk may take every write and say so only here (quotas, network disks).
    """
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":  # Windows opens no folder
        return
    # a folder can only be opened for reading, and some systems flush no file that is
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (is_folder and error.errno == errno.EINVAL):  # some disks have no such thing for folders
            raise
    finally:
        os.close(handle)


def publish(aside: Path, target: Path, check: Callable[[], None] | None = None, stale: Collection[str] = ()) -> None:
    """Give a finished file its target's name, as the last of all; what had that name is replaced.

    check: reads the flushed file back, and raises if it is not what was written. stale: endings of the names of what
    stands beside an older target and must not be read with the new one (labels.tif.ovr); it is removed.
    """
    flush(aside)
    if check is not None:
        check()
    for ending in stale:
        target.with_name(target.name + ending).unlink(missing_ok=True)
    os.replace(aside, target)
    flush(target.parent)  # else a power failure may take the new name back


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files and folders that killed processes have left beside a target.

    Whoever calls it answers for nobody else writing that target just now.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial*"):
        # GDAL's own beside them (.cog.ovr.tmp, .aux.xml) are named after them
        if re.fullmatch(r"\d+\.partial(\..+)?", path.name[len(target.name) + 2 :]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def not_created(target: Path, error: OSError) -> DataError:
    """The error for a target whose folder or temporary file cannot be made."""
    return DataError(
        f"{target}: cannot be created ({error.strerror}: {error.filename}); choose a folder where you may write"
    )


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def require_own(target: Path, mark: str) -> None:
    """Refuse to replace what is not ours: a folder of ours is empty or holds the file `mark` (CheckpointError)."""
    if target.is_dir() and ((target / mark).is_file() or not any(target.iterdir())):
        return
    if target.exists():
        raise CheckpointError(
            f"{target}: exists and is no folder that holds {mark}, so it is not replaced; choose another name, or "
            "move it away"
        )


def local_path(output: str | Path) -> Path:
    """Where something is written: on a disk of this machine (DataError for an address or a path of GDAL's own)."""
    if elsewhere(str(output)):
        raise DataError(f"{output}: labels are written to a disk of this machine; name a local path, and copy it then")
    return Path(os.path.expanduser(output))


def unfit_name(target: Path) -> str | None:
    """Why no file of this name can be written, and what to do; None if one can."""
    try:
        target.name.encode("utf-8")
    except UnicodeEncodeError:
        return f"{target}: its name is not UTF-8, in which GDAL takes names; choose another name"
    folder = next((folder for folder in target.absolute().parents if os.path.isdir(folder)), None)
    most = os.pathconf(folder, "PC_NAME_MAX") if folder and os.name == "posix" else 255
    length = len(os.fsencode(target.name))
    if length + _ASIDE > most:
        return (
            f"{target}: its name has {length} bytes, and temporary files beside it have {_ASIDE} more; expected at "
            f"most {most - _ASIDE} of the {most} that this disk allows: name the output shorter (in a list outputs are "
            "named after the scenes: link or rename the scene)"
        )
    return None


def require_new(target: Path) -> None:
    """DataError if something is there already."""
    if target.exists():
        raise DataError(f"{target}: exists already; choose another name, or allow overwriting (--overwrite)")


def check_label_file(target: Path) -> None:
    """Labels are a GeoTIFF and are called one, by a name that fits (DataError)."""
    unfit = unfit_name(target)
    if unfit is not None:
        raise DataError(unfit)
    if target.is_dir():
        raise DataError(f"{target}: is a folder; expected the name of a GeoTIFF to write")
    if target.suffix.lower() not in (".tif", ".tiff"):
        raise DataError(f"{target}: labels are written as a GeoTIFF; name it {target.with_suffix('.tif').name}")


def never_an_input(written: Iterable[Path], inputs: Iterable[str]) -> None:
    """DataError if one of the files that are written is, replaces or removes one that an input is read from.

    `inputs`: names of all files that are read, as GDAL is given them. Files are told by what they are on the disk, so
    links, other spellings and data sets inside a file are known. With a map its sidecars go, and the pieces and
    temporary files that are kept beside it under a name that begins with a dot and its own.
    """
    read = [file for name in inputs for file in files_behind(name)]
    known = {_identity(file) for file in read}
    for target in written:
        for path in (target, *(target.with_name(target.name + suffix) for suffix in SIDECARS)):
            if path.exists() and _identity(path) in known:
                raise DataError(
                    f"{path}: is the scene itself, or a part of it (or is the area of interest), and would be lost; "
                    "choose another output"
                )
        aside = os.path.join(os.path.realpath(target.parent), f".{target.name}.")
        for file in read:
            if os.path.realpath(file).startswith(aside):
                raise DataError(
                    f"{target}: its pieces are kept in {aside}..., where {file} lies, which the scene is read from; "
                    "choose another output"
                )


def _identity(path: str | Path) -> tuple[int, int]:
    """What tells a file of this disk, whatever it is called."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


@contextlib.contextmanager
def whole_folder(target: Path, own: Collection[str] | None = None) -> Iterator[Path]:
    """A folder to write into that takes the target's name only when the block ends without an error.

    own: names of what is ours in a folder that it replaces; what else a person has put there stays. None: all of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(target)
    # a folder cannot be renamed onto one that holds something: the old one goes out of the way first
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        readable = 0o666 & ~_umask()
        for path in (*aside.rglob("*"), aside):
            if path.is_file():
                path.chmod(readable)  # safetensors makes files that nobody else may read
            flush(path)
        if target.exists():
            if own is not None:
                new = {*own, *(path.name for path in aside.iterdir())}
                _carry_over([path for path in target.iterdir() if path.name not in new], aside)
            target.rename(old)
        aside.rename(target)
        flush(target.parent)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError):
            error.filename = error.filename or str(target)  # a full disk is reported without a name
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.is_symlink():  # what it leads to is not ours to remove
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)


def _carry_over(paths: Iterable[Path], folder: Path) -> None:
    """Put files and folders into another folder as well, without a copy of their bytes where the disk can do that."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, folder / path.name)


def _link(path: str | Path, twin: str | Path) -> None:
    try:
        os.link(path, twin, follow_symlinks=False)
    except OSError:  # disks without hard links
        shutil.copy2(path, twin, follow_symlinks=False)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A file to write that takes the target's name only when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(target)
    try:
        yield aside
        publish(aside, target)
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside a target to make it in, for `publish`; gone afterwards whatever happens.

    For a file of which GDAL makes several on the way. DataError if the folder cannot be made.
    """
    folder = aside_of(target)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise not_created(target, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(target: Path, content: Any) -> None:
    """Write JSON aside and rename it."""
    with whole_file(target) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
