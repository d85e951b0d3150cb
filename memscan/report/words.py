"""This module holds the report's words and number formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memscan.errors import Reason

LABELS: dict[str, dict[str, str]] = {
    "VM": {"name": "Verbatim", "meaning": "Foreground and background are both those of a training image."},
    "FM": {"name": "Foreground", "meaning": "The subject is that of a training image, the background is not."},
    "BM": {"name": "Background", "meaning": "The background is that of a training image, the subject is not."},
    "NM": {"name": "Not memorised", "meaning": "Neither region reaches its threshold for any candidate."},
}

REASONS: dict[str, str] = {
    Reason.CAPTION_EMPTY.value: "no text was left after normalising the caption",
    Reason.CAPTION_TOO_LONG.value: "the caption is longer than the configuration allows",
    Reason.CAPTION_NOT_UTF8.value: "the caption's bytes are not UTF-8 text",
    Reason.ROW_MALFORMED.value: "the row could not be read as the file's format says",
    Reason.IMAGE_UNDECODABLE.value: "an image is damaged or of an unknown format",
    Reason.IMAGE_TOO_LARGE.value: "an image has more pixels than are accepted",
    Reason.IMAGE_MISSING.value: "an image is missing",
    Reason.GENERATION_FAILED.value: "the generator failed on this prompt",
    Reason.GENERATION_NOT_FINITE.value: "the generator gave pixels that are not numbers",
    Reason.SEGMENTATION_FAILED.value: "foreground and background could not be separated",
    Reason.EMBEDDING_FAILED.value: "the embedding could not be computed",
    Reason.SEARCH_FAILED.value: "the index could not be searched",
    Reason.REFERENCE_MISSING.value: "a candidate's training image is missing from the index",
    Reason.CLASSIFICATION_FAILED.value: "the scores could not be computed",
    Reason.ROW_TIMED_OUT.value: "the row took longer than the watchdog allows, also when it was tried alone",
    Reason.WORKER_DIED.value: "the row ended its worker process, also when it was tried alone",
    Reason.ID_REPEATED.value: "another reference has the same id",
    Reason.SCREEN_FAILED.value: "the screen's first denoiser step gave no score",
}

# A flagged prompt whose deciding score is nearer to its threshold than this is shown as near a threshold. Scores of one
# pair differ by about as much between canvas sizes (docs/metric.md), so such a verdict is a close one.
NEAR = 0.02

GLOSSARY = (
    ("Generation", "One image that the model made of a prompt, from one random seed."),
    ("Training image", "An image of the reference index: what the model was trained on, as far as it is known."),
    ("Foreground, background", "The subject of an image and the rest of it, as a segmentation model separates them."),
    ("Score", "How alike two images are in a region, from 0 to 1, by the metric named at the end of this page."),
    ("Threshold", "The score from which on two images are called alike. Another threshold gives other rates."),
    ("Margin", "How far the deciding score lies above its threshold. A small margin is a close call."),
    ("Severity", "Mean harm of a prompt's generations: verbatim counts most, not memorised counts nothing."),
    ("Share", "How many of a prompt's generations are memorised."),
    (
        "95% interval",
        "Where the true rate lies, wrong one time in twenty, if the prompts are a random draw of their kind.",
    ),
    (
        "Similarity",
        "How near two images are for the copy detector, from -1 to 1. It finds candidates and decides nothing.",
    ),
    ("Noise norm", "How strongly the prompt pulls the model while it draws. High values go with memorised prompts."),
    ("Other signals", "Numbers that detectors take from inside the model. They are hints and decide no class."),
    ("Localisation", "Where in the image the model's own signals see memorisation."),
    ("Cluster", "Flagged prompts that say alike things or reach the same training images."),
    ("Near-duplicate", "A training image that is the same as another one to the eye. They count as one."),
)


def percent(share: float | None) -> str:
    """Return a share in percent, with as many digits as are useful.

    Examples are 12.3%, 0.42% and 0.031%; it is never a false 0% or 100%.
    """
    if share is None:
        return "n/a"
    value = 100 * share
    if value in (0.0, 100.0):
        return f"{value:.0f}%"
    if value < 0.001:
        return "<0.001%"
    digits = 1 if value >= 1 else 2 if value >= 0.1 else 3
    text = f"{value:.{digits}f}"
    return ">99.9%" if text == "100.0" else f"{text}%"


def interval(low: float, high: float) -> str:
    """Return an interval of shares: 2.5-4.1% with an en dash, the sign once."""
    first, last = percent(low), percent(high)
    plain = first.endswith("%") and first[0].isdigit()
    return f"{first[:-1] if plain else first}\u2013{last}"


def share(value: float | None) -> str:
    """Return a share in percent without trailing zeros: 50%, 2.5%."""
    return "n/a" if value is None else f"{100 * value:.3g}%"


def number(value: float | None, digits: int | None = None) -> str:
    """Return a number for people: thousands separated, at most `digits` decimals and no trailing zeros."""
    if value is None:
        return "n/a"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:,.{2 if digits is None else digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def score(value: float | None) -> str:
    """Return a score with two decimals."""
    return "n/a" if value is None else f"{value:.2f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def inside(path: str) -> str:
    """Return a path out of a manifest for people: what lies in the run folder by its name there."""
    return f"{path.removeprefix('run://')} in the run folder" if path.startswith("run://") else path


def thresholds(method: Mapping[str, Any]) -> str:
    """Describe the thresholds and how they were chosen, in words."""
    found = method["thresholds"]
    said = (
        f"Two images are called alike in the subject when their score there is at least {found['foreground']:g}, and "
        f"in the background when it is at least {found['background']:g}, from 0 (nothing alike) to 1 (equal)."
    )
    source = str(found["source"])
    if source.startswith("published"):
        how = (
            "The thresholds are those that the metric's authors published; they were not chosen for this model and data"
        )
    else:
        how = f"The thresholds' source, in the words of the configuration: {source}"
    known = found.get("false_positive_rate")
    if known:
        wrong = (
            f"Of {number(known['ordinary'])} pairs there that are no copies, {percent(known['rate'])} were called "
            f"alike (at most {percent(known['bound'])} with 95% confidence)"
        )
    else:
        wrong = "How many pairs that are no copies these thresholds call alike is not recorded with the run"
    return f"{said} {how}. {wrong}."


def headline(census: Mapping[str, Any]) -> dict[str, str]:
    """Return the finding in two sentences."""
    found = census["prompts"]["memorised"]
    scanned = plural(found["total"], "prompt")
    bounds = interval(found["low"], found["high"])
    if not found["total"]:
        return {"figure": "No prompt was scanned", "detail": "There is nothing to give a rate of."}
    if not found["count"]:
        detail = f"None of {scanned} made the model reproduce a training image (95% interval {bounds})."
        return {"figure": "No prompt reproduces a training image", "detail": detail}
    verb = "makes" if found["count"] == 1 else "make"
    detail = f"{found['count']:,} of {scanned} {verb} the model reproduce training images (95% interval {bounds})."
    return {"figure": f"{percent(found['rate'])} of prompts reproduce training images", "detail": detail}


def rule(verdict: Mapping[str, Any]) -> str:
    """Return the verdict rule in words."""
    return (
        f"A prompt is flagged when at least {share(verdict['min_share'])} of its generations are memorised. Its "
        "class is the most frequent one among those generations, ties going to the more severe. The evidence shown is "
        "the generation of that class whose deciding score lies furthest above its threshold."
    )


def scheduler(census: Mapping[str, Any]) -> str:
    """Return the class name of the scheduler that sampled.

    A configuration may say "auto"; then this is the scheduler that was found.
    """
    found = census["method"].get("generator") or census["run"]["config"]["generator"]
    return str(found["scheduler"])


def absent_signals(census: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the reasons why signals do not apply to the model, with their names."""
    reasons: dict[str, list[str]] = {}
    for name, why in census.get("signals", {}).get("not_applicable", {}).items():
        reasons.setdefault(why, []).append(name)
    return list(reasons.items())


