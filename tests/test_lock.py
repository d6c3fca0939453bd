"""The lock of what a run writes: one run at a time, named while it lives, forgotten when it is dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfmseg.disk import lock as lock_module
from vfmseg.disk.lock import GONE, also_held, held, lock_beside
from vfmseg.errors import BusyError, DataError

# a process that holds a lock until it is killed: WORD LOCK
HOLDER = """
import sys, time
from pathlib import Path
from typing import Any
from vfmseg.disk.lock import also_held, held

lock = Path(sys.argv[2])
also = sys.argv[1] == "also"
with also_held(lock, lock, "labelling") if also else held(lock, lock, "labelling", shared=sys.argv[1] == "first"):
    print("holds", flush=True)
    time.sleep(100)
"""

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no flock")


@contextmanager
def holder(how: str, lock: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", HOLDER, how, str(lock)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
            yield process
        finally:
            process.kill()


def take(lock: Path, shared: bool = False) -> None:
    with held(lock, lock.with_name("labels.tif"), "labelling", shared):
        assert lock.is_file()


@posix
@pytest.mark.pitfall("F1", "F2")
def test_who_holds_a_lock_is_named_and_a_dead_one_is_forgotten(tmp_path: Path) -> None:
    lock = lock_beside(tmp_path / "labels.tif")
    with holder("alone", lock) as process:
        with pytest.raises(BusyError, match=rf"labels\.tif: another run is writing it \(process {process.pid} on "):
            take(lock)
        assert process.poll() is None
        assert lock.is_file()
        process.kill()
        process.wait()
        assert lock.is_file()
        take(lock)
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.pitfall("F1")
def test_processes_that_outlive_their_first_one_and_their_launcher_hold_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with holder("first", lock) as first, holder("also", lock) as second:
        first.kill()
        first.wait()
        with pytest.raises(BusyError, match=f"process {second.pid} on "):
            take(lock)
        second.kill()
        second.wait()
        take(lock)
    assert not lock.exists()


@pytest.mark.pitfall("F1")
def test_the_last_process_of_a_run_removes_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(held(lock, tmp_path / "run", "training", shared=True))
        second.enter_context(also_held(lock, tmp_path / "run", "training"))
        assert [json.loads(line)["process"] for line in lock.read_text().splitlines()] == [os.getpid()] * 2
        with pytest.raises(BusyError):
            take(lock)
        first.close()
        with pytest.raises(BusyError):
            take(lock)
        assert lock.is_file()
    assert not lock.exists()
    with also_held(lock, tmp_path / "run", "training"):  # a machine that does not see the disk
        pass


@posix
@pytest.mark.pitfall("F1", "F2")
def test_of_many_at_once_one_holds_it_at_a_time(tmp_path: Path) -> None:
    """Also while the lock, and the folder that was made for it, come and go."""
    lock = tmp_path / "new" / "folder" / ".lock"
    inside, most, wins = [0], [0], [0]

    def compete() -> None:
        for _ in range(150):
            try:
                with held(lock, lock.parent, "training"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    wins[0] += 1
                    time.sleep(0.0002)
                    inside[0] -= 1
            except BusyError:
                time.sleep(0.0001)

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert wins[0] >= 20
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


@pytest.mark.pitfall("F1")
def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdir finds it there, and it is gone when its kind is asked."""
    lock, lost = tmp_path / "new" / ".lock", [3]
    honest = Path.mkdir

    def races(self: Path, *arguments: Any, **options: Any) -> None:
        if self == lock.parent and lost[0]:
            lost[0] -= 1
            raise FileExistsError(17, "File exists", str(self))
        honest(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", races)
    with held(lock, lock.parent, "training"):
        assert lock.is_file()
    assert lost == [0]
    assert not lock.parent.exists()
    lock.parent.write_text("a file")
    lost[0] = 1
    with pytest.raises(DataError, match="cannot be created"), held(lock, lock.parent, "training"):
        pass


def elsewhere(lock: Path, age: float, **changes: str) -> None:
    """A lock of another machine, whose last sign of life is `age` seconds old by the clock of the disk."""
    line = {"process": 1, "host": "node9", "kernel": "other", "since": "2026-01-01T00:00:00+00:00", "doing": "training"}
    lock.write_text(json.dumps(line | changes) + "\n")
    now = lock.stat().st_mtime
    os.utime(lock, (now - age, now - age))


@posix
@pytest.mark.pitfall("F2")
def test_the_lock_of_another_machine_holds_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"
    monkeypatch.setattr(time, "time", lambda: 0.0)  # clocks do not matter
    elsewhere(lock, GONE / 2)
    before = lock.read_text()
    with pytest.raises(BusyError, match=r"process 1 on node9, since 2026.*counts as gone 120 s after its last sign"):
        take(lock)
    assert lock.read_text() == before
    elsewhere(lock, GONE * 2)
    take(lock)
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.pitfall("F2")
def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".lock"
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.01)
    with held(lock, tmp_path, "training"):
        os.utime(lock, (1, 1))
        end = time.monotonic() + 5
        while lock.stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 2


