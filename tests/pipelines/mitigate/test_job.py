"""The mitigation job on the tiny world: any number of workers, killed workers, folders that are taken, bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from memscan.errors import MemscanError, ModelError, RunError
from memscan.mitigation.card import read_card
from memscan.mitigation.patch import Patch, patch_folder
from memscan.mitigation.settings import MitigationSettings
from memscan.models.generator import Generator
from pipelines.cli import app
from pipelines.mitigate.job import mitigate
from pipelines.reduce.outputs import LISTS
from tests.support.alone import Alone
from tests.support.killing import one_killed
from tests.support.tiny_world import NEMO_C

UNET = "unet/diffusion_pytorch_model.safetensors"


def publish(run: Path, census: dict[str, Any]) -> None:
    """Let census.json name the lists as they are now."""
    census["files"] = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in LISTS}
    (run / "census.json").write_text(json.dumps(census))


def silent(text: str) -> None:
    """Say nothing."""


def test_result_is_a_stock_folder_with_card_and_patch(
    reduced_run: Path, nemo_c: Path, tiny_world: Any, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    card = read_card(nemo_c)
    units = card["units"]
    assert 0 < units["off"] < units["of"]
    assert card["notes"] == ["2 of 2 clusters have one prompt: their union is that prompt's own units"]
    assert {target["caption"] for target in card["targets"]} == {"a red lighthouse on a cliff", "two cats in a basket"}
    pipeline = StableDiffusionPipeline.from_pretrained(str(nemo_c), local_files_only=True, safety_checker=None)
    zero = sum(
        int((module.weight == 0).all(dim=1).sum())
        for name, module in pipeline.unet.named_modules()
        if name.endswith("attn2.to_v")
    )
    assert zero == units["off"]
    original = tiny_world.folder / "checkpoint"
    patch = Patch.load(str(nemo_c / "patch.safetensors"))
    assert patch.changed_weights == card["changed"]["weights"]
    patch_folder(original, patch, tmp_path / "applied")
    patch_folder(tmp_path / "applied", patch, tmp_path / "reverted", reverse=True)
    mine, applied, reverted, old = (
        load_file(str(folder / UNET)) for folder in (nemo_c, tmp_path / "applied", tmp_path / "reverted", original)
    )
    assert all(torch.equal(mine[name], applied[name]) and torch.equal(old[name], reverted[name]) for name in old)
    assert not any(nemo_c.parent.glob(".*"))  # neither half a folder nor the workers' checkpoints are left


def test_switches_draw_what_the_zeroed_rows_draw(nemo_c: Path, tiny_world: Any, tmp_path: Path) -> None:
    from memscan.mitigation.switches import GuardedGenerator, read_switches, write_switches
    from memscan.mitigation.units import union
    from memscan.records import prompt_id

    groups, _ = read_switches(str(nemo_c / "switches.json"))
    captions = ["a red lighthouse on a cliff", "an ordinary caption number 3", "a red lighthouse on a cliff"]
    write_switches(str(tmp_path / "s.json"), {"x": union(groups.values())}, {prompt_id(captions[0]): "x"})
    config = tiny_world.config(tmp_path).generator
    plain = Generator.load(config)
    guarded = GuardedGenerator.guard(plain, str(tmp_path / "s.json")).generate(captions, [1, 2, 3])
    zeroed = Generator.load(config.model_copy(update={"path": str(nemo_c)})).generate(captions, [1, 2, 3])
    untouched = plain.generate(captions, [1, 2, 3])
    for row, wanted in enumerate((zeroed, untouched, zeroed)):
        # One grey level: a product with 0 and a sum of zeros differ in the last bit.
        difference = guarded.images_BHWC[row].astype(int) - wanted.images_BHWC[row].astype(int)
        assert abs(difference).max() <= 1
    assert abs(zeroed.images_BHWC[0].astype(int) - untouched.images_BHWC[0]).max() > 1


@pytest.mark.slow
def test_killed_worker_and_two_workers_give_the_same(
    reduced_run: Path, nemo_c: Path, ray_once: None, tmp_path: Path, monkeypatch: Any
) -> None:
    """Two workers of Ray Train, one of them killed after the first checkpoint: the units are those of one in peace."""
    import pipelines.mitigate.search as search_module

    monkeypatch.setattr(search_module, "ROUND", 2)
    out = tmp_path / "two"
    with one_killed(tmp_path / ".two.work", out) as killed:
        mitigate(str(reduced_run), MitigationSettings(**NEMO_C), str(out), workers=2, say=silent)
    assert killed
    one, two = read_card(nemo_c), read_card(out)
    assert one["units"] == two["units"]
    assert one["evidence"] == two["evidence"]
    assert (nemo_c / UNET).read_bytes() == (out / UNET).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_all_clusters_together_and_what_they_can_spare(
    reduced_run: Path, nemo_c: Path, alone: Alone, tmp_path: Path
) -> None:
    """One union over everybody, by the paper's timestep, pruned back; a death between two rounds loses nothing."""
    settings = {
        **NEMO_C,
        "scope": "all",
        "convention": "first",
        "prune": True,
        "paraphrases": 0,
        "embeddings": 4,
        "embedding_noise": 0.5,
    }
    alone.die_after = 1
    card = mitigate(str(reduced_run), MitigationSettings(**settings), str(tmp_path / "all"), workers=1, say=silent)
    assert alone.deaths == 1
    assert card["scope"] == "all"
    assert not (tmp_path / "all" / "switches.json").exists()
    assert len(card["evidence"]["searches"]) == 2 * 5  # each prompt and four noisy embeddings of it
    units = card["units"]
    assert units["off"] == units["groups"]["all"] < units["before_prune"]["all"]
    assert "units, summed over 1 groups" in (tmp_path / "all" / "README.md").read_text()
    other = read_card(nemo_c)
    assert other["units"]["before_prune"] is None
    assert len(other["evidence"]["searches"]) == 2 * 3
    assert other["evidence"]["threshold"] != card["evidence"]["threshold"]


