"""This module starts and stops Ray, and sends everything that Ray writes into one log file.

A person watches our progress (`progress.py`); Ray's own bars, INFO lines and warnings go to `RUN/logs/ray.log`. A Ray
that already runs in this process (a test, a notebook) is used and left running. If RAY_ADDRESS is set (a submitted job,
a cluster), that cluster is joined. Otherwise Ray is started on this machine and stopped at the end.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from memscan.errors import MemscanError
from memscan.io import storage
from pipelines.ray import metrics
from pipelines.ray.place import check_place, token
from pipelines.ray.stopping import listen
from pipelines.ray.supervisor import NAMES, open_streams, tell

# Read by Ray when it is imported or when its processes start, so they stand before the import below.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    # A thread of Ray Data that outlives `ray.shutdown()` would start or, worse, join any Ray on this machine.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # CPU actors keep CUDA_VISIBLE_DEVICES
    "RAY_worker_niceness": "0",  # Ray's 15 lets any other work on the machine starve the actors
    # One thread a worker until a stage sets its own number: libraries would each take all cores.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Threads of OpenMP that wait for each other sleep, not spin: on a machine whose two cores are busy with other work,
    # a convolution on two threads took 800 ms with spinning, 100 ms so, and 40 ms on one thread.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Below `uv run` Ray would start its workers on this machine by it again, in a copy of the working directory.
_UV = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
METRICS_PORT = "MEMSCAN_METRICS_PORT"
# Ray gives its processes 30 seconds to come up, which a machine that is busy with other things can miss.
START_ATTEMPTS = 3
CONNECT_SECONDS = 60.0


@dataclass(frozen=True)
class Machine:
    """This is what Ray has to give.

    Args:
        cpus: logical CPUs of the cluster; on one machine at least 2, for a pipeline of actors needs room for tasks.
        gpus: GPUs of the cluster.
        cores: processor cores that this process may use; threads are sized by it on one machine.
        local: whether Ray runs on this machine only.
    """

    cpus: float
    gpus: float
    cores: int
    local: bool


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def logs_folder(run: str) -> Path:
    """Return where a run's logs go: RUN/logs, or a temporary folder for a run in an object store."""
    if storage.is_remote(run):
        return Path(tempfile.gettempdir()) / "memscan-logs" / run.split("://", 1)[1].replace("/", "_")
    return Path(run) / "logs"


@contextmanager
def ray_session(logs: Path) -> Iterator[Machine]:
    """Run Ray inside a `with` block.

    Args:
        logs: folder of `ray.log`, made if need be.
    """
    open_streams()
    logs.mkdir(parents=True, exist_ok=True)
    with worker_environment(), token(), _quiet(logs / "ray.log"):
        import ray
        import ray.data

        _hush()
        ours = not ray.is_initialized()
        if ours:
            _never_connect_by_itself()
            start()
            listen()  # Ray has put a handler of its own for SIGTERM
            tell(**_needed(ray), logs=str(logs))
        _settle(ray)
        try:
            yield _machine(ray)
        finally:
            if ours:
                tell(ray={}, address=None)
                metrics.forget()
                ray.shutdown()


def _needed(ray: Any) -> dict[str, Any]:
    """Return what the driver cannot live without, for its watcher: Ray's processes that it started, or a cluster."""
    node = ray._private.worker._global_node
    started = {} if node is None else node.all_processes
    needed = {name: started[name][0].process.pid for name in NAMES if started.get(name)}
    return {"ray": needed, "address": None if needed else os.environ.get("RAY_ADDRESS")}


def _never_connect_by_itself() -> None:
    """As the switches say, where Ray was imported before they were set; for good, as its threads may stay."""
    from ray._private import auto_init_hook, ray_constants

    auto_init_hook.enable_auto_connect = False
    if os.environ.get(_UV) == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


@contextmanager
def worker_environment() -> Iterator[None]:
    """Set the environment in which Ray and its workers start.

    Variables that the user has set are kept.
    """
    settings = {key: value for key, value in _ENVIRONMENT.items() if key not in os.environ}
    if not os.environ.get("RAY_ADDRESS") and _UV not in os.environ:
        settings[_UV] = "0"
    os.environ.update(settings)
    try:
        yield
    finally:
        for key in settings:
            os.environ.pop(key, None)


