"""Memory that a model frees with each tile stays with the process for the next, in the commands."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
import vfmseg.cli

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        some = [np.ones(2**24, np.uint8) for _ in range(8)]
        del some
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "kept" in sys.argv:
    vfmseg.cli.app = lambda: None
    vfmseg.cli.main()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
def test_a_command_keeps_what_it_has_freed() -> None:
    """128 MiB ten times are 327,680 pages of 4 KiB, or fewer large ones; kept, hardly any is asked for again."""
    found = [
        int(subprocess.run([sys.executable, "-c", FAULTS, *how], capture_output=True, text=True, check=True).stdout)
        for how in ([], ["kept"])
    ]
    assert found[0] > 1_000
    assert found[1] < found[0] / 20


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
@pytest.mark.parametrize(
    "said", [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}]
)
def test_what_somebody_has_set_for_the_heap_stays(said: dict[str, str]) -> None:
    how = [sys.executable, "-c", FAULTS, "kept"]
    found = subprocess.run(how, capture_output=True, text=True, check=True, env=os.environ | said).stdout
    assert int(found) > 1_000
