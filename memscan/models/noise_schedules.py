"""This module recognises the noise schedule of a checkpoint's training by the class name of its scheduler.

It uses names only, and no torch.

Our own loop samples the discrete variance-preserving schedule (`beta_start` to `beta_end`) under any scheduler that
supports it. Those schedulers are rules of sampling, and interchangeable. A checkpoint with another schedule would be
sampled with betas with which it was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT = "DDIMScheduler"
SUPPORTED = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# Their noise is a source of their own, so we do not sample by them; the betas are the usual ones.
_SAME_BETAS = ("DPMSolverSDEScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")
# Continuous noise levels (Karras et al. 2022): diffusers' own pipelines know how these are sampled.
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_CONSISTENCY = ("LCMScheduler", "TCDScheduler")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# What suits models that were distilled to few steps: 1 to 8 (LCM, Turbo, Lightning), and no guidance or hardly any.
FEW_STEPS, LITTLE_GUIDANCE = 8, 2.0


def name_in(schedule: Mapping[str, Any]) -> str | None:
    """Return the class name in a scheduler's configuration, without the prefix of the JAX versions.

    It is None if there is none.
    """
    name = schedule.get("_class_name")
    return name.removeprefix("Flax") if isinstance(name, str) else None


def is_variance_preserving(name: str | None) -> bool:
    """Return whether a scheduler of this name samples the schedule of Stable Diffusion.

    A scheduler without a name counts as DDIM.
    """
    return name is None or name in SUPPORTED or name in _SAME_BETAS


def is_distilled(schedule: Mapping[str, Any]) -> bool:
    """Return whether a scheduler is that of a model distilled to few steps.

    Otherwise it is one with which the checkpoint was trained.

    Latent consistency models come with LCM or TCD; SD Turbo, SD XL Turbo and Lightning with Euler and trailing
    timesteps, which models that predict v or have no signal left at the last timestep use as well.
    """
    name = name_in(schedule)
    if name in _CONSISTENCY:
        return True
    plain = schedule.get("prediction_type", "epsilon") == "epsilon" and not schedule.get("rescale_betas_zero_snr")
    return name in _EULER and schedule.get("timestep_spacing") == "trailing" and plain


def chosen(wanted: str, schedule: Mapping[str, Any]) -> str:
    """Return the scheduler of memscan's own loop.

    It is the one that is asked for. With "auto" it is DDIM, except that a distilled model keeps its own.
    """
    if wanted != "auto":
        return wanted
    return str(name_in(schedule)) if is_distilled(schedule) else DEFAULT


def unsuited(schedule: Mapping[str, Any], steps: int, guidance: float) -> list[str]:
    """Return what does not suit a distilled model, in one sentence each."""
    if not is_distilled(schedule):
        return []
    found = [f"generator.steps {steps}"] if steps > FEW_STEPS else []
    found += [f"generator.guidance {guidance:g}"] if guidance > LITTLE_GUIDANCE else []
    if not found:
        return []
    text = (
        f"{' and '.join(found)} do not suit this checkpoint: its scheduler ({name_in(schedule)}) is that of a model "
        f"distilled to few steps, which is sampled in 1 to {FEW_STEPS} steps with guidance 1 to {LITTLE_GUIDANCE:g}"
    )
    return [text]
