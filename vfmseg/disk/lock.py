"""One run at a time writes a file or folder: a lock file beside it, which says who holds it.

    with held(lock_beside(target), target, "labelling"):        # BusyError, which names the other run, if one holds it
        ...

The kernel keeps the lock (flock) and frees it when its process ends, however that ends; a file that nobody locks was
left behind and is taken over without a word. Locks may not reach other machines, and some disks and Windows have none:
there the holder is alive as long as it gives a sign, the time of the lock file, every HEARTBEAT seconds. The file holds
one line for each process of the run:

    {"process": 4711, "host": "node3", "kernel": "...", "since": "2026-05-04T10:11:12+02:00", "doing": "labelling"}
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from vfmseg.disk.files import not_created
from vfmseg.errors import BusyError, DataError

LOCK = ".lock"
"""Name of the lock inside a folder that is written as a whole."""

HEARTBEAT = 20.0
GONE = 120.0
"""Seconds between signs of life, and without one after which a holder that no kernel answers for is taken for dead."""

_TRIES = 100
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a lock leads to no other file, whoever may make links here
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """A line of a lock file. kernel: the running system, which containers on one machine share."""

    process: int
    host: str
    kernel: str
    since: str
    doing: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}, {self.doing}"


def lock_beside(file: Path) -> Path:
    """The lock of a single file: labels.tif -> .labels.tif.lock."""
    return file.with_name(f".{file.name}.lock")


@contextlib.contextmanager
def held(lock: Path, target: Path, doing: str, shared: bool = False) -> Iterator[None]:
    """Hold `lock`, so that no other run writes `target` while the block runs; BusyError, naming who does, if one does.

    `shared`: other processes of the same run will hold it as well, by `also_held`. Missing folders are made, and
    removed again if nothing has come into them. DataError where no file can be made.
    """
    missing = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    try:
        handle = _take(lock, target, doing, shared)
        try:
            with _signs_of_life(lock, handle):
                yield
        finally:
            _give_back(lock, handle)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it holds something, or another run has removed it
                folder.rmdir()


@contextlib.contextmanager
def also_held(lock: Path, target: Path, doing: str) -> Iterator[None]:
    """Hold a lock that another process of the same run has taken, so that it lasts as long as one of them lives."""
    try:
        handle = os.open(lock, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:  # a machine that does not see this disk: whoever writes there will say so
        yield
        return
    try:
        if _flock(handle, shared=True) is False:  # the process that took it has died, and a new run was faster
            raise BusyError(_busy(target, handle))
        os.write(handle, _line(doing))
    except BaseException:
        os.close(handle)
        raise
    try:
        with _signs_of_life(lock, handle):
            yield
    finally:
        _give_back(lock, handle)


def _take(lock: Path, target: Path, doing: str, shared: bool) -> int:
    """The open lock file, locked and with our line in it; tried again where a run that ends removes it just now."""
    for _ in range(_TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        except FileNotFoundError:  # a run that has ended removes the folder that it made
            continue
        except OSError as error:
            if error.errno in _FULL:
                raise
            # it was there when it was to be made and gone when it was looked at, and may be there again
            if isinstance(error, FileExistsError) and (lock.parent.is_dir() or not os.path.lexists(lock.parent)):
                continue
            if lock.exists():
                raise DataError(
                    f"{target}: whether another run is writing it cannot be told ({error.strerror}: {lock}); remove "
                    "that file if no run is, or choose another output"
                ) from error
            raise not_created(target, error) from error
        try:
            if _taken(lock, target, handle, doing, shared):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise DataError(
        f"{target}: cannot be created: {lock} cannot be made there, or is removed again and again; choose another "
        "output"
    )


def _taken(lock: Path, target: Path, handle: int, doing: str, shared: bool) -> bool:
    """Lock an open file and write our name into it; False if its last holder has just removed it."""
    given = _flock(handle)
    if not _has_name(lock, handle):
        return False
    if given is False:
        raise BusyError(_busy(target, handle))
    if os.read(handle, 1).strip(b"{\0"):  # zeros: what may be left of it when the power fails
        raise DataError(f"{lock}: is no lock of vfmseg, and {target} is not written without one; move it away")
    alive = next((holder for holder in _holders(handle) if _lives(holder, lock, handle, given is True)), None)
    if alive is not None:
        raise BusyError(_busy(target, handle, alive))
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, _line(doing))
        with contextlib.suppress(OSError):  # another user's, who has done so: who may write here may take it over
            os.chmod(handle if os.chmod in os.supports_fd else lock, 0o666)
    except OSError as error:  # a full disk is reported without a name
        lock.unlink(missing_ok=True)
        error.filename = error.filename or str(target)
        raise
    # the kernel takes the one lock back before it gives the other, and somebody may come between
    if shared and _flock(handle, shared=True) is False:
        raise BusyError(_busy(target, handle))
    return True


def _give_back(lock: Path, handle: int) -> None:
    """Close; the last one of a run removes the file."""
    remove = False
    with contextlib.suppress(OSError):
        alone, first = _flock(handle), next(iter(_holders(handle)), None)
        here = first is None or first.kernel == _kernel()  # the kernel of another machine would not answer for all
        mine = first is not None and first.process == os.getpid()
        remove = here and (alone is True or (alone is None and mine)) and _has_name(lock, handle)
    if remove and sys.platform != "win32":  # while it is locked: once it is not, it may be another run's
        lock.unlink(missing_ok=True)
    os.close(handle)
    if remove and sys.platform == "win32":  # which removes no open file
        lock.unlink(missing_ok=True)


def _flock(handle: int, shared: bool = False) -> bool | None:
    """Whether the kernel gives the lock; None where the system or the disk has none."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _has_name(lock: Path, handle: int) -> bool:
    """Whether an open file is the one under the name of the lock.

    Between our opening and locking it its last holder may have removed it: then we hold a file that nobody else sees.
    """
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _holders(handle: int) -> list[Holder]:
    os.lseek(handle, 0, os.SEEK_SET)
    holders = []
    for line in os.read(handle, 2**16).splitlines():
        with contextlib.suppress(ValueError, TypeError):  # half a line: written, or lost with the power, just now
            holders.append(Holder(**json.loads(line)))
    return holders


