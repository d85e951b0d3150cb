"""The benchmarks of the sampling path run on a CPU at the smallest sizes, and what they say of results holds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import chain, reduce, sampling, signals
from benchmarks._timeline import Timeline, covered
from benchmarks.published import ARCHITECTURES, build_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries' own code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning"),
]


def last_line(printed: str) -> dict[str, Any]:
    return dict(json.loads(printed.splitlines()[-1]))


@pytest.mark.long
def test_sampling_compares_the_same_images_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    """On the planted checkpoint, which predicts v; the rehearsal of `gpu_quick` does it with the other networks."""
    options = ["--model", "planted", "--steps", "2", "--batch", "2", "--one-by-one", "2", "--screen", "6"]
    sampling.main([*options, "--screen-batch", "2", "--screen-loop", "3", "--device", "cpu", "--threads", "1"])
    result = last_line(capsys.readouterr().out)
    assert result["benchmark"] == "sampling"
    assert set(result["ratio"]) == {"one by one", "batched"}
    assert result["levels_from_stock"] < 0.01  # of 255: rounding of float32
    assert result["screen"]["largest_difference"] < 1e-4
    assert 0 < result["share_of_peak"]["ours"] < 1.2  # the peak is measured, on a machine that others use
    assert {"torch", "device", "date"} <= set(result["machine"])


@pytest.mark.long
def test_sampling_times_the_lossy_modes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "planted", "--steps", "2", "--batch", "2", "--one-by-one", "1", "--images", "2", "--lossy"]
    sampling.main([*options, "--screen", "0", "--device", "cpu", "--threads", "1"])
    result = last_line(capsys.readouterr().out)
    assert set(sampling.LOSSY) < set(result["images_per_second"])
    assert result["levels_from_stock"] < 0.01
    assert "screen" not in result


def test_arithmetic_is_that_of_the_published_network_less_what_is_shared(tmp_path: Any) -> None:
    """SD 1.x: two rows a step and the decoder; sharing saves 2.5 % of a guided step."""
    with torch.device("meta"):
        pipeline = build_pipeline("sd1", tmp_path, device="meta")
    row, decoder = ARCHITECTURES["sd1"].tera or (math.nan, math.nan)
    assert sampling._flop(pipeline, 50, shared=False) / 1e12 == pytest.approx(100 * row + decoder, rel=2e-3)
    assert sampling._flop(pipeline, 50, shared=True) / 1e12 == pytest.approx(97.5 * row + decoder, rel=2e-3)


def test_chain_goes_the_scans_way(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny", "--small", "--steps", "2", "--batch", "2", "--samples", "2", "--prompts", "3"]
    chain.main([*options, "--references", "9", "--one-by-one", "1", "--device", "cpu", "--threads", "1"])
    result = last_line(capsys.readouterr().out)
    assert result["generations"] == result["with_evidence"] == 6
    assert 4 <= result["candidates"] <= 9
    assert set(result["seconds"]) == {"wall", "busy", "denoiser", "decoder", "segmenter", "embedder", "metric"}
    wall, busy = result["seconds"].pop("wall"), result["seconds"].pop("busy")
    assert all(0 < value <= 1.001 * wall for value in result["seconds"].values())
    assert busy > 0  # CPU time of all threads: two halves overlap, so it may be more than the wall time
    assert set(result["ratio"]) == {"judged after", "sampling alone", "script"}


@pytest.mark.long
def test_reduce_measures_every_size_and_the_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_process: None
) -> None:
    """What a process of its own does for each figure is done here by calls."""

    def called(kind: str, folder: Path) -> dict[str, Any]:
        reduce._child(kind, folder)
        return last_line(capsys.readouterr().out) | {"children_mib": 0.0}

    monkeypatch.setattr(reduce, "_run_child", called)
    monkeypatch.setattr(sys, "argv", ["reduce", "--rows", "200", "400", "--loop", "400"])
    reduce.main()
    result = last_line(capsys.readouterr().out)
    assert {rows: figures["flagged"] for rows, figures in result["figures"].items()} == {"200": 10, "400": 20}
    assert all(figures["driver_mib"] > 10 for figures in result["figures"].values())
    assert result["judging"]["rows"] == 400
    assert isinstance(result["slope"], float)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=12))
def test_covered_is_the_union(pairs: list[tuple[int, int]]) -> None:
    """Against every unit of time counted once."""
    spans = [(float(start), float(start + length)) for start, length in pairs]
    units = {at for start, length in pairs for at in range(start, start + length)}
    assert covered(spans) == len(units)


def test_a_timeline_gives_back_what_the_function_gives() -> None:
    timeline = Timeline(torch.device("cpu"))
    double = timeline.wrap("double", lambda x, *, more=0: 2 * x + more)
    assert [double(1), double(2, more=1)] == [2, 5]
    (first, second) = timeline.spans()["double"]
    assert 0 <= first[0] <= first[1] <= second[0] <= second[1]
    timeline.clear()
    assert timeline.spans() == {}


@pytest.mark.gpu
def test_a_gpus_profile_knows_when_it_was_busy() -> None:
    from benchmarks._machine import matrix_peak
    from benchmarks._timeline import busy

    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    active, wall = busy(lambda: [torch.mm(matrix, matrix) for _ in range(200)], device)
    assert 0.5 * wall < active <= wall
    assert matrix_peak(device, torch.bfloat16) > 1e12


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "graphs"])
def test_both_run_on_a_gpu(compile: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "tiny", "--steps", "4", "--compile", compile, "--dtype", "float32"]
    sampling.main([*common, "--screen", "64"])
    assert last_line(capsys.readouterr().out)["levels_from_stock"] < 0.5
    chain.main([*common, "--small", "--references", "20"])
    result = last_line(capsys.readouterr().out)
    assert 0 < result["busy"] <= 1.001
    assert 0 < result["denoiser_of_busy"] <= 1.1


def test_signals_cost_no_call(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny", "--steps", "2", "--batch", "2", "--repeats", "1", "--device", "cpu", "--threads", "1"]
    signals.main(options)
    result = last_line(capsys.readouterr().out)
    assert set(result["calls"].values()) == {2 * 2 * 2}
    assert all(value > 0 for value in result["milliseconds"].values())
