"""Signals and maps in the rows of a scan: where they stand, what they are, and that they say when they do not apply."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from memscan.census.signals import not_applicable
from memscan.config import CensusConfig, EmbedderConfig, SignalsConfig
from memscan.errors import ConfigError
from memscan.io.images import decode, decode_mask
from memscan.models.embedder import load_embedder
from memscan.models.generator import Generator
from pipelines.ray.stage import StageSetup
from pipelines.run_folder.inputs import model_ids
from pipelines.scan.stages import Census, Judge, Sample
from tests.models.test_embedder import vision_model
from tests.support.tiny_world import TinyWorld

ALL = {"noise_norm", "noise_norm_first", "attention_entropy", "bright_ending", "tiled_l2", "copy_similarity"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> EmbedderConfig:
    folder = tmp_path_factory.mktemp("clip")
    vision_model().save_pretrained(folder)
    return EmbedderConfig(kind="transformers", path=str(folder), resize="square", size=32)


def generations(table: pa.Table) -> list[dict[str, Any]]:
    return [one | {"caption": row["caption"]} for row in table.to_pylist() for one in row["generations"]]


def changed(plan: StageSetup, **sections: Any) -> StageSetup:
    return dataclasses.replace(plan, config=plan.config.model_copy(update=sections))


def test_maps_stand_where_something_is_memorised(plan: StageSetup, prompts: pa.Table) -> None:
    """Each is what two calls by hand give, in 8 bits; its share in the foreground is a sum over the mask."""
    found = generations(Census(plan)(prompts))
    assert {one["label"] for one in found} == {"VM", "NM"}
    for one in found:
        if one["label"] == "NM":
            assert one["localization"] is None
            assert one["localized_foreground"] is None
            continue
        map_HW, mask_HW = decode_mask(one["localization"]), decode_mask(one["evidence"]["generation_mask"])
        assert map_HW.shape == (8, 8)  # the latent grid of 64 pixels
        np.testing.assert_allclose(map_HW, by_hand(plan.config, one["caption"], one["seed"]), atol=0.003)
        cells = mask_HW.reshape(8, 8, 8, 8).mean(axis=(1, 3))
        share = (map_HW * cells).sum() / map_HW.sum()
        assert one["localized_foreground"] == pytest.approx(share, abs=1e-4)


def by_hand(config: CensusConfig, caption: str, seed: int) -> np.ndarray:
    generator = Generator.load(config.generator)
    scheduler = generator.scheduler
    scheduler.set_timesteps(config.generator.steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    with torch.no_grad():
        cond, uncond = (
            generator.checkpoint.unet(x, scheduler.timesteps[0], generator.encode([text]).clone()).sample
            for text in (caption, "")
        )
    squares = ((cond - uncond) ** 2).sum(dim=1)[0]
    return (squares / squares.max()).numpy()


def test_signals_of_every_generation(plan: StageSetup, prompts: pa.Table) -> None:
    found = generations(Census(plan)(prompts))
    for one in found:
        signals = dict(one["signals"])
        assert set(signals) == ALL
        assert signals["copy_similarity"] == pytest.approx(one["similarity"])
        assert signals["noise_norm"] == pytest.approx(one["noise_norm"])
        assert -1 < signals["tiled_l2"] <= 0
    pair = [one for one in found if one["label"] == "VM"][:2]
    images = [decode(one["evidence"]["generation"]) / 255 for one in pair]
    tiles = ((images[0] - images[1]) ** 2).reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4))
    assert dict(pair[0]["signals"])["tiled_l2"] == pytest.approx(-(tiles.max() ** 0.5), abs=1e-6)


def test_switched_off_they_are_absent_and_nothing_else_changes(plan: StageSetup, prompts: pa.Table) -> None:
    without = changed(
        plan,
        signals=SignalsConfig(attention=False),
        generator=plan.config.generator.model_copy(update={"samples": 1}),
    )
    on, off = generations(Census(plan)(prompts)), generations(Census(without)(prompts))
    assert {name for one in off for name, _ in one["signals"]} == ALL - {
        "attention_entropy",
        "bright_ending",
        "tiled_l2",
    }
    for one in off:
        same = next(other for other in on if other["seed"] == one["seed"])
        assert {**one, "signals": None} == {**same, "signals": None}
    reasons = not_applicable(
        dict.fromkeys(ALL - {"attention_entropy", "bright_ending", "tiled_l2"}, 1), {}, without.config
    )
    assert "switched off" in reasons["attention_entropy"]
    assert "each was made alone" in reasons["tiled_l2"]
    assert set(reasons) == {"attention_entropy", "bright_ending", "tiled_l2", "semantic_similarity"}


def test_similarity_of_meaning_to_the_match(plan: StageSetup, prompts: pa.Table, clip: EmbedderConfig) -> None:
    """1 where the match is the image itself; else the cosine of both images by the encoder alone."""
    meant = changed(plan, signals=SignalsConfig(semantic=clip))
    fused = Census(meant)
    table = fused(prompts)
    encoder, index = load_embedder(clip), fused.work[1].index
    rows = {index.fetch(row).reference_id: row for row in range(index.manifest.rows)}
    for one in generations(table):
        signals = dict(one["signals"])
        assert set(signals) == ALL | {"semantic_similarity"}
        if one["label"] == "VM":
            assert signals["semantic_similarity"] == pytest.approx(1, abs=1e-3)
            own = encoder.embed([decode(one["evidence"]["generation"])])[0]
            other = encoder.embed([index.fetch(rows[one["match_id"]]).image_HWC])[0]
            assert signals["semantic_similarity"] == pytest.approx(float(own @ other), abs=1e-5)
    assert Judge(meant)(Sample(meant)(prompts)).equals(table)


def test_the_encoder_is_part_of_the_identity_and_its_absence_is_not(
    tiny_world: TinyWorld, clip: EmbedderConfig, tmp_path: Path
) -> None:
    plain = tiny_world.config(tmp_path)
    assert "signals" not in plain.content()
    meant = plain.model_copy(update={"signals": SignalsConfig(semantic=clip)})
    assert meant.fingerprint() != plain.fingerprint()
    assert set(model_ids(meant)) == {*model_ids(plain), "semantic"}
    bare = plain.model_copy(update={"signals": SignalsConfig(semantic=EmbedderConfig(path="clip.pt"))})
    with pytest.raises(ConfigError, match=r"signals\.semantic\.sha256"):
        model_ids(bare)
