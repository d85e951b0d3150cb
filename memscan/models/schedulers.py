"""This module makes diffusers schedulers by class name, configured from the checkpoint's own noise schedule.

Only schedulers of the discrete variance-preserving schedule that Stable Diffusion is trained with are accepted, and
only those whose noise comes from the generators they are given: a row must make the same image in every run.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from memscan.errors import ModelError
from memscan.models.folders import first_line
from memscan.models.noise_schedules import SUPPORTED, is_variance_preserving, name_in

PREDICTIONS = ("epsilon", "v_prediction")


def make_scheduler(name: str, config: Mapping[str, Any], *, where: str) -> Any:
    """Return a scheduler of class `name` with the checkpoint's schedule.

    As the stock pipeline does, outdated settings are put right: `steps_offset` becomes 1 and latents are never clipped.

    Args:
        name: a class name of diffusers.
        config: the checkpoint's scheduler configuration.
        where: the checkpoint, for messages.

    Raises:
        ModelError: the name is unknown (names the nearest), unsuited, or the configuration does not make a scheduler,
            or is that of another noise schedule.
    """
    if not is_variance_preserving(name_in(config)):
        raise ModelError(
            f"its scheduler {name_in(config)} has another noise schedule than Stable Diffusion's",
            where=where,
            hint="give a checkpoint with the scheduler with which it was trained",
        )
    if name not in SUPPORTED:
        raise ModelError(_why_not(name), where="generator.scheduler", hint=_nearest(name))
    kind = getattr(diffusers, name)
    scheduler = scheduler_from(kind, dict(config), where=where)
    fixes = {
        key: value for key, value in (("steps_offset", 1), ("clip_sample", False)) if _differs(scheduler, key, value)
    }
    scheduler = scheduler_from(kind, scheduler.config, where=where, **fixes) if fixes else scheduler
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ModelError(f"prediction type {prediction!r} is not one of {', '.join(PREDICTIONS)}", where=where)
    return scheduler


def scheduler_from(kind: Any, config: Mapping[str, Any], *, where: str, **changes: Any) -> Any:
    """Return a scheduler of a class of diffusers, made from a configuration.

    Args:
        changes: keys that replace those of the configuration. (Among its own keys, those that it says were defaults
            are not used.)

    Raises:
        ModelError: the class cannot be made from it, or needs a package that is not installed.
    """
    try:
        return kind.from_config(config, **changes)
    except (ImportError, TypeError, ValueError, NotImplementedError) as error:
        what = f"{kind.__name__} cannot be made from the checkpoint's configuration ({first_line(error)})"
        raise ModelError(what, where=where) from error


def _differs(scheduler: Any, key: str, value: object) -> bool:
    return key in scheduler.config and scheduler.config[key] != value


def _why_not(name: str) -> str:
    if name in _all_names():
        return f"{name} does not sample reproducibly from a Stable Diffusion checkpoint"
    return f"diffusers has no scheduler {name!r}"


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, SUPPORTED, n=3, cutoff=0.5) or [
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
    ]
    return f"try {', '.join(near)}"


def _all_names() -> set[str]:
    return {name for name in dir(diffusers) if name.endswith("Scheduler")}


def check_steps(scheduler: Any, steps: int, *, where: str) -> None:
    """Refuse a number of steps that the scheduler cannot take. Raises ModelError."""
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"{type(scheduler).__name__} cannot take {steps} steps ({error})",
            where=where,
            hint="change generator.steps",
        ) from error


def step_accepts(scheduler: Any, key: str) -> bool:
    """Return whether the scheduler's `step` takes the keyword (`eta`, `generator`)."""
    return key in inspect.signature(scheduler.step).parameters