def _lives(holder: Holder, lock: Path, handle: int, locked: bool) -> bool:
    """Whether a holder is alive of whose lock our kernel says nothing: it is of another machine, or a disk without any.

    locked: whether the kernel has just given us the lock, so that no process of this system holds it.
    """
    if holder.kernel == _kernel():
        if locked:  # its lock would have been in the way of ours
            return False
        if holder.host == platform.node() and sys.platform != "win32" and not _runs(holder.process):
            return False
    with tempfile.TemporaryFile(dir=lock.parent) as probe:  # the clock of the disk, whatever ours says
        probe.write(b".")
        probe.flush()
        now = os.fstat(probe.fileno()).st_mtime
    return now - os.fstat(handle).st_mtime < GONE


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but is another user's
        pass
    return True


def _busy(target: Path, handle: int, holder: Holder | None = None) -> str:
    """Who writes the target, and what can be done."""
    names = _holders(handle)
    if not names:  # locked just now, and about to write its name
        time.sleep(0.2)
        names = _holders(handle)
    here = [one for one in names if one.host == platform.node() and sys.platform != "win32" and _runs(one.process)]
    who = holder or next(iter([*here, *names]), "a process that has not said its name")
    remedy = "wait until it has ended, stop it, or choose another output"
    if holder is not None:
        remedy += f"; if it is dead, it counts as gone {GONE:.0f} s after its last sign of life"
    return f"{target}: another run is writing it ({who}): {remedy}"


def _line(doing: str) -> bytes:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = Holder(os.getpid(), platform.node(), _kernel(), since, doing)
    return (json.dumps(asdict(holder)) + "\n").encode()


@cache
def _kernel() -> str:
    """What tells this running system from all others: Linux has a number for that, elsewhere it is the host's name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return platform.node()


@contextlib.contextmanager
def _signs_of_life(lock: Path, handle: int) -> Iterator[None]:
    """Renew the time of the lock file every HEARTBEAT seconds while the block runs, from a thread."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(handle if os.utime in os.supports_fd else lock)

    thread = threading.Thread(target=beat, name="vfmseg-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1)
