"""The denoiser run in parts against the stock network: shared branches, padding, feature caching, compiled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.published import build_pipeline
from memscan.models.acceleration import Acceleration, accelerate
from memscan.models.graphs import Graphed
from memscan.models.unet import SplitUNet, why_not

ALL = Acceleration(share=True, fuse=True)
# Float32 kernels on other numbers of rows add up in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    return {name: build_pipeline(name, folder).unet for name in ("tiny", "tiny-xl")}


def inputs(name: str, count: int, copies: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a denoiser call for so many images; the second half of the latents equals the first."""
    draw = torch.Generator().manual_seed(count)
    latents = torch.randn(count, 4, 16, 16, generator=draw).to(dtype)
    width = {"tiny": 32, "tiny-xl": 56}[name]
    text = torch.randn(count * copies, 7, width, generator=draw).to(dtype)
    arguments = {"sample": torch.cat([latents] * copies), "timestep": torch.tensor(500), "encoder_hidden_states": text}
    if name == "tiny-xl":
        pooled = torch.randn(count * copies, 24, generator=draw).to(dtype)
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(count * copies, 6, dtype=dtype)}
    return arguments


def assert_near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within a share of the largest value."""
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("name", ["tiny", "tiny-xl"])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_shared_branches_change_nothing(unets: dict[str, Any], name: str, copies: int, dtype: torch.dtype) -> None:
    unet = unets[name].to(dtype)
    arguments = inputs(name, 3, copies, dtype)
    expected = unet(**arguments, return_dict=False)[0]
    assert_near(SplitUNet(unet)(**arguments, copies=copies)[0], expected, TOLERANCE[dtype])
    unet.to(torch.float32)


@pytest.mark.parametrize("name", ["tiny", "tiny-xl"])
@torch.inference_mode()
def test_a_short_batch_is_padded_and_cut(unets: dict[str, Any], name: str) -> None:
    split = SplitUNet(unets[name], rows=5)
    seen: list[int] = []
    full = split.full
    split.full = lambda *arguments: seen.append(len(arguments[0])) or full(*arguments)  # type: ignore[func-returns-value]
    for count in (2, 5):
        arguments = inputs(name, count)
        assert_near(split(**arguments, copies=2)[0], unets[name](**arguments, return_dict=False)[0])
    assert seen == [5, 5]


@torch.inference_mode()
def test_the_first_self_attention_is_taken_once(unets: dict[str, Any]) -> None:
    unet = unets["tiny"]
    rows: list[int] = []
    first = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    hooks = [
        part.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
        for part in (unet.down_blocks[0].resnets[0], first.attn1, first.attn2)
    ]
    SplitUNet(unet)(**inputs("tiny", 3), copies=2)
    for hook in hooks:
        hook.remove()
    assert rows == [3, 3, 6]


@torch.inference_mode()
def test_fused_projections_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = build_pipeline("tiny", tmp_path).unet
    arguments = inputs("tiny", 2)
    expected = unet(**arguments, return_dict=False)[0]
    fast = accelerate(unet, ALL, rows=2)
    assert_near(fast(**arguments, copies=2)[0], expected)
    assert "Fused" in type(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor).__name__
    assert_near(accelerate(unet, ALL, rows=2)(**arguments, copies=2)[0], expected)  # again, on the fused network


@pytest.mark.parametrize("name", ["tiny", "tiny-xl"])
@torch.inference_mode()
def test_cached_features_are_exact_where_nothing_deep_has_changed(unets: dict[str, Any], name: str) -> None:
    """On the same input a shallow step gives what a full one gives; on another it differs; step 0 is always full."""
    unet = unets[name]
    split, arguments, other = SplitUNet(unet, interval=3), inputs(name, 2), inputs(name, 2)
    other["sample"] = other["sample"] + 0.5
    expected = unet(**arguments, return_dict=False)[0]
    fresh = unet(**other, return_dict=False)[0]
    for step in (0, 1, 2):
        assert_near(split(**arguments, copies=2, step=step)[0], expected)
    assert_near(split(**other, copies=2, step=3)[0], fresh)
    assert_near(split(**arguments, copies=2, step=6)[0], expected)
    shallow = split(**other, copies=2, step=7)[0]
    assert 1e-4 < float((shallow - fresh).abs().max() / fresh.abs().max()) < 1


@torch.inference_mode()
def test_cached_features_of_the_captions_serve_without_guidance(unets: dict[str, Any]) -> None:
    unet, arguments = unets["tiny"], inputs("tiny", 2)
    split = SplitUNet(unet, interval=2)
    both = split(**arguments, copies=2, step=0)[0]
    alone = {"sample": arguments["sample"][:2], "timestep": arguments["timestep"]}
    cond = split(**alone, encoder_hidden_states=arguments["encoder_hidden_states"][2:], copies=1, step=1)[0]
    assert_near(cond, both[2:])


def test_a_network_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    unet = build_pipeline("tiny", tmp_path).unet
    unet.down_blocks[0].attentions[0].transformer_blocks[0].only_cross_attention = True
    assert why_not(unet) == "the denoiser's transformers have other parts"
    assert accelerate(unet, Acceleration(share=True), rows=2) is unet
    with pytest.raises(ValueError, match="feature caching is not known there"):
        accelerate(unet, Acceleration(), rows=2, interval=2)
    with pytest.raises(ValueError, match="other parts"):
        SplitUNet(unet)


def test_nothing_asked_for_is_the_network_itself(unets: dict[str, Any]) -> None:
    assert accelerate(unets["tiny"], Acceleration(), rows=2) is unets["tiny"]


@pytest.mark.long
@torch.inference_mode()
def test_compiled_code_is_the_same_denoiser(unets: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as one graph; with a compiler of C++ or CUDA it would be the same trace through inductor."""
    compiled: list[Any] = []

    def trace(function: Any, **_options: Any) -> Any:
        compiled.append(torch._dynamo.optimize("aot_eager", nopython=True)(function))
        return compiled[-1]

    monkeypatch.setattr("memscan.models.acceleration.compile_function", trace)
    name = "tiny-xl"  # has all that `tiny` has, and the pooled text
    fast = accelerate(unets[name], Acceleration(share=True, compile="inductor"), rows=3, interval=2)
    for step, count in enumerate((3, 2)):
        arguments = inputs(name, count)
        out = fast(**arguments, copies=2, step=2 * step)[0]
        assert_near(out, unets[name](**arguments, return_dict=False)[0], 1e-4)
    assert len(compiled) == 2


