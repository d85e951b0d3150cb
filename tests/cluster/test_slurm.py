"""The Slurm script against stand-ins for Slurm's and Ray's commands: which address, which signal, what is requeued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/slurm/scan.sbatch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; else echo "$@" >> "$LOG/requeue"; fi',
    # Options of srun first, then the command, as on the node.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": 'case "$*" in --all-ip-addresses) echo "$OWN ";; --ip-address) echo 127.0.1.1;; *) echo node-a;; esac',
    "getent": 'echo "$NAMED STREAM node-a"',
    "ray": '[ "$1" = get-auth-token ] || { echo "$@" >> "$LOG/ray"; exec sleep 60; }',
    "python3": "echo 1",
    # As Python's driver: SIGINT ends it with 130, unless it was started with SIGINT ignored.
    "memscan": f"""exec {sys.executable} -c '
import os, sys, time
log = os.environ["LOG"]
open(log + "/driver", "w").write(" ".join(sys.argv[1:]))
try:
    time.sleep(float(os.environ["WORK"]))
except KeyboardInterrupt:
    open(log + "/interrupted", "w").close()
    sys.exit(130)
' "$@" """,
}


@pytest.fixture
def job(tmp_path: Path):
    """Starts the script as a batch job of one node; what its commands did stands in files of `tmp_path`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []

    def start(work: float = 30.0, own: str = "10.0.0.7", named: str = "127.0.1.1", **more: str):
        slurm = {"SLURM_JOB_NODELIST": "node-a", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1"}
        slurm |= {"SLURM_CPUS_PER_TASK": "2", "LOG": str(tmp_path), "WORK": str(work), "OWN": own, "NAMED": named}
        path = f"{commands}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", str(SCRIPT), "census.yaml"],
            env={**os.environ, **slurm, **more, "PATH": path},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(file: Path) -> str:
    for _ in range(200):
        if file.is_file() and file.read_text():
            return file.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {file.name}")


@pytest.mark.parametrize(
    ("own", "named", "address"),
    [
        ("10.0.0.7 172.17.0.1", "127.0.1.1", "10.0.0.7"),  # a stock Debian
        ("172.17.0.1", "10.0.0.9", "10.0.0.9"),  # the site's name service knows better
    ],
)
def test_the_head_listens_where_others_reach_it(job, tmp_path: Path, own: str, named: str, address: str) -> None:
    job(own=own, named=named)
    assert f"--node-ip-address={address} --port=20042" in wait_for(tmp_path / "ray")
    assert wait_for(tmp_path / "driver") == "scan census.yaml"


def test_no_address_but_loopback_is_told(job) -> None:
    process = job(own="127.0.0.1")
    assert process.wait(60) == 1
    assert b"MEMSCAN_HEAD_ADDRESS" in process.stderr.read()


def test_near_the_time_limit_the_driver_stops_and_the_job_is_requeued(job, tmp_path: Path) -> None:
    process = job()
    wait_for(tmp_path / "driver")
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 130
    assert (tmp_path / "interrupted").exists()
    assert (tmp_path / "requeue").read_text() == "requeue 42\n"


def test_a_cancelled_job_stops_and_is_not_requeued(job, tmp_path: Path) -> None:
    process = job()
    wait_for(tmp_path / "driver")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert (tmp_path / "interrupted").exists()
    assert not (tmp_path / "requeue").exists()


def test_a_census_that_ends_is_the_end_of_the_job(job, tmp_path: Path) -> None:
    assert job(work=0.1).wait(10) == 0
    assert not (tmp_path / "requeue").exists()


def test_the_trial_on_two_nodes_runs_the_script_as_it_is() -> None:
    """`two_nodes.sh` needs Debian's Slurm and minutes, so it is run by command; here it is only read."""
    trial = Path(__file__).parent / "two_nodes.sh"
    subprocess.run(["bash", "-n", str(trial)], check=True)
    assert '"$root/cluster/slurm/scan.sbatch" "$work/census.yaml"' in trial.read_text()


def test_slurm_sends_the_signal_that_is_trapped() -> None:
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=B:USR1@120" in text
    assert "' USR1" in text
