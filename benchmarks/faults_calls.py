"""Every call by which a process changes files, seen before it happens: to count them, to kill at one, to fill the disk.

The kernel stops the process (a seccomp filter, ptrace) at the calls below, also those that GDAL, torch and safetensors
make in C, C++ and Rust. Linux on x86-64 only; `usable()` says whether this machine allows it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

Decision = Literal["go", "kill", "full"]

# number: (name, which argument is the path or the open file, whether it is a path, whether it takes room on the disk)
CALLS: dict[int, tuple[str, int, bool, bool]] = {
    1: ("write", 0, False, True), 18: ("pwrite64", 0, False, True), 20: ("writev", 0, False, True),
    296: ("pwritev", 0, False, True), 328: ("pwritev2", 0, False, True), 40: ("sendfile", 0, False, True),
    326: ("copy_file_range", 2, False, True), 285: ("fallocate", 0, False, True), 77: ("ftruncate", 0, False, True),
    76: ("truncate", 0, True, True), 2: ("open", 0, True, True), 257: ("openat", 1, True, True),
    85: ("creat", 0, True, True), 83: ("mkdir", 0, True, True), 258: ("mkdirat", 1, True, True),
    84: ("rmdir", 0, True, False), 82: ("rename", 0, True, False), 264: ("renameat", 1, True, False),
    316: ("renameat2", 1, True, False), 86: ("link", 1, True, True), 265: ("linkat", 3, True, True),
    88: ("symlink", 1, True, True), 266: ("symlinkat", 2, True, True), 87: ("unlink", 0, True, False),
    263: ("unlinkat", 1, True, False), 74: ("fsync", 0, False, False), 75: ("fdatasync", 0, False, False),
    90: ("chmod", 0, True, False), 91: ("fchmod", 0, False, False), 268: ("fchmodat", 1, True, False),
}  # fmt: skip
_SAME = ("fsync", "fdatasync", "chmod", "fchmod", "fchmodat")  # the bytes stay as they are
_MAKES = ("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "creat")  # what is not there yet
_FLAGS = {2: 1, 257: 2}  # of those that open: the argument that says for what
_ALL_KINDS = 0x40000000  # __WALL: wait for threads too
_STOPS = 0x100000 | 0x80 | 0x8 | 0x4 | 0x2  # it ends with us; stop at the filter's calls; follow threads and forks
_FULL = 28  # ENOSPC
_REGISTERS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in [*_REGISTERS.split(), "ds", "es", "fs", "gs"]]


class Call(NamedTuple):
    """A call that is about to change `path` (without the number of the process in it).

    takes_room: fails on a full disk. changes: what is on the disk is another afterwards.
    """

    name: str
    path: str
    takes_room: bool
    changes: bool


class Alarm:
    """Kills a process after some seconds; one inside another stops the clock of that."""

    def __init__(self, pid: int, seconds: float) -> None:
        self.pid, self.seconds = pid, seconds

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, lambda *_: os.kill(self.pid, signal.SIGKILL))
        self.rest, _ = signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGALRM, self.before)
        signal.setitimer(signal.ITIMER_REAL, self.rest)


class Stopped(NamedTuple):
    """How a watched process ended: its wait status and what it has used."""

    status: int
    usage: Any


def usable() -> bool:
    """Whether processes can be watched here."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    seen: list[Call] = []
    with open(os.devnull, "wb") as nothing:
        watched(lambda: os.write(nothing.fileno(), b"x"), Path("/dev"), lambda n, call: _note(seen, call))
    return len(seen) == 1


