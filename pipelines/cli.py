"""This module is the `memscan` command.

A configuration describes a run, and the command line chooses it and overrides keys.

A user's mistake gives one line on standard error and exit code 2. The exit code is 3 if most rows of a census were
rejected. Ctrl-C gives one line and exit code 130. An unexpected error leaves its traceback in the run's logs
(MEMSCAN_DEBUG=1 shows it) and exits with 1. Results go to standard output, and messages about progress go to standard
error. Heavy modules are imported inside the commands, so that `memscan --help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pipelines.commands.config as configuration
from memscan import __version__
from pipelines.commands import (
    census,
    compare,
    diff,
    doctor,
    evaluate,
    export,
    index,
    inspect,
    mitigate,
    nightly,
    plan,
    planted,
    runs,
    submit,
)
from pipelines.ray.logs import LogFormat, speak
from pipelines.ray.supervisor import supervised, tell

# The commands by panel of the help, in the order in which a user needs them.
COMMANDS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Take a census": {
        "demo": census.demo,
        "scan": census.scan,
        "status": census.status,
        "runs": runs.runs,
        "reduce": census.reduce,
        "report": census.report,
        "export": export.export,
        "compare": compare.compare,
    },
    "Prepare a census": {
        "doctor": doctor.doctor,
        "inspect": inspect.inspect,
        "plan": plan.plan,
        "index": index.app,
        "config": configuration.app,
    },
    "Measure, repair and verify": {
        "evaluate": evaluate.app,
        "mitigate": mitigate.mitigate,
        "verify": mitigate.verify,
        "patch": mitigate.patch,
    },
    "Further work": {
        "nightly": nightly.nightly,
        "submit": submit.submit,
        "diff": diff.diff,
        "retry": census.retry,
        "repair-run": census.repair_run,
        "planted": planted.app,
    },
}


class _InOrder(TyperGroup):
    """This group shows commands in the order of `COMMANDS`; Typer would show all commands before all groups."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for panel in COMMANDS.values() for name in panel]


app = typer.Typer(
    name="memscan",
    cls=_InOrder,
    help="Take a census of memorisation for a text-to-image diffusion model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, rich_help_panel=_panel)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memscan {__version__}")
        raise typer.Exit


@app.callback()
def speaking(
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="MEMSCAN_LOG_FORMAT", help="Write lines for people or JSON objects to standard error."),
    ] = LogFormat.TEXT,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    speak(log_format)
    tell(json=log_format is LogFormat.JSON)


def main() -> None:
    """Run the console script `memscan`, watched by a parent that explains an end without a word."""
    supervised(lambda: app(prog_name="memscan"))


if __name__ == "__main__":
    main()
