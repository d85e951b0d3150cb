"""Shared fixtures: no network, reproducible randomness, optional data and devices."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Deadlines measure the machine's other work. Continuous integration repeats the same examples, so that a change is
# never blamed for an old failure; everywhere else they are new each time.
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU, with the reason, where there is none."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers; tests must pass for any seed: `MEMSCAN_TEST_SEED=7 make test`."""
    return np.random.default_rng(int(os.environ.get("MEMSCAN_TEST_SEED", "0")))


@pytest.fixture(scope="session")
def real_prompts() -> Path:
    """Folder of real prompt lists, which a clone does not have."""
    folder = SHARED / "data" / "prompts"
    if not folder.is_dir():
        pytest.skip("the real prompt lists are not here")
    return folder