def test_wanda_and_a_folder_that_is_taken(reduced_run: Path, alone: Alone, tmp_path: Path) -> None:
    out = tmp_path / "wanda"
    settings = MitigationSettings(method="wanda", wanda_steps=1)
    card = mitigate(str(reduced_run), settings, str(out), workers=1, say=silent)
    assert 0 < card["changed"]["weights"] < 0.02 * card["changed"]["of"]
    before = (out / UNET).read_bytes()
    assert mitigate(str(reduced_run), settings, str(out), workers=1, say=silent) == card  # complete already
    assert alone.runs == 1
    with pytest.raises(MemscanError, match="not overwritten"):
        mitigate(str(reduced_run), MitigationSettings(method="wanda", wanda_steps=2), str(out), workers=1, say=silent)
    assert (out / UNET).read_bytes() == before


@pytest.mark.slow
def test_finetuning_with_an_adversary(
    reduced_run: Path, nemo_c: Path, ray_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker here that dies after the first epoch, and two of Ray Train, end with the same weights to rounding; a
    loss that is not finite writes nothing."""
    common: dict[str, Any] = {
        "method": "finetune",
        "pruned": str(nemo_c),
        "epochs": 2,
        "steps_per_epoch": 2,
        "batch": 4,
        "micro_batch": 1,
        "attack_steps": 2,
        "attack_batch": 2,
        "rate": 1e-3,
    }
    settings = MitigationSettings(**common)
    broken = MitigationSettings(**{**common, "rate": 1e30, "method": "dedup", "pruned": None})
    with monkeypatch.context() as patch:
        runner = Alone(die_after=1)
        runner.install(patch)
        cards = {1: mitigate(str(reduced_run), settings, str(tmp_path / "1"), workers=1, say=silent)}
        assert runner.deaths == 1
        with pytest.raises(MemscanError, match="loss is not finite"):
            mitigate(str(reduced_run), broken, str(tmp_path / "nan"), workers=1, say=silent)
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
    cards[2] = mitigate(str(reduced_run), settings, str(tmp_path / "2"), workers=2, say=silent)
    assert not any(tmp_path.glob(".*"))
    one, two = (load_file(str(tmp_path / str(workers) / UNET)) for workers in (1, 2))
    config = json.loads((reduced_run / "run.json").read_text())["config"]
    original = load_file(str(Path(config["generator"]["path"]) / UNET))
    assert max(float((one[name] - original[name]).abs().max()) for name in one) > 1e-4
    # Sums of gradients in another order, through Adam: a hundredth of the largest step that was taken.
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 6e-5
    assert cards[1]["evidence"]["losses"] == pytest.approx(cards[2]["evidence"]["losses"], rel=1e-4)
    assert cards[1]["evidence"]["surrogates"] == cards[2]["evidence"]["surrogates"]
    assert sum(cards[1]["evidence"]["surrogates"].values()) >= len(cards[1]["targets"])


def test_bad_input(reduced_run: Path, complete_run: Path, in_process: None, tmp_path: Path) -> None:
    from memscan.census import flagged

    settings = MitigationSettings(**NEMO_C)
    with pytest.raises(RunError, match="has not been reduced"):
        mitigate(str(complete_run), settings, str(tmp_path / "x"), say=silent)
    empty = tmp_path / "empty"
    shutil.copytree(reduced_run, empty)
    rows = flagged.read_parquet(str(empty / "flagged" / "flagged.parquet"))
    census = json.loads((empty / "census.json").read_text())
    flagged.write_flagged(str(empty / "flagged"), pa.Table.from_batches([], schema=rows.schema), {})
    with pytest.raises(RunError, match="belongs to another reduce"):
        mitigate(str(empty), settings, str(tmp_path / "x"), say=silent)
    publish(empty, census)
    with pytest.raises(RunError, match="no prompt is flagged"):
        mitigate(str(empty), settings, str(tmp_path / "x"), say=silent)
    with pytest.raises(MemscanError, match="needs a pruned model"):
        mitigate(str(reduced_run), MitigationSettings(method="finetune"), str(tmp_path / "x"), workers=1, say=silent)
    with pytest.raises(MemscanError, match="cannot be shared by 3"):
        mitigate(str(reduced_run), MitigationSettings(method="dedup"), str(tmp_path / "x"), workers=3, say=silent)
    manifest = json.loads((empty / "run.json").read_text())
    manifest["models"]["generator"] = "checkpoint@000000000000"
    (empty / "run.json").write_text(json.dumps(manifest))
    flagged.write_flagged(str(empty / "flagged"), rows, {})
    publish(empty, census)
    with pytest.raises(ModelError, match="the run scanned checkpoint@000000000000"):
        mitigate(str(empty), settings, str(tmp_path / "x"), say=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_models_that_repairs_do_not_know_are_refused(tiny_world: Any, tmp_path: Path) -> None:
    from pipelines.mitigate.job import _refuse_others

    config = tiny_world.config(tmp_path)
    _refuse_others(config)
    stock = config.generator.model_copy(update={"adapter": "stock"})
    with pytest.raises(ModelError, match="the stock StableDiffusionPipeline of diffusers"):
        _refuse_others(config.model_copy(update={"generator": stock}))
    (tmp_path / "xl").mkdir()
    index = {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (tmp_path / "xl" / "model_index.json").write_text(json.dumps(index))
    double = config.generator.model_copy(update={"path": str(tmp_path / "xl")})
    with pytest.raises(ModelError, match="two text encoders"):
        _refuse_others(config.model_copy(update={"generator": double}))


def test_command_line_names_the_nearest_setting(reduced_run: Path) -> None:
    result = CliRunner().invoke(app, ["mitigate", str(reduced_run), "--method", "nemo", "--set", "seed_s=3"])
    assert result.exit_code == 2
    assert "did you mean seeds?" in result.output
    result = CliRunner().invoke(app, ["mitigate", str(reduced_run), "--method", "nemo", "--set", "seeds=1"])
    assert result.exit_code == 2
    assert "seeds" in result.output
