"""Threads that hand work on through bounded queues, and end together: the first error of any of them ends all."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.1  # seconds between two looks at whether another stage has failed


class Stopped(Exception):
    """Another stage has failed or the work is given up: leave quietly."""


class Stages:
    """The threads of one job. Use in a `with` statement: leaving it stops and joins them all.

    An error in a stage is kept, ends the others at their next put or get, and is raised again, as it was, by `check`
    or at the end of the `with` block. `busy` counts the seconds that each stage has worked.
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
        """Keep the first error and stop everybody."""
        with self._lock:
            if self.error is None:
                self.error = error
        self._stop.set()

    def check(self) -> None:
        """Raise the error of a stage that failed, or Stopped."""
        if self._stop.is_set():
            raise self.error or Stopped

    def worked(self, name: str, seconds: float) -> None:
        """Count seconds of work of a stage; several threads may be one stage."""
        with self._lock:
            self.busy[name] = self.busy.get(name, 0.0) + seconds

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Do a piece of work and count its time."""
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
        # an error that stopped this thread through `Stopped` is the one to tell; one that came late is told as well
        if failed is None:
            failed = self.error
        if failed is not None and (kind is None or kind is Stopped):
            raise failed


class Pipe(Generic[T]):
    """A bounded queue between two stages. `blocked`: seconds for which putting has waited."""

    def __init__(self, stages: Stages, most: int) -> None:
        self._stages = stages
        self._queue: queue.Queue[T] = queue.Queue(most)
        self.blocked = 0.0

    def put(self, item: T) -> None:
        """Hand on; waits while the queue is full. Raises Stopped (or the error) if the job has ended."""
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
        """Take the next; waits while the queue is empty."""
        while True:
            self._stages.check()
            try:
                return self._queue.get(timeout=_PATIENCE)
            except queue.Empty:
                continue

    def __len__(self) -> int:
        return self._queue.qsize()
