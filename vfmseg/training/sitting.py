"""One sitting of a run that trains: its folder is ours alone, and its processes are connected, until it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfmseg.errors import RecipeError
from vfmseg.launch import several
from vfmseg.terminal import is_main_process, quiet_libraries
from vfmseg.training.curves import require_tensorboard
from vfmseg.training.processes import connect
from vfmseg.training.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Sitting:
    """How a run is started: anew, or gone on with (`resume`), also with other data than those of then.

    folder: where it is kept; an earlier run there is replaced if `overwrite` says so.
    """

    folder: RunFolder
    resume: bool
    overwrite: bool
    accept_changed_data: bool

    @property
    def known(self) -> bool:
        """Whether there is a state to go on from."""
        return self.resume and self.folder.state.is_file()

    @contextmanager
    def begun(self, precision: str, track: str) -> Iterator[Accelerator]:
        """The accelerator of the run, while its folder is locked.

        Whatever can be told without torch is: a folder that is not ours, options that exclude each other, TensorBoard
        that is not installed.
        """
        quiet_libraries()
        self.folder.require_place(self.resume, self.overwrite)
        if self.accept_changed_data and not self.resume:
            raise RecipeError("--accept-changed-data is about going on with a run: add --resume, or leave it out")
        with ExitStack() as stack:
            if is_main_process():
                stack.enter_context(self.folder.alone(several()))
            self.folder.require_own(self.resume, self.overwrite)
            if track == "tensorboard":
                require_tensorboard()
            accelerator = connect(precision)
            if not is_main_process():  # which has come as far, and so has the folder
                stack.enter_context(self.folder.with_the_others())
            yield accelerator
            accelerator.end_training()