def notices(census: Mapping[str, Any], unreadable: int) -> list[dict[str, str]]:
    """Return what a reader must know before believing the figures.

    `unreadable` pictures could not be decoded for the page.
    """
    found = []
    counts, run, references = census["counts"], census["run"], census["references"]
    if census["partial"]:
        text = f"{plural(counts['distinct_prompts'], 'prompt')} of {run['prompts_total']:,} had been processed."
        found.append({"kind": "alert", "title": "Partial: the scan is not complete.", "text": text})
    if counts["rejected"]:
        part = percent(counts["rejected"] / counts["distinct_prompts"])
        text = f"They are in no rate; {part} of the prompts. See 'Rows that could not be processed'."
        title = f"{plural(counts['rejected'], 'prompt')} could not be processed."
        found.append({"kind": "note", "title": title, "text": text})
    rejects = (census.get("index") or {}).get("rejects") or {}
    if rejects.get("rejected"):
        title = f"{plural(rejects['rejected'], 'reference')} of {rejects['source_rows']:,} could not be indexed."
        why = ", ".join(f"{reason} {count:,}" for reason, count in rejects["reasons"].items()) or "see rejects.parquet"
        text = f"No generation is compared with them, so copies of them are not found. Reasons: {why}."
        found.append({"kind": "alert", "title": title, "text": text})
    if references["missing"]:
        what = plural(references["missing"], "matched training image")
        verb = "was" if references["missing"] == 1 else "were"
        text = "Pictures and URLs are left out below where that is so; ids and scores are as the scan found them."
        found.append({"kind": "alert", "title": f"{what} {verb} not found in the index.", "text": text})
    if unreadable:
        text = "They are marked 'not available' below."
        title = f"{plural(unreadable, 'picture')} could not be decoded."
        found.append({"kind": "alert", "title": title, "text": text})
    for warning in (census["method"].get("generator") or {}).get("warnings", ()):
        title = "The model was sampled by settings that do not suit it."
        found.append({"kind": "alert", "title": title, "text": f"{warning}."})
    if census["method"]["thresholds"]["source"].startswith("published"):
        text = (
            "Scores depend on canvas size, segmenter and resolution: calibrate the thresholds before comparing these "
            "rates with others."
        )
        title = "The thresholds are the published ones, not calibrated here."
        found.append({"kind": "note", "title": title, "text": text})
    return found
