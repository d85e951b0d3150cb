"""The GPU figures rehearsed on a CPU: every part runs, results come as they are made, nothing foreign is imported."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_quick, host_cost
from benchmarks._gpu_parts import PARTS, Setting
from benchmarks._roofline import Peaks, work_of

pytestmark = pytest.mark.waits  # for a process that it started

ROOT = Path(__file__).resolve().parent.parent

# Missing on a bare GPU machine, and not carried there (docs/speed.md).
ABSENT = ("ray", "hdbscan", "s3fs", "moto", "boto3", "mypy", "flask", "xdist")
REHEARSAL = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # None: an import fails, and whoever looks finds nothing
from benchmarks.gpu_quick import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_without_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    command = [sys.executable, "-c", REHEARSAL, "--rehearse", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(out.read_text())
    assert list(last["parts"]) == list(PARTS)
    assert {row["state"] for row in last["parts"].values()} == {"done"}
    found = {name: row["found"] for name, row in last["parts"].items()}
    assert found["exactness"]["float32 off"]["holds"]
    assert found["sd1"]["levels_from_stock"] < 0.01
    assert found["screen"]["largest_difference"] < 1e-4
    assert found["verdicts"]["bfloat16"]["generations"] > 0


def test_a_part_that_fails_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(setting: Setting) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    def endless(setting: Setting) -> dict[str, Any]:
        while True:
            pass

    def fine(setting: Setting) -> dict[str, Any]:
        return {"value": 1}

    parts = {"broken": (broken, 9.0), "endless": (endless, 0.01), "fine": (fine, 9.0)}
    monkeypatch.setattr(gpu_quick, "PARTS", parts)
    out = tmp_path / "figures" / "quick.json"

    def states(minutes: float) -> tuple[int, dict[str, str]]:
        arguments = argparse.Namespace(rehearse=True, parts=list(parts), minutes=minutes, out=out)
        code = gpu_quick._measure(arguments)
        return code, {name: row["state"] for name, row in json.loads(out.read_text())["parts"].items()}

    assert states(5) == (1, {"broken": "failed", "endless": "out of time", "fine": "done"})
    assert states(0) == (0, dict.fromkeys(parts, "not begun"))


def test_a_machine_without_a_gpu_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_quick.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_work_is_the_closed_form_of_a_matrix_product_and_of_attention() -> None:
    """Bytes: each operand read and the result written, once. FLOP: 2 per multiply-add."""
    one, other = torch.zeros(8, 16, device="meta"), torch.zeros(16, 4, device="meta")
    product = work_of(lambda: one @ other)
    assert (product.flops, product.moved, product.kernels) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4), 1)
    q, k = torch.zeros(2, 3, 10, 8, device="meta"), torch.zeros(2, 3, 6, 8, device="meta")
    attention = work_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
    assert (attention.flops, attention.kernels) == (2 * 2 * 3 * 10 * 6 * (8 + 8), 1)
    assert attention.moved == 4 * (2 * q.numel() + 2 * k.numel())
    assert work_of(lambda: one.t().reshape(2, 64)).kernels == 1  # the copy that a reshape of a transpose needs
    assert product.seconds(Peaks(flops=1e3, bandwidth=1e9, name="slow")) == pytest.approx(product.flops / 1e3)


def test_reads_and_copies_are_counted() -> None:
    def reads() -> None:
        there = torch.zeros(4).to("meta")
        if there.sum() > 0:
            raise AssertionError

    work = work_of(reads)
    assert sum(work.reads.values()) == 1
    assert work.copied == 16


def test_the_host_reads_nothing_in_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    host_cost.main(["--model", "tiny", "--batch", "2", "--steps", "2", "--repeats", "1"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert [row["reads"] for row in figures.values()] == [0, 0]
    assert all(row["copied_bytes_per_image"] <= 65536 for row in figures.values())
    assert figures["ours"]["kernels"] <= 1.05 * figures["stock network"]["kernels"]
