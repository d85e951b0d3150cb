"""A census of a model that our own loop does not know: the real command, a tiny transformer denoiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memscan.errors import ConfigError
from memscan.models.adapters import NOISE_NORMS
from pipelines.cli import app
from pipelines.reduce.job import reduce_run
from pipelines.run_folder.inputs import generator_id
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table
from pipelines.scan.job import run_content
from tests.support.stock_models import save_pixart
from tests.support.tiny_world import MEMORISED, ORDINARY, SAMPLES, TinyWorld

IMAGES = {"tiled_l2", "copy_similarity"}
ATTENDED = ("attention_entropy", "bright_ending")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pixart(tmp_path_factory.mktemp("pixart") / "checkpoint")


def scanned(tiny_world: TinyWorld, pixart: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a run by the command."""
    file = tiny_world.write_yaml(out.with_suffix(".yaml"), out)
    overrides = {"generator.path": str(pixart), **changes}
    arguments = [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    result = CliRunner().invoke(app, ["scan", str(file), *arguments])
    assert result.exit_code == 0, result.stderr
    run = Run.load(str(out))
    assert run.state == "complete"
    return [row for number in run.parts for file in run.files(number) for row in read_table(file).to_pylist()]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_transformer_is_scanned_reduced_and_reported(
    tiny_world: TinyWorld, in_process: None, pixart: Path, tmp_path: Path, guidance: float
) -> None:
    out = tmp_path / "run"
    rows = scanned(tiny_world, pixart, out, **{"generator.guidance": guidance})
    done = [row for row in rows if row["status"] == "done"]
    assert len(done) == len(MEMORISED) + len(ORDINARY)
    generations = [generation for row in done for generation in row["generations"]]
    assert len(generations) == SAMPLES * len(done)
    for generation in generations:
        assert generation["label"] in ("VM", "FM", "BM", "NM")
        assert {name for name, _ in generation["signals"]} == IMAGES | (set(NOISE_NORMS) if guidance > 1 else set())
        mapped = guidance > 1 and generation["label"] != "NM"
        assert (generation["localization"] is not None) == mapped
        assert (generation["noise_norm"] is None) == (guidance <= 1)  # absent, never zero
    document = reduce_run(str(out))
    facts = document["method"]["generator"]
    assert facts == Run.load(str(out)).manifest["generator"]
    assert (facts["adapter"], facts["pipeline"]) == ("stock", "PixArtSigmaPipeline")
    counts = dict.fromkeys([*IMAGES, *(NOISE_NORMS if guidance > 1 else ())], len(generations))
    assert document["signals"]["generations"] == counts
    absent = document["signals"]["not_applicable"]
    assert set(absent) == {*NOISE_NORMS, *ATTENDED, "semantic_similarity"} - set(counts)
    assert all("stock pipeline" in absent[name] for name in ATTENDED)
    report = (out / "report.html").read_text()
    assert "the stock PixArtSigmaPipeline of diffusers with DPMSolverMultistepScheduler" in report
    assert ("guidance is off" in report) == (guidance <= 1)


def test_a_screen_is_refused_at_once(tiny_world: TinyWorld, pixart: Path, tmp_path: Path) -> None:
    config = tiny_world.config(tmp_path / "run", generator__path=str(pixart), screen__threshold=1.0)
    with pytest.raises(ConfigError, match=r"screen: a screen needs .* stock PixArtSigmaPipeline; leave it out"):
        run_content(config)


def test_the_identity_names_the_adapter(tiny_world: TinyWorld, pixart: Path, tmp_path: Path) -> None:
    config = tiny_world.config(tmp_path / "run", generator__path=str(pixart)).generator
    assert generator_id(config).endswith("+stock:PixArtSigmaPipeline:DPMSolverMultistepScheduler")
    other = config.model_copy(update={"scheduler": "DDIMScheduler"})
    assert generator_id(other).endswith(":DDIMScheduler")
    plain = tiny_world.config(tmp_path / "run")
    assert "adapter" not in plain.content()["generator"]
    assert plain.content()["generator"]["scheduler"] == "DDIMScheduler"
    assert tiny_world.config(tmp_path / "run", generator__adapter="stock").fingerprint() != plain.fingerprint()