def watched(
    work: Callable[[], Any], below: Path, decide: Callable[[int, Call], Decision], patience: float = 60.0
) -> Stopped:
    """Do `work` in a fork of this process; ask `decide` (number from 1, call) before each change to files in `below`.

    "kill" ends the process by SIGKILL before the call happens; "full" lets the call fail as on a full disk. After
    `patience` seconds it is killed anyway.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _libc.ptrace(0, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            _filter()
            work()
            os._exit(0)
        finally:
            os._exit(70)
    os.waitpid(pid, _ALL_KINDS)
    _libc.ptrace(0x4200, pid, None, _STOPS)
    _libc.ptrace(7, pid, None, None)
    with Alarm(pid, patience):
        return _watch(pid, f"{below}{os.sep}", decide)


def _watch(pid: int, below: str, decide: Callable[[int, Call], Decision]) -> Stopped:
    number = 0
    while True:
        thread, status, usage = os.wait4(-1, _ALL_KINDS)
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return Stopped(status, usage)
            continue
        handed_on = os.WSTOPSIG(status)
        if status >> 16 or handed_on == signal.SIGSTOP:
            handed_on = 0
        if status >> 16 == 7:  # a call of the filter's
            registers = _Registers()
            _libc.ptrace(12, thread, None, ctypes.addressof(registers))
            call = _call(thread, registers, below)
            if call is not None:
                number += 1
                decision = decide(number, call)
                if decision == "kill":
                    os.kill(pid, signal.SIGKILL)
                    continue
                if decision == "full":
                    registers.orig_rax = 2**64 - 1  # no call at all, with this as its answer
                    registers.rax = 2**64 - _FULL
                    _libc.ptrace(13, thread, None, ctypes.addressof(registers))
        _libc.ptrace(7, thread, None, handed_on)


def places(calls: list[Call]) -> list[int]:
    """Numbers of the calls before which the disk holds something new; of many writes in a row to one file a few."""
    kept, same = [1], 0
    for number in range(2, len(calls) + 1):
        before = calls[number - 2]
        same = same + 1 if calls[number - 1] == before else 0
        if before.changes and (same < 2 or same in (4, 16, 64)):
            kept.append(number)
    return kept


def _note(seen: list[Call], call: Call) -> Decision:
    seen.append(call)
    return "go"


def _call(thread: int, registers: _Registers, below: str) -> Call | None:
    """What a stopped thread is about to change, if that lies below a folder."""
    name, place, is_path, takes_room = CALLS[registers.orig_rax]
    arguments = [getattr(registers, r) for r in ("rdi", "rsi", "rdx", "r10", "r8", "r9")]
    try:
        if is_path:
            path = _text(thread, arguments[place])
            if not path.startswith("/"):
                start = ctypes.c_int(arguments[place - 1] & 0xFFFFFFFF).value if name.endswith("at") else -100
                link = f"/proc/{thread}/cwd" if start == -100 else f"/proc/{thread}/fd/{start}"
                path = os.path.normpath(os.path.join(os.readlink(link), path))
        else:
            path = os.readlink(f"/proc/{thread}/fd/{arguments[place]}")
    except OSError:
        return None
    if not (path + os.sep).startswith(below):
        return None
    there = os.path.lexists(path)
    changes = name not in _SAME and there is (name not in _MAKES)
    takes_room = takes_room and changes
    if registers.orig_rax in _FLAGS:
        flags = arguments[_FLAGS[registers.orig_rax]]
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return None
        changes = bool(flags & (os.O_TRUNC if there else os.O_CREAT))
        takes_room = changes and not there
    return Call(name, re.sub(r"\.\d+\.(partial|old)", r".N.\1", path[len(below) :]), takes_room, changes)


def _text(thread: int, address: int) -> str:
    """The path at an address of another process."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        found = b""
        while b"\0" not in found and len(found) < 4096:
            found += memory.read(min(256, 4096 - address % 4096 if not found else 256))
    return os.fsdecode(found.split(b"\0")[0])


def _filter() -> None:
    """From now on the calls above stop this process, and no others."""
    rules = [(0x20, 0, 0, 0)]  # load the number of the call
    for i, number in enumerate(CALLS):
        rules.append((0x15, len(CALLS) - i, 0, number))  # if equal, jump to the last rule
    rules += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FF00000)]  # allow; stop for whoever watches
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    kept = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(kept)), 16)
    _libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    if _libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