@torch.inference_mode()
def test_graphs_run_as_they_are_without_a_gpu(unets: dict[str, Any]) -> None:
    fast = accelerate(unets["tiny"], Acceleration(share=True, compile="graphs"), rows=2)
    arguments = inputs("tiny", 2)
    assert isinstance(fast.full, Graphed)
    assert_near(fast(**arguments, copies=2)[0], unets["tiny"](**arguments, return_dict=False)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["graphs", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_a_gpu_runs_compiled_code_and_graphs(tmp_path: Path, compile: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    unet = build_pipeline("tiny", tmp_path, device="cuda", dtype=dtype).unet
    stock = build_pipeline("tiny", tmp_path, device="cuda", dtype=dtype).unet
    stock.load_state_dict(unet.state_dict())
    fast = accelerate(unet.to(memory_format=torch.channels_last), Acceleration(True, True, True, compile), rows=4)
    for count in (4, 3, 4):
        arguments = {
            name: value.cuda() if name == "timestep" else value.cuda().to(dtype)
            for name, value in inputs("tiny", count).items()
        }
        tolerance = 1e-2 if dtype is torch.float32 else 5e-2  # tensor cores round to 10 bits by default
        assert_near(fast(**arguments, copies=2)[0], stock(**arguments, return_dict=False)[0], tolerance)
