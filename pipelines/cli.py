"""The `memscan` command. It picks and overrides; what a run is stands in its configuration.

A user's mistake is one line on standard error and exit code 2; Ctrl-C is one line and 130; anything unexpected leaves
its traceback in the run's logs (MEMSCAN_DEBUG=1 shows it) and exits with 1. Results go to standard output, the story of
the run to standard error. Heavy modules are imported inside the commands, so that `memscan --help` is quick.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memscan.config import CensusConfig

app = typer.Typer(
    name="memscan",
    help="A census of memorisation for text-to-image diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
planted = typer.Typer(help="The embedded world whose memorisation is known.", no_args_is_help=True)
index = typer.Typer(help="Reference indexes.", no_args_is_help=True)
app.add_typer(planted, name="planted")
app.add_typer(index, name="index")

ConfigPath = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.yaml", help="A census configuration; see examples/.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. generator.steps=20.")
]
World = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help='A planted world\'s folder, or "shipped": its models and references are the base.'
    ),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, local or s3://.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Run folder.")] = "runs/demo",
    world: World = None,
) -> None:
    """Scan the planted world, reduce, report, and compare with what is known to be planted."""
    with _guarded(out):
        from memscan.planted.score import score_run
        from memscan.planted.world import shipped_world, world_config
        from pipelines.reduce import reduce_run
        from pipelines.scan import scan as run_scan

        started = time.monotonic()
        folder = _world_folder(world)
        config = world_config(folder, out=out)
        run_scan(config, _say)
        document = reduce_run(out)
        score = score_run(out, folder or shipped_world())
        _print_score(score)
        _print(f"flagged list  {out}/flagged/flagged.csv ({document['counts']['flagged']} prompts)")
        _print(f"report        {out}/report.html")
        _say(f"{time.monotonic() - started:.0f} s in all")


@app.command()
def scan(config_path: ConfigPath = None, overrides: Overrides = None, world: World = None) -> None:
    """Run a census, or what is left of it: the same command resumes a run that was stopped."""
    where: list[str] = []  # the run folder, once it is known
    with _guarded(where):
        from pipelines.scan import scan as run_scan

        config = _config(config_path, overrides, world)
        where.append(config.out)
        counts = run_scan(config, _say)
        labels = "  ".join(f"{label} {count:,}" for label, count in counts.to_json()["labels"].items())
        _print(f"complete      {counts.rows:,} prompts ({counts.inputs:,} input rows)")
        _print(f"done          {counts.done:,}   rejected {counts.rejected:,}")
        for reason, count in (counts.reasons or {}).items():
            _print(f"              {reason} {count:,}")
        _print(f"generations   {counts.generations:,}   {labels}")
        _print(f"next          memscan reduce {config.out}")


@app.command()
def reduce(
    run: RunPath,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a run that is not complete.")] = False,
) -> None:
    """Prompt verdicts, rates, flagged list and report of a scanned run."""
    with _guarded(run):
        from pipelines.reduce import reduce_run

        document = reduce_run(run, partial=partial)
        counts = document["counts"]
        _print(f"flagged       {counts['flagged']:,} of {counts['done']:,} prompts   {run}/flagged/flagged.csv")
        _print(f"figures       {run}/census.json")
        _print(f"report        {run}/report.html")


@app.command()
def report(run: RunPath) -> None:
    """Write a reduced run's report anew."""
    with _guarded(run):
        from pipelines.reduce import report_run

        _print(report_run(run))


@app.command()
def status(run: RunPath, as_json: AsJson = False) -> None:
    """State, counts and progress of a run, while it runs and after."""
    with _guarded(run):
        from pipelines.status import describe, run_status

        found = run_status(run)
        _print(json.dumps(found, indent=2) if as_json else describe(found))


@app.command()
def doctor(
    config_path: ConfigPath = None, overrides: Overrides = None, world: World = None, as_json: AsJson = False
) -> None:
    """What is installed, which devices there are, and whether models and references are whole."""
    with _guarded():
        from pipelines.doctor import describe, examine

        config = _config(config_path, overrides, world) if config_path or world else None
        findings = examine(config)
        if as_json:
            _print(json.dumps([finding.to_json() for finding in findings], indent=2))
        else:
            _print(describe(findings))
        if any(finding.state == "bad" for finding in findings):
            raise typer.Exit(1)


@planted.command("build")
def planted_build(
    seed: Annotated[int, typer.Option(help="Another seed is another world: other images, captions and groups.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the world.")],
    minutes: Annotated[float, typer.Option(help="Training time.")] = 55.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    start_from: Annotated[
        str | None, typer.Option(metavar="DIR", help='Start from a world\'s weights ("shipped"), not from random ones.')
    ] = None,
) -> None:
    """Make a new planted world: render, train, write with hashes."""
    with _guarded():
        from memscan.planted.build import build_world
        from memscan.planted.world import shipped_world

        begin = _world_folder(start_from) or shipped_world() if start_from else None
        build_world(seed, out, minutes=minutes, device=device, start_from=begin, progress=_say)
        _print(f"world         {out}")


