"""How a command talks to the person who started it, and how it ends: messages on stderr, results on stdout, exit codes.

A *verb* is what one command does: `vfmseg finetune`, `vfmseg predict`. Of several processes one talks, so that each
line comes once; errors come from any.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from vfmseg.errors import MachineError, VfmsegError
from vfmseg.launch import rank, several

_said: set[str] = set()  # messages of `say_once`
_lost: dict[int, OSError] = {}  # {1: stdout or 2: stderr: why it could not be written to}


def is_main_process() -> bool:
    """Whether this is the process that talks: rank 0 of a launch, or the only one."""
    return rank() == 0


def say(message: str) -> None:
    """Write a line to stderr, from the main process only; stdout is kept for results."""
    if is_main_process():
        _to_stderr(f"{message}\n")


def say_once(message: str) -> None:
    """The same as `say`, but each message once in the life of the process."""
    if message not in _said:
        _said.add(message)
        say(message)


def quiet_libraries() -> None:
    """Turn off other libraries' progress bars and advice; their errors stay. To be called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("rasterio").setLevel(logging.ERROR)


def guarded(verb: Callable[[], None], resume_line: str | None = None) -> int:
    """Run a verb; returns its exit code, after its error was told in a line.

    0 done; 2 the input is wrong; 3 the machine could not; 128 + the signal's number where it was stopped: 130 by Ctrl-C
    (SIGINT is 2), 143 by SIGTERM (15), both told with `resume_line`, the command that goes on. Any other error is a bug
    and is raised, so that Python prints the traceback and exits with 1.
    """
    try:
        with _termination_unwinds():
            verb()
    except VfmsegError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        if is_main_process():  # the signal goes to all processes of a launch; one line is enough
            what = "terminated" if terminated else "interrupted"
            complain(what + (f"; go on with: {resume_line}" if resume_line else ""))
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except MemoryError:
        complain("out of memory; try a smaller batch_size or tile")
        return 3
    except (PermissionError, NotADirectoryError) as error:
        complain(f"{error.filename}: {error.strerror}; check the path, and whether you may read and write there")
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            complain(f"{error.filename}: {error.strerror}; choose a shorter name")
            return 2
        # no space, over quota, file too large for the disk's format, mounted read-only
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        complain(f"{error.filename or 'the target'}: {error.strerror}; free some space or choose another folder")
        return 3
    except RuntimeError as error:
        # known by name and words, as importing torch for its class would take seconds in verbs that do without
        if type(error).__name__ == "OutOfMemoryError":
            complain("the accelerator ran out of memory; try a smaller batch_size or tile, or precision fp16/bf16")
        elif "DefaultCPUAllocator" in str(error):  # torch's MemoryError
            complain("out of memory; try a smaller batch_size or tile")
        else:
            raise
        return 3
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it some time before SIGKILL; ends work the way Ctrl-C does."""


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """While the block runs, let SIGTERM raise `_Terminated`, so that `finally` and `with` remove half-written files.

    Without it Python ends at once and leaves them. One of several processes is left as it is: it may be waiting for the
    others in C code, which no exception reaches, while its launcher waits for it. Python lets only the main thread say
    what a signal does.
    """
    if several() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(message: str) -> None:
    """Write an error to stderr, from any process; one of several says its number, as in "vfmseg, process 3: ..."."""
    who = "vfmseg" if is_main_process() else f"vfmseg, process {rank()}"
    _to_stderr(f"{who}: {message}\n")


def _to_stderr(text: str) -> None:
    """Write in one go, so that lines of several processes do not mix. What cannot be written is dropped."""
    if sys.stderr is None:  # in a program without a console (pythonw); `print` would write to stdout
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
        sys.stderr.write(text)
        sys.stderr.flush()


def on_terminal() -> bool:
    """Whether stderr is a terminal, to draw a bar on, and this is the process that talks."""
    return is_main_process() and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def deliver(result: str) -> None:
    """Write a result to stdout. MachineError, with the result in its message, if the disk behind stdout is full.

    It is no error where nobody wants more of it: the reader of the pipe has gone (`| head`), or stdout is closed.
    """
    _lost.pop(1, None)
    sys.stdout.write(result)
    sys.stdout.flush()
    lost = _lost.get(1)
    if lost is not None and lost.errno != errno.EPIPE:
        raise MachineError(
            f"stdout: {lost.strerror}; the work is done and its files are kept, only the result could not be written "
            f"there; it is:\n{result}"
        )


def keep_displays() -> None:
    """Replace sys.stdout and sys.stderr by streams on which writing never fails, whoever writes, to the program's end.

    A pipe whose reader has gone, a terminal that was closed or a full disk behind stderr must not end hours of
    training; `deliver` asks afterwards whether a result was lost. To be called in a program's first line: libraries
    keep the streams that they find.
    """
    # 0, 1, 2 are stdin, stdout, stderr. If one is closed, the next file that is opened gets its number: a map could
    # get what is written to stderr
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    """A stream of the same encoding on file `number` (1 or 2) that takes all that is written to it."""
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
        if os.name == "nt" and stream.isatty():  # Windows writes to its console by calls of its own, not as bytes
            return stream
    display = io.BufferedWriter(_Display(number, "w", closefd=False))
    encoding = "utf-8" if stream is None else stream.encoding
    # letters that the encoding lacks are shown as \xe9 instead of an error
    return io.TextIOWrapper(display, encoding, "backslashreplace", line_buffering=True)


class _Display(io.FileIO):
    """The file of a number (1 or 2); bytes that cannot be written are dropped, and `_lost` says why."""

    def write(self, data: Any) -> int:
        """How many bytes are dealt with: those that were written, or all if none can be."""
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                _lost[self.fileno()] = error
                return len(data)
            if written is not None:
                return written
            select.select([], [self], [])  # it was set not to wait (O_NONBLOCK) by a program that shares it: wait here
