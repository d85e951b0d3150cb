"""This module makes the report page, one HTML string, from figures, the flagged list and exhibits.

Captions, ids, URLs and configuration are hostile text. The template escapes everything (jinja2 autoescape), the script
only ever sets text, links lead to http(s) addresses, writing directions are isolated, and the content security policy
forbids every request and every script but the page's own, which is named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from memscan.config import MetricConfig
from memscan.records import LABELS, MEMORISED
from memscan.report import data, figures, words
from memscan.report.evidence import Exhibit
from memscan.report.pictures import Pictures

Images = Literal["show", "blur", "none"]
MAX_EXHIBITS = 400
SHOWN_CLUSTERS = 60
SHOWN_REMOVALS = 15
_TEMPLATES = Path(__file__).parent


def render_report(
    census: Mapping[str, Any],
    flagged: pa.Table,
    clusters: Sequence[Mapping[str, Any]],
    removal: pa.Table,
    exhibits: Sequence[Exhibit],
    metric: MetricConfig,
    *,
    show: Images = "show",
) -> str:
    """Render the report.

    Args:
        census: the content of `census.json`.
        flagged: `records.FLAGGED`, worst first: all of it is in the page.
        clusters: rows of `records.CLUSTERS`.
        removal: `records.REMOVAL`; its head is shown.
        exhibits: the prompts with pictures, as `choose_exhibits` picks them.
        metric: for the similarity maps.
        show: "blur" blurs the images until they are pointed at (they are still in the file), "none" leaves them out.

    Returns:
        A complete HTML document.
    """
    pictures = Pictures(metric)
    drawn = pictures.of(exhibits) if show != "none" else {"prompts": {}, "references": {}}
    payload = {
        **data.columns(flagged, exhibits),
        "labels": [{"code": label, **words.LABELS[label]} for label in MEMORISED],
        "thresholds": {name: census["method"]["thresholds"][name] for name in ("foreground", "background")},
        "clusters": [_cluster(one) for one in clusters],
        "show": show,
        "run": census["run"]["fingerprint"],
        "near": words.NEAR,
    }
    script = page_script()
    labels = flagged["label"]
    return (
        environment()
        .get_template("report.html")
        .render(
            census=census,
            labels=LABELS,
            memorised=MEMORISED,
            label_words=words.LABELS,
            reason_words=words.REASONS,
            notices=words.notices(census, pictures.unreadable),
            headline=words.headline(census),
            rule=words.rule(census["method"]["verdict"]),
            threshold_words=words.thresholds(census["method"]),
            glossary=words.GLOSSARY,
            near={
                "margin": words.NEAR,
                "flagged": flagged.num_rows,
                "count": pc.sum(pc.less(flagged["margin"], words.NEAR)).as_py() or 0,
            },
            scheduler=words.scheduler(census),
            absent_signals=words.absent_signals(census),
            mix_bar=figures.mix_bar(census["prompts"]),
            generation_bar=figures.mix_bar(census["generations"]),
            ruler=figures.ruler(census),
            reach=figures.reach(census["one_to_many"]["histogram"]),
            score_map=figures.score_map(census["scores"], census["method"]["thresholds"]),
            clusters=[{**one, "mix": figures.shares([one[label] for label in MEMORISED])} for one in clusters][
                :SHOWN_CLUSTERS
            ],
            clusters_total=len(clusters),
            removals=_removals(removal),
            removal_images=removal.num_rows,
            signals=sorted({name for row in flagged["signals"].to_pylist() for name, _ in row}),
            label_counts={label: pc.sum(pc.equal(labels, label)).as_py() or 0 for label in MEMORISED},
            exhibits=len(exhibits),
            show=show,
            configuration=yaml.safe_dump(census["run"]["config"], sort_keys=False, allow_unicode=True),
            style=Markup(read_part("report.css")),
            script=Markup(script),
            script_hash=script_hash(script),
            payload=Markup(data.to_script(payload)),
            drawn=Markup(data.to_script(drawn)),
        )
    )


def choose_exhibits(flagged: pa.Table, limit: int = MAX_EXHIBITS) -> list[int]:
    """Return the rows of a flagged list (worst first) for which pictures are shown.

    These are the worst of each cluster, and then the worst of all.

    Half of them at most are chosen for their cluster, so that neither many clusters nor one large one fills the page.
    """
    clusters = flagged["cluster"].to_pylist()
    first: dict[int, int] = {}
    for row, cluster in enumerate(clusters):
        if cluster:
            first.setdefault(cluster, row)
    chosen = [first[cluster] for cluster in sorted(first)][: limit // 2]
    taken = set(chosen)
    chosen += [row for row in range(len(clusters)) if row not in taken][: limit - len(chosen)]
    return sorted(chosen)


def environment() -> Environment:
    """Return the templates with the report's filters."""
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        inside=words.inside,
        percent=words.percent,
        share=words.share,
        number=words.number,
        score=words.score,
        interval=words.interval,
    )
    return found


def read_part(name: str) -> str:
    """Return a style sheet or script of this package."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def page_script() -> str:
    """Return the page's one script: the list, the enlarged evidence and the review, in one scope of their own."""
    parts = "".join(read_part(name) for name in ("report.js", "viewer.js", "review.js"))
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def script_hash(script: str) -> str:
    """Return the hash by which a content security policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _cluster(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("cluster", "name", "prompts", *MEMORISED, "images", "medoid", "words")
    return {
        **{name: row[name] for name in names},
        "severity": round(row["severity"], 2),
        "persistence": round(row["persistence"], 2),
        "stability": None if row["stability"] is None else round(row["stability"], 2),
        "caption": row["caption"][: data.CAPTION],
    }


def _removals(removal: pa.Table) -> list[dict[str, Any]]:
    """Return the first ranks, near-duplicates of one folded into it."""
    found: dict[int, dict[str, Any]] = {}
    for row in removal.slice(0, 40 * SHOWN_REMOVALS).to_pylist():
        one = found.setdefault(row["rank"], {**row, "ids": []})
        url = data.shown_url(row["url"])
        one["ids"].append({"id": row["reference_id"], "url": url, "link": data.link(url)})
    return list(found.values())[:SHOWN_REMOVALS]
