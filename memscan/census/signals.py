"""This module summarises detector signals: means by prompt, counts of generations, and agreement of maps with labels.

A signal that does not apply to a model is absent from its generations, and never zero. Therefore the count of
generations that have a signal says whether it was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memscan.config import CensusConfig
from memscan.detection.specifications import ATTENTION_ENTROPY, BRIGHT_ENDING, SEMANTIC, TILED_L2
from memscan.models.adapters import NOISE_NORMS
from memscan.records import Label

_PAIRS = pa.list_(pa.struct([pa.field("key", pa.string(), nullable=False), pa.field("value", pa.float32())]))


def mean_signals(generations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of every detector signal over the generations that have it, by name in order."""
    values: dict[str, list[float]] = {}
    for generation in generations:
        for name, value in dict(generation.get("signals") or ()).items():
            values.setdefault(name, []).append(float(value))
    return {name: sum(values[name]) / len(values[name]) for name in sorted(values)}


def agreement_of(label: Label, generations: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how well the localisation maps agree with the label about the place, in [0, 1].

    This is the mean share of a map's mass in the foreground for FM, and outside of it for BM. It is None without maps,
    and for VM, where all of the image is memorised.
    """
    shares = [g["localized_foreground"] for g in generations if g.get("localized_foreground") is not None]
    if not shares or label not in (Label.FM, Label.BM):
        return None
    mean = float(sum(shares)) / len(shares)
    return mean if label is Label.FM else 1.0 - mean


def count_signals(table: pa.Table) -> Counter[str]:
    """Count the generations that have a signal, by its name, over rows with a `generations` column."""
    counts: Counter[str] = Counter()
    for chunk in table["generations"].chunks:
        flat = pc.list_flatten(chunk)
        if flat.type.get_field_index("signals") < 0:  # of a version that had none
            continue
        pairs = pc.list_flatten(pc.struct_field(flat, "signals").cast(_PAIRS))  # `keys` of a map forgets its offset
        found = pc.value_counts(pc.struct_field(pairs, "key"))
        counts.update({one["values"]: one["counts"] for one in found.to_pylist()})
    return counts


def not_applicable(
    taken: Mapping[str, int], generator: Mapping[str, Any], config: CensusConfig | None = None
) -> dict[str, str]:
    """Return the signals that no generation of a run has, with the reason.

    Args:
        taken: generations that have a signal, by its name.
        generator: what run.json says of the adapter (`models.adapters.Adapter.to_json`); {} in older runs.
        config: of the run.
    """
    unguided = "no call of the denoiser gave predictions with and without the caption"
    reasons = {**dict.fromkeys(NOISE_NORMS, unguided), **generator.get("not_applicable", {})}
    reasons |= dict.fromkeys((ATTENTION_ENTROPY.name, BRIGHT_ENDING.name), _no_attention(generator, config))
    if taken.get(ATTENTION_ENTROPY.name):
        reasons[BRIGHT_ENDING.name] = reasons[NOISE_NORMS[0]]
    reasons[TILED_L2.name] = "it compares generations of a prompt that are made together, and each was made alone"
    reasons[SEMANTIC.name] = "no image encoder for meaning is configured (signals.semantic)"
    return {name: why for name, why in reasons.items() if not taken.get(name)}


def _no_attention(generator: Mapping[str, Any], config: CensusConfig | None) -> str:
    if generator.get("adapter") == "stock":
        return "the stock pipeline samples, and its attention is not measured"
    if config is not None and not config.signals.attention:
        return "switched off (signals.attention)"
    if config is not None and config.generator.cache_interval > 1:
        return "feature caching leaves out most layers (generator.cache_interval)"
    return "no cross-attention to the caption was seen"
