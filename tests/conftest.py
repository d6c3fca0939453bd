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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pitfall", help="only the tests that guard lines of docs/pitfalls.md, such as C24,P43")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--pitfall")
    if not chosen:
        return
    wanted = set(chosen.upper().split(","))
    guards = {item: {name for mark in item.iter_markers("pitfall") for name in mark.args} & wanted for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not guards[item]])
    items[:] = [item for item in items if guards[item]]
