"""Which of several processes this one is (rank 0 to ranks - 1), how they wait for each other, and on which device.

Processes that label one scene share nothing but files: each labels its own shards (`plan.share_of`), and they meet
before and after, so that the first one can make the folder and join the pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from vfmseg.disk.lock import also_held, held, lock_beside
from vfmseg.errors import MachineError, RecipeError
from vfmseg.launch import REMEDY, local_rank, rank_and_size, require_meeting_point

T = TypeVar("T")

# a process that waits may wait for hours for one with more work; a launcher ends all of them if one fails
PATIENCE = timedelta(days=30)


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, ranks) of this process, connected to the others that `accelerate launch` or `torchrun` has started.

    A connection made here is closed here: left to the end of the interpreter, its threads may abort the process.
    """
    _, ranks = rank_and_size()
    if ranks == 1:
        yield 0, 1
        return
    own = not torch.distributed.is_initialized()
    if own:
        require_meeting_point()
        try:
            # only short messages are exchanged, so gloo does on every machine
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise MachineError(f"the {ranks} processes cannot be connected ({reason}); {REMEDY}") from None
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        if own:
            torch.distributed.destroy_process_group()


def meet() -> None:
    """Wait until every process has come here; MachineError if this one is not connected to others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise MachineError(
            "several processes shall label one scene, but this one is connected to none: start them by torchrun or "
            "accelerate launch, and call torch.distributed.init_process_group, or leave out rank and ranks"
        )
    with _together():
        torch.distributed.barrier()


@contextmanager
def alone(files: Iterable[Path], rank: int, ranks: int) -> Iterator[None]:
    """While the block runs, no other run writes these files or removes what lies beside them; BusyError if one does.

    Each of the processes that label a scene together holds the locks, as any of them may be the last that works on:
    they go on if their launcher is killed. The first one takes them, then the others join.
    """
    if ranks > 1:
        meet()  # first of all: processes that are not connected must not touch anything
    with ExitStack() as stack:
        for file in sorted(files) if rank == 0 else ():
            stack.enter_context(held(lock_beside(file), file, f"labelling {file.name}", shared=ranks > 1))
        if ranks > 1:
            meet()
        for file in sorted(files) if rank else ():
            stack.enter_context(also_held(lock_beside(file), file, f"labelling {file.name}"))
        yield


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; waits until each has called it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    with _together():
        torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def _together() -> Iterator[None]:
    """MachineError in one line where another process has ended; that one tells why itself."""
    try:
        yield
    except RuntimeError as error:
        raise MachineError(f"another process has ended ({str(error).splitlines()[0]}); see its message") from None


def own_device() -> str:
    """Name of the device that this process takes unless told otherwise: its GPU (cuda:0, cuda:1, ...), or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_rank() % torch.cuda.device_count()}"


def usable_device(name: str) -> torch.device:
    """A torch device by name; RecipeError if there is no such kind, MachineError if this machine has none."""
    try:
        # without a number: that of this process, not the first one for all of them
        device = torch.device(own_device() if name == "cuda" and torch.cuda.is_available() else name)
    except RuntimeError:
        raise RecipeError(f"device = {name!r} is not known; expected cpu, cuda, cuda:1, mps, ...") from None
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch built without it, no driver, no such number
        raise MachineError(f"device = {name}: {str(error).splitlines()[0]}; use another one, such as cpu") from None
    return device
