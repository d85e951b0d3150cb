"""This module makes verdicts on prompts from their generations.

A census row holds a prompt's generations, each with FB-Mem's label. `verdict` says whether one prompt is flagged, with
which label, how severely, and on what evidence. `tally` does so for batches, `summary` for the whole census.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memscan.census.matches import matched
from memscan.census.signals import agreement_of, mean_signals
from memscan.config import MetricConfig, VerdictConfig
from memscan.metric.decision import margin_of
from memscan.records import LABELS, Label


@dataclass(frozen=True)
class Verdict:
    """A verdict is what a prompt's generations say about the prompt.

    `best` is the position of the best evidence in the generations that were given; None if the prompt is not
    flagged. `margin` is how far that generation's deciding score lies above its threshold, in score units.
    `match_counts` says how many memorised generations match each of `match_ids`. `signals` are means over the
    generations that have the signal. `agreement` is described at `agreement_of`.
    """

    label: Label
    severity: float
    share: float
    samples: int
    best: int | None = None
    margin: float = 0.0
    match_ids: tuple[str, ...] = ()
    match_counts: tuple[int, ...] = ()
    noise_norm: float | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None

    @property
    def flagged(self) -> bool:
        return self.label is not Label.NM


def needed(samples: int, rule: VerdictConfig) -> float:
    """Return how many of `samples` generations must be memorised to flag a prompt; 0.3 of 10 gives exactly 3."""
    return max(1.0, rule.min_share * samples - 1e-9)


def verdict(generations: Sequence[Mapping[str, Any]], rule: VerdictConfig, metric: MetricConfig) -> Verdict:
    """Give the verdict on one prompt from its generations (rows of `records.GENERATION`, in any order).

    The prompt is flagged if at least the share `rule.min_share` of its generations is not NM. The label is the most
    frequent one among the memorised generations; ties go to the more severe label (VM, FM, BM). The best evidence is
    the generation of that label with the largest margin. Severity is the mean harm over all generations. `match_ids`
    are the distinct training images of the memorised generations, most frequent first; ties go to that of the best
    evidence, and then by id. NM matches never count.

    Raises:
        ValueError: no generations, or a label that is not one of the four.
    """
    if not generations:
        raise ValueError("a verdict needs at least one generation")
    labels = [Label(generation["label"]) for generation in generations]
    counts = Counter(label for label in labels if label is not Label.NM)
    memorised = sum(counts.values())
    harm = harm_of(rule)
    samples = len(labels)
    severity = sum(harm[label.value] for label in labels) / samples
    share = memorised / samples
    norms = [float(g["noise_norm"]) for g in generations if g.get("noise_norm") is not None]
    norm = sum(norms) / len(norms) if norms else None
    if memorised < needed(samples, rule):
        return Verdict(Label.NM, severity, share, samples, noise_norm=norm, signals=mean_signals(generations))
    label = max(counts, key=lambda one: (counts[one], -LABELS.index(one.value)))
    margins = [
        margin_of(Label(g["label"]), float(g["foreground"]), float(g["background"]), metric, g.get("missing") or ())
        for g in generations
    ]
    best = max(
        (position for position, one in enumerate(labels) if one is label),
        key=lambda p: (
            margins[p],
            generations[p]["foreground"] + generations[p]["background"],
            -generations[p]["sample"],
        ),
    )
    matches = matched(generations, str(generations[best]["match_id"]))
    return Verdict(
        label,
        severity,
        share,
        samples,
        best,
        margins[best],
        tuple(matches),
        tuple(matches.values()),
        norm,
        mean_signals(generations),
        agreement_of(label, [g for g, one in zip(generations, labels, strict=True) if one is label]),
    )


def harm_of(rule: VerdictConfig) -> dict[str, float]:
    """Return the harm per label.

    A label that a configuration leaves out keeps its published value (VM 2, FM 1.5, BM 0.5, NM 0).
    """
    harm = {str(label): value for label, value in {**VerdictConfig().harm, **rule.harm}.items()}
    return {label: harm[label] for label in LABELS}
