"""This module has the names of files inside a run folder."""

from __future__ import annotations

from dataclasses import dataclass

from memscan.io import storage


@dataclass(frozen=True)
class RunFolder:
    """These are the names inside a run folder. The object reads and writes nothing."""

    path: str

    @property
    def manifest(self) -> str:
        return storage.join(self.path, "run.json")

    @property
    def states(self) -> str:
        return storage.join(self.path, "state")

    @property
    def index(self) -> str:
        return storage.join(self.path, "index")

    @property
    def leases(self) -> str:
        return storage.join(self.path, "lease")

    @property
    def journals(self) -> str:
        return storage.join(self.path, "journal")

    def journal(self, epoch: int) -> str:
        """Of one driver's workers: those of an earlier one, which may live, would look like rows that killed theirs."""
        return storage.join(self.journals, f"e{epoch:06d}")

    @property
    def scratch(self) -> str:
        """This folder is for data that does not fit into memory.

        It is deleted when the prompts are fixed.
        """
        return storage.join(self.path, "scratch")

    @property
    def census(self) -> str:
        return storage.join(self.path, "census")

    @property
    def rejects(self) -> str:
        return storage.join(self.path, "rejects")

    def prompts_part(self, number: int) -> str:
        return storage.join(self.path, "prompts", f"part-{number:05d}.parquet")

    def census_part(self, number: int) -> str:
        return storage.join(self.census, f"part-{number:05d}")

    def commit_record(self, number: int, opened: int = 0) -> str:
        """Of a part as it was committed, first (0) or after it was opened again in an epoch."""
        return storage.join(self.census, f"_part-{number:05d}{_after(opened)}.json")

    def opening_record(self, number: int, opened: int) -> str:
        """Return which files a part kept when it was opened again."""
        return storage.join(self.census, f"_part-{number:05d}{_after(opened)}.open.json")

    def rejects_part(self, number: int, opened: int = 0) -> str:
        return storage.join(self.rejects, f"part-{number:05d}{_after(opened)}.parquet")


def _after(opened: int) -> str:
    return f".{opened:06d}" if opened else ""
