"""Milliseconds a pair: our metric against torchmetrics' MS-SSIM, called per region as the published code does.

Both get the same image pairs and masks. The oracle fills and compares foreground and background anew for every pair, on
RGBA canvases; ours prepares every image once (timed apart) and pays the cross term per pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as oracle_ms_ssim

from memscan.config import MetricConfig
from memscan.images import resize
from memscan.metric import load_metric
from memscan.metric.regions import compose_background, compose_foreground
from memscan.planted.renderer import Scene, random_background, random_object, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--canvas", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    drawn = [render(Scene(random_object(rng), random_background(rng))) for _ in range(arguments.candidates + 1)]
    side = arguments.canvas
    images = [resize(image, (side, side)) for image, _ in drawn]
    masks = [resize((mask * 255).astype(np.uint8), (side, side)).astype(np.float32) / 255 for _, mask in drawn]

    figures = {"oracle": {"pair": _oracle(images, masks, arguments.repeats), "prepare": 0.0}}
    for variant in ("paper", "region"):
        figures[variant] = _ours(variant, side, images, masks, arguments.repeats)
    print(f"{'':10}{'ms a pair':>12}{'ms to prepare':>16}{'ratio a pair':>14}")
    for name, row in figures.items():
        print(f"{name:10}{row['pair']:12.2f}{row['prepare']:16.2f}{figures['oracle']['pair'] / row['pair']:14.1f}")
    ratios = {name: figures["oracle"]["pair"] / row["pair"] for name, row in figures.items() if name != "oracle"}
    print(json.dumps({"benchmark": "metric", "settings": vars(arguments), "milliseconds": figures, "ratio": ratios}))


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
    metric = load_metric(MetricConfig.model_validate({"variant": variant, "canvas": side}))
    prepared = [metric.prepare(image, mask) for image, mask in zip(images, masks, strict=True)]
    pair = _milliseconds(lambda: metric.score(prepared[0], prepared[1:]), repeats) / (len(images) - 1)
    return {"pair": pair, "prepare": _milliseconds(lambda: metric.prepare(images[0], masks[0]), repeats)}


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
