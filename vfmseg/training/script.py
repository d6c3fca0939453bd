"""The command line of a script that `accelerate launch` starts: a recipe, changes of it, and whether to go on."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from vfmseg.terminal import guarded
from vfmseg.training.processes import launch_command

Verb = Callable[[Path, Sequence[str], bool, bool, bool], None]
"""(recipe, changes, resume, overwrite, accept changed data)."""


def run_script(name: str, about: str, example: str, verb: Verb, arguments: Sequence[str] | None) -> int:
    """Run the verb as the arguments say (left out: those of the process); returns the exit code.

    `name` of the file in vfmseg/, what it is `about`, and an `example` of how to start it.
    """
    parser = argparse.ArgumentParser(prog=name, description=about, epilog=f"example: {example}")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on after the last finished epoch")
    group.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    parser.add_argument("--accept-changed-data", action="store_true", help="with --resume: go on with other data")
    given = parser.parse_intermixed_args(arguments)  # overrides may follow an option
    again = [*launch_command(), f"vfmseg/{name}", str(given.recipe), *given.overrides, "--resume"]
    return guarded(
        lambda: verb(given.recipe, given.overrides, given.resume, given.overwrite, given.accept_changed_data),
        shlex.join(again),
    )
