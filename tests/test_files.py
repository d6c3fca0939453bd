"""Writing aside: the target holds the old content or the checked new one, and nothing else stays beside it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from vfmseg.disk.files import aside_of, folder_aside, publish, remove_leftovers, whole_file, whole_folder
from vfmseg.errors import DataError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finished(target: Path, content: str = "new") -> Path:
    aside = aside_of(target)
    aside.write_text(content)
    return aside


@pytest.mark.pitfall("P37")
def test_a_file_that_is_not_what_was_written_replaces_nothing(tmp_path: Path) -> None:
    target, sidecar = tmp_path / "a.tif", tmp_path / "a.tif.ovr"
    target.write_text("old")
    sidecar.write_text("of the old one")

    def refuse() -> None:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        publish(finished(target), target, refuse, stale=(".ovr",))
    assert (target.read_text(), sidecar.read_text()) == ("old", "of the old one")


@pytest.mark.pitfall("P37")
def test_it_is_on_the_disk_before_it_is_checked_and_checked_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sidecar, other = tmp_path / "a.tif", tmp_path / "a.tif.ovr", tmp_path / "b.tif.ovr"
    for path in (target, sidecar, other):
        path.write_text("old")
    aside, done = finished(target), []
    flushed, replaced = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append("folder flushed" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file flushed")
        flushed(handle)

    def replace(one: Any, two: Any) -> None:
        done.append("renamed")
        assert not sidecar.exists()  # nobody may read the new file with what belongs to the old one
        replaced(one, two)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    publish(aside, target, lambda: done.append("checked"), stale=(".ovr",))
    folder = ["folder flushed"] if os.name == "posix" else []
    assert done == ["file flushed", "checked", "renamed", *folder]
    assert names_in(tmp_path) == ["a.tif", "b.tif.ovr"]
    assert target.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="no other system flushes folders")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_disk_that_flushes_no_folders_is_a_disk_but_one_that_flushes_no_files_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == (what == "folder"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    target = tmp_path / "a.json"
    if what == "folder":
        with whole_file(target) as aside:
            aside.write_text("new")
        with whole_folder(tmp_path / "best") as folder:
            (folder / "b").write_text("new")
        assert names_in(tmp_path) == ["a.json", "best"]
    else:
        with pytest.raises(OSError, match="Invalid"), whole_file(target) as aside:
            aside.write_text("new")
        assert names_in(tmp_path) == []


@pytest.mark.pitfall("P37")
def test_what_killed_processes_left_of_a_target_goes_and_nothing_else(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    for name in (".a[1].tif.12.partial", ".a[1].tif.12.partial.cog.ovr.tmp", ".a[1].tif.12.partial.aux.xml"):
        (tmp_path / name).touch()
    (tmp_path / ".a[1].tif.13.partial").mkdir()
    (tmp_path / ".a[1].tif.13.partial" / "polygons.gpkg").touch()
    (tmp_path / ".a[1].tif.14.partial").symlink_to(elsewhere)
    others = [".a1.tif.12.partial", ".a[1].tif.mine.partial", ".a[1].tif.12.partially", ".a[1].tif.parts", "a[1].tif"]
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a[1].tif")
    assert names_in(tmp_path) == sorted([*others, "elsewhere"])
    assert names_in(elsewhere) == ["mine"]


def test_a_folder_to_work_in_is_empty_and_goes(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.gpkg"
    aside_of(target).mkdir(parents=True)
    (aside_of(target) / "of a process of the same number").touch()
    with folder_aside(target) as folder:
        assert names_in(folder) == []
        (folder / "half").touch()
    assert names_in(target.parent) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"a\.gpkg: cannot be created \(.*where you may write"),
        folder_aside(tmp_path / "file" / "a.gpkg"),
    ):
        pass
