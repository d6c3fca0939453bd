"""Curves of a training run for TensorBoard, through accelerate's tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmseg.errors import MachineError

if TYPE_CHECKING:
    from accelerate.tracking import TensorBoardTracker


def require_tensorboard() -> None:
    """MachineError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise MachineError(
            "train.track = tensorboard: TensorBoard is not installed; pip install 'vfmseg[track]', or leave "
            "train.track out: metrics.jsonl holds the same numbers"
        )


class Curves:
    """Event files in a folder that say what `metrics.jsonl` says, with the same step numbers.

    They are written anew by the first `update`, which is told all records of a run: those of an earlier run, or of
    an epoch that was cut off, are gone then. `drawn(values)`: {curve: value} of what a validation has found.
    """

    def __init__(self, folder: Path, drawn: Callable[[Mapping[str, Any]], Mapping[str, float | None]]) -> None:
        self._folder = folder
        self._drawn = drawn
        self._tracker: TensorBoardTracker | None = None
        self._told = 0

    @property
    def started(self) -> bool:
        """Whether there are files of this run."""
        return self._tracker is not None

    def update(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write what is new among all records of a run so far."""
        if self._tracker is None:
            from accelerate.tracking import TensorBoardTracker

            remove_curves(self._folder)
            self._tracker = TensorBoardTracker(self._folder.name, self._folder.parent)
            self._tracker.start()
        for record in records[self._told :]:
            self._tracker.log(self._scalars(record), step=record["step"])
        self._told = len(records)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._tracker is not None:
            self._tracker.finish()

    def _scalars(self, record: Mapping[str, Any]) -> dict[str, float]:
        """{curve: value} of a line of `metrics.jsonl`; what has no value (a class that is nowhere) has no point."""
        if record["kind"] == "step":
            losses = {f"train/loss/{name}": value for name, value in record.get("losses", {}).items()}
            return {"train/loss": record["loss"], **losses, "train/lr": record["lr"]}
        found = self._drawn(record["validation"]) if "validation" in record else {}
        return {f"val/{name}": float(value) for name, value in found.items() if value is not None}


def remove_curves(folder: Path) -> None:
    """Remove what an earlier run drew, and nothing else."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
