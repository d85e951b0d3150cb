"""Shared fixtures: no network, reproducible randomness, optional data and devices."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from hypothesis import settings

from tests.support.seeding import seed_examples

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# A suite that nohup started, or a script in the background (tests/run.sh starts half of it so), ignores these signals,
# and so does all that it starts: tests of what they do would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Deadlines measure the machine's other work. Continuous integration repeats the same examples, so that a change is
# never blamed for an old failure; everywhere else they are new each time.
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU, with the reason, where there is none."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for item in items:
        if isinstance(item, pytest.Function):
            seed_examples(item.function)
        if "ray_once" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
    beside = os.environ.get("MEMSCAN_TESTS_BESIDE", "").split()  # of tests/run.sh: what its other process collects
    for item in items if beside else ():
        marked = item.get_closest_marker("ray") or item.get_closest_marker("waits")
        if marked and item.path.relative_to(ROOT).as_posix() not in beside:
            raise pytest.UsageError(f"{item.nodeid} is marked, and tests/run.sh does not find its file")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is filled once for the session. Tests copy it; none changes it."""
    folder = factory.getbasetemp() / f"shared-{name}"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "in").mkdir(parents=True)
        make(folder / "in")
        (folder / "made").touch()
    return folder / "in"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Staged indexes and notes of verified ones belong to the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSCAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_once() -> Iterator[None]:
    """One Ray for all tests of a session; jobs join it instead of starting their own."""
    import ray

    from pipelines.ray.session import start, worker_environment

    with worker_environment(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # ten seconds otherwise, for which a test would wait
        start()
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The `TinyWorld` of the pipelines' tests, made once a session."""
    from tests.support.tiny_world import make_world, open_world

    return open_world(made_once(tmp_path_factory, "world", make_world))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loops of Ray Train jobs run in this process, by one worker."""
    from tests.support.alone import Alone

    runner = Alone()
    runner.install(monkeypatch)
    return runner


@pytest.fixture(scope="session")
def reduced_run(complete_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete run, reduced: two prompts are flagged. Tests do not change it."""
    from pipelines.reduce.job import reduce_run

    def make(folder: Path) -> None:
        shutil.copytree(complete_run, folder / "run")
        assert reduce_run(str(folder / "run"))["counts"]["flagged"] == 2

    return made_once(tmp_path_factory, "reduced", make) / "run"


@pytest.fixture(scope="session")
def nemo_c(reduced_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NeMo-C mitigation of that run by one worker."""
    from memscan.mitigation.settings import MitigationSettings
    from pipelines.mitigate.job import mitigate
    from tests.support.alone import Alone
    from tests.support.tiny_world import NEMO_C

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Alone().install(patch)
            settings = MitigationSettings(**NEMO_C)
            mitigate(str(reduced_run), settings, str(folder / "nemo_c"), workers=1, say=lambda text: None)

    return made_once(tmp_path_factory, "mitigated", make) / "nemo_c"


@pytest.fixture(scope="session")
def complete_run(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the tiny world in three parts, scanned in this process. Tests copy it; none changes it."""
    from pipelines.scan.job import scan
    from tests.support.local_ray import local_ray

    def make(folder: Path) -> None:
        with local_ray():
            scan(tiny_world.config(folder / "tiny", part_size=6))

    return made_once(tmp_path_factory, "runs", make) / "tiny"


@pytest.fixture
def in_process() -> Iterator[None]:
    """Jobs that a test starts find a Ray that is this process (`tests/support/local_ray.py`)."""
    from tests.support.local_ray import local_ray

    with local_ray():
        yield


class Kit:
    """What makes a run folder without models: `tests.support.synthetic_run`, loaded when it is used."""

    def __getattr__(self, name: str) -> Any:
        from tests.support import synthetic_run

        return getattr(synthetic_run, name)


@pytest.fixture(scope="session")
def kit() -> Any:
    return Kit()


@pytest.fixture(scope="session")
def small_census(kit: Any) -> list[Any]:
    """A small census: 3 flagged, 1 with too few memorised generations, ordinary ones, 2 rejects."""
    return kit.small_census()


@pytest.fixture
def run_dir(tmp_path: Path, kit: Any, small_census: list[Any]) -> Path:
    """That census as a finished run, not reduced yet."""
    return kit.write_run(tmp_path / "run", small_census)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers; tests must pass for any seed: `MEMSCAN_TEST_SEED=7 make test`."""
    return np.random.default_rng(int(os.environ.get("MEMSCAN_TEST_SEED", "0")))


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server on this machine, which the environment makes everybody's default."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    from memscan.io.s3_answers import S3Files

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for kind in (S3Files, s3fs.S3FileSystem):
            kind.clear_instance_cache()
        yield s3fs.S3FileSystem(use_listings_cache=False)
    for kind in (S3Files, s3fs.S3FileSystem):
        kind.clear_instance_cache()
    server.stop()


@pytest.fixture
def s3_bucket(s3: Any, request: pytest.FixtureRequest) -> str:
    """An empty bucket of that server, as s3://NAME."""
    bucket = f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"
    s3.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def real_prompts() -> Path:
    """Folder of real prompt lists, which a clone does not have."""
    folder = SHARED / "data" / "prompts"
    if not folder.is_dir():
        pytest.skip("the real prompt lists are not here")
    return folder