def start() -> None:
    """Join the Ray of RAY_ADDRESS, or start one on this machine. Raises MemscanError if there is none."""
    import ray

    # `configure_logging` would give Ray its handlers back.
    quiet: Any = {"log_to_driver": False, "configure_logging": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            ray.shutdown()
            raise MemscanError(
                f"no Ray cluster could be joined ({error})", where=f"RAY_ADDRESS={address}", hint="is its head up?"
            ) from error
        return
    port = _metrics_port()
    check_place()
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            # "local": never join a Ray that somebody else happens to run on this machine.
            ray.init(address="local", num_cpus=max(2, cores()), include_dashboard=False, **port, **quiet)
            return
        except Exception as error:  # Ray raises a plain Exception when its processes take more than 30 seconds
            ray.shutdown()
            logging.getLogger("ray").warning("start %d of %d failed: %s", attempt, START_ATTEMPTS, error)
            if isinstance(error, OSError):  # of a folder or a port: that does not pass
                raise MemscanError(f"Ray did not start ({error})", hint="see ray.log in the run's logs") from error
            if attempt == START_ATTEMPTS:
                raise MemscanError(f"Ray did not start ({error})", hint="is the machine overloaded?") from error


def _check_address(address: str) -> None:
    """Knock at a cluster's head first: Ray tries a dead one for many minutes, without a word.

    Raises:
        MemscanError: the address is none of Ray's, or nobody answers there for CONNECT_SECONDS.
    """
    where = f"RAY_ADDRESS={address}"
    if address in ("auto", "local"):
        return
    scheme, sign, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if (sign and scheme != "ray") or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        hint = "give HOST:PORT of its head (6379), ray://HOST:PORT (10001), or auto"
        raise MemscanError("is not the address of a Ray cluster", where=where, hint=hint)
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                why = error.strerror or error
                raise MemscanError(
                    f"no Ray cluster could be joined: nobody answered within {CONNECT_SECONDS:.0f} s ({why})",
                    where=where,
                    hint="is its head up?",
                ) from error
            time.sleep(1)


def _metrics_port() -> dict[str, int]:
    """Return where Ray serves its metrics, if the user says where; Ray takes a free port otherwise."""
    wanted = os.environ.get(METRICS_PORT)
    if not wanted:
        return {}
    if not wanted.isdecimal() or not 0 < int(wanted) < 2**16:
        raise MemscanError(f"{wanted!r} is no port", where=METRICS_PORT, hint="give a number from 1 to 65535")
    return {"_metrics_export_port": int(wanted)}


def _machine(ray: Any) -> Machine:
    have = ray.cluster_resources()
    # A cluster may consist of its head alone until somebody asks for workers.
    local = len(ray.nodes()) == 1 and not os.environ.get("RAY_ADDRESS")
    return Machine(have.get("CPU", 0.0), have.get("GPU", 0.0), cores(), local)


def _settle(ray: Any) -> None:
    """Ray Data's switches."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.log_internal_stack_trace = False
    # Else a worker's exception arrives as text inside another, and a user's mistake could not be told from a bug.
    context.raise_original_map_exception = True


def _hush() -> None:
    """Take the printing handlers off Ray's loggers, and let what they say go up to the root logger."""
    for name in ("ray", "ray.data"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            # Ray Data keeps a handler that writes to its own session folder; that one may stay.
            if isinstance(handler, logging.StreamHandler):
                logger.removeHandler(handler)
        logger.propagate = True


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Python's warnings, all loggers, what Ray prints and what its C++ writes to file descriptor 2, into the log file.

    `sys.stderr` keeps pointing at the terminal through a copy of the descriptor, so our own words still arrive there.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    # Ray prints the cluster's messages to standard output, which is ours, for results.
    printed = path.open("a", encoding="utf-8", buffering=1)
    with printed, redirect_stdout(printed), _descriptor_into(path), warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(handler)
            handler.close()


@contextmanager
def _descriptor_into(path: Path) -> Iterator[None]:
    sys.stderr.flush()
    kept, shown = os.dup(2), sys.stderr
    try:
        if _is_descriptor_2(shown):
            sys.stderr = os.fdopen(os.dup(kept), "w", buffering=1, encoding=shown.encoding, errors=shown.errors)
        with path.open("ab") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        if sys.stderr is not shown:
            sys.stderr.close()
            sys.stderr = shown
        os.dup2(kept, 2)
        os.close(kept)


def _is_descriptor_2(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (OSError, ValueError):  # replaced by an object without a descriptor, as test runners do
        return False
