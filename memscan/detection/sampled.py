"""This module has the detectors of a scan without extra cost.

They read what sampling and classification compute anyway, and add no denoiser call.

Each is a score by generation in `GENERATION.signals` under the name of its specification, and by prompt the mean of
these; higher is more memorised, and one that does not apply is absent. Two kinds see the denoiser (`models.hooks` has
the noise norms, `AttentionHook` looks into its cross-attention); the others compare images, with one another
(`tiled_similarity`) or with the training image that they match (the judging half has both embeddings).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memscan.detection.specifications import ATTENTION_ENTROPY, BRIGHT_ENDING
from memscan.models.attention import Attention, AttentionRecorder, end_map, entropy
from memscan.models.hooks import Signals

LAST_CALLS = 10  # of a sampling, over which the entropy is a mean (Ren et al. 2024, section 4.2)
ENDING_LAYERS = 2  # the first two down, as Chen et al. 2025 have it
TILES = 4  # a side: sixteen tiles, as Carlini et al. 2023 have it


class AttentionHook:
    """This hook computes the attention entropy of the last steps and the bright ending's magnitude.

    Sources: Ren et al. 2024; Chen et al. 2025.

    `attention_entropy`: -sum a log a over tokens of what all positions pay together, mean over the cross-attention
    layers and the last ten calls. `bright_ending`: mean over all guided calls of ||(eps_c - eps_u) * m||_2, divided by
    mean(m), with m the attention to the caption's first end token at the last call; absent without guidance, and for
    text that is not a caption.

    Args:
        unet: the network whose layers compute; a compiled form of it is instructed to call them (`SplitUNet`).
    """

    def __init__(self, unet: Any) -> None:
        self._recorder = AttentionRecorder(unet, see=self._see)
        self._reset()

    def _reset(self) -> None:
        self._recorder.stop()
        self._ends_B: torch.Tensor | None = None
        self._recording = False
        self._layers: list[torch.Tensor] = []  # entropies of the call that is going on, (B,) each
        self._first: list[Attention] = []  # and its first layers
        self._entropies: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []  # (eps_c - eps_u)^2 summed over channels, (B, h, w) a call
        self._ending_Bhw: torch.Tensor | None = None

    def begin(self, count: int) -> None:
        self._reset()
        self._count = count

    def before_call(self, index: int, calls: int, ends_B: torch.Tensor | None) -> bool:
        self._recording = index >= calls - LAST_CALLS
        if self._recording:
            self._ends_B, self._layers, self._first = ends_B, [], []
            self._recorder.start(self._count)
        return self._recording

    def _see(self, attention: Attention) -> None:
        self._layers.append(entropy(attention.rows_BPT))
        if len(self._first) < ENDING_LAYERS:
            self._first.append(attention)

    def on_step(
        self,
        index: int,
        timestep: float,
        latents: torch.Tensor,
        noise_cond: torch.Tensor,
        noise_uncond: torch.Tensor | None,
    ) -> None:
        if noise_uncond is not None:
            self._squares.append((noise_cond - noise_uncond).square().sum(dim=1))
        if not self._recording:
            return
        self._recorder.stop()
        self._recording = False
        if self._layers:
            self._entropies.append(torch.stack(self._layers).mean(dim=0))
            if self._ends_B is not None:
                self._ending_Bhw = end_map(self._first, self._ends_B, (latents.shape[2], latents.shape[3]))

    def result(self) -> Signals:
        signals = {}
        if self._entropies:
            signals[ATTENTION_ENTROPY.name] = torch.stack(self._entropies).mean(dim=0)
        if self._ending_Bhw is not None and self._squares:
            signals[BRIGHT_ENDING.name] = ending_magnitude(torch.stack(self._squares), self._ending_Bhw)
        found = {name: values.float().cpu().numpy().copy() for name, values in signals.items()}
        self._reset()  # a batch's tensors are not kept until the next one
        return found


def ending_magnitude(squares_SBhw: torch.Tensor, ending_Bhw: torch.Tensor) -> torch.Tensor:
    """Return the mean over S calls of ||difference * m||_2, divided by the mean of the mask m (Chen et al. 2025), (B,).

    Args:
        squares_SBhw: squared differences, summed over channels, on which the mask does not depend.
    """
    norms_SB = (squares_SBhw * ending_Bhw.square()).flatten(2).sum(dim=2).sqrt()
    return norms_SB.mean(dim=0) / ending_Bhw.flatten(1).mean(dim=1).clamp_min(1e-12)


def tiled_distances(images_SHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return distances (S, S) in [0, 1].

    A distance is the largest root mean square difference over the 4 x 4 tiles of two images.

    Source: Carlini et al. 2023, section 4.2: a plain L2 calls any two images alike that share a large even ground.
    Images are cut to a multiple of four.
    """
    count, height, width = images_SHWC.shape[:3]
    rows, columns = height // TILES, width // TILES
    cut = images_SHWC[:, : rows * TILES, : columns * TILES].astype(np.float32) / 255
    tiles = cut.reshape(count, TILES, rows, TILES, columns, -1)
    distances = np.zeros((count, count), np.float32)
    for one in range(count - 1):
        squares = np.square(tiles[one + 1 :] - tiles[one]).mean(axis=(2, 4, 5))
        distances[one, one + 1 :] = np.sqrt(squares.max(axis=(1, 2)))
    return distances + distances.T


def tiled_similarity(images_SHWC: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """Return minus each generation's tiled distance to the nearest other one of its prompt, (S,) in [-1, 0].

    The result is None for a single generation.

    Carlini et al. look for cliques among 500 generations; among the few of a census the nearest one must do.
    """
    if len(images_SHWC) < 2:
        return None
    distances = tiled_distances(images_SHWC)
    np.fill_diagonal(distances, np.inf)
    nearest: NDArray[np.float32] = -distances.min(axis=1)
    return nearest
