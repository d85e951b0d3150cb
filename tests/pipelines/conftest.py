"""The one census on Ray's own processes that several tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scraper import Scraper


@pytest.fixture(scope="session")
def census_on_ray(
    tiny_world: Any, ray_once: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Scraper]]:
    """A census in three parts with its index, sampling and judging in pools of their own and the index scattered.

    Each of its processes imports torch, diffusers and transformers anew, 10 s of CPU: a second one would say no more.
    """
    from pipelines.scan.job import scan

    out = tmp_path_factory.mktemp("metered") / "run"
    with Scraper("metered") as scraper:
        pools = {"resources__judges": 1, "resources__search": "scatter"}
        scan(tiny_world.config(out, name="metered", part_size=6, **pools))
        yield out, scraper
