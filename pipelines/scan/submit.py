"""This module runs a census as a job of a running cluster.

Ray's job server gets the configuration and runs `memscan scan`.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from memscan.config import CensusConfig
from memscan.errors import MemscanError
from memscan.io import storage

CENSUS_FILE = "census.yaml"
TOKEN_FILE = Path.home() / ".ray" / "auth_token"  # where `ray get-auth-token --generate` puts it
POLL_SECONDS = 2.0


def places_off_the_cluster(config: CensusConfig) -> list[str]:
    """Return the keys whose paths are not in an object store; such paths must be the same on every node."""
    places = {
        "out": config.out,
        "generator.path": config.generator.path,
        "segmenter.path": config.segmenter.path,
        "embedder.path": config.embedder.path,
        "signals.semantic.path": config.signals.semantic.path if config.signals.semantic else None,
        "index.path": config.index.path,
        "index.source": config.index.source,
        **{f"prompts.paths[{at}]": path for at, path in enumerate(config.prompts.paths)},
    }
    return [key for key, path in places.items() if path and not storage.is_remote(str(path))]


def submit(address: str, config_file: str | None, arguments: Sequence[str], job_id: str | None = None) -> str:
    """Submit `memscan scan` with a configuration file that travels with the job; returns the job's id.

    Args:
        address: of the job server, http://HEAD:8265.
        config_file: local or s3://, uploaded as `census.yaml`; None if the arguments say all.
        arguments: further ones of `memscan scan`, passed on as they are.

    Raises:
        MemscanError: no job server answers there, or it refuses the job.
    """
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        command = ["memscan", "scan"]
        environment = {}
        if config_file is not None:
            storage.fetch(config_file, Path(folder) / CENSUS_FILE)
            command.append(CENSUS_FILE)
            environment["working_dir"] = folder
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join([*command, *arguments]), runtime_env=environment, submission_id=job_id
                )
            )
        except (RuntimeError, ValueError) as error:
            raise MemscanError(f"the job was refused: {' '.join(str(error).split())[:200]}", where=address) from error


def follow(address: str, job: str, write: Callable[[str], None]) -> bool:
    """Pass on a job's output until it ends; whether it succeeded. Stopping to follow does not stop the job."""
    client = _client(address)
    shown = 0
    while True:
        status = client.get_job_status(job)
        logs = client.get_job_logs(job)
        if len(logs) > shown:
            write(logs[shown:])
            shown = len(logs)
        if status.is_terminal():
            return bool(status == "SUCCEEDED")
        time.sleep(POLL_SECONDS)


def _client(address: str):  # type: ignore[no-untyped-def]
    _show_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise MemscanError(
            "the job server asks for Ray's token, and here there is none, or a different one",
            where=address,
            hint="put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN",
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise MemscanError(
            "no Ray job server answers",
            where=address,
            hint="give the head's dashboard, http://HEAD:8265; `ray dashboard ray_cluster.yaml` tunnels to it",
        ) from error


def _show_token() -> None:
    """Let Ray send a token that is here: clusters of Ray 2.60 ask for one, and clients send none unless told to.

    Ray reads the variable when it is imported.
    """
    here = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or TOKEN_FILE.is_file()
    if here:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
