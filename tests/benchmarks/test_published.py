"""The published sizes: parameters and arithmetic of the networks that speed is measured on."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import ARCHITECTURES, EmbedderSized, SegmenterSized


def tera(call: object, *inputs: torch.Tensor, **more: object) -> float:
    """TFLOP of a call on tensors without memory."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*inputs, **more)  # type: ignore[operator]
    return float(counter.get_total_flops()) / 1e12


@pytest.mark.parametrize(("name", "parameters"), [("sd1", 859.5e6), ("sd2", 865.9e6), ("xl", 2567.5e6)])
def test_denoiser_and_decoder_cost_what_the_published_ones_do(name: str, parameters: float) -> None:
    made = ARCHITECTURES[name]
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(**made.unet), diffusers.AutoencoderKL(**made.vae)
        side = made.unet["sample_size"]
        latents, text = torch.zeros(1, 4, side, side), torch.zeros(1, 77, made.unet["cross_attention_dim"])
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if made.double else None
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(parameters, rel=1e-4)
    denoiser = tera(unet, latents, torch.tensor(1, device="meta"), text, added_cond_kwargs=added)
    assert (denoiser, tera(vae.decode, latents)) == pytest.approx(made.tera, rel=2e-3)


def test_segmenter_and_embedder_have_their_sizes() -> None:
    with torch.device("meta"):
        segmenter, embedder = SegmenterSized().eval(), EmbedderSized().eval()
        image = torch.zeros(1, 3, 1024, 1024)
    # BiRefNet itself has 2.53 TFLOP and 221 million parameters; SSCD's ResNet-50 at 288 pixels has .014 TFLOP.
    assert tera(segmenter, image) == pytest.approx(2.53, rel=0.05)
    assert sum(p.numel() for p in segmenter.parameters()) == pytest.approx(221e6, rel=0.05)
    assert tera(embedder, image[:, :, :288, :288]) == pytest.approx(0.014, rel=0.05)


def test_small_ones_run_on_a_cpu() -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert SegmenterSized(small=True).eval()(images).shape == (2, 1, 64, 64)
        assert EmbedderSized(small=True).eval()(images).shape == (2, 512)
