"""The shipped planted world's model, loaded once."""

from __future__ import annotations

import pytest
import torch

from memscan.models.generator import Generator
from memscan.planted.world import world_config


@pytest.fixture(scope="session")
def planted_generator() -> Generator:
    torch.set_num_threads(1)
    return Generator.load(world_config().generator)
