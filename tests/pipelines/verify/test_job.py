"""The verification job on the tiny world: what it finds of a copy and of a repair, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from memscan.errors import MemscanError, ModelError, RunError
from memscan.mitigation.settings import LocalitySettings, VerifySettings
from pipelines.cli import app
from pipelines.evaluate.locality import evaluate_locality
from pipelines.verify.job import verify
from tests.support.alone import Alone

UNET = "unet/diffusion_pytorch_model.safetensors"
FEW = VerifySettings(panel=4, references=8, targets=2, attack_steps=2, attack_batch=2, draws=1, pictures=2, strata=2)


def silent(text: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def reduced(reduced_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced run of the tiny world to be verified in: two prompts are flagged."""
    run = tmp_path_factory.mktemp("verified") / "run"
    shutil.copytree(reduced_run, run)
    return run


@pytest.fixture(scope="module")
def wiped(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "repair" that nobody can miss: a UNet whose last layer is noise."""
    return changed(tiny_world, tmp_path_factory.mktemp("wiped") / "wiped", break_output)


def changed(tiny_world: Any, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(tiny_world.folder / "checkpoint", folder)
    weights = load_file(str(folder / UNET))
    change(weights)
    save_file(weights, str(folder / UNET), {"format": "pt"})
    return folder


def break_output(weights: dict[str, Any]) -> None:
    weights["conv_out.weight"] = torch.randn(
        weights["conv_out.weight"].shape, generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module")
def verified(reduced: Path, wiped: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        Alone().install(patch)
        return verify(str(reduced), str(wiped), FEW, workers=1, say=silent)


def test_a_wiped_model_repeats_nothing(verified: dict[str, Any], reduced: Path) -> None:
    flagged = verified["prompts"]["flagged"]
    assert flagged["prompts"] == 2
    assert flagged["not_compared"] == 0
    assert flagged["classes"]["before"]["VM"]["count"] == 4
    assert flagged["classes"]["after"]["memorised"]["count"] == 0
    assert flagged["severity"]["removed"] == 1.0
    assert flagged["own_images"]["classes"]["before"]["VM"]["count"] == 4
    assert verified["prompts"]["paraphrases"]["prompts"] == 2
    assert verified["prompts"]["paraphrases"]["own_images"]["classes"]["after"]["memorised"]["count"] == 0
    assert verified["prompts"]["ordinary"]["prompts"] == 3  # of ten, whose ids say that no repair has seen them
    assert verified["attacked"] == {"attacked": 2, "controls": 2}
    # Three starts, one draw: two images give six outcomes a kind.
    for when in ("before", "after"):
        assert {kind: one["all"]["memorised"]["total"] for kind, one in verified["attack"][when].items()} == {
            "memorised": 6,
            "control": 6,
        }
    assert verified["utility"]["frechet"]["between"] > 0
    assert verified["utility_off"] is None
    assert verified["utility"]["encoder"].startswith("embedder:tiny")
    assert 0 < verified["changed"]["weights"] < verified["changed"]["of"]
    page = (reduced / "verified" / "report.html").read_text()
    assert "two cats in a basket" in page
    assert not (reduced / "verified" / "wiped" / ".work").exists()


def test_what_was_examined_is_not_examined_again(
    in_process: None, verified: dict[str, Any], reduced: Path, wiped: Path
) -> None:
    said: list[str] = []
    again = verify(str(reduced), str(wiped), FEW, workers=1, say=said.append)
    assert again == verified
    assert sum("was examined already" in line for line in said) == 2
    other = FEW.model_copy(update={"seed": 1})
    with pytest.raises(MemscanError, match="other settings"):
        verify(str(reduced), str(wiped), other, workers=1, say=silent)
    assert json.loads((reduced / "verified" / "wiped" / "verify.json").read_text()) == verified


@pytest.mark.slow
def test_switches_hold_for_paraphrases_and_spare_ordinary_prompts(
    verified: dict[str, Any], reduced: Path, tiny_world: Any, tmp_path: Path, monkeypatch: Any, alone: Alone
) -> None:
    """With a worker that dies after the second checkpoint: every attack is there once all the same."""
    import pipelines.verify.workers as work_module

    monkeypatch.setattr(work_module, "ROUND", 2)
    alone.die_after = 2
    switched = with_switches(tiny_world, reduced, tmp_path / "nemo")
    place = reduced / "verified" / "nemo"
    found = verify(str(reduced), str(switched), FEW, workers=1, say=silent)
    assert (alone.runs, alone.deaths) == (1, 1)  # the original is was examined already
    attacks = json.loads((place / "outcomes.json").read_text())["attacks"]
    starts = [(one["kind"], one["image"], one["start"]) for one in attacks]
    assert len(starts) == len(set(starts)) == 12
    assert found["scope"] == "prompt"
    assert found["utility_off"]["frechet"]["between"] > 1e-3  # the panel with half of all units off
    assert found["utility"]["frechet"]["ratio"] == 1.0
    assert found["utility"]["frechet"]["between"] == pytest.approx(0.0, abs=1e-6)
    ordinary = found["prompts"]["ordinary"]["classes"]
    assert ordinary["before"] == ordinary["after"]
    switches = json.loads((reduced / "verified" / "nemo" / "switches.json").read_text())
    assert len(switches["prompts"]) == 4  # two flagged prompts and a paraphrase of each
    table = json.loads((reduced / "verified" / "table.json").read_text())
    assert {one["name"] for one in table["methods"]} == {"nemo", "wiped"}


def test_locality(verified: dict[str, Any], reduced: Path, alone: Alone) -> None:
    """Embeddings from three starts an image, those that bring it back localised; a death between two rounds."""
    settings = LocalitySettings(starts=3, attack_steps=2, attack_batch=2, seeds=3, threshold_prompts=3, steps=10)
    alone.die_after = 1
    found = evaluate_locality(str(reduced), settings, workers=1, say=silent)
    assert (alone.runs, alone.deaths) == (1, 1)
    labels = [[draw["label"] for draw in image["draws"]] for image in found["images"]]
    assert [len(one) for one in labels] == [3, 3]
    assert [draw["start"] for draw in found["images"][0]["draws"]] == ["prompt", "noise", "unrelated"]
    assert found["searches"] == 6
    hits = [sum(label != "NM" for label in one) for one in labels]
    assert found["found"] == sum(hits)
    pairs = sum(one * (one - 1) // 2 for one in hits), hits[0] * hits[1]
    embeddings = found["embeddings"]["found"]
    assert (embeddings["within"]["pairs"], embeddings["between"]["pairs"]) == pairs
    assert found["embeddings"]["starts"]["within"]["pairs"] == 6
    page = (reduced / "verified" / "report.html").read_text()
    assert "Is it in one place?" in page
    assert "All repairs" in page
    assert not (reduced / "verified" / ".locality.work").exists()
    assert evaluate_locality(str(reduced), settings, workers=1, say=silent) == found
    with pytest.raises(MemscanError, match="not overwritten"):
        evaluate_locality(str(reduced), settings.model_copy(update={"seed": 1}), workers=1, say=silent)
    assert alone.runs == 1


def with_switches(tiny_world: Any, reduced: Path, folder: Path) -> Path:
    """A repair by switches: half of all units off for every flagged prompt."""
    from memscan.mitigation.card import write_card
    from memscan.mitigation.folder import load_original_unet, write_folder
    from memscan.mitigation.switches import write_switches
    from memscan.mitigation.units import BLOCKS, Layout, UnitSet
    from pipelines.mitigate.job import prepare

    original = tiny_world.folder / "checkpoint"
    unet, ready = load_original_unet(original), prepare(str(reduced))
    layout = Layout.of(unet, BLOCKS)
    units = UnitSet.of(layout.unit(flat) for flat in range(0, layout.count, 2))
    card = {
        "method": "nemo",
        "scope": "prompt",
        "settings": {},
        "seconds": 1.0,
        "run": {"name": "tiny", "fingerprint": ready.run.manifest["fingerprint"]},
        "original": {
            "name": "checkpoint",
            "id": ready.run.manifest["models"]["generator"],
            "sha256": "0" * 64,
        },
        "targets": [asdict(target) for target in ready.targets],
        "changed": {"tensors": 0, "weights": 0, "of": 1},
        "units": {"off": len(units), "of": layout.count, "share": len(units) / layout.count},
    }

    def more(out: Path) -> None:
        write_switches(str(out / "switches.json"), {"g": units}, {one.prompt_id: "g" for one in ready.targets})
        write_card(out, card)

    write_folder(original, unet, folder, more)
    return folder


def test_bad_input(
    reduced: Path, complete_run: Path, in_process: None, tiny_world: Any, wiped: Path, tmp_path: Path
) -> None:
    def widen(weights: dict[str, Any]) -> None:
        del weights["conv_out.bias"]

    with pytest.raises(RunError, match="has not been reduced"):
        verify(str(complete_run), str(wiped), FEW, str(tmp_path / "out"), say=silent)
    with pytest.raises(ModelError, match="no such folder"):
        verify(str(reduced), str(tmp_path / "nothing"), FEW, str(tmp_path / "out"), say=silent)
    half = changed(tiny_world, tmp_path / "half", widen)
    with pytest.raises(ModelError):
        verify(str(reduced), str(half), FEW, str(tmp_path / "out"), say=silent)
    shutil.rmtree(half)
    wide = other_architecture(tiny_world, half)
    with pytest.raises(ModelError, match="another architecture"):
        verify(str(reduced), str(wide), FEW, str(tmp_path / "out"), say=silent)
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["verify", str(reduced), str(wiped), "--set", "panle=3"])
    assert result.exit_code == 2
    assert "did you mean panel?" in result.output


def other_architecture(tiny_world: Any, folder: Path) -> Path:
    """The tiny checkpoint with a wider UNet."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(tiny_world.folder / "checkpoint", folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["block_out_channels"] = [8, 32]
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(str(folder / "unet"), safe_serialization=True)
    return folder
