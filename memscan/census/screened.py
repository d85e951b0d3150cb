"""This module estimates, for a census with a screen, the results of prompts that were not scanned, from audited ones.

Prompts fall into two strata: those at or above the threshold, all scanned, and those below it, of which a known share
was scanned. Figures estimate what a scan of all prompts of this census would give (`rates.Screened`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memscan.census.rates import Screened
from memscan.config import ScreenConfig
from memscan.intervals import CONFIDENCE
from memscan.records import ANY, LABELS, MEMORISED, Label

CENSUS, AUDIT, PASS = "census", "audit", "pass"
DECISIONS = (CENSUS, AUDIT, PASS)


def decisions(table: pa.Table) -> npt.NDArray[Any]:
    """Return the decision on every row; it is None without a screen."""
    if "decision" not in table.column_names:
        return np.full(table.num_rows, None, dtype=object)
    return np.asarray(table["decision"].to_numpy(zero_copy_only=False), dtype=object)


def count(
    decision_N: npt.NDArray[Any],
    done_N: npt.NDArray[np.bool_],
    label_N: npt.NDArray[np.int64],
    counts_NL: npt.NDArray[np.int64],
    weight_N: npt.NDArray[np.int64],
) -> Counter[tuple[str, str]]:
    """Return sums over done rows by decision.

    The keys are (decision, "rows"), (decision, "generations"), (decision, "inputs") and, for every label, (decision,
    "prompts/LABEL"), (decision, "generations/LABEL") and (decision, "inputs/LABEL").

    Args:
        weight_N: input rows folded into each row.
        label_N: position of the prompt's label in `LABELS`.
        counts_NL: generations by label; the same number of them in every scanned row.
    """
    sums: Counter[tuple[str, str]] = Counter()
    for decision in DECISIONS:
        mask_N = done_N & (decision_N == decision)
        if not mask_N.any():
            continue
        sums[decision, "rows"] = int(mask_N.sum())
        sums[decision, "generations"] = int(counts_NL[mask_N].sum())
        sums[decision, "inputs"] = int(weight_N[mask_N].sum())
        for position, label in enumerate(LABELS):
            of_label_N = mask_N & (label_N == position) & (decision != PASS)
            sums[decision, f"prompts/{label}"] = int(of_label_N.sum())
            sums[decision, f"inputs/{label}"] = int(weight_N[of_label_N].sum())
            sums[decision, f"generations/{label}"] = int(counts_NL[mask_N, position].sum())
    return sums


def strata(sums: Counter[tuple[str, str]]) -> Screened:
    """Return the two strata of the counts."""
    rows = {decision: sums[decision, "rows"] for decision in DECISIONS}
    return Screened(rows[CENSUS], rows[AUDIT] + rows[PASS], rows[AUDIT])


def summary(sums: Counter[tuple[str, str]], rule: ScreenConfig) -> dict[str, Any]:
    """Return `screen` of census.json: decisions, the rule, the findings of the audit, and missed prompts."""
    memorised = _sum(sums, AUDIT, "prompts", ANY)
    missed = strata(sums).missed(memorised)
    return {
        "decisions": {decision: sums[decision, "rows"] for decision in DECISIONS},
        "detector": rule.detector,
        "timestep": rule.timestep,
        "seeds": rule.seeds,
        "threshold": rule.threshold,
        "threshold_source": rule.threshold_source,
        "audit_share": rule.audit_share,
        "audit": {"scanned": sums[AUDIT, "rows"], "memorised": memorised},
        "missed": {"count": missed.total, "low": missed.low, "high": missed.high, "of": missed.of},
        "interval": f"hypergeometric by prompt, Clopper-Pearson by generation, {CONFIDENCE:.0%}, these prompts",
    }


def estimate_into(mix: dict[str, Any], sums: Counter[tuple[str, str]], what: str) -> None:
    """Replace the rates and intervals of a class mix by estimates for all prompts of the census.

    Args:
        what: "prompts", or "generations": the mean over prompts of the share of their generations.
    """
    for label, entry in [*mix["classes"].items(), (ANY, mix[ANY])]:
        parts: list[float] = [_sum(sums, decision, what, label) for decision in (CENSUS, AUDIT)]
        if what == "generations":
            # Every scanned prompt has the same number of generations here, so that a sum of shares is a quotient.
            parts = [part * _each(sums, decision) for part, decision in zip(parts, (CENSUS, AUDIT), strict=True)]
        if label == Label.NM.value:
            continue
        entry.update(strata(sums).estimate(*parts).share())
    others = mix[ANY]
    none = mix["classes"][Label.NM.value]
    none["rate"] = None if others["rate"] is None else 1 - others["rate"]
    none["low"], none["high"] = 1 - others["high"], 1 - others["low"]
    if what == "generations":
        for entry in (*mix["classes"].values(), mix[ANY]):
            entry.update(clustered_low=entry["low"], clustered_high=entry["high"])


def separate_rows(rows: dict[str, Any], sums: Counter[tuple[str, str]]) -> None:
    """Move the input rows of passed prompts, which have no label, out of a class mix by input row, to `passed`.

    Counts are of what was scanned, and with `passed` add up to `total`. Rates are estimates for all input rows: those
    of audited prompts stand for all below the threshold (the ratio estimator; Cochran, Sampling Techniques, section
    6.2). Without an audited row there is no estimate.
    """
    scanned = sums[CENSUS, "inputs"] + sums[AUDIT, "inputs"]
    rows["passed"] = rows["total"] - scanned
    below, audited = sums[AUDIT, "inputs"] + sums[PASS, "inputs"], sums[AUDIT, "inputs"]
    for label, entry in [*rows["classes"].items(), (ANY, rows[ANY])]:
        certain, drawn = (_sum(sums, decision, "inputs", label) for decision in (CENSUS, AUDIT))
        entry["count"] = certain + drawn
        known = not below or audited
        total = certain + (drawn * below / audited if audited else 0.0)
        entry["rate"] = total / rows["total"] if known and rows["total"] else None


def _sum(sums: Counter[tuple[str, str]], decision: str, what: str, label: str) -> int:
    labels = MEMORISED if label == ANY else [label]
    return sum(sums[decision, f"{what}/{one}"] for one in labels)


def _each(sums: Counter[tuple[str, str]], decision: str) -> float:
    """1 / generations of a prompt."""
    generations = sums[decision, "generations"]
    return sums[decision, "rows"] / generations if generations else 0.0
