"""The sampling rule that a checkpoint's author meant: kept, told as unsuited, or refused; never made into another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from memscan.config import GeneratorConfig
from memscan.errors import ConfigError, ModelError
from memscan.models.adapters import adapter_of
from memscan.models.noise_schedules import SUPPORTED, chosen, is_variance_preserving
from memscan.models.schedulers import make_scheduler
from memscan.models.stock import guidance_arguments
from memscan.planted.world import shipped_world
from pipelines.run_folder.inputs import generator_id

REFUSED = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "IPNDMScheduler",
    "CMStochasticIterativeScheduler",
    "KarrasVeScheduler",
    "ScoreSdeVeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "MyOwnScheduler",
)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped_world() / "checkpoint", tmp_path / "planted"))


def edit(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def config(folder: Path, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig(path=str(folder), **settings)


@pytest.mark.parametrize("name", REFUSED)
def test_other_noise_schedules_are_refused_by_name(planted: Path, name: str) -> None:
    edit(planted / "scheduler" / "scheduler_config.json", _class_name=name)
    for settings in ({}, {"scheduler": "DDIMScheduler"}, {"adapter": "stock"}):
        with pytest.raises(ModelError, match=f"has the scheduler {name}"):
            adapter_of(config(planted, **settings))
    with pytest.raises(ModelError, match=name):
        make_scheduler("DDIMScheduler", {"_class_name": name}, where="here")


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_is_sampled_by_the_stock_pipeline(planted: Path, name: str) -> None:
    edit(planted / "scheduler" / "scheduler_config.json", _class_name=name)
    adapter = adapter_of(config(planted))
    assert (adapter.kind, adapter.scheduler) == ("stock", name)


@pytest.mark.parametrize("name", [*SUPPORTED, "DPMSolverSDEScheduler", "FlaxDDIMScheduler", None])
def test_training_defaults_are_sampled_by_ddim_as_before(planted: Path, name: str | None) -> None:
    if name in ("LCMScheduler", "TCDScheduler"):
        return
    assert is_variance_preserving(name.removeprefix("Flax") if name else None)
    schedule = {"_class_name": name, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    assert chosen("auto", schedule) == "DDIMScheduler"
    assert chosen("PNDMScheduler", schedule) == "PNDMScheduler"


@pytest.mark.parametrize(
    "schedule",
    [
        {"_class_name": "LCMScheduler", "prediction_type": "epsilon"},
        {"_class_name": "TCDScheduler", "prediction_type": "epsilon"},
        {
            "_class_name": "EulerAncestralDiscreteScheduler",
            "timestep_spacing": "trailing",
            "prediction_type": "epsilon",
        },
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"},
    ],
)
def test_distilled_models_keep_their_scheduler_and_are_named_by_it(planted: Path, schedule: dict[str, Any]) -> None:
    before = generator_id(config(planted))
    edit(planted / "scheduler" / "scheduler_config.json", **schedule)
    adapter = adapter_of(config(planted))
    assert (adapter.kind, adapter.scheduler) == ("own", schedule["_class_name"])
    (warning,) = adapter.to_json(7.0)["warnings"]
    assert "generator.steps 50 and generator.guidance 7 do not suit" in warning
    assert not adapter_of(config(planted, steps=4, guidance=1.0)).warnings
    assert adapter_of(config(planted, scheduler="DDIMScheduler")).scheduler == "DDIMScheduler"
    assert "+" not in before
    assert generator_id(config(planted)).endswith(f"+{schedule['_class_name']}")


def test_a_pipeline_with_code_of_its_own_is_refused(planted: Path) -> None:
    edit(planted / "model_index.json", _class_name=["my_pipeline", "MyPipeline"])
    with pytest.raises(ModelError, match=r"pipeline with its own code \(my_pipeline.MyPipeline\)"):
        adapter_of(config(planted))
    edit(planted / "model_index.json", _class_name="StableDiffusionPipeline")
    (planted / "handler.py").write_text("# of the hub's inference: nothing that is loaded")
    assert adapter_of(config(planted)).kind == "own"
    (planted / "pipeline.py").write_text("")
    with pytest.raises(ModelError, match=r"pipeline.py"):
        adapter_of(config(planted))


def test_another_pipeline_over_the_same_parts_is_not_sampled_by_our_loop(planted: Path) -> None:
    edit(planted / "model_index.json", _class_name="StableDiffusionSAGPipeline")
    assert adapter_of(config(planted)).kind == "stock"


def test_guidance_goes_to_the_argument_that_means_it() -> None:
    rule = GeneratorConfig(path="x", guidance=4.0)
    qwen, flux, sd3 = {"true_cfg_scale", "guidance_scale"}, {"true_cfg_scale", "guidance_scale"}, {"guidance_scale"}
    assert guidance_arguments(qwen, rule, {"guidance_embeds": False}) == {"true_cfg_scale": 4.0}
    assert guidance_arguments(flux, rule, {"guidance_embeds": True}) == {"guidance_scale": 4.0}
    assert guidance_arguments(sd3, rule, {}) == {"guidance_scale": 4.0}
    with pytest.raises(ConfigError, match="the pipeline has no guidance"):
        guidance_arguments({"prompt"}, rule, {})
    assert guidance_arguments({"prompt"}, GeneratorConfig(path="x", guidance=1.0), {}) == {}


def test_a_negative_prompt_without_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect without guidance"):
        GeneratorConfig(path="x", guidance=1.0, negative_prompt="blurry")
