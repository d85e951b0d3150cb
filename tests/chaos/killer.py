"""A Ray cluster of several nodes on one machine, and a killer that ends or stalls its processes.

A worker, a node and the driver are ended; from seed FURTHER_FROM on, a worker, a raylet or the driver is stopped for a
while instead, the driver comes back with another clock, and the driver's own raylet or the control store dies, after
which there is a new cluster. A driver that is stopped during a scan is replaced by another command meanwhile.

What is killed and when is drawn from a seed: for each fault a stage of the chain and a share of the time that the stage
took in the undisturbed run. A worker is one that does the stage's own work (`WORK`), a node one that has such a worker
on it: where there is none yet, the fault waits for it. A fault whose stage is over before it could strike, strikes in
the next one, and the record says so.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("driver", "worker", "node")
FURTHER = ("stalled driver", "stalled worker", "stalled raylet", "clock", "raylet", "control store")
FURTHER_FROM = 100
ENDS_THE_DRIVER = ("driver", "clock")
STALE_SECONDS = 15.0  # after which a driver that is not heard of is replaced; 90 outside of tests
SKEW_SECONDS = 36_000  # of the clock of a driver that comes back, to either side
# Ray's own switch for tests (ray_config_def.h): some of all messages between its processes fail before they are sent,
# while they are answered, or on the way back. Delays (testing_asio_delay_us) are left out: with some milliseconds of
# them on a machine under load the control store counted its own nodes as lost, and no chain could begin.
NETWORKS: dict[str, dict[str, str]] = {
    "sound": {},
    "lossy": {
        "RAY_testing_rpc_failure": json.dumps(
            {"*": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1, "in_flight_failure_prob": 1}}
        )
    },
}
# A lost node is noticed after some seconds and not after half a minute.
_NOTICE = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
}
# Workers are started when they are needed and not in advance: of those, most are never used, and each costs seconds.
_LEAN = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
MAX_COMMANDS = 12
START_ATTEMPTS = 5
LIMIT_SECONDS = 1200.0  # of a chain, on a machine that is busy with other things
# Words in the titles of the processes that do a stage's work: actors of Ray Data, its tasks, workers of Ray Train.
WORK = {
    "index": ("MapBatches(Describe", "MapBatches(_call"),
    "scan": ("MapBatches(Census", "MapBatches(write_rows"),
    "reduce": ("Map(judged",),
    "mitigate": ("RayTrainWorker",),
}


@dataclass(frozen=True)
class Fault:
    """Kill something of this kind when so much of the stage's usual time has passed."""

    kind: str
    stage: str
    share: float


@dataclass
class Outcome:
    """What was done to a chain, and how it went.

    Attributes:
        struck: (kind, stage that was running, what was killed) of each fault.
        commands: how often the chain's command was given.
        failed: last lines of commands that ended by themselves with an error.
        stages: seconds from the first beginning of each stage to the first beginning of the next.
    """

    struck: list[tuple[str, str, str]] = field(default_factory=list)
    commands: int = 0
    failed: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def draw(seed: int, stages: tuple[str, ...], kinds: tuple[str, ...] = KINDS) -> list[Fault]:
    """One fault of each kind, in different stages where there are enough, in the order in which they are to strike.

    From seed FURTHER_FROM on three of the further kinds.
    """
    chance = random.Random(seed)
    if seed >= FURTHER_FROM:
        kinds = tuple(chance.sample(FURTHER, 3))
    places = (
        chance.sample(stages * len(kinds), len(kinds))
        if len(stages) < len(kinds)
        else chance.sample(stages, len(kinds))
    )
    faults = [Fault(kind, stage, chance.random()) for kind, stage in zip(kinds, places, strict=True)]
    return sorted(faults, key=lambda fault: (stages.index(fault.stage), fault.share))


