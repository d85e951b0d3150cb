"""The first step of the shipped world's model: costs, reuse, attention, and what its detectors find."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import roc_auc_score

from memscan.detection.base import Need
from memscan.detection.first_step import FirstStepper, bank_seeds
from memscan.detection.one_step import AttentionEntropy, MidScheduleNoiseNorm, NoiseNorm, OneStepDcs
from memscan.detection.released import PADDED_ENTROPY
from memscan.detection.specifications import SAMPLED
from memscan.evaluation import detectors
from memscan.models.attention import AttentionRecorder, entropy
from memscan.models.calls import CallCounter
from memscan.models.generator import Generator
from memscan.planted.world import read_truth
from memscan.records import TRUTH

CAPTIONS = ["a plain red disc on a plain blue ground", "kodren borlabraerk wall calendar and gift set", "x"]


def without_guidance(generator: Generator) -> Generator:
    return Generator(generator.checkpoint, generator.config.model_copy(update={"guidance": 1.0}))


def test_the_unconditional_prediction_is_paid_once_a_seed(planted_generator: Generator) -> None:
    stepper = FirstStepper(planted_generator, bank_seeds(4))
    with CallCounter(planted_generator.checkpoint.unet) as counter:
        stepper(CAPTIONS)
        assert counter.calls == 3 * 4 + 4
        stepper(CAPTIONS[:2])
        assert counter.calls == 3 * 4 + 4 + 2 * 4
    with CallCounter(planted_generator.checkpoint.unet) as counter:
        assert without_guidance(planted_generator).generate(CAPTIONS, [1, 2, 3]).signals == {}
        assert counter.calls == 3 * planted_generator.config.steps


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_sampling_takes_up_the_first_step(planted_generator: Generator, scheduler: str) -> None:
    """The same images, less one call in each half of guidance."""
    rule = planted_generator.config.model_copy(update={"scheduler": scheduler, "steps": 4, "batch_size": 3})
    generator = Generator(planted_generator.checkpoint, rule)
    seeds = bank_seeds(2)
    step = FirstStepper(generator, seeds)(CAPTIONS[:2])
    assert step.empty_SCHW is not None
    first = torch.stack([step.empty_SCHW.repeat(2, 1, 1, 1), step.outputs_PSCHW.flatten(0, 1)])
    captions, pairs = [c for c in CAPTIONS[:2] for _ in seeds], seeds * 2
    with CallCounter(generator.checkpoint.unet) as whole:
        plain = generator.generate(captions, pairs)
    with CallCounter(generator.checkpoint.unet) as saved:
        reused = generator.generate(captions, pairs, first)
    assert whole.calls - saved.calls == 2 * len(captions)
    # Other batches round differently in the last bits: at most one level of 255.
    assert np.abs(plain.images_BHWC.astype(int) - reused.images_BHWC.astype(int)).max() <= 1
    np.testing.assert_allclose(plain.signals["noise_norm_first"], reused.signals["noise_norm_first"], rtol=1e-3)
    np.testing.assert_allclose(
        NoiseNorm().score(step), reused.signals["noise_norm_first"].reshape(2, 2).mean(axis=1), rtol=1e-3
    )


def test_what_applies_to_a_model(planted_generator: Generator) -> None:
    assert FirstStepper(planted_generator, bank_seeds(2)).available == {
        Need.GUIDANCE,
        Need.CROSS_ATTENTION,
        Need.SEVERAL_SEEDS,
    }
    assert FirstStepper(without_guidance(planted_generator), bank_seeds(1)).available == {Need.CROSS_ATTENTION}
    blind = Generator(dataclasses.replace(planted_generator.checkpoint, unet=_transformer()), planted_generator.config)
    assert Need.CROSS_ATTENTION not in FirstStepper(blind, bank_seeds(1)).available


def _transformer() -> torch.nn.Module:
    """A denoiser that mixes caption and latent in one attention has no layer of its own for the caption."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=16,
        pos_embed_max_size=8,
    )


def test_recording_attention_changes_nothing_and_is_taken_off(planted_generator: Generator) -> None:
    unet = planted_generator.checkpoint.unet
    text = planted_generator.encode(CAPTIONS).clone()
    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = unet(x, 999, encoder_hidden_states=text).sample
        with AttentionRecorder(unet) as recorder:
            recorded = unet(x, 999, encoder_hidden_states=text).sample
        seen = recorder.take()
    torch.testing.assert_close(plain, recorded, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert {layer.rows_BPT.shape for layer in seen} == {(3, 64, text.shape[1]), (3, 16, text.shape[1])}
    for layer in seen:
        torch.testing.assert_close(layer.rows_BPT.sum(dim=2), torch.ones(3, layer.rows_BPT.shape[1]))
    assert recorder.take() == []


def test_entropy_has_its_closed_form() -> None:
    even, sharp = torch.full((1, 5, 8), 1 / 8), torch.eye(8)[:1].expand(1, 5, 8)
    torch.testing.assert_close(entropy(torch.cat([even, sharp])), torch.tensor([float(np.log(8)), 0.0]))


def test_memorised_captions_of_the_shipped_world(planted_generator: Generator) -> None:
    """Held out: the probe's timestep was chosen on world 2. AUC 1.000 there; bounds leave room for another machine."""
    truth = [row for at, row in enumerate(read_truth().to_pylist()) if row["label"] != "NM" or at % 4 == 0]
    memorised = np.array([row["label"] != "NM" for row in truth])
    step = FirstStepper(planted_generator, bank_seeds(4), rows=192)([row["caption"] for row in truth])
    auc = {}
    with torch.no_grad():
        for detector in (MidScheduleNoiseNorm(), OneStepDcs(), NoiseNorm(), AttentionEntropy()):
            auc[detector.spec.name] = roc_auc_score(memorised, detector.score(step).numpy())
    assert auc["noise_norm_probe"] >= 0.995
    assert auc["one_step_dcs"] >= 0.97
    # The published norm at T does badly where captions name everything that is in the picture: docs/detection.md.
    assert 0.5 < auc["noise_norm"] < 0.9
    assert 0.5 < auc["attention_entropy_first"] < 0.9


def test_signals_of_a_scan_are_rows_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four memorised and eight ordinary prompts; docs/detection.md has all. What does not apply says so."""
    truth = read_truth().to_pylist()
    few = [row for row in truth if row["label"] == "VM"][:4] + [row for row in truth if row["label"] == "NM"][:8]
    monkeypatch.setattr(detectors, "read_truth", lambda world: pa.Table.from_pylist(few, schema=TRUTH))
    document = detectors.evaluate_detectors(seeds=2)
    signals = document["signals"]
    assert set(signals) == {card.name for card in (*SAMPLED, PADDED_ENTROPY)}
    assert signals["semantic_similarity"]["missing"] == ["an image encoder for meaning (signals.semantic)"]
    for name, row in signals.items():
        assert (row["calls"], row["added"]) == (2 * 10 * 2, 0)
        assert ("auc" in row) == (name != "semantic_similarity")
        assert row.get("nan", 0) == 0
    assert signals["copy_similarity"]["auc"] > 0.9
    assert signals["tiled_l2"]["auc"] > 0.9
    lines = detectors.detector_table(document).splitlines()
    assert len(lines) == 4 + len(document["detectors"]) + 1 + len(signals)
    assert sum("does not apply: needs an image encoder" in line for line in lines) == 1
    json.dumps(document)