@posix
@pytest.mark.pitfall("F1")
def test_a_disk_without_locks_is_judged_by_process_and_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"
    monkeypatch.setattr(lock_module, "_flock", lambda handle, shared=False: None)
    with held(lock, tmp_path, "training"), pytest.raises(BusyError, match=f"process {os.getpid()} on "):
        take(lock)
    assert not lock.exists()
    with holder("alone", tmp_path / "other") as process:
        process.kill()
        process.wait()
        lock.write_text((tmp_path / "other").read_text())
    take(lock)  # its process is dead
    assert not lock.exists()


@pytest.mark.parametrize("content", [b"of another program", b"4711\n"])
@pytest.mark.pitfall("F1")
def test_the_lock_of_another_program_is_left_alone(tmp_path: Path, content: bytes) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    with pytest.raises(DataError, match="is no lock of vfmseg"):
        take(lock)
    assert lock.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"process": 47', b"\0" * 100, b'{"process": 1}\n', b"{}\n"])
@pytest.mark.pitfall("F1")
def test_what_a_power_cut_left_of_a_lock_is_taken_over(tmp_path: Path, content: bytes) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    take(lock)
    assert not lock.exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="takes a folder in which nothing can be made")
@pytest.mark.pitfall("F1")
def test_a_folder_that_takes_no_files_is_called_so() -> None:
    with pytest.raises(DataError, match=r"/proc/\.m\.tif\.lock cannot be made there"):
        take(lock_beside(Path("/proc/m.tif")))


@pytest.mark.pitfall("F1")
def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock_module.os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        take(tmp_path / "new" / ".lock")
    monkeypatch.undo()
    assert caught.value.filename
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="takes the right to become another user")
@pytest.mark.pitfall("F1", "F2")
def test_another_user_is_told_who_holds_a_lock_and_takes_over_what_is_left_of_one(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o005)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    target, lock = shared / "m.tif", lock_beside(shared / "m.tif")

    def as_nobody() -> str:
        said, write = os.pipe()
        if os.fork() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                take(lock)
            except DataError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        os.wait()
        with open(said, "rb") as text:
            return text.read().decode()

    before = os.umask(0o077)
    try:
        with held(lock, target, "labelling"):
            assert f"another run is writing it (process {os.getpid()} on" in as_nobody()
            left = lock.read_bytes()
            mode = lock.stat().st_mode
    finally:
        os.umask(before)
    lock.write_bytes(left)
    lock.chmod(mode)
    assert as_nobody() == ""
    lock.write_bytes(left)
    lock.chmod(0o600)
    assert f"cannot be told (Permission denied: {lock}); remove that file if no run is" in as_nobody()


@pytest.mark.skipif(sys.platform == "win32", reason="links take a right of their own")
@pytest.mark.pitfall("F1")
def test_a_lock_leads_to_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch(mode=0o600)
    lock_beside(tmp_path / "m.tif").symlink_to("other")
    with (
        pytest.raises(DataError, match="cannot be told"),
        held(lock_beside(tmp_path / "m.tif"), tmp_path / "m.tif", ""),
    ):
        pass
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.pitfall("F1")
def test_errors_inside_are_passed_on_and_free_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    with pytest.raises(KeyboardInterrupt), held(lock, lock.parent, "training"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with held(lock, lock.parent, "training"):
        (lock.parent / "state").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["state"]
