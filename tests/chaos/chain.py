"""All jobs of a census one after another, as a script of an operator would give them: python -m tests.chaos.chain FILE

FILE is JSON: `config` (a census), `stages`, `mitigation`, `marks`, `chunk_rows`. Every call goes on from where the last
one was stopped, and leaves a line in the file `marks` when a stage begins, for the killer (`killer.py`) to go by.
MEMSCAN_CHAOS_SKEW moves the clock of the driver by so many seconds. A driver that is not heard of is replaced after
`STALE_SECONDS` of the killer. Work that would be done in the driver because it is little is given to workers here, so
that there is something to end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from memscan.config import parse_config
from pipelines.ray import supervisor

STAGES = ("index", "scan", "reduce", "mitigate")


def run(settings: dict[str, Any]) -> None:
    """Every stage, or what is left of it, in one Ray session: joining the cluster anew for each would take longer."""
    import ray

    from pipelines.ray.session import start, worker_environment
    from pipelines.ray.stopping import listen

    _impatient()
    _skew(float(os.environ.get("MEMSCAN_CHAOS_SKEW", "0")))
    config = parse_config(settings["config"])
    with worker_environment():
        start()
        listen()
        supervisor.tell(ray={}, address=os.environ["RAY_ADDRESS"])
        for stage in settings["stages"]:
            with Path(settings["marks"]).open("a", encoding="utf-8") as marks:
                marks.write(json.dumps({"stage": stage, "at": time.time()}) + "\n")
            _STAGES[stage](config, settings)
        ray.shutdown()


class _Clock:
    """The module `time`, with another clock."""

    def __init__(self, skew: float) -> None:
        self._skew = skew

    def time(self) -> float:
        return time.time() + self._skew

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def _skew(seconds: float) -> None:
    """Move the clock of all that asks for it here; of Ray's own code, it would only break the pickling."""
    from pipelines.ray import progress
    from pipelines.run_folder import lease

    lease.time = progress.time = _Clock(seconds)  # type: ignore[attr-defined]


def _impatient() -> None:
    from pipelines.run_folder import lease
    from tests.chaos.killer import STALE_SECONDS

    lease.STALE_SECONDS, lease.FRESH_SECONDS, lease.RENEW_SECONDS = STALE_SECONDS, STALE_SECONDS / 3, STALE_SECONDS / 9
    lease.LOOK_SECONDS = 0.5


def _index(config: Any, settings: dict[str, Any]) -> None:
    from memscan.io import storage
    from memscan.sources import reading as references
    from pipelines.index import job as index

    index.HERE_UP_TO = 0
    if settings.get("chunk_rows"):
        references.CHUNK_ROWS = (settings["chunk_rows"], 2048)
    # As `memscan index build`, which refuses a folder with an index that is complete.
    begun = storage.exists(config.index.path + ".build/plan.json")
    if begun or not storage.exists(config.index.path + "/manifest.json"):
        index.build(config)


def _scan(config: Any, settings: dict[str, Any]) -> None:
    from pipelines.scan import waves
    from pipelines.scan.job import scan

    waves.LOAD_SECONDS = 60.0
    scan(config)


def _reduce(config: Any, settings: dict[str, Any]) -> None:
    from pipelines.reduce import verdicts as judging
    from pipelines.reduce.job import reduce_run

    judging._FILES_A_TASK = 1
    reduce_run(config.out, use_ray=True)


def _mitigate(config: Any, settings: dict[str, Any]) -> None:
    from memscan.mitigation.settings import MitigationSettings
    from pipelines.mitigate import search as mitigation_search
    from pipelines.mitigate.job import mitigate

    mitigation_search.ROUND = 1  # a checkpoint after every prompt
    method = MitigationSettings(**settings["mitigation"])
    mitigate(config.out, method, config.out + "/mitigated/nemo_c", workers=2, say=lambda text: None)


_STAGES = {"index": _index, "scan": _scan, "reduce": _reduce, "mitigate": _mitigate}


def main() -> None:
    """As `memscan`: a mistake is one line, and so is an end without a word."""
    from memscan.errors import MemscanError

    try:
        run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except MemscanError as error:
        sys.exit(f"memscan: {error}")


if __name__ == "__main__":
    supervisor.supervised(main)
