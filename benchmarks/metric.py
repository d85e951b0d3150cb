"""Milliseconds per pair: our metric against torchmetrics' MS-SSIM, called per region as the published code does.

Both get the same image pairs and masks. The oracle fills and compares foreground and background anew for every pair, on
RGBA canvases; ours prepares every image once (timed apart) and pays the cross term per pair.

With --references, a whole generation: the published search compares it with every reference, ours with 20 candidates
from an index of copy-detection embeddings (the shipped planted world's). The exhaustive time is the oracle's time
for a pair times the references; the share of equal verdicts is that of `paper` over all references and over candidates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as oracle_ms_ssim

from memscan.config import MetricConfig
from memscan.io.images import resize
from memscan.metric import FbMem, RegionScores, load_metric
from memscan.metric.regions import compose_background, compose_foreground
from memscan.models.embedder import Embedder, load_embedder
from memscan.planted.renderer import Scene, random_background, random_object, render
from memscan.planted.world import world_config

CANDIDATES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--canvas", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--references", type=int, default=0, help="0 leaves the search out; published: 500")
    parser.add_argument("--generations", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    drawn = [render(Scene(random_object(rng), random_background(rng))) for _ in range(arguments.candidates + 1)]
    side = arguments.canvas
    images = [resize(image, (side, side)) for image, _ in drawn]
    masks = [np.clip(np.asarray(Image.fromarray(mask).resize((side, side))), 0, 1) for _, mask in drawn]

    figures = {"oracle": {"pair": _oracle(images, masks, arguments.repeats), "prepare": 0.0}}
    for variant in ("paper", "region", "robust"):
        figures[variant] = _ours(variant, side, images, masks, arguments.repeats)
    print(f"{'':10}{'ms per pair':>12}{'ms to prepare':>16}{'ratio':>14}")
    for name, row in figures.items():
        print(f"{name:10}{row['pair']:12.2f}{row['prepare']:16.2f}{figures['oracle']['pair'] / row['pair']:14.1f}")
    ratios = {name: figures["oracle"]["pair"] / row["pair"] for name, row in figures.items() if name != "oracle"}
    result = {"benchmark": "metric", "settings": vars(arguments), "milliseconds": figures, "ratio": ratios}
    if arguments.references:
        search = _search(arguments.references, arguments.generations, figures)
        result["search"] = search
        print(
            f"\nmilliseconds per generation, {arguments.references} references; {CANDIDATES} candidates from the index"
        )
        print(
            f"exhaustive, oracle {search['exhaustive']:.0f}   ours {search['ours']:.1f}   ratio {search['ratio']:.0f}"
        )
        print(f"equal verdicts {search['equal']:.3f} of {arguments.generations}")
    print(json.dumps(result))


def _oracle(images: list[np.ndarray], masks: list[np.ndarray], repeats: int) -> float:
    def canvas(image: np.ndarray) -> torch.Tensor:
        opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
        return torch.from_numpy(np.concatenate([image, opaque], 2)).permute(2, 0, 1)[None].float() / 255

    def compare() -> None:
        for image, mask in zip(images[1:], masks[1:], strict=True):
            for compose in (compose_foreground, compose_background):
                pair = canvas(compose(images[0], masks[0])), canvas(compose(image, mask))
                oracle_ms_ssim(*pair, data_range=1.0, normalize="relu")

    return _milliseconds(compare, repeats) / (len(images) - 1)


def _ours(variant: str, side: int, images: list[np.ndarray], masks: list[np.ndarray], repeats: int) -> dict[str, float]:
    metric = _metric(variant, side)
    prepared = [metric.prepare(image, mask) for image, mask in zip(images, masks, strict=True)]
    pair = _milliseconds(lambda: metric.score(prepared[0], prepared[1:]), repeats) / (len(images) - 1)
    return {"pair": pair, "prepare": _milliseconds(lambda: metric.prepare(images[0], masks[0]), repeats)}


def _metric(variant: str, canvas: int) -> FbMem[Any]:
    thresholds = {"foreground_threshold": 0.8, "background_threshold": 0.8}
    return load_metric(MetricConfig.model_validate({"variant": variant, "canvas": canvas, **thresholds}))


def _search(references: int, generations: int, figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """A generation against candidates and against all; verdicts on the smallest canvas of `paper`, times at full size.

    Half of the generations copy a reference (whole, object or background), half copy nothing.
    """
    rng = np.random.default_rng(1)
    scenes = [Scene(random_object(rng), random_background(rng)) for _ in range(references)]
    made = []
    for number in range(generations):
        source, new = scenes[number % references], Scene(random_object(rng), random_background(rng))
        copies = (source, Scene(source.object, new.background), Scene(new.object, source.background), new, new, new)
        made.append(copies[number % 6])
    own, other = ([render(scene) for scene in group] for group in (made, scenes))
    metric = _metric("paper", 176)
    prepared = [metric.prepare(*picture) for picture in own]
    scores: list[list[RegionScores]] = [[] for _ in own]
    for picture in other:
        reference = metric.prepare(*picture)
        for row, generation in zip(scores, prepared, strict=True):
            row.extend(metric.score(generation, [reference]))
    embedder = load_embedder(world_config().embedder, "cpu")
    vectors = [_vectors(embedder, group) for group in (other, own)]
    index = faiss.IndexFlatIP(vectors[0].shape[-1])
    equal, seconds = 0, []
    for row, generation in zip(scores, own, strict=True):
        start = time.perf_counter()
        queries = _vectors(embedder, [generation])[:, 0]
        found = sorted({int(at) for region in range(3) for at in _nearest(index, vectors[0][region], queries[region])})
        seconds.append(time.perf_counter() - start)
        equal += metric.match([row[at] for at in found])[1] is metric.match(row)[1]
    ours = 1000 * statistics.median(seconds) + figures["paper"]["prepare"] + CANDIDATES * figures["paper"]["pair"]
    exhaustive = references * figures["oracle"]["pair"]
    return {"exhaustive": exhaustive, "ours": ours, "ratio": exhaustive / ours, "equal": equal / generations}


def _nearest(index: Any, vectors_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    index.reset()
    index.add(vectors_ND)
    return index.search(query_D[None], CANDIDATES // 3 + 1)[1][0]


def _vectors(embedder: Embedder, pictures: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Unit vectors (3, N, D) of whole, foreground and background."""
    views = [image for image, _ in pictures]
    views += [compose_foreground(*picture) for picture in pictures]
    views += [compose_background(*picture) for picture in pictures]
    return embedder.embed(views).reshape(3, len(pictures), -1)


def _milliseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    main()
