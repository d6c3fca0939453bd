"""What a verb says to the person who started it, and how it ends: messages on stderr, exit codes by error class."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vfmseg.errors import VfmsegError

_said: set[str] = set()


def is_main_process() -> bool:
    """True on the one process that talks: rank 0 of a launch, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """One line on stderr, from the main process only (stdout is kept for results)."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


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
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
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
    who = "vfmseg" if is_main_process() else f"vfmseg, process {os.environ['RANK']}"
    # one write: the lines of several processes must not mix, and `print` writes the end of a line by itself
    sys.stderr.write(f"{who}: {message}\n")
    sys.stderr.flush()
