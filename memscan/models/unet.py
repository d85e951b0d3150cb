"""This module runs a Stable Diffusion UNet through its own modules, and does once what is the same for a guided batch.

Predictions with and without the caption start from the same latents, and nothing before the first cross-attention sees
the text: the first convolution, the first residual block and the first self-attention (the largest one) are computed
once for both. This is exact, and saves 2.5 % of a guided step of SD 1.x at 512 pixels. In SD XL the pooled text enters
every residual block, so only the first convolution is shared.

Feature caching (DeepCache, Ma et al. 2024, arXiv 2312.00858, section 3.3, branch 0) is not exact and off by default:
between full steps only the first layer down and the last two up are computed, over the deep features of the last full
step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Added = Mapping[str, Tensor]


class SplitUNet(nn.Module):
    """A `UNet2DConditionModel` whose rows may share latents.

    Args:
        unet: the network; its modules are used, not copied.
        rows: images that every call is padded to, so that compiled code and graphs see one shape; None: as they come.
        interval: feature caching: every step whose number this one divides is a full step; 1 switches caching off.

    Raises:
        ValueError: the network has parts that a Stable Diffusion UNet has not; see `why_not`.
    """

    def __init__(self, unet: Any, *, rows: int | None = None, interval: int = 1) -> None:
        super().__init__()
        reason = why_not(unet)
        if reason:
            raise ValueError(reason)
        self.unet, self.rows, self.interval = unet, rows, interval
        self._shares_time = unet.config.addition_embed_type is None
        self._features: Tensor | None = None
        # Replaced by their compiled or captured forms (`acceleration.py`).
        self.full: Callable[..., tuple[Tensor, Tensor]] = self._full
        self.shallow: Callable[..., Tensor] = self._shallow

    @property
    def config(self) -> Any:
        """This is the network's configuration."""
        return self.unet.config

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Added | None = None,
        return_dict: bool = False,
        copies: int = 1,
        step: int = 0,
        plain: bool = False,
    ) -> tuple[Tensor]:
        """Return predictions (N, C, h, w) in a tuple, as the network's own `forward` does.

        Args:
            sample: (N, C, h, w) in the network's precision; where `copies` is 2, its second half equals the first.
            timestep: scalar, on the network's device.
            encoder_hidden_states: text (N, T, D).
            added_cond_kwargs: pooled text and sizes, for SD XL.
            copies: how many rows have the same latents.
            step: number of the step, for feature caching: call with 0 before any other.
            plain: not compiled, so that hooks on the network's modules see the call.
        """
        latents = sample[: len(sample) // copies]
        count = len(latents)
        full, shallow = (self._full, self._shallow) if plain else (self.full, self.shallow)
        padding = 0 if plain or self.rows is None or count >= self.rows else self.rows - count
        latents, text = _padded(latents, 1, padding), _padded(encoder_hidden_states, copies, padding)
        added = {name: _padded(value, copies, padding) for name, value in (added_cond_kwargs or {}).items()}
        if self.interval > 1 and step % self.interval and self._features is not None:
            features = self._features[len(self._features) - len(text) :]  # late in sampling only captions are left
            out = shallow(latents, timestep, text, added, features)
        else:
            out, features = full(latents, timestep, text, added)
            self._features = features if self.interval > 1 else None
        if padding:
            out = out.reshape(copies, -1, *out.shape[1:])[:, :count].flatten(0, 1)
        return (out,)

    def _full(self, latents: Tensor, timestep: Tensor, text: Tensor, added: Added) -> tuple[Tensor, Tensor]:
        """Prediction, and the features that the last two layers up start from."""
        unet = self.unet
        emb = self._embedding(latents, timestep, text, added)
        x = unet.conv_in(latents)
        residuals = [x]
        for block in unet.down_blocks:
            for layer in range(len(block.resnets)):
                x = self._layer(block, layer, x, emb, text)
                residuals.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                residuals.append(x)
        x = _repeated(x, len(text))
        if getattr(unet.mid_block, "has_cross_attention", False):
            x = unet.mid_block(x, emb, encoder_hidden_states=text)
        else:
            x = unet.mid_block(x, emb)
        features = x
        for number, block in enumerate(unet.up_blocks):
            last = number == len(unet.up_blocks) - 1
            for layer in range(len(block.resnets)):
                if last and layer == len(block.resnets) - 2:
                    features = x
                x = self._up(block, layer, x, residuals.pop(), emb, text)
            for upsampler in block.upsamplers or ():
                x = upsampler(x, residuals[-1].shape[2:])
        return self._out(x), features

    def _shallow(self, latents: Tensor, timestep: Tensor, text: Tensor, added: Added, features: Tensor) -> Tensor:
        """Prediction from fresh outer layers over old deep features."""
        emb = self._embedding(latents, timestep, text, added)
        first = self.unet.conv_in(latents)
        second = self._layer(self.unet.down_blocks[0], 0, first, emb, text)
        block = self.unet.up_blocks[-1]
        x = features
        for layer, residual in ((len(block.resnets) - 2, second), (len(block.resnets) - 1, first)):
            x = self._up(block, layer, x, residual, emb, text)
        return self._out(x)

    def _embedding(self, latents: Tensor, timestep: Tensor, text: Tensor, added: Added) -> Tensor:
        """Of time (and, for XL, pooled text and sizes), a row for each row of text."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=latents[:1], timestep=timestep))
        more = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb.expand(len(text), -1)
        total: Tensor = emb if more is None else emb + more
        return total

    def _layer(self, block: Any, layer: int, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        if not self._shares_time:
            x = _repeated(x, len(text))
        x = block.resnets[layer](x, emb[: len(x)])
        if not getattr(block, "has_cross_attention", False):
            return x
        attention = block.attentions[layer]
        if len(x) < len(text):
            return _attend_shared(attention, x, text)
        out: Tensor = attention(x, encoder_hidden_states=text, return_dict=False)[0]
        return out

    def _up(self, block: Any, layer: int, x: Tensor, residual: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = block.resnets[layer](torch.cat([x, _repeated(residual, len(text))], dim=1), emb)
        if getattr(block, "has_cross_attention", False):
            x = block.attentions[layer](x, encoder_hidden_states=text, return_dict=False)[0]
        return x

    def _out(self, x: Tensor) -> Tensor:
        unet = self.unet
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return out


def call_options(unet: Any, copies: int, step: int, *, plain: bool = False) -> dict[str, int]:
    """Return the options of a call of this denoiser beyond those of stock ones; see `SplitUNet.forward`."""
    return {"copies": copies, "step": step, "plain": plain} if isinstance(unet, SplitUNet) else {}


def why_not(unet: Any) -> str | None:
    """Return why a network cannot be run by `SplitUNet`; None if it can."""
    config = unet.config
    blocks = [*unet.down_blocks, *unet.up_blocks]
    known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    other = {type(block).__name__ for block in blocks} - known
    if other:
        return f"the denoiser has a {min(other)}"
    if type(unet.mid_block).__name__ not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
        return "the denoiser has another middle block"
    if config.addition_embed_type not in (None, "text_time"):
        return f"the denoiser has conditions of kind {config.addition_embed_type!r}"
    if unet.class_embedding is not None or unet.encoder_hid_proj is not None or config.center_input_sample:
        return "the denoiser has conditions other than text and time"
    if unet.time_embed_act is not None or unet.conv_norm_out is None:
        return "the denoiser begins or ends in another way"
    attentions = [one for block in blocks for one in getattr(block, "attentions", ())]
    if not all(_is_plain(attention) for attention in attentions):
        return "the denoiser's transformers have other parts"
    return None


def _is_plain(attention: Any) -> bool:
    first = attention.transformer_blocks[0]
    return bool(
        attention.is_input_continuous
        and first.norm_type == "layer_norm"
        and first.pos_embed is None
        and first.attn2 is not None
        and not first.only_cross_attention
        and not getattr(first, "double_self_attention", False)
    )


def _attend_shared(attention: Any, x_BCHW: Tensor, text_NTD: Tensor) -> Tensor:
    """A `Transformer2DModel` whose input has fewer rows than its text: its first self-attention is taken once."""
    batch, _, height, width = x_BCHW.shape
    linear = attention.use_linear_projection
    tokens = attention.norm(x_BCHW)
    tokens = tokens if linear else attention.proj_in(tokens)
    tokens = tokens.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
    tokens = attention.proj_in(tokens) if linear else tokens
    first, *others = attention.transformer_blocks
    tokens = _repeated(tokens + first.attn1(first.norm1(tokens)), len(text_NTD))
    tokens = tokens + first.attn2(first.norm2(tokens), encoder_hidden_states=text_NTD)
    tokens = tokens + first.ff(first.norm3(tokens))
    for block in others:
        tokens = block(tokens, encoder_hidden_states=text_NTD)
    tokens = attention.proj_out(tokens) if linear else tokens
    image = tokens.reshape(len(text_NTD), height, width, -1).permute(0, 3, 1, 2).contiguous()
    image = image if linear else attention.proj_out(image)
    out: Tensor = image + _repeated(x_BCHW, len(text_NTD))
    return out


def _repeated(x: Tensor, rows: int) -> Tensor:
    """Rows over and over until there are so many; keeps channels-last, which `repeat` does not."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


def _padded(x: Tensor, copies: int, padding: int) -> Tensor:
    """Return each of `copies` groups of rows lengthened by its own last row."""
    if not padding:
        return x
    groups = x.reshape(copies, -1, *x.shape[1:])
    return torch.cat([groups, groups[:, -1:].expand(-1, padding, *groups.shape[2:])], dim=1).flatten(0, 1)
