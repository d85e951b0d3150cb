"""The table of docs/parity.md: what the authors' code gave, and what this version gives on the same inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parity.cases import Cut, cut_pairs
from memscan.config import MetricConfig
from memscan.metric import load_metric

STORED = Path(__file__).parent / "stored"


def stored(name: str) -> dict[str, Any]:
    """One stored comparison."""
    found: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def fbmem(variant: str) -> dict[str, tuple[float, float]]:
    """Our foreground and background score of every pair, by its name, on the canvas of the scripts."""
    metric = load_metric(MetricConfig.model_validate({"variant": variant, "canvas": 512}))
    found = {}
    for pair in cut_pairs():
        own, other = (metric.prepare(cut.image_HWC, mask_of(cut)) for cut in (pair.generated, pair.reference))
        (scores,) = metric.score(own, [other])
        found[pair.name] = scores.foreground, scores.background
    return found


def mask_of(cut: Cut) -> Any:
    return cut.alpha_HW.astype(np.float32) / np.float32(255)


def table() -> str:
    """Markdown."""
    theirs = stored("fbmem")
    release, paper = fbmem("release"), fbmem("paper")
    lines = [
        f"FB-Mem: {theirs['repository']} at {theirs['commit'][:7]} ({theirs['ran']}).",
        "",
        "| pair | authors' f, b | `release` | greatest difference | `paper` |",
        "|---|---|---|---|---|",
    ]
    for row in theirs["values"]:
        known = row["foreground"], row["background"]
        own, clean = release[row["pair"]], paper[row["pair"]]
        off = max(abs(a - b) for a, b in zip(known, own, strict=True))
        cells = [f"{values[0]:.4f}, {values[1]:.4f}" for values in (known, own, clean)]
        lines.append(f"| {row['pair']} | {cells[0]} | {cells[1]} | {off:.1e} | {cells[2]} |")
    return "\n".join(lines)
