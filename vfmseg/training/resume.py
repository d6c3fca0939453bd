"""The state from which an interrupted run goes on: one file, replaced after every epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vfmseg.data.inputs import Inputs
from vfmseg.disk.files import whole_file
from vfmseg.disk.seal import is_intact, seal
from vfmseg.disk.tensors import load_strictly, plain_tensors
from vfmseg.errors import CheckpointError, MachineError, show
from vfmseg.terminal import say
from vfmseg.training.loop import Loop, RunState

FORMAT = 2
"""Number of the way the file is written, kept in it. The first had no number, and other names of tensors."""


@dataclass(frozen=True)
class Origin:
    """What a run stands on and the state does not hold: it must be the same where the run goes on."""

    recipe: str  # what decides of it, as text
    encoder: str  # SHA-256 of the tensors that were published; of several encoders joined by +
    inputs: dict[str, Any]  # of each modality: bands, stored type and statistics of the training scenes
    processes: int
    data: dict[str, str] = field(default_factory=dict)  # a digest of each image and label map, by its name in words


def save_run(path: Path, loop: Loop, origin: Origin) -> None:
    """Write everything a run needs to go on after this epoch: what it has changed, optimizer, scaler, records."""
    scaler = loop.accelerator.scaler
    content = {
        "format": FORMAT,
        "origin": asdict(origin),
        "tensors": plain_tensors(loop.step.kept()),
        "optimizer": loop.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "state": asdict(loop.state),
    }
    with whole_file(path) as aside:
        try:
            torch.save(content, aside)
            seal(aside, "state")
        except RuntimeError as error:  # how torch's own writer reports a full disk
            raise MachineError(
                f"{path}: could not be written, the disk seems to be full ({str(error).splitlines()[0]}); what the run "
                "has reached before is kept: free some space and --resume"
            ) from None


def noted(inputs: Inputs) -> dict[str, Any]:
    """What a run notes of its training scenes: {modality: bands, stored type, mean and std}."""
    return {one.name: {"bands": one.count, "dtype": one.dtype, "mean": one.mean, "std": one.std} for one in inputs}


def as_then(inputs: Inputs, path: Path) -> Inputs:
    """The same with the mean and std that the run of a state noted: its weights were learned from such values."""
    try:
        then = _read(path)["origin"]["inputs"]
        return tuple(
            replace(one, mean=tuple(then[one.name]["mean"]), std=tuple(then[one.name]["std"]))
            if one.name in then
            else one
            for one in inputs
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _no_state(path, error) from None


def data_of(path: Path) -> dict[str, str]:
    """{image or label map, in words: digest} of what the run of a state learned from; empty if none were noted."""
    try:
        return dict(Origin(**_read(path)["origin"]).data)
    except (KeyError, TypeError, ValueError) as error:
        raise _no_state(path, error) from None


def changed_data(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of `data_of` is another than it was, in words; empty if nothing is, or none were noted."""
    return _some(list(_other_data(then, now))) if then and now else ""


def load_run(path: Path, loop: Loop, origin: Origin, accept_changed_data: bool = False) -> None:
    """Put a run back to where `save_run` left it; a run of another origin is refused.

    `accept_changed_data`: other images and labels than those of then are told, and the run goes on with them.
    """
    content = _read(path)
    try:
        _restore(path, loop, origin, content, accept_changed_data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_state(path, error) from None


def _no_state(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not the state of a run ({type(error).__name__}: {error}); start anew with --overwrite"
    )


def _never_sealed(path: Path) -> bool:
    """Whether a state may have been written without a seal, as format 1 was at first: it ends where its archive ends.

    Such a file is read, so that the message is about its format, and not about damage.
    """
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 22))
        return file.read(4) == b"PK\5\6"


