"""This module computes the sharpness of the conditional density at the first step.

It is ||H s||, with s = s_c - s_u and H its Jacobian.

Source: Jeon et al. 2025, section 4.2 ("Understanding and mitigating memorization in generative models via sharpness of
probability landscapes"): a memorised prompt's density is a spike, so that its score changes fast along itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from memscan.detection.base import DetectorSpec, Need
from memscan.detection.first_step import FirstStep
from memscan.models.denoiser import Denoiser, Level
from memscan.models.text import Text, joined

_CHUNK = 32


class Sharpness:
    """This score is ||H s|| at the first timestep, over all channels and positions, as the mean over seeds.

    Args:
        method: "jvp", the exact product by forward-mode differentiation, or "difference",
            (s(x + step * s) - s(x)) / step, for denoisers whose kernels have no forward mode.
        step: of the difference, as a share of the length of x over that of s.
    """

    def __init__(self, method: Literal["jvp", "difference"] = "difference", step: float = 1e-2) -> None:
        self.method, self.step = method, step
        # With the caption one call and a second one; those without caption belong to the prompt too, since the
        # direction does. A product by forward mode is counted as one call: its second half is no call of the network.
        name = "sharpness" if method == "difference" else "sharpness_jvp"
        self.spec = DetectorSpec(name, "Jeon 2025", frozenset({Need.GUIDANCE}), calls=3)

    def score(self, step: FirstStep) -> torch.Tensor:
        assert step.empty is not None
        count = len(step.x_SCHW)
        x = step.x_SCHW.repeat(len(step.text), 1, 1, 1)
        owner = [prompt for prompt in range(len(step.text)) for _ in range(count)]
        difference = step.difference_PSCHW.flatten(0, 1)
        norms = []
        for at in range(0, len(x), _CHUNK):
            span = slice(at, at + _CHUNK)
            words = step.text[owner[span]]
            both = joined(words, step.empty[[0] * len(words)])
            product = self._product(step.denoiser, x[span], step.level, both, difference[span])
            norms.append(torch.linalg.vector_norm(product.flatten(1), dim=1))
        return torch.cat(norms).reshape(-1, count).mean(dim=1)

    def _product(
        self,
        denoiser: Denoiser,
        x: torch.Tensor,
        level: Level,
        both: Text,
        difference: torch.Tensor,
    ) -> torch.Tensor:
        """H s; both s and H carry the factor -1 / sigma of the score."""
        scale = -1 / level.sigma

        def score_difference(point: torch.Tensor) -> torch.Tensor:
            cond, uncond = denoiser.epsilon(torch.cat([point, point]), level, both).chunk(2)
            return scale * (cond - uncond)

        s = scale * difference
        if self.method == "jvp":
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                product: torch.Tensor = torch.func.jvp(score_difference, (x,), (s,))[1]
                return product
        length = torch.linalg.vector_norm(s.flatten(1), dim=1).clamp_min(1e-12)
        width = (self.step * torch.linalg.vector_norm(x.flatten(1), dim=1) / length)[:, None, None, None]
        quotient: torch.Tensor = (score_difference(x + width * s) - s) / width
        return quotient
