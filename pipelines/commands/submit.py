"""This module is the command `memscan submit`, which runs a census on an existing cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, ConfigPath, Overrides, World, configuration, guarded, say, tell


def submit(
    config_path: ConfigPath = None,
    overrides: Overrides = None,
    world: World = None,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="Submit the job to Ray's job server at this address."
        ),
    ] = "http://127.0.0.1:8265",
    job_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="Give this id to the job. Without it, Ray makes one.")
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(help="Show the job's output until it ends. The exit code is then 1 unless the job succeeded."),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run `memscan scan` as a job on an existing Ray cluster; the configuration file is sent with the job."""
    with guarded():
        from memscan.errors import ConfigError
        from memscan.io import storage
        from pipelines.scan.submit import follow, places_off_the_cluster
        from pipelines.scan.submit import submit as submit_job

        if world not in (None, "shipped") and not storage.is_remote(str(world)):
            raise ConfigError("a planted world's folder is not sent with a job", where=world, hint="put it on s3://")
        config = configuration(config_path, overrides, world)
        if world is None and (local := places_off_the_cluster(config)):
            say(f"memscan: these must be at the same path on every node: {', '.join(local)}")
        arguments = [part for override in overrides or () for part in ("--set", override)]
        arguments += ["--world", world] if world else []
        job = submit_job(address, config_path, arguments, job_id)
        lines = [f"job           {job}"]
        lines += [] if wait else [f"follow        ray job logs --address {address} --follow {job}"]
        tell(as_json, {"job": job, "address": address}, lines)
        if wait and not follow(address, job, lambda text: typer.echo(text, nl=False, err=True)):
            raise typer.Exit(1)
