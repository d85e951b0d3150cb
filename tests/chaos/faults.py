"""Faults that a test puts into every worker of a Ray: rows whose caption says what they do to their process."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

POISON = {
    "poison that raises": "generation_failed",
    "poison that hangs": "row_timed_out",
    "poison that kills": "worker_died",
}


def poison() -> None:
    """Ray's `worker_process_setup_hook`: the generator meets the poison as it would meet a driver's or a kernel's."""
    from memscan.models.generator import Generator

    healthy = Generator.generate

    def generate(self: Any, captions: Any, seeds: Any, first: Any = None) -> Any:
        for caption in captions:
            if caption == "poison that raises":
                raise ValueError("poisoned")
            if caption == "poison that hangs":
                time.sleep(3600)
            if caption == "poison that kills":
                os.kill(os.getpid(), signal.SIGKILL)
        return healthy(self, captions, seeds)

    Generator.generate = generate  # type: ignore[method-assign]
