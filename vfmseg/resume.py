"""The state from which an interrupted run goes on: one file, replaced after every epoch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from vfmseg.checkpoint import load_strictly, plain_tensors
from vfmseg.errors import CheckpointError
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
        torch.save(content, aside)


def load_run(path: Path, loop: Loop, recipe_text: str) -> None:
    """Put a run back to where `save_run` left it; a run of another recipe is refused."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a damaged or a code-bearing file
        raise CheckpointError(f"{path}: not a readable run state ({type(error).__name__}: {error})") from None
    changed = _changed_lines(content["recipe"], recipe_text)
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with another recipe ({'; '.join(changed[:3])}); resume with the same "
            "recipe, or start anew with --overwrite"
        )
    load_strictly(content["model"], loop.model.trainable(), path)
    loop.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] is not None and loop.accelerator.scaler is not None:
        loop.accelerator.scaler.load_state_dict(content["scaler"])
    loop.state = RunState(**content["state"])


def _changed_lines(before: str, after: str) -> list[str]:
    old, new = before.splitlines(), after.splitlines()
    return [f"now '{line.strip()}'" for line in new if line not in old] + [
        f"then '{line.strip()}'" for line in old if line not in new
    ]
