"""This module records cross-attention: which tokens of the caption each position of the latent attends to.

The stock processors never form the probabilities. While a recorder is on, they are computed beside the cross-attention
layers of a UNet, by the same formula and from the same inputs; self-attention is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch

CROSS = "attn2"  # diffusers' name of the attention from latent to caption


@dataclass(frozen=True)
class Attention:
    """These are probabilities of one layer in one call: rows_BPT, mean over heads, float32; P positions, T tokens."""

    layer: str
    rows_BPT: torch.Tensor


def cross_layers(unet: Any) -> dict[str, Any]:
    """Return the cross-attention modules by name, in the order of the network.

    The result is empty if there are none.
    """
    if not hasattr(unet, "named_modules"):
        return {}
    return {name: module for name, module in unet.named_modules() if name.rsplit(".", 1)[-1] == CROSS}


def has_cross_attention(unet: Any) -> bool:
    """Return whether the network attends to the caption in layers of its own, as a UNet does."""
    return bool(cross_layers(unet))


class AttentionRecorder:
    """This records the cross-attention of every call inside a `with` block.

    The probabilities are computed a second time beside the network's own attention, which stays as it is: so do its
    outputs, to the last bit, and whatever kernels and fused projections it runs by. Compiled code is not seen.

    Args:
        unet: a `UNet2DConditionModel`.
        names: layers to record; all of `cross_layers` by default.
        see: told of each layer, in order; by default they are kept until `take`.
    """

    def __init__(
        self, unet: Any, names: list[str] | None = None, see: Callable[[Attention], None] | None = None
    ) -> None:
        layers = cross_layers(unet)
        self.layers = {name: layers[name] for name in (layers if names is None else names)}
        self._seen: list[Attention] = []
        self._see = see or self._seen.append
        self._hooks: list[Any] = []

    def __enter__(self) -> AttentionRecorder:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, rows: int | None = None) -> None:
        """Record from now on.

        Args:
            rows: only this number of last rows of a call, which are those with a caption.
        """
        self.stop()
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_pre_hook(partial(self._on_call, name, rows), with_kwargs=True))

    def stop(self) -> None:
        """Record no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take(self) -> list[Attention]:
        """Return what was recorded since the last time."""
        seen = list(self._seen)
        self._seen.clear()
        return seen

    @torch.no_grad()
    def _on_call(self, name: str, rows: int | None, layer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        last = slice(None) if rows is None else slice(-rows, None)
        hidden = args[0] if args else options["hidden_states"]
        text = args[1] if len(args) > 1 else options.get("encoder_hidden_states")
        self._see(Attention(name, _probabilities(layer, hidden[last], (hidden if text is None else text)[last])))


def _probabilities(layer: Any, hidden_BPD: torch.Tensor, text_BTD: torch.Tensor) -> torch.Tensor:
    """softmax(QK^T / sqrt(d)), mean over heads, as diffusers' `AttnProcessor` for attention to text without a mask."""
    text = layer.norm_encoder_hidden_states(text_BTD) if layer.norm_cross else text_BTD
    query = layer.head_to_batch_dim(layer.to_q(hidden_BPD))
    key = layer.head_to_batch_dim(layer.to_k(text))
    weights: torch.Tensor = layer.get_attention_scores(query, key)
    heads = weights.float().reshape(len(hidden_BPD), -1, *weights.shape[1:])
    return heads.mean(dim=1)


def end_map(layers: Sequence[Attention], ends_B: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return the attention to each caption's first end token on the latent grid (B, h, w), as the mean over layers.

    Args:
        layers: of one call, one row per caption; coarser ones are enlarged to the grid (bilinear).
        ends_B: positions of the first end tokens, int64.
    """
    height, width = shape
    maps = []
    for layer in layers:
        at_BP1 = ends_B[:, None, None].expand(-1, layer.rows_BPT.shape[1], 1)
        rows_BP = layer.rows_BPT.gather(2, at_BP1)[..., 0]
        side = round((rows_BP.shape[1] * height / width) ** 0.5)
        grid = rows_BP.reshape(len(rows_BP), 1, side, -1)
        maps.append(torch.nn.functional.interpolate(grid, shape, mode="bilinear")[:, 0])
    return torch.stack(maps).mean(dim=0)


def entropy(rows_BPT: torch.Tensor) -> torch.Tensor:
    """Return -sum a log a over the tokens of the attention of all positions together, (B,), in nats.

    Source: Ren et al. 2024, equation 3 (the entropy of the mean over pixels).
    """
    shares_BT = rows_BPT.mean(dim=1)
    return -torch.xlogy(shares_BT, shares_BT).sum(dim=1)
