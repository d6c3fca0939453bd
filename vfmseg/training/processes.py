"""The processes that train together: accelerate, set up so that what it was configured with changes no result."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vfmseg.errors import MachineError
from vfmseg.launch import rank_and_size, require_meeting_point

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def connect(precision: str) -> Accelerator:
    """The accelerator of a run: device, mixed precision ("no", "bf16", "fp16"), and the other processes.

    MachineError where the machine or the settings of `accelerate config` cannot do what a run means: fp16 without a
    GPU, processes that are not connected, weights that are cut over processes.
    """
    import torch

    if precision == "fp16" and not torch.cuda.is_available():
        raise MachineError('train.precision = fp16 needs a GPU, and none is visible here; use bf16 or "no"')
    for name in SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise MachineError(
                f"accelerate is configured to use {name}, which cuts a model over processes; vfmseg trains whole "
                "models side by side: launch with another configuration (--config_file), or by torchrun"
            )
    _, started = rank_and_size()
    require_meeting_point()
    if started == 1:  # what an earlier launch has left behind would make accelerate wait for others
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    # accelerate keeps its settings for the life of a process; a second run in a notebook may want other ones
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # on the CPU accelerate connects the processes of torchrun only if it is told that the CPU is meant
            cpu=not torch.accelerator.is_available(),
            # the loop accumulates by itself; a number in accelerate's settings would divide the gradients once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:  # of a word or number that it does not know
        reason = " ".join(str(error).split())[:200]
        raise MachineError(
            f"the settings of accelerate in the environment (ACCELERATE_...) cannot be used ({reason}); correct them "
            "by `accelerate config`, or unset them"
        ) from None
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise MachineError(
            "train.precision = fp16 needs a GPU, but accelerate is configured to use the CPU; change that, or use bf16"
        )
    if accelerator.num_processes != started:
        raise MachineError(
            f"{started} processes were started, but accelerate connected {accelerator.num_processes}: each would train "
            "a model of its own; check the settings of `accelerate config` and the environment"
        )
    return accelerator


def launch_command() -> list[str]:
    """How this process was started: `accelerate launch` leaves its settings in the environment."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return ["accelerate", "launch"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return ["accelerate", "launch", "--num_processes", processes]
    return ["torchrun", "--nproc_per_node", processes]
