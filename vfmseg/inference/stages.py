"""Threads that hand work on through queues of few places, and end together: the first error of any of them ends all.

A thread that waits for a queue cannot be stopped from outside, and would wait for ever for one that has failed. So all
waiting is done in `Pipe.put` and `Pipe.get`, which look ten times a second whether the work has ended.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.1  # seconds between two looks at whether the work has ended


class Stopped(Exception):
    """Raised in a stage that waits when another has failed, or the work is given up: it ends without an error."""


class Stages:
    """The threads of one run. Use in a `with` statement: leaving it stops them all and waits for their end.

    An error in a stage is kept, ends the others at their next put or get, and is raised again, as it was, in the thread
    of the `with` block. busy {stage: seconds that it has worked}: with several threads more than have passed.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.busy: dict[str, float] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread of its own."""

        def guarded() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:  # whatever it is, it is raised again in the thread that waits
                self.fail(error)

        thread = threading.Thread(target=guarded, name=f"vfmseg-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def fail(self, error: BaseException) -> None:
        """Keep an error, if it is the first, and stop all stages."""
        with self._lock:
            if self.error is None:
                self.error = error
        self._stop.set()

    def check(self) -> None:
        """If the work has ended: raise the error of the stage that failed, or Stopped if none has."""
        if self._stop.is_set():
            raise self.error or Stopped

    def worked(self, name: str, seconds: float) -> None:
        """Add seconds of work to a stage; several threads may be one stage."""
        with self._lock:
            self.busy[name] = self.busy.get(name, 0.0) + seconds

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns; its time is added to a stage."""
        started = time.perf_counter()
        result = work()
        self.worked(name, time.perf_counter() - started)
        return result

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = self.error
        self._stop.set()
        for thread in self._threads:
            thread.join()
        # this thread may have been stopped by an error of a stage (kind is Stopped): then that one is to be told. An
        # error that came while the threads ended counts as well, but not beside one that this thread has raised itself
        if failed is None:
            failed = self.error
        if failed is not None and (kind is None or kind is Stopped):
            raise failed


class Pipe(Generic[T]):
    """A queue of at most `most` items between two stages. blocked: seconds that `put` has waited for room."""

    def __init__(self, stages: Stages, most: int) -> None:
        self._stages = stages
        self._queue: queue.Queue[T] = queue.Queue(most)
        self.blocked = 0.0

    def put(self, item: T) -> None:
        """Hand an item on; waits while the queue is full. Raises as `Stages.check` if the work has ended."""
        started = time.perf_counter()
        while True:
            self._stages.check()
            try:
                self._queue.put(item, timeout=_PATIENCE)
            except queue.Full:
                continue
            self.blocked += time.perf_counter() - started
            return

    def get(self) -> T:
        """The next item; waits while the queue is empty. Raises as `Stages.check` if the work has ended."""
        while True:
            self._stages.check()
            try:
                return self._queue.get(timeout=_PATIENCE)
            except queue.Empty:
                continue

    def __len__(self) -> int:
        """Items that wait."""
        return self._queue.qsize()
