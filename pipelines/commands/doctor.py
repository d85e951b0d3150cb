"""This module is the command `memscan doctor`, which checks an installation before a job."""

from __future__ import annotations

import json

import typer

from pipelines.commands.shared import AsJson, ConfigPath, Overrides, World, configuration, guarded, show


def doctor(
    config_path: ConfigPath = None, overrides: Overrides = None, world: World = None, as_json: AsJson = False
) -> None:
    """Show what is installed, which devices exist, and whether models and references are complete."""
    with guarded():
        from pipelines.doctor import describe, examine

        config = configuration(config_path, overrides, world) if config_path or world else None
        findings = examine(config)
        if as_json:
            show(json.dumps([finding.to_json() for finding in findings], indent=2))
        else:
            show(describe(findings))
        if any(finding.state == "bad" for finding in findings):
            raise typer.Exit(1)
