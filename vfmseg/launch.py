"""Which of several processes this one is, as `torchrun` and `accelerate launch` say it in the environment."""

from __future__ import annotations

import os

from vfmseg.errors import MachineError

REMEDY = "start the processes by torchrun or accelerate launch, or unset it to work with one process"


def several() -> bool:
    """Whether this is one of several processes. A RANK that an earlier launch has left behind makes it none."""
    size = os.environ.get("WORLD_SIZE", "1").strip()
    return size.isdecimal() and len(size) < 9 and int(size) > 1


def rank_and_size() -> tuple[int, int]:
    """(number, count) of this process; (0, 1) for the only one. MachineError where what is set fits no launch."""
    size = _number("WORLD_SIZE", "1", 1, 10**6)
    if size == 1:
        return 0, 1
    if not os.environ.get("RANK"):
        raise MachineError(f"WORLD_SIZE = {size} is set in the environment, but RANK is not; {REMEDY}")
    return _number("RANK", "0", 0, size - 1), size


def rank() -> int:
    """Number of this process, 0 where that is not to be told."""
    try:
        return rank_and_size()[0]
    except MachineError:
        return 0


def local_rank() -> int:
    """Number of this process on its machine."""
    return _number("LOCAL_RANK", "0", 0, 10**6) if several() else 0


def require_meeting_point() -> None:
    """MachineError if several processes were started without a place to meet, or one of them with a wrong number."""
    _, size = rank_and_size()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise MachineError(f"WORLD_SIZE = {size} is set in the environment, but {missing[0]} is not; {REMEDY}")
    local_rank()


def _number(name: str, otherwise: str, least: int, most: int) -> int:
    text = os.environ.get(name, "").strip() or otherwise
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise MachineError(
            f"{name} = {text[:40]!r} in the environment: expected a whole number from {least} to {most}; {REMEDY}"
        )
    return int(text)
