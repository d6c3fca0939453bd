"""The state from which an interrupted run goes on: one file, replaced after every epoch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vfmseg.checkpoint import load_strictly, plain_tensors
from vfmseg.errors import CheckpointError, MachineError
from vfmseg.files import whole_file
from vfmseg.loop import Loop, RunState


def save_run(path: Path, loop: Loop, recipe_text: str) -> None:
    """Write everything a run needs to go on after this epoch: trained tensors, optimizer, scaler, records."""
    scaler = loop.accelerator.scaler
    content = {
        "recipe": recipe_text,
        "model": plain_tensors(loop.model.trainable()),
        "optimizer": loop.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "state": asdict(loop.state),
    }
    with whole_file(path) as aside:
        try:
            torch.save(content, aside)
        except RuntimeError as error:  # how torch's own writer reports a full disk
            raise MachineError(
                f"{path}: could not be written, the disk seems to be full ({str(error).splitlines()[0]}); the state of "
                "the epoch before is kept: free some space and --resume"
            ) from None


def load_run(path: Path, loop: Loop, recipe_text: str) -> None:
    """Put a run back to where `save_run` left it; a run of another recipe is refused."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a damaged or a code-bearing file
        raise CheckpointError(f"{path}: not a readable run state ({type(error).__name__}: {error})") from None
    try:
        _restore(path, loop, recipe_text, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not the state of a run ({type(error).__name__}: {error}); start anew with --overwrite"
        ) from None


def _restore(path: Path, loop: Loop, recipe_text: str, content: dict[str, Any]) -> None:
    changed = _changed_lines(content["recipe"], recipe_text)
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with another recipe ({'; '.join(changed[:3])}); resume with the same "
            "recipe, or start anew with --overwrite"
        )
    state = RunState(**content["state"])
    if state.step != state.epoch * loop.steps_per_epoch:
        raise CheckpointError(
            f"{path}: {state.step} steps in {state.epoch} epochs, but now an epoch has {loop.steps_per_epoch} steps: "
            "the training scenes or the number of processes have changed; resume with the same, or start anew with "
            "--overwrite"
        )
    load_strictly(content["model"], loop.model.trainable(), path)
    loop.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] is not None and loop.accelerator.scaler is not None:
        loop.accelerator.scaler.load_state_dict(content["scaler"])
    loop.state = state


def _changed_lines(before: str, after: str) -> list[str]:
    old, new = before.splitlines(), after.splitlines()
    return [f"now '{line.strip()}'" for line in new if line not in old] + [
        f"then '{line.strip()}'" for line in old if line not in new
    ]
