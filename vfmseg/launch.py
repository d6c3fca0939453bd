"""Which of several processes this one is, as `torchrun` and `accelerate launch` say it in environment variables.

    WORLD_SIZE    number of processes, on all machines together; 1 if unset
    RANK          number of this one among them, from 0
    LOCAL_RANK    its number on its machine, by which it takes a GPU
    MASTER_ADDR, MASTER_PORT    where they meet

Read by hand, as asking torch would import it, which takes seconds; this is asked for each message (`terminal.say`).
"""

from __future__ import annotations

import os

from vfmseg.errors import MachineError

REMEDY = "start the processes by torchrun or accelerate launch, or unset it to work with one process"


def several() -> bool:
    """Whether this is one of several processes. WORLD_SIZE decides: a RANK may be left from an earlier launch."""
    size = os.environ.get("WORLD_SIZE", "1").strip()
    return size.isdecimal() and len(size) < 9 and int(size) > 1


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) for the only one. MachineError where the variables contradict each other.

    A wrong guess would let several processes write one file, or wait for others that do not exist.
    """
    size = _number("WORLD_SIZE", "1", 1, 10**6)
    if size == 1:
        return 0, 1
    if not os.environ.get("RANK"):
        raise MachineError(f"WORLD_SIZE = {size} is set in the environment, but RANK is not; {REMEDY}")
    return _number("RANK", "0", 0, size - 1), size


def rank() -> int:
    """Rank of this process; 0 where the variables make no sense, so that their error can be told by somebody."""
    try:
        return rank_and_size()[0]
    except MachineError:
        return 0


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return _number("LOCAL_RANK", "0", 0, 10**6) if several() else 0


def require_meeting_point() -> None:
    """MachineError if there are several processes and no address where they meet, or LOCAL_RANK is no number."""
    _, size = rank_and_size()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise MachineError(f"WORLD_SIZE = {size} is set in the environment, but {missing[0]} is not; {REMEDY}")
    local_rank()


def _number(name: str, otherwise: str, least: int, most: int) -> int:
    """An environment variable as a whole number from `least` to `most`; `otherwise` where it is unset or empty."""
    text = os.environ.get(name, "").strip() or otherwise
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise MachineError(
            f"{name} = {text[:40]!r} in the environment: expected a whole number from {least} to {most}; {REMEDY}"
        )
    return int(text)
