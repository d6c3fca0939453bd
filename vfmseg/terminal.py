"""What a verb says to the person who started it, and how it ends: messages on stderr, exit codes by error class."""

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

_said: set[str] = set()
_lost: dict[int, OSError] = {}  # why a stream, by its number, could not be written to


def is_main_process() -> bool:
    """True on the one process that talks: rank 0 of a launch, or the only process."""
    return rank() == 0


def say(message: str) -> None:
    """One line on stderr, from the main process only (stdout is kept for results)."""
    if is_main_process():
        _to_stderr(f"{message}\n")


def say_once(message: str) -> None:
    """The same as `say`, but a message that was already said stays silent."""
    if message not in _said:
        _said.add(message)
        say(message)


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of our messages; their warnings and errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("rasterio").setLevel(logging.ERROR)


def guarded(verb: Callable[[], None], resume_line: str | None = None) -> int:
    """Run a verb and return its exit code.

    0 done; 2 the input is wrong; 3 the machine could not; 130 interrupted, 143 terminated (both with the line that
    resumes); anything else is a bug and is raised, so that Python prints the traceback and exits with 1.
    """
    try:
        with _termination_unwinds():
            verb()
    except VfmsegError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        if is_main_process():  # all of them were interrupted
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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        complain(f"{error.filename or 'the target'}: {error.strerror}; free some space or choose another folder")
        return 3
    except RuntimeError as error:
        # told by name and words, so that torch is not imported for it
        if type(error).__name__ == "OutOfMemoryError":
            complain("the accelerator ran out of memory; try a smaller batch_size or tile, or precision fp16/bf16")
        elif "DefaultCPUAllocator" in str(error):  # torch's MemoryError
            complain("out of memory; try a smaller batch_size or tile")
        else:
            raise
        return 3
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill: to be left as by Ctrl-C."""


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM end this process by an exception, so that half-written files go.

    Not one of several processes: it may wait for the others in code that no exception reaches, while its launcher waits
    for it. And only the main thread may say what a signal does.
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
    """A message on stderr from whatever process, which says its number."""
    who = "vfmseg" if is_main_process() else f"vfmseg, process {rank()}"
    _to_stderr(f"{who}: {message}\n")


def _to_stderr(text: str) -> None:
    """One write: the lines of several processes must not mix. What cannot be shown is dropped."""
    if sys.stderr is None:  # of a program without a console; `print` would turn to stdout
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
        sys.stderr.write(text)
        sys.stderr.flush()


def on_terminal() -> bool:
    """Whether there is a terminal to draw a bar on, and this is the process that talks."""
    return is_main_process() and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def deliver(result: str) -> None:
    """A result on stdout. MachineError, which holds it, if the disk behind stdout cannot take it.

    A reader that has gone (`| head`) or a closed stdout wanted no more of it: that is no error.
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
    """Let stdout and stderr take whatever is written to them, now and as the program ends, whoever writes.

    A pipe whose reader has gone, a terminal that was closed or a full disk behind one of them ends no run. For a
    program's first line: nothing has been opened yet, and libraries have not noted which streams there are.
    """
    for number in range(3):  # the next file opened would get the number of a closed one, and what is meant for stderr
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
        if os.name == "nt" and stream.isatty():  # written to by other means than bytes
            return stream
    display = io.BufferedWriter(_Display(number, "w", closefd=False))
    encoding = "utf-8" if stream is None else stream.encoding
    # a console of few letters shows the others by their numbers
    return io.TextIOWrapper(display, encoding, "backslashreplace", line_buffering=True)


class _Display(io.FileIO):
    """A stream by its number that takes all bytes; those that it cannot pass on it drops."""

    def write(self, data: Any) -> int:
        """The number of bytes that are done with: all of them, if they cannot be written."""
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                _lost[self.fileno()] = error
                return len(data)
            if written is not None:
                return written
            select.select([], [self], [])  # whoever shares the stream has set it not to wait: we do