def _read(path: Path) -> dict[str, Any]:
    if not is_intact(path) and not _never_sealed(path):
        raise CheckpointError(
            f"{path}: is damaged: it does not hold what was written (checksum); copy it again if there is a copy, or "
            "start anew with --overwrite"
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a damaged or a code-bearing file
        raise CheckpointError(
            f"{path}: not a readable run state ({type(error).__name__}: {error}); copy it again if there is a copy, or "
            "start anew with --overwrite"
        ) from None
    found = content.get("format", 1) if isinstance(content, dict) else None
    if found not in (None, FORMAT):
        raise CheckpointError(
            f"{path}: is the state of a run in format {show(found)}, but this version of vfmseg goes on with format "
            f"{FORMAT}; finish the run with the version that began it, or start anew with --overwrite"
        )
    return content


def _restore(path: Path, loop: Loop, origin: Origin, content: dict[str, Any], accept_changed_data: bool) -> None:
    then = Origin(**content["origin"])
    other = list(_other_data(then.data, origin.data)) if then.data else []  # empty: none were noted
    if other and accept_changed_data:
        say(f"the data have changed since the run was started, and it goes on with what there is now: {_some(other)}")
        then = replace(then, data=origin.data)
    changed = next(_changes(then, origin), None)
    if changed:
        raise CheckpointError(f"{path}: {changed}; resume with the same, or start anew with --overwrite")
    state = RunState(**content["state"])
    if state.step != state.epoch * loop.steps_per_epoch:
        raise CheckpointError(
            f"{path}: {state.step} steps in {state.epoch} epochs, but now an epoch has {loop.steps_per_epoch} steps: "
            "the training scenes have changed; resume with the same, or start anew with --overwrite"
        )
    load_strictly(content["tensors"], loop.step.kept(), path)
    loop.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] is not None and loop.accelerator.scaler is not None:
        loop.accelerator.scaler.load_state_dict(content["scaler"])
    loop.state = state


def _changes(then: Origin, now: Origin) -> Iterator[str]:
    """What is another than it was, as the beginning of a message."""
    lines = _changed_lines(then.recipe, now.recipe)
    if lines:
        yield f"the run was started with another recipe ({'; '.join(lines[:3])})"
    for old, new in zip_longest(then.encoder.split("+"), now.encoder.split("+"), fillvalue="none"):
        if old != new:
            yield f"the run was started on an encoder with SHA-256 {old[:12]}..., now it is {new[:12]}..."
    if then.processes != now.processes:
        yield f"the run was started with {then.processes} processes, now there are {now.processes}"
    for kind, what in (("bands", "bands"), ("dtype", "stored types")):
        before, after = ({name: one[kind] for name, one in of.inputs.items()} for of in (then, now))
        if before != after:
            yield f"the training scenes had {what} {before}, now they have {after}"
    other = list(_other_data(then.data, now.data)) if then.data else []
    if other:
        yield (
            f"the data have changed since the run was started: {_some(other)}; go on with what there is now by "
            "--accept-changed-data"
        )
    for name, one in now.inputs.items():
        was = then.inputs[name]
        if not np.allclose([was["mean"], was["std"]], [one["mean"], one["std"]], rtol=1e-5):  # machines round otherwise
            yield (
                f"mean and std of the training scenes' {name} have changed: their pixels are not those of then; go on "
                "with these pixels, and mean and std of then, by --accept-changed-data"
            )


def _other_data(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Each image and label map that is not as it was."""
    for what in sorted({*then, *now}, key=lambda what: ("(labels of" not in what, what)):
        if what not in now:
            yield f"{what} is not there any more"
        elif what not in then:
            yield f"{what} is new"
        elif then[what] != now[what]:
            yield f"{what} has changed"


def _some(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return ", ".join(lines[:3]) + more


def _changed_lines(before: str, after: str) -> list[str]:
    old, new = before.splitlines(), after.splitlines()
    return [f"now '{line.strip()}'" for line in new if line not in old] + [
        f"then '{line.strip()}'" for line in old if line not in new
    ]
