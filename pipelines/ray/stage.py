"""This module is the base of every stateful callable of Ray Data.

It has its setup, its models that load once, and its progress reports.

A stage that cannot load says so on its first batch, because Ray keeps the kind of an exception that a call raises, but
not of one that a constructor raises.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from pipelines.ray.metrics import BLOCKS, LOADS, STARTS, Meters
from pipelines.run_folder.inputs import check_folders
from pipelines.run_folder.journal import Journal

T = TypeVar("T")


Report = Callable[[str, int, Mapping[str, int]], None]


@dataclass(frozen=True)
class StageSetup:
    """This is what a stage needs to know; it is sent to the stage's actors.

    Args:
        device: torch device of the models.
        threads: numeric threads of an actor.
        index: folder of the reference index; "" while it is being built.
        index_version: of that index, which a run keeps to; None for the one that counts.
        journal: folder where workers say what they are at; "" for none.
        shards: actors of the index's shards, where it is spread over the nodes (`scatter.py`).
        models: role -> id of the models that the run began with; a worker loads no other ones. Empty: not checked.
    """

    config: CensusConfig
    device: str
    threads: int
    index: str = ""
    index_version: int | None = None
    journal: str = ""
    shards: tuple[Any, ...] = ()
    models: Mapping[str, str] = field(default_factory=dict)

    def open_journal(self) -> Journal:
        return Journal(self.journal, self.config.resources.watchdog_seconds)

    def begin(self, *roles: str) -> None:
        """Prepare a worker before it loads models of these roles: check that they are the run's, and set threads.

        Raises:
            MemscanError: a model is another one by now, or not there any more.
        """
        check_folders(self.config, self.models, roles)
        set_threads(self)


def silent(stage: str, rows: int, notes: Mapping[str, int]) -> None:
    """Drop a report."""


class Stage(Generic[T]):
    """This loads its work once; a failure on which the user can act is raised by the first call."""

    worker: ClassVar[str]  # its kind in the metrics

    def __init__(self, setup: StageSetup, load: Callable[[], T], report: Report, *names: str) -> None:
        self._report, self._meters = report, Meters(setup.config.name)
        self._work: T | None = None
        self._error: MemscanError | None = None
        started = time.perf_counter()
        try:
            self._work = load()
        except MemscanError as error:
            self._error = error
        else:
            self._meters.add(STARTS, worker=self.worker)
            self._meters.observe(LOADS, time.perf_counter() - started, worker=self.worker)
        for name in names:  # the clock of a stage starts when its first actor is ready
            report(name, 0, {})

    @property
    def work(self) -> T:
        if self._error is not None:
            raise self._error
        assert self._work is not None
        return self._work

    @contextmanager
    def _block(self) -> Iterator[None]:
        """Note how long a block takes."""
        started = time.perf_counter()
        yield
        self._meters.observe(BLOCKS, time.perf_counter() - started, worker=self.worker)


def set_threads(setup: StageSetup) -> None:
    import torch

    if setup.device == "cpu":
        torch.set_num_threads(setup.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