class Nodes:
    """A cluster: a head without work, and nodes of two CPUs each. A context manager."""

    def __init__(self, count: int = 2, network: str = "sound") -> None:
        from pipelines.ray.session import worker_environment

        self._environment = worker_environment()
        self._environment.__enter__()
        self._switches = {**NETWORKS[network], **_LEAN}
        os.environ.update(self._switches)
        os.environ["PYTHONPATH"] = str(ROOT)
        self._count = count
        self._begin()

    def _begin(self) -> None:
        from ray.cluster_utils import Cluster

        self.broken = False
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _NOTICE}
        for left in reversed(range(START_ATTEMPTS)):
            try:
                self._cluster = Cluster(initialize_head=True, head_node_args=dict(head))
                break
            except Exception:  # as Ray says that a head has not come up in 30 s, on a machine that is busy
                if not left:
                    raise
        for _ in range(self._count):
            self.add()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_error: object) -> None:
        self._cluster.shutdown()
        for key in self._switches:
            os.environ.pop(key, None)
        self._environment.__exit__(None, None, None)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def renew(self) -> None:
        """Another cluster, at another address, in place of one whose head is broken."""
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._begin()

    def break_head(self, name: str) -> str:
        """Kill the raylet that the driver belongs to, or the control store."""
        process = self._cluster.head_node.all_processes[name][0].process
        process.kill()
        self.broken = True
        return f"process {process.pid}"

    def busy_raylet(self, chance: random.Random, stage: str) -> int | None:
        """The raylet of a node that does the stage's work; None where there is none."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id)
        busy = [node for node in nodes if self.workers(node, stage)]
        return int(chance.choice(busy).all_processes["raylet"][0].process.pid) if busy else None

    def replace_lost(self) -> None:
        """Other nodes for those whose raylet has ended, as it does when it was stalled for so long that it was lost."""
        for node in list(self._cluster.worker_nodes):
            if any(info.process.poll() is not None for info in node.all_processes.get("raylet", ())):
                self._cluster.remove_node(node, allow_graceful=False)
                self.add()

    def add(self) -> None:
        self._cluster.add_node(num_cpus=2)

    def lose(self, chance: random.Random, stage: str) -> str | None:
        """Kill a node with everything on it, and give the cluster another one; None where none is at work."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id)
        busy = [(node, titles) for node in nodes if (titles := [title for _, title in self.workers(node, stage)])]
        if not busy:
            return None
        node, doomed = chance.choice(busy)
        self._cluster.remove_node(node, allow_graceful=False)
        self.add()
        return f"a node with {', '.join(sorted(doomed))}"

    def signal_worker(self, chance: random.Random, stage: str, number: int = signal.SIGKILL) -> tuple[int, str] | None:
        """Signal one process that does the stage's work, on any node; None where there is none."""
        found = sorted({worker for node in self._cluster.worker_nodes for worker in self.workers(node, stage)})
        if not found:
            return None
        process, title = chance.choice(found)
        try:
            os.kill(process, number)
        except ProcessLookupError:
            return None
        return process, title

    @staticmethod
    def workers(node: Any, stage: str) -> list[tuple[int, str]]:
        """Process number and title of a node's workers that do a stage's work."""
        found = []
        for info in node.all_processes.get("raylet", ()):
            try:
                children = psutil.Process(info.process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for child in children:
                try:
                    title = " ".join(child.cmdline())[:80].strip()
                except psutil.Error:
                    continue
                if title.startswith("ray::") and any(word in title for word in WORK[stage]):
                    found.append((child.pid, title.removeprefix("ray::")))
        return found


class Killer:
    """Runs a chain on a cluster to its end, and strikes while it runs."""

    def __init__(self, nodes: Nodes, folder: Path, settings: dict[str, Any], seed: int) -> None:
        self._nodes, self._folder = nodes, folder
        self._chance = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self._marks, self._file = folder / "marks", folder / "chain.json"
        self._marks.touch()
        self._file.write_text(json.dumps({**settings, "marks": str(self._marks)}), encoding="utf-8")
        self.outcome = Outcome()
        self._skew = 0
        self._asleep: list[tuple[float, int]] = []  # when which process goes on
        self._replaced: list[subprocess.Popen[bytes]] = []  # drivers that were stalled, and for which there is another

    def run(self, faults: list[Fault], usual: dict[str, float], limit: float = LIMIT_SECONDS) -> Outcome:
        """Give the command until it ends well. Raises AssertionError when that takes too long or too many."""
        left, started = list(faults), time.monotonic()
        self._driver = self._start()
        try:
            while (code := self._driver.poll()) != 0:
                assert time.monotonic() - started < limit, f"no end after {limit:.0f} s: {self.outcome}"
                if code is not None:
                    self._note_failure(code)
                    assert self.outcome.commands < MAX_COMMANDS, self.outcome
                    self._driver = self._start()
                elif left and self._due(left[0], usual) and self._strike(left[0]):
                    left.pop(0)
                self._wake()
                time.sleep(0.05)
            self._wake(all_of_them=True)
            for other in self._replaced:
                other.wait(timeout=LIMIT_SECONDS)
        finally:
            self._wake(all_of_them=True)
            for driver in (self._driver, *self._replaced):
                driver.kill()
                driver.wait()
        self.outcome.seconds = time.monotonic() - started
        self._time_stages()
        return self.outcome

    def _start(self) -> subprocess.Popen[bytes]:
        self.outcome.commands += 1
        if self._nodes.broken:
            self._nodes.renew()
        log = (self._folder / "output").open("ab")
        environment = {**os.environ, "RAY_ADDRESS": self._nodes.address, "MEMSCAN_CHAOS_SKEW": str(self._skew)}
        command = [sys.executable, "-m", "tests.chaos.chain", str(self._file)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def _note_failure(self, code: int) -> None:
        if code == -signal.SIGKILL and self.outcome.struck and self.outcome.struck[-1][0] in ENDS_THE_DRIVER:
            return
        lines = (self._folder / "output").read_text(errors="replace").strip().splitlines()
        self.outcome.failed.append(f"exit {code}: {lines[-1] if lines else ''}"[:300])

    def _stage(self) -> str:
        marks = self._begun()
        return str(marks[-1]["stage"]) if marks else ""

    def _begun(self) -> list[dict[str, Any]]:
        lines = self._marks.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def _due(self, fault: Fault, usual: dict[str, float]) -> bool:
        """Whether a fault's time has come: counted from the first beginning of its stage."""
        begun: dict[str, float] = {}
        for mark in self._begun():
            begun.setdefault(mark["stage"], mark["at"])
        return fault.stage in begun and time.time() - begun[fault.stage] >= fault.share * usual[fault.stage]

    def _strike(self, fault: Fault) -> bool:
        """False where there is nothing to strike yet."""
        stage = self._stage()
        told = self._done(fault.kind, stage)
        if told is not None:
            self.outcome.struck.append((fault.kind, stage, told))
        return told is not None

    def _done(self, kind: str, stage: str) -> str | None:
        """Strike; what was struck, or None."""
        if kind in ENDS_THE_DRIVER:
            self._driver.send_signal(signal.SIGKILL)
            self._driver.wait()
            self._skew = self._chance.choice((-SKEW_SECONDS, SKEW_SECONDS)) if kind == "clock" else self._skew
            return "the driver" + (f", then {self._skew / 3600:+.0f} h" if kind == "clock" else "")
        if kind == "node":
            return self._nodes.lose(self._chance, stage)
        if kind == "stalled driver":
            return self._stall_driver(stage)
        if kind in ("raylet", "control store"):
            return self._nodes.break_head("raylet" if kind == "raylet" else "gcs_server")
        if kind == "stalled raylet":
            raylet = self._nodes.busy_raylet(self._chance, stage)
            return None if raylet is None else self._stall(raylet, self._chance.uniform(5, 40))
        found = self._nodes.signal_worker(
            self._chance, stage, signal.SIGSTOP if kind == "stalled worker" else signal.SIGKILL
        )
        if found is None or kind == "worker":
            return found and found[1]
        return f"{found[1]} for {self._stall(found[0], self._chance.uniform(5, 20))}"

    def _stall_driver(self, stage: str) -> str:
        if stage != "scan":
            return self._stall(self._driver.pid, self._chance.uniform(5, 20))
        told = self._stall(self._driver.pid, self._chance.uniform(1.2, 3) * STALE_SECONDS)
        time.sleep(1)  # the watcher is stopped at once, the driver soon after it
        self._replaced.append(self._driver)
        self._driver = self._start()
        return f"{told}, replaced"

    def _stall(self, process: int, seconds: float) -> str:
        os.kill(process, signal.SIGSTOP)
        self._asleep.append((time.monotonic() + seconds, process))
        return f"{seconds:.0f} s"

    def _wake(self, *, all_of_them: bool = False) -> None:
        due = [process for at, process in self._asleep if all_of_them or time.monotonic() >= at]
        self._asleep = [one for one in self._asleep if one[1] not in due]
        for process in due:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        if not self._nodes.broken:
            self._nodes.replace_lost()

    def _time_stages(self) -> None:
        marks = [*self._begun(), {"stage": "", "at": time.time()}]
        for mark, following in itertools.pairwise(marks):
            self.outcome.stages.setdefault(mark["stage"], following["at"] - mark["at"])
