"""This module measures whether a pipeline of diffusers denoises its own samples, noised anew, in calls like its own.

A stock pipeline cannot be changed from inside, so one sampling is recorded: the denoiser's calls with all their
arguments, what the pipeline makes of an output before its step, and the sample with which the scheduler ends. That
sample z is then noised to the levels of some of the calls, x = c z + n eps, put in the place of the call's, and the
output is read as each thing that a denoiser can predict (`sanity.py` says how a reading is judged). For flow matching c
= 1 - s and n = s with s the scheduler's sigma, and the velocity is eps - z (Esser et al. 2024, arXiv 2403.03206,
section 2); for the others c = sqrt(a) and n = sqrt(1 - a). A pipeline that is built differently, with two calls per
step or an output that is changed before the step, is not measured, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memscan.models.sampling import alpha_bars

# A second guided prediction of the same call must be what the pipeline steps with, up to the rounding of its precision.
_SAME = 0.05
_NOISE_SEED = 1000  # the samples begin with the noise of 0 and 1, which must be another one
_SAMPLES = ("hidden_states", "sample", "x")  # what denoisers call what they are given


@dataclass(frozen=True)
class Level:
    """One of the pipeline's calls has the input x = clean * z + noise * eps."""

    call: int
    clean: float
    noise: float
    flow: bool


@dataclass
class Watched:
    """This value holds one sampling: calls of the denoiser and steps of the scheduler.

    Args:
        calls: (positional, named) arguments of the denoiser.
        outputs: what it gave.
        steps: what the scheduler was given as the model's output.
        last: the sample that it ended with.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None


class NotMeasuredError(Exception):
    """This error says in which unknown way a pipeline is built."""


@contextmanager
def watched(denoiser: Any, scheduler: Any) -> Iterator[Watched]:
    """Watch what a pipeline does with its denoiser and its scheduler in the `with` block."""
    seen = Watched()

    def on_call(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.calls.append((args, dict(kwargs)))
        seen.outputs.append(_tensor(output))

    step = scheduler.step

    def on_step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = step(model_output, *args, **kwargs)
        seen.steps.append(model_output)
        seen.last = made[0] if isinstance(made, tuple) else made.prev_sample
        return made

    if not isinstance(denoiser, torch.nn.Module):
        yield seen
        return
    handle = denoiser.register_forward_hook(on_call, with_kwargs=True)
    scheduler.step = on_step
    try:
        yield seen
    finally:
        handle.remove()
        del scheduler.step


def error_left(
    denoiser: Any, scheduler: Any, seen: Watched, guidance: float, levels: Sequence[float]
) -> tuple[str, dict[str, list[float]]]:
    """Return what the pipeline reads its denoiser's output as, and by reading the share of the linear filter's error.

    Args:
        levels: shares of the signal's power that are aimed at, as `sanity.LEVELS`.

    Raises:
        NotMeasuredError: the pipeline is built otherwise.
    """
    sign, copies = _rule(seen, guidance)
    z = seen.last
    assert z is not None
    z = z.float()
    chosen = _levels(seen, scheduler, levels)
    make = torch.Generator().manual_seed(_NOISE_SEED)
    noise = torch.randn(z.shape, generator=make).to(z.device)
    spread = z.var(dim=(0, 2, 3) if z.ndim == 4 else tuple(range(z.ndim - 1)), keepdim=True)
    ratios: dict[str, list[float]] = {}
    for level in chosen:
        c, n = level.clean, level.noise
        x = c * z + n * noise
        args, kwargs = _with_sample(seen.calls[level.call], torch.cat([x] * copies))
        with torch.no_grad():
            output = sign * _tensor(denoiser(*args, **kwargs))[-len(z) :].float()
        output = output[:, : z.shape[1]] if z.ndim == 4 else output  # the rest are variances
        if not torch.isfinite(output).all():
            raise ArithmeticError("its denoiser gives values that are not finite")
        filtered = float((spread * n * n / (c * c * spread + n * n)).mean())
        for name, estimate in _readings(output, x, level).items():
            error = float((estimate - z).square().mean())
            ratios.setdefault(name, []).append(error / max(filtered, 1e-9))
    kind = "velocity" if chosen[0].flow else str(scheduler.config.get("prediction_type", "epsilon"))
    if kind not in ratios:
        raise NotMeasuredError(f"it predicts {kind}")
    return kind, ratios


def noise_kept(seen: Watched) -> float:
    """Return the correlation of the last sample with what the denoiser was given first: 1 if nothing was done to it."""
    args, kwargs = seen.calls[0]
    first = args[0] if args else next(kwargs[name] for name in _SAMPLES if name in kwargs)
    assert seen.last is not None
    pair = torch.stack([first[: len(seen.last)].float().flatten(), seen.last.float().flatten()])
    return float(torch.corrcoef(pair)[0, 1])


def means(ratios: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the geometric mean over levels of each reading's ratios."""
    return {name: math.exp(sum(math.log(max(one, 1e-9)) for one in by) / len(by)) for name, by in ratios.items()}


