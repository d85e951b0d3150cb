"""This module has detectors as their authors' code computes them, where that differs from ours or from the paper.

Each has a name of its own, so that a number of ours is never compared with a published one of another kind;
`memscan evaluate detectors` lists them beside ours, and docs/parity.md says what differs and by how much. None of them
is a screen's, since ours rank prompts at least as well for no more calls.

* Webster 2023: github.com/ryanwebster90/onestep-extraction at fb4aa65, run_wb_attack.py.
* Ren et al. 2024: github.com/renjie3/MemAttn at c66efd2, detect.py, its modes D and E.
* Asthana and Belagiannis 2026: github.com/rohanasthana/memorization-anisotropy at 97e991b, detect_mem.py.
"""

from __future__ import annotations

from typing import Any

import torch

from memscan.detection.base import DetectorSpec, Need
from memscan.detection.first_step import FirstStep
from memscan.detection.one_step import predicted_difference, row_batches
from memscan.detection.sampled import LAST_CALLS
from memscan.models.attention import Attention, AttentionRecorder
from memscan.models.hooks import Signals

GUIDED_DCS = DetectorSpec("guided_dcs", "Webster 2023, code", frozenset({Need.GUIDANCE}), calls=1)
SINGLE_DCS = DetectorSpec("single_dcs", "Webster 2023, one unguided call", calls=1)
LAYER_ENTROPY = DetectorSpec("attention_entropy_layer", "Ren 2024, code E", frozenset({Need.CROSS_ATTENTION}), calls=2)
PADDED_ENTROPY = DetectorSpec("attention_entropy_padded", "Ren 2024, code D", frozenset({Need.CROSS_ATTENTION}))
CELL_ANISOTROPY = DetectorSpec("anisotropy_by_cell", "Asthana 2026, code", frozenset({Need.GUIDANCE}), calls=2)


class GuidedDcs:
    """mean (z_0 - z_1)^2 of one guided step from the greatest noise level to none: sigma^2 mean(eps^2).

    With one step of Karras' schedule the levels are the greatest sigma and 0, and Heun's second call falls away, so
    that z_1 = z_0 - sigma eps with eps = eps_u + 7.5 (eps_c - eps_u). The code's z_0 is sigma times noise, and the
    network sees it divided by sqrt(sigma^2 + 1).
    """

    spec = GUIDED_DCS

    def __init__(self, guidance: float = 7.5) -> None:
        self.guidance = guidance

    def score(self, step: FirstStep) -> torch.Tensor:
        level = step.denoiser.level(step.denoiser.timesteps - 1)
        difference_PSCHW, uncond_SCHW = predicted_difference(step, level, step.x_SCHW * level.sigma)
        guided_PSCHW = uncond_SCHW[None] + self.guidance * difference_PSCHW
        squares_P = guided_PSCHW.flatten(1).square().mean(dim=1)
        return squares_P * (level.sigma**2 / level.alpha_bar)


class SingleDcs:
    """mean eps_c^2 of the first step itself, without guidance: it ranks as `one_step_dcs` does, for half the calls."""

    spec = SINGLE_DCS

    def score(self, step: FirstStep) -> torch.Tensor:
        return step.cond_PSCHW.flatten(1).square().mean(dim=1)


class LayerEntropy:
    """Entropy of one layer's attention at the first step: the fourth in order of execution, or the last of fewer."""

    spec = LAYER_ENTROPY

    def __init__(self, layer: int = 3) -> None:
        self.layer = layer

    def score(self, step: FirstStep) -> torch.Tensor:
        values = []
        with AttentionRecorder(step.denoiser.unet) as recorder:
            for x, text in row_batches(step, step.x_SCHW.repeat(len(step.text), 1, 1, 1)):
                step.denoiser.output(x, step.level, text)
                layers = recorder.take()
                values.append(single_entropy(layers[min(self.layer, len(layers) - 1)].rows_BPT.mean(dim=1)))
        return torch.cat(values).reshape(len(step.text), -1).mean(dim=1)


