"""Captions to what the denoiser is conditioned on: one text encoder for SD 1.x and 2.x, two for SD XL.

SD XL (Podell et al. 2023, arXiv 2307.01952, section 2.1) concatenates the second to last hidden states of both encoders
along the width, and adds the second one's pooled output, with the image's sizes, to the time embedding (section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memscan.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Text:
    """Encoded captions, on the device.

    Args:
        hidden_NTD: embeddings of the tokens.
        pooled_NP: embeddings of the captions; None but for SD XL.
    """

    hidden_NTD: Tensor
    pooled_NP: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> Text:
        chosen = list(rows)
        return Text(self.hidden_NTD[chosen], None if self.pooled_NP is None else self.pooled_NP[chosen])

    def __len__(self) -> int:
        return len(self.hidden_NTD)

    def copy(self) -> Text:
        """Copies that gradients may flow through, which tensors of inference mode refuse."""
        return Text(self.hidden_NTD.clone(), None if self.pooled_NP is None else self.pooled_NP.clone())


def joined(one: Text, other: Text) -> Text:
    """The rows of both."""
    if one.pooled_NP is None or other.pooled_NP is None:
        return Text(torch.cat([one.hidden_NTD, other.hidden_NTD]))
    return Text(torch.cat([one.hidden_NTD, other.hidden_NTD]), torch.cat([one.pooled_NP, other.pooled_NP]))


class TextEncoder:
    """The text encoders of a checkpoint.

    Args:
        batch_size: captions encoded at once.
    """

    def __init__(self, checkpoint: Checkpoint, batch_size: int) -> None:
        self._checkpoint, self._size = checkpoint, batch_size

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> Text:
        """Encode captions, truncated to the model's token limit as the stock pipeline does."""
        size = self._size
        parts = [self._encode(list(captions[start : start + size])) for start in range(0, len(captions), size)]
        if not parts:
            return self._nothing()
        pooled = [part.pooled_NP for part in parts if part.pooled_NP is not None]
        return Text(torch.cat([part.hidden_NTD for part in parts]), torch.cat(pooled) if pooled else None)

    def empty(self) -> Text:
        """The empty caption (N = 1), or what a checkpoint takes for it: XL's is all zeros by its own setting."""
        text = self([""])
        if self._checkpoint.zero_empty and text.pooled_NP is not None:
            return Text(torch.zeros_like(text.hidden_NTD), torch.zeros_like(text.pooled_NP))
        return text

    def _encode(self, captions: list[str]) -> Text:
        parts = self._checkpoint
        if parts.text_encoder_2 is None:
            return Text(_run(parts.text_encoder, *_tokens(parts.tokenizer, captions, parts.max_tokens))[0])
        first, second = (
            _run(encoder, *_tokens(tokenizer, captions, parts.max_tokens), output_hidden_states=True)
            for encoder, tokenizer in (
                (parts.text_encoder, parts.tokenizer),
                (parts.text_encoder_2, parts.tokenizer_2),
            )
        )
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Text(hidden, second.text_embeds)

    def _nothing(self) -> Text:
        one = self._encode([""])
        return Text(one.hidden_NTD[:0], None if one.pooled_NP is None else one.pooled_NP[:0])


def size_ids(height: int, width: int, like: Tensor) -> Tensor:
    """SD XL's condition on sizes (1, 6): original size, no crop, target size; in the text's precision."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=like.dtype, device=like.device)


def _tokens(tokenizer: Any, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def _run(encoder: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    masked = getattr(encoder.config, "use_attention_mask", False)
    device = encoder.device
    return encoder(ids.to(device), attention_mask=mask.to(device) if masked else None, **options)
