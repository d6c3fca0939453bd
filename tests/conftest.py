"""Settings and small makers shared by the tests: offline, one thread a process, everything in memory or tmp_path."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("same_examples", derandomize=True)
settings.load_profile("same_examples")  # others each time: pytest --hypothesis-profile=default


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it on the same worker."""
    torch.manual_seed(0)
