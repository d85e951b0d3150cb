"""This module turns captions into the denoiser's conditions.

SD 1.x and 2.x have one text encoder, and SD XL has two.

SD XL (Podell et al. 2023, arXiv 2307.01952, section 2.1) concatenates the second to last hidden states of both encoders
along the width, and adds the second one's pooled output, with the image's sizes, to the time embedding (section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memscan.errors import ConfigError
from memscan.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Text:
    """These are encoded captions, on the device.

    Args:
        hidden_NTD: embeddings of the tokens.
        pooled_NP: embeddings of the captions; None but for SD XL.
        ends_N: position of each caption's first end token, int64; None for text that stands for no caption.
    """

    hidden_NTD: Tensor
    pooled_NP: Tensor | None = None
    ends_N: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> Text:
        chosen = list(rows)
        return self._each(lambda values: values[chosen])

    def __len__(self) -> int:
        return len(self.hidden_NTD)

    def copy(self) -> Text:
        """Return copies through which gradients may flow; tensors of inference mode refuse gradients."""
        return self._each(lambda values: values.clone())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        parts = (self.hidden_NTD, self.pooled_NP, self.ends_N)
        hidden, pooled, ends = (None if part is None else change(part) for part in parts)
        assert hidden is not None
        return Text(hidden, pooled, ends)


def joined(*parts: Text) -> Text:
    """Return the rows of all, one after the other.

    If one of them lacks a value, the result lacks it too.
    """
    pooled = [part.pooled_NP for part in parts if part.pooled_NP is not None]
    ends = [part.ends_N for part in parts if part.ends_N is not None]
    return Text(
        torch.cat([part.hidden_NTD for part in parts]),
        torch.cat(pooled) if len(pooled) == len(parts) else None,
        torch.cat(ends) if len(ends) == len(parts) else None,
    )


class TextEncoder:
    """These are the text encoders of a checkpoint.

    Args:
        batch_size: captions encoded at once.
        clip_skip: last layers that are skipped for captions; none when not given.
    """

    def __init__(self, checkpoint: Checkpoint, batch_size: int, clip_skip: int | None = None) -> None:
        self._checkpoint, self._size, self._skip = checkpoint, batch_size, clip_skip or 0

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> Text:
        """Encode captions, truncated to the model's token limit as the stock pipeline does."""
        return self._all(captions, self._skip)

    @torch.inference_mode()
    def negative(self, caption: str) -> Text:
        """Encode a caption that guidance leads away from (N = 1), with all layers, as the stock pipelines do."""
        return self._all([caption], 0)

    def _all(self, captions: Sequence[str], skip: int) -> Text:
        size = self._size
        parts = [self._encode(list(captions[start : start + size]), skip) for start in range(0, len(captions), size)]
        return joined(*parts) if parts else self._encode([""], skip)[[]]

    def empty(self) -> Text:
        """Return the empty caption (N = 1) as a checkpoint encodes it; that of XL is all zeros by its own setting."""
        text = self.negative("")
        if self._checkpoint.zero_empty and text.pooled_NP is not None:
            return Text(torch.zeros_like(text.hidden_NTD), torch.zeros_like(text.pooled_NP))
        return text

    def _encode(self, captions: list[str], skip: int) -> Text:
        parts = self._checkpoint
        captions = [_expanded(caption, parts.expansions) for caption in captions]
        ids, mask = _tokens(parts.tokenizer, captions, parts.max_tokens)
        # Truncated captions end in one as well. argmax gives the first of several: padding is often the end token.
        ends = (ids == parts.tokenizer.eos_token_id).int().argmax(dim=1).to(parts.text_encoder.device)
        if parts.text_encoder_2 is None and skip:
            states = _run(parts.text_encoder, ids, mask, output_hidden_states=True).hidden_states
            network = getattr(parts.text_encoder, "text_model", parts.text_encoder)
            return Text(network.final_layer_norm(_skipped(states, skip + 1)), ends_N=ends)
        if parts.text_encoder_2 is None:
            return Text(_run(parts.text_encoder, ids, mask)[0], ends_N=ends)
        first, second = (
            _run(encoder, *_tokens(tokenizer, captions, parts.max_tokens), output_hidden_states=True)
            for encoder, tokenizer in (
                (parts.text_encoder, parts.tokenizer),
                (parts.text_encoder_2, parts.tokenizer_2),
            )
        )
        hidden = torch.cat([_skipped(each.hidden_states, skip + 2) for each in (first, second)], dim=-1)
        return Text(hidden, second.text_embeds, ends)


def _skipped(states: Sequence[Tensor], back: int) -> Tensor:
    """Return the hidden states so many from the end. Raises ConfigError if the encoder has fewer layers."""
    if back > len(states):
        raise ConfigError(
            f"skips all of the text encoder's {len(states) - 1} layers", where="generator.clip_skip", hint="lower it"
        )
    return states[-back]


def _expanded(caption: str, expansions: Sequence[tuple[str, str]]) -> str:
    """Return a caption in which every word of a textual inversion stands as the words of all its vectors."""
    for word, words in expansions:
        caption = caption.replace(word, words)
    return caption


def size_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return SD XL's condition on sizes (1, 6): original size, no crop, target size; in the text's precision."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=like.dtype, device=like.device)


def _tokens(tokenizer: Any, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def _run(encoder: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    masked = getattr(encoder.config, "use_attention_mask", False)
    device = encoder.device
    return encoder(ids.to(device), attention_mask=mask.to(device) if masked else None, **options)
