"""One thread: on small tensors a second one mostly waits, and on a busy machine for very long."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> None:
    torch.set_num_threads(1)
