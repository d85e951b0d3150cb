"""This module writes the evaluation of the metric as Markdown, with one column per variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]


def metric_tables(document: Document) -> str:
    """Return tables of an `evaluate_metric` document."""
    variants = document["variants"]
    parts = [
        _heading(document),
        _table("thresholds", variants, [(name, _threshold(name)) for name in _THRESHOLDS]),
        _table("uncorrupted pairs", variants, _clean_rows(variants)),
        _table("macro-F1 under one corruption", variants, _corruption_rows(variants)),
        _table("false positives, unrelated content under one silhouette", variants, _area_rows(variants)),
    ]
    return "\n\n".join(parts)


_THRESHOLDS = ("foreground", "background", "bound kept")


def _heading(document: Document) -> str:
    settings = document["settings"]
    return (
        f"Calibrated on seed {settings['calibration_seed']}, reported on seed {settings['seed']}; "
        f"{settings['count']} pairs per label and family, {settings['size']} px, false positives bounded at "
        f"{settings['bound']:.2%} with 95 % confidence. Photographs: "
        f"{len(settings['photographs']['calibration'])} for calibration, "
        f"{len(settings['photographs']['evaluation'])} others for the report."
    )


def _table(title: str, variants: Document, rows: Sequence[tuple[str, Callable[[Document], str]]]) -> str:
    lines = [f"| {title} | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(variants[v]) for v in variants) + " |" for name, cell in rows]
    return "\n".join(lines)


def _threshold(name: str) -> Callable[[Document], str]:
    if name == "bound kept":
        return lambda variant: (
            f"{variant['calibration']['max_false_positive_rate']:.1%}" if variant["bounded"] else "none can be kept"
        )
    return lambda variant: f"{variant['calibration'][f'{name}_threshold']:.3f}"


def _clean_rows(variants: Document) -> list[tuple[str, Callable[[Document], str]]]:
    families = sorted({family for variant in variants.values() for family in variant["families"]})
    return [
        ("macro-F1", lambda variant: f"{variant['clean']['macro_f1']:.3f}"),
        *((f"macro-F1, {family}", _family(family)) for family in families),
        ("false positives", lambda variant: _rate(variant["clean"])),
        ("AUC foreground", lambda variant: f"{variant['clean']['auc_foreground']:.4f}"),
        ("AUC background", lambda variant: f"{variant['clean']['auc_background']:.4f}"),
        ("recoloured foregrounds found (FM)", lambda variant: f"{variant['recoloured']['right']:.3f}"),
    ]


def _family(name: str) -> Callable[[Document], str]:
    return lambda variant: f"{variant['families'][name]['macro_f1']:.3f}"


def _corruption_rows(variants: Document) -> list[tuple[str, Callable[[Document], str]]]:
    names = list(next(iter(variants.values()))["corruptions"])

    def mean(variant: Document) -> str:
        values = [row["macro_f1"] for row in variant["corruptions"].values()]
        return f"**{sum(values) / len(values):.3f}**"

    def cell(name: str) -> Callable[[Document], str]:
        return lambda variant: f"{variant['corruptions'][name]['macro_f1']:.3f}"

    return [*((name, cell(name)) for name in names), ("**mean**", mean)]


def _area_rows(variants: Document) -> list[tuple[str, Callable[[Document], str]]]:
    def cell(name: str) -> Callable[[Document], str]:
        return lambda variant: _rate(variant["areas"][name])

    return [(f"foreground {name}", cell(name)) for name in next(iter(variants.values()))["areas"]]


def _rate(row: Document) -> str:
    return f"{row['false_positives']}/{row['unrelated']} ({row['false_positive_rate']:.1%})"
