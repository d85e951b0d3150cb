"""Cross-attention made visible: what each position of the latent looks at in the caption.

The stock processors never form the probabilities. While a recorder is on, the cross-attention layers of a UNet run
through one that does, by the same formula; self-attention is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

CROSS = "attn2"  # diffusers' name of the attention from latent to caption


@dataclass(frozen=True)
class Attention:
    """Probabilities of one layer in one call: rows_BPT, mean over heads, float32; P positions, T tokens."""

    layer: str
    rows_BPT: torch.Tensor


def cross_layers(unet: Any) -> dict[str, Any]:
    """Cross-attention modules by name, in the order of the network. Empty where there are none."""
    if not hasattr(unet, "named_modules"):
        return {}
    return {name: module for name, module in unet.named_modules() if name.rsplit(".", 1)[-1] == CROSS}


def has_cross_attention(unet: Any) -> bool:
    """Whether the network attends to the caption in layers of its own, as a UNet does."""
    return bool(cross_layers(unet))


class AttentionRecorder:
    """Records the cross-attention of every call, from `with` to the end of the block.

    Args:
        unet: a `UNet2DConditionModel`.
        names: layers to record; all of `cross_layers` by default.

    Attributes:
        seen: what the last call gave, by layer, in order; emptied with `take`.
    """

    def __init__(self, unet: Any, names: list[str] | None = None) -> None:
        layers = cross_layers(unet)
        self._layers = {name: layers[name] for name in (layers if names is None else names)}
        self._stock: dict[str, Any] = {}
        self.seen: list[Attention] = []

    def __enter__(self) -> AttentionRecorder:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Put the recording processors in."""
        for name, layer in self._layers.items():
            if name not in self._stock:
                self._stock[name] = layer.processor
                layer.processor = _Recording(name, self.seen)

    def stop(self) -> None:
        """Put the stock processors back."""
        for name, processor in self._stock.items():
            self._layers[name].processor = processor
        self._stock.clear()

    def take(self) -> list[Attention]:
        """What was seen since the last time."""
        seen = list(self.seen)
        self.seen.clear()
        return seen


class _Recording:
    """softmax(QK^T / sqrt(d)) V with the probabilities kept; as diffusers' `AttnProcessor` for attention to text."""

    def __init__(self, name: str, seen: list[Attention]) -> None:
        self._name, self._seen = name, seen

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = attn.head_to_batch_dim(attn.to_k(text)), attn.head_to_batch_dim(attn.to_v(text))
        weights = attn.get_attention_scores(query, key, attention_mask)
        mean_BPT = weights.detach().float().unflatten(0, (-1, attn.heads)).mean(dim=1)
        self._seen.append(Attention(self._name, mean_BPT))
        out = attn.batch_to_head_dim(torch.bmm(weights, value))
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor  # type: ignore[no-any-return]


def end_map(layers: Sequence[Attention], ends_B: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Attention to each caption's first end token on the latent grid (B, h, w), mean over layers.

    Args:
        layers: of one call, one row a caption; coarser ones are enlarged to the grid (bilinear).
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
    """-sum a log a over the tokens of the attention that all positions pay together, (B,), in nats.

    Source: Ren et al. 2024, equation 3 (the entropy of the mean over pixels).
    """
    shares_BT = rows_BPT.mean(dim=1)
    return -torch.xlogy(shares_BT, shares_BT).sum(dim=1)
