"""Kill a worker of a Ray Train job that this process runs, in the middle of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def one_killed(work: Path, out: Path, file: str = "state.json") -> Iterator[list[int]]:
    """While the block runs, kill a training worker as soon as a checkpoint holds `file`; gives the pids killed.

    Args:
        work: storage folder of the job.
        out: its result, which must not be there yet.
    """
    killed: list[int] = []
    watcher = threading.Thread(target=_kill_one, args=(work, out, file, killed), daemon=True)
    watcher.start()
    yield killed
    watcher.join(timeout=60)


def _kill_one(work: Path, out: Path, file: str, killed: list[int]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(work.glob(f"*/checkpoint_*/{file}")):
        time.sleep(0.02)
    for pid in _training_workers():
        if not out.exists():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return


def _training_workers() -> Iterator[int]:
    """Training workers of the Ray that this process started, by their process titles."""
    import ray

    session = ray._private.worker.global_worker.node.get_session_dir_path()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes()
            mine = session.encode() in (folder / "environ").read_bytes() or _raylet_of(int(folder.name), session)
        except OSError:
            continue
        if title.startswith(b"ray::RayTrainWorker") and mine:
            yield int(folder.name)


def _raylet_of(pid: int, session: str) -> bool:
    parent = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return session.encode() in (Path("/proc") / str(parent) / "cmdline").read_bytes()
