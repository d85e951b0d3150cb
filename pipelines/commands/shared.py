"""This module holds what all commands share.

It has types of options, the configuration of a command, and messages about mistakes.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memscan.redaction import redact
from pipelines.commands.track import Tracker

if TYPE_CHECKING:
    from memscan.config import CensusConfig
    from memscan.report import Images

ConfigPath = Annotated[
    str | None,
    typer.Argument(metavar="CONFIG.yaml", help="This is the census configuration, local or s3://; see examples/."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the configuration, for example generator.steps=20. It may be given several times.",
    ),
]
World = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help='This is the folder of a planted world, local or s3://, or "shipped". A configuration overrides the '
        "models and references of this world.",
    ),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="This is the run folder, local or s3://.")]
NoImages = Annotated[bool, typer.Option("--no-images", help="Leave all pictures out of the page.")]
Blur = Annotated[bool, typer.Option("--blur", help="Blur the pictures of the page until they are pointed at.")]
Track = Annotated[
    Tracker | None,
    typer.Option(
        "--track", help="Tell this experiment tracker what was found; it must be installed, and its own settings count."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result to standard output as JSON.")]


def configuration(path: str | None, overrides: list[str] | None, world: str | None) -> CensusConfig:
    """Return the configuration of a command: a file, a planted world, or a file over a world, then the overrides."""
    from memscan.config import load_config, parse_config, read_yaml
    from memscan.errors import ConfigError

    if world is None:
        if path is None:
            raise ConfigError("no configuration", hint="give CONFIG.yaml (see examples/) or --world DIR")
        return load_config(path, overrides or ())
    from memscan.planted.world import world_config

    base = world_config(world_folder(world)).model_dump(mode="json")
    data = _overlay(base, read_yaml(path)) if path else base
    return parse_config(data, overrides or (), where=str(path or world))


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = {**base, **top}
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            both[key] = _overlay(base[key], value)
    return both


def images_of(no_images: bool, blur: bool) -> Images:
    """Return what a page does with pictures. Raises ConfigError if both options are given."""
    from memscan.errors import ConfigError

    if no_images and blur:
        raise ConfigError("--no-images leaves nothing to blur", hint="give only one of the two")
    return "none" if no_images else "blur" if blur else "show"


def world_folder(world: str | None) -> str | None:
    return None if world == "shipped" else world


def another_world(calibrate_on: str | None) -> Path | None:
    """Return the folder of the world on which thresholds are chosen; None if there is none."""
    if calibrate_on is None:
        return None
    from memscan.planted.world import shipped_world

    return shipped_world() if calibrate_on == "shipped" else Path(calibrate_on)


@contextmanager
def guarded(out: str | list[str] | None = None) -> Iterator[None]:
    """Turn an error inside the block into one line and an exit code."""
    from memscan.errors import MemscanError
    from pipelines.ray.causes import user_error
    from pipelines.ray.stopping import Stopped, stopping
    from pipelines.ray.supervisor import tell

    try:
        with stopping():
            yield
    except typer.Exit:
        raise
    except MemscanError as error:
        _debug()
        say(f"memscan: {error}", level="error")
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        say(f"memscan: stopped by {stopped}; run the same command to resume", level="warning")
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        say("memscan: interrupted; run the same command to resume", level="warning")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        tell(exit=1)
        os._exit(1)  # the reader of our output has gone; nothing can be said
    except Exception as error:
        _debug()
        if type(error).__name__ == "ValidationError":  # pydantic's, from a manifest or a library call
            say(f"memscan: not a valid configuration: {' '.join(str(error).split())[:300]}", level="error")
            raise typer.Exit(2) from None
        if (cause := user_error(error)) is not None:
            say(f"memscan: {cause}")
            raise typer.Exit(cause.exit_code) from None
        path = _write_traceback(out if isinstance(out, str) else "".join(out or []))
        line = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        say(f"memscan: unexpected {line}; details in {path}", level="error")
        raise typer.Exit(1) from None


def _debug() -> None:
    if os.environ.get("MEMSCAN_DEBUG") == "1":
        traceback.print_exc()


def _write_traceback(out: str) -> Path:
    from pipelines.ray.session import logs_folder

    folder = logs_folder(out) if out and Path(out).is_dir() else Path(tempfile.mkdtemp(prefix="memscan-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "error.log"
    path.write_text(redact(traceback.format_exc()), encoding="utf-8")
    return path


def show(text: str) -> None:
    typer.echo(text)


def tell(as_json: bool, document: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Write a command's result to standard output, as a JSON document or as lines for people."""
    if as_json:
        show(json.dumps(document, indent=2, ensure_ascii=False))
        return
    for line in lines:
        show(line)


def say(text: str, level: str = "info") -> None:
    """Write a line about the progress of a command to standard error."""
    from pipelines.ray.logs import json_line, speaks_json

    with suppress(OSError, ValueError):  # a terminal that is gone, a closed standard error: nobody reads it
        typer.echo(json_line(text, level=level) if speaks_json() else text, err=True)