class CellAnisotropy:
    """`anisotropy` with the cosine taken over channels at every position, at the third-last of the sampling's steps.

    For a model that predicts v the code takes the norm of the scores' difference, sqrt(a) (v_c - v_u) / (1 - a), the
    cosine of the raw outputs, and a weight of .1 in place of 2, which are its settings for SD2.
    """

    spec = CELL_ANISOTROPY

    def __init__(self, weights: tuple[float, float] = (2.0, 0.1)) -> None:
        self.weights = weights

    def score(self, step: FirstStep) -> torch.Tensor:
        predicts_v = step.denoiser.prediction == "v_prediction"
        level = step.denoiser.level(step.timesteps[-min(3, len(step.timesteps))])
        cond_PSCHW, uncond_SCHW = _outputs(step, level)
        cosine_PShw = torch.cosine_similarity(cond_PSCHW - uncond_SCHW[None], uncond_SCHW[None], dim=2)
        first = step.level
        # eps_c - eps_u = sqrt(a) (v_c - v_u), so that the difference of the scores is that of eps by 1 - a.
        scale = 1 / first.sigma**2 if predicts_v else 1.0
        norms_PS = torch.linalg.vector_norm(step.difference_PSCHW.flatten(2), dim=2) * scale
        weight = self.weights[1 if predicts_v else 0]
        score_P: torch.Tensor = norms_PS.mean(dim=1) + weight * cosine_PShw.flatten(1).mean(dim=1)
        return score_P


def _outputs(step: FirstStep, level: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the network's own outputs of the same pure noise at another level: (P, S, C, h, w) and (S, C, h, w)."""
    assert step.empty is not None, "a detector that needs guidance"
    uncond = step.denoiser.output(step.x_SCHW, level, step.empty[[0] * len(step.x_SCHW)])
    repeated = step.x_SCHW.repeat(len(step.text), 1, 1, 1)
    cond = torch.cat([step.denoiser.output(x, level, text) for x, text in row_batches(step, repeated)])
    return cond.reshape(len(step.text), *uncond.shape), uncond


class PaddedEntropyHook:
    """Ren's mode D while images are sampled: entropy of the mean attention over the last ten calls, plus the change of
    the padding's part of it since the first call.

    The mean is over heads, positions and layers before any logarithm, and padding begins with the end token.

    Args:
        unet: the network whose layers compute.
    """

    def __init__(self, unet: Any) -> None:
        self._recorder = AttentionRecorder(unet, see=self._see)
        self.begin(0)

    def begin(self, count: int) -> None:
        self._recorder.stop()
        self._count, self._recording = count, False
        self._layers: list[torch.Tensor] = []
        self._ends_B: torch.Tensor | None = None
        self._calls: dict[int, torch.Tensor] = {}

    def before_call(self, index: int, calls: int, ends_B: torch.Tensor | None) -> bool:
        self._recording = ends_B is not None and (index == 0 or index >= calls - LAST_CALLS)
        if self._recording:
            self._ends_B, self._layers = ends_B, []
            self._recorder.start(self._count)
        return self._recording

    def _see(self, attention: Attention) -> None:
        self._layers.append(attention.rows_BPT.mean(dim=1))

    def on_step(self, index: int, *_what: Any) -> None:
        if not self._recording:
            return
        self._recorder.stop()
        self._recording = False
        if self._layers and self._ends_B is not None:
            shares_BT = torch.stack(self._layers).mean(dim=0)
            self._calls[index] = shares_BT

    def result(self) -> Signals:
        calls, ends_B = dict(self._calls), self._ends_B
        self.begin(0)
        if not calls or ends_B is None:
            return {}
        last_CBT = torch.stack([calls[index] for index in sorted(calls)[-LAST_CALLS:]])
        score_B = padded_entropy(last_CBT, calls[min(calls)], ends_B)
        return {PADDED_ENTROPY.name: score_B.float().cpu().numpy().copy()}


def padded_entropy(last_CBT: torch.Tensor, first_BT: torch.Tensor, ends_B: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy over C calls, plus the rise since the first call of its part from the end token on, (B,).

    Args:
        last_CBT, first_BT: shares of T tokens, which are means over heads, positions and layers.
        ends_B: positions of the first end tokens.
    """
    places_T = torch.arange(first_BT.shape[1], device=first_BT.device)
    padding_BT = places_T >= ends_B.to(first_BT.device)[:, None]
    padding_C = [single_entropy(shares_BT, padding_BT) for shares_BT in last_CBT]
    whole_C = [single_entropy(shares_BT) for shares_BT in last_CBT]
    change_B = torch.stack(padding_C).mean(dim=0) - single_entropy(first_BT, padding_BT)
    return torch.stack(whole_C).mean(dim=0) + change_B


def single_entropy(shares_BT: torch.Tensor, where_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Return -sum a log a over the tokens, or over some of them, (B,), in nats."""
    terms_BT = torch.xlogy(shares_BT, shares_BT)
    return -(terms_BT if where_BT is None else terms_BT * where_BT).sum(dim=1)


RELEASED = (GuidedDcs(), SingleDcs(), LayerEntropy(), CellAnisotropy())
