"""This module sends the results of a command to an experiment tracker, MLflow or Weights & Biases, if it is installed.

The tracker's own environment variables (`MLFLOW_TRACKING_URI`, `WANDB_PROJECT`, `WANDB_MODE` ...) choose server,
project and account. A tracker that is not installed is refused before any expensive work starts. If one fails
afterwards, one line says so, and nothing else happens, because the run folder has everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memscan.errors import ConfigError
from memscan.redaction import redact

_AT_ONCE = 100  # parameters that MLflow's servers take in one request


class Tracker(str, Enum):
    """The trackers that are known."""

    MLFLOW = "mlflow"
    WANDB = "wandb"


@dataclass(frozen=True)
class Outcome:
    """This is what a tracker gets about one command.

    Args:
        name: of the run.
        settings: what it was made with: name -> text or number.
        figures: what it found: name -> number.
        files: pages and tables on this machine; those that are not there are left out.
    """

    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    files: Sequence[str] = ()


def check(tracker: Tracker | None) -> None:
    """Raise ConfigError if the tracker that is asked for is not installed."""
    if tracker is not None and find_spec(tracker.value) is None:
        raise ConfigError(f"{tracker.value} is not installed", where="--track", hint=f"pip install {tracker.value}")


def tell(tracker: Tracker | None, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Tell the tracker, if one is asked for, and say how it went."""
    if tracker is None:
        return
    files = [file for file in outcome.files if "://" not in file and Path(file).is_file()]
    try:
        _TELL[tracker](import_module(tracker.value), outcome, files)
    except Exception as error:  # the tracker's own kinds: network, account, server
        line = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        say(f"memscan: {tracker.value} was not told ({line}); the run folder has everything")
        return
    say(f"tracked       {tracker.value}: {outcome.name}, {len(outcome.figures)} figures, {len(files)} files")


def _mlflow(mlflow: Any, outcome: Outcome, files: Sequence[str]) -> None:
    with mlflow.start_run(run_name=outcome.name):
        settings = list(outcome.settings.items())
        for start in range(0, len(settings), _AT_ONCE):
            mlflow.log_params(dict(settings[start : start + _AT_ONCE]))
        mlflow.log_metrics(dict(outcome.figures))
        for file in files:
            mlflow.log_artifact(file)


def _wandb(wandb: Any, outcome: Outcome, files: Sequence[str]) -> None:
    run = wandb.init(name=outcome.name, job_type="memscan", config=dict(outcome.settings))
    try:
        run.log(dict(outcome.figures))
        for file in files:
            run.save(file, base_path=str(Path(file).parent), policy="now")
    finally:
        run.finish()


_TELL: dict[Tracker, Callable[[Any, Outcome, Sequence[str]], None]] = {Tracker.MLFLOW: _mlflow, Tracker.WANDB: _wandb}


def of_scan(config: Any, fingerprint: str, counts: Mapping[str, Any]) -> Outcome:
    """A scan: its configuration and its counts."""
    labels = {f"generations.{name}": float(count) for name, count in (counts.get("labels") or {}).items()}
    plain = {name: float(counts[name]) for name in ("inputs", "rows", "done", "rejected", "generations")}
    return Outcome(f"{config.name} scan", {"fingerprint": fingerprint, **_flat(config.content())}, plain | labels)


def of_reduce(run: str, census: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a reduced census: its rates, with their intervals."""
    prompts = census["prompts"]
    rates = {"memorised": prompts["memorised"], **{name.lower(): one for name, one in prompts["classes"].items()}}
    figures = {
        f"{name}.{end}": float(rate[end])
        for name, rate in rates.items()
        for end in ("rate", "low", "high")
        if rate[end] is not None
    }
    figures |= {name: float(census["counts"][name]) for name in ("done", "rejected", "flagged")}
    if (severity := census["severity"]["mean_generation"]) is not None:
        figures["severity"] = float(severity)
    settings = {"fingerprint": census["run"]["fingerprint"], **_flat(census["run"]["config"]), **census["models"]}
    files = [f"{run}/census.json", f"{run}/report.html"]
    return Outcome(f"{census['run']['name']} census", settings, figures, files)


def of_verify(result: Mapping[str, Any], judgement: Mapping[str, Any], page: str) -> Outcome:
    """A verification: what each limit of its policy was held against."""
    figures = {rule["rule"]: float(rule["value"]) for rule in judgement["rules"] if rule["value"] is not None}
    settings = {"fingerprint": result["run"]["fingerprint"], "state": judgement["state"], **_flat(result["settings"])}
    return Outcome(f"{result['run']['name']} {result['name']}", settings, figures, [page])


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; lists as text, and text short enough for every tracker."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float)) else redact(str(value))[:250]
    return found
