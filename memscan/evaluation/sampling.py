"""This module measures whether faster modes of sampling give the same verdicts.

Verdicts are compared generation by generation, with the same prompt, seed and thresholds. A mode that changes images
may be as correct as the plain one and still disagree with it. What is measured here is whether the figures of one mode
can stand for those of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memscan.census.rates import ClusterMoments, clustered_interval
from memscan.records import Label

REJECTED = "rejected"

Labels = Mapping[tuple[str, int], str]


@dataclass(frozen=True)
class Mode:
    """A mode of sampling is a change to the plain one (float32, with nothing done for speed).

    Args:
        spec: in a few words.
        generator, resources: keys of the configuration's sections.
        lossy: whether images change by more than rounding.
    """

    spec: str
    generator: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    lossy: bool = False


PLAIN = Mode("float32, nothing done for speed", {"dtype": "float32"}, {"fast": "off", "compile": "off"})
MODES = {
    "fast": Mode("float32, shared branches, fused projections", resources={"fast": "on"}),
    "bfloat16": Mode("bfloat16, shared branches, fused projections", {"dtype": "bfloat16"}, {"fast": "on"}),
    "float16": Mode("float16, shared branches, fused projections", {"dtype": "float16"}, {"fast": "on"}),
    "solver": Mode("20 steps of DPM-Solver++", {"steps": 20, "scheduler": "DPMSolverMultistepScheduler"}, lossy=True),
    "late-guidance": Mode("guidance in the first half of the steps", {"guided_share": 0.5}, lossy=True),
    "cached": Mode("deep features every second step", {"cache_interval": 2}, lossy=True),
}


def compare_labels(plain: Labels, other: Labels) -> dict[str, Any]:
    """Compare the verdicts of two modes on the same generations.

    Args:
        plain, other: label, or `REJECTED`, by prompt and sample.

    Returns:
        generations; equal: how many have the same label; rate: their share, and `low`, `high`, its 95 % interval
        (samples of one prompt count for what they tell); memorised: of the plain way; lost: of these, NM in the other;
        gained: NM of the plain way that are memorised in the other; changes: pairs of different labels, their number.

    Raises:
        ValueError: the generations are not the same.
    """
    if plain.keys() != other.keys():
        raise ValueError("the two ways have different generations")
    changes = Counter(f"{plain[key]} to {other[key]}" for key in plain if plain[key] != other[key])
    sizes, hits = Counter(name for name, _ in plain), Counter(key[0] for key in plain if plain[key] == other[key])
    counts = [(size, hits[name]) for name, size in sizes.items()]
    moments = ClusterMoments(
        len(counts),
        sum(n for n, _ in counts),
        sum(k for _, k in counts),
        sum(n * n for n, _ in counts),
        sum(n * k for n, k in counts),
        sum(k * k for _, k in counts),
    )
    low, high = clustered_interval(moments)
    return {
        "generations": len(plain),
        "equal": moments.k,
        "rate": moments.k / len(plain) if plain else None,
        "low": low,
        "high": high,
        "memorised": sum(map(_is_memorised, plain.values())),
        "lost": sum(_is_memorised(plain[key]) and other[key] == Label.NM.value for key in plain),
        "gained": sum(plain[key] == Label.NM.value and _is_memorised(other[key]) for key in plain),
        "changes": dict(changes.most_common()),
    }


def _is_memorised(label: str) -> bool:
    return label not in (Label.NM.value, REJECTED)


def agreement_table(document: Mapping[str, Any]) -> str:
    """Return the evaluation as Markdown."""
    lines = [
        (
            f"{document['prompts']} prompts, {document['samples']} generations each, {document['steps']} steps of "
            f"{document['scheduler']}, guidance {document['guidance']:g}, on {document['device']}; "
            f"against {PLAIN.spec}."
        ),
        "",
        "| | what it is | equal verdicts | 95 % | memorised, lost, gained | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in document["modes"].items():
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        moved = f"{row['memorised']}, {row['lost']}, {row['gained']}"
        rate = f"{row['rate']:.2%} of {row['generations']:,}"
        lines.append(f"| {name} | {MODES[name].spec} | {rate} | {interval} | {moved} | {row['seconds']:.0f} |")
    plain = document["seconds"]
    return "\n".join([*lines, "", f"The plain mode took {plain:.0f} seconds."])