def _readings(output: Tensor, x: Tensor, level: Level) -> dict[str, Tensor]:
    """Estimate the clean sample by each thing that the output can be."""
    c, n = level.clean, level.noise
    found = {"epsilon": (x - n * output) / c, "sample": output}
    if level.flow:
        return {"velocity": x - n * output, **found}
    return {**found, "v_prediction": c * x - n * output}


def _rule(seen: Watched, guidance: float) -> tuple[float, int]:
    """Find the sign of what the pipeline makes of an output, and how many copies of the batch are in a call."""
    if seen.last is None or not seen.calls or len(seen.calls) != len(seen.steps):
        raise NotMeasuredError(f"it calls its denoiser {len(seen.calls)} times in {len(seen.steps)} steps")
    output, stepped = seen.outputs[0].float(), seen.steps[0].float()
    copies, rest = divmod(len(output), len(stepped))
    if rest or copies not in (1, 2) or len(seen.last) != len(stepped):
        raise NotMeasuredError(f"its calls have {len(output)} rows for {len(stepped)} images")
    if output.ndim == 4 and output.shape[1] == 2 * stepped.shape[1]:
        output = output[:, : stepped.shape[1]]
    if copies == 2:
        without, captioned = output.chunk(2)
        output = without + guidance * (captioned - without)
    if output.shape != stepped.shape:
        raise NotMeasuredError("its denoiser's output is of another shape than what it steps with")
    for sign in (1.0, -1.0):
        apart = float((sign * output - stepped).square().mean())
        if not apart > _SAME**2 * float(stepped.square().mean()):
            return sign, copies
    raise NotMeasuredError("what it steps with is not its denoiser's output")


def _levels(seen: Watched, scheduler: Any, wanted: Sequence[float]) -> list[Level]:
    """Choose the calls whose share of signal comes nearest to each that is wanted."""
    found = []
    for call in range(len(seen.calls)):
        if type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
            s = float(scheduler.sigmas[call])
            level = Level(call, 1 - s, s, flow=True)
        elif hasattr(scheduler, "alphas_cumprod"):
            a = alpha_bars(scheduler, scheduler.timesteps[call].reshape(1).cpu())[0]
            level = Level(call, a**0.5, (1 - a) ** 0.5, flow=False)
        else:
            raise NotMeasuredError(f"{type(scheduler).__name__} has a noise schedule that is not known here")
        if level.clean > 0.2 and level.noise > 0.1:  # else nothing is left of the signal, or hardly any noise is there
            found.append(level)
    if not found:
        raise NotMeasuredError("none of its calls is at a medium level of noise")

    def share(level: Level) -> float:
        return level.clean**2 / (level.clean**2 + level.noise**2)

    nearest = {min(found, key=lambda level: abs(share(level) - aim)).call for aim in wanted}
    return [level for level in found if level.call in nearest]


def _with_sample(call: tuple[tuple[Any, ...], dict[str, Any]], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another sample in their place."""
    args, kwargs = call
    key = next((name for name in _SAMPLES if name in kwargs), None)
    before = args[0] if args else kwargs.get(key or "")
    if not isinstance(before, Tensor) or before.shape != x.shape:
        raise NotMeasuredError("its denoiser takes something else than the sample")
    x = x.to(before.dtype)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, str(key): x})


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    if not isinstance(found, Tensor):
        raise NotMeasuredError("its denoiser gives something else than a sample")
    return found