@planted.command("score")
def planted_score(run: RunPath, world: World = None) -> None:
    """Compare a reduced run with ground truth; one JSON object on standard output."""
    with _guarded(run):
        from memscan.planted.score import score_run
        from memscan.planted.world import shipped_world

        _print(json.dumps(score_run(run, _world_folder(world) or shipped_world())))


@planted.command("calibrate")
def planted_calibrate(
    run: RunPath,
    out: Annotated[str, typer.Option(metavar="FILE.json", help="Where the thresholds go.")],
    world: World = None,
    max_false_positive_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Bound on the share of ordinary generations with a label.")
    ] = 0.001,
) -> None:
    """Choose thresholds on a scanned world. Never report on that world with them."""
    with _guarded(run):
        from memscan.planted.score import calibrate_run

        found = calibrate_run(run, _world_folder(world), max_false_positive_rate=max_false_positive_rate)
        found.save(out)
        _print(f"thresholds    foreground {found.foreground_threshold:g}   background {found.background_threshold:g}")
        _print(f"achieved      macro-F1 {found.macro_f1:.3f}   false positives {found.false_positive_rate:.4f}   {out}")


@index.command("build")
def index_build(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Parquet with encoded images, or a folder of images.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the index.")],
    config_path: Annotated[Path | None, typer.Option("--config", help="Where segmenter and embedder stand.")] = None,
    overrides: Overrides = None,
    world: World = None,
) -> None:
    """Build a reference index once, for many runs (their index.path)."""
    with _guarded(out):
        from pipelines.index import build

        places = [f"index.source={json.dumps(source)}", f"index.path={json.dumps(out)}"]
        manifest = build(_config(config_path, [*(overrides or []), *places], world))
        _print(f"index         {out} ({manifest.count:,} references)")


def _config(path: Path | None, overrides: list[str] | None, world: str | None) -> CensusConfig:
    """The configuration of a command: a file, a planted world, or a file laid over a world; then the overrides."""
    from memscan.config import load_config, parse_config
    from memscan.errors import ConfigError

    if world is None:
        if path is None:
            raise ConfigError("no configuration", hint="give CONFIG.yaml (see examples/) or --world DIR")
        return load_config(path, overrides or ())
    from memscan.planted.world import world_config

    base = world_config(_world_folder(world)).model_dump(mode="json")
    data = _overlay(base, _read_mapping(path)) if path else base
    return parse_config(data, overrides or (), where=str(path or world))


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    from memscan.errors import ConfigError

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration ({error})", where=str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("must be a mapping of keys to values", where=str(path), hint="see examples/")
    return data


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = {**base, **top}
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            both[key] = _overlay(base[key], value)
    return both


def _world_folder(world: str | None) -> Path | None:
    return None if world in (None, "shipped") else Path(world)


def _print_score(score: Mapping[str, Any]) -> None:
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "false_positive_rate": "false positives",
        "match_precision": "match precision",
        "match_recall": "match recall",
    }
    shown = "   ".join(f"{name} {score[key]:.3f}" for key, name in names.items() if score.get(key) is not None)
    _print(f"against truth {score.get('prompts', 0):,} prompts   {shown}")


@contextmanager
def _guarded(out: str | list[str] | None = None) -> Iterator[None]:
    """Turn what goes wrong into one line and an exit code."""
    from memscan.errors import MemscanError

    try:
        yield
    except typer.Exit:
        raise
    except MemscanError as error:
        _debug()
        _say(f"memscan: {error}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _say("memscan: interrupted; run the same command to resume")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has gone; nothing can be said
    except Exception as error:
        _debug()
        if type(error).__name__ == "ValidationError":  # pydantic's, from a manifest or a library call
            _say(f"memscan: not a valid configuration: {' '.join(str(error).split())[:300]}")
            raise typer.Exit(2) from None
        path = _write_traceback(out if isinstance(out, str) else "".join(out or []))
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _say(f"memscan: unexpected {line}; details in {path}")
        raise typer.Exit(1) from None


def _debug() -> None:
    if os.environ.get("MEMSCAN_DEBUG") == "1":
        traceback.print_exc()


def _write_traceback(out: str) -> Path:
    from pipelines.session import logs_folder

    folder = logs_folder(out) if out and Path(out).is_dir() else Path(tempfile.mkdtemp(prefix="memscan-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "error.log"
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return path


def _print(text: str) -> None:
    typer.echo(text)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="memscan")


if __name__ == "__main__":
    main()
