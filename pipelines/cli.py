"""The `memscan` command. It picks and overrides; what a run is stands in its configuration.

A user's mistake is one line on standard error and exit code 2; a census of which most rows were rejected is 3; Ctrl-C
is one line and 130; anything unexpected leaves its traceback in the run's logs (MEMSCAN_DEBUG=1 shows it) and exits
with 1. Results go to standard output, what happens meanwhile to standard error. Heavy modules are imported inside the
commands, so that `memscan --help` is quick.
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

# By panel of the help, in the order of a user's day.
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
    "Prepare one": {
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
    "Go on": {
        "nightly": nightly.nightly,
        "submit": submit.submit,
        "diff": diff.diff,
        "retry": census.retry,
        "repair-run": census.repair_run,
        "planted": planted.app,
    },
}


class _InOrder(TyperGroup):
    """Typer would show all commands before all groups of commands."""

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
        typer.Option(
            envvar="MEMSCAN_LOG_FORMAT", help="What is written to standard error: lines for people, or JSON objects."
        ),
    ] = LogFormat.TEXT,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    speak(log_format)
    tell(json=log_format is LogFormat.JSON)


def main() -> None:
    """Entry point of the console script: the command, with a watcher that explains an end without a word."""
    supervised(lambda: app(prog_name="memscan"))


if __name__ == "__main__":
    main()
