"""What the sanity check of the generator costs: its seconds against those of sampling the demo's prompts.

The check runs as a scan runs it, on eight reference images and four captions of the shipped planted world. The census
is timed on some of its prompts and counted for all of them; segmenting, searching and comparing are left out, which
makes the share larger than it is.

    python -m benchmarks.sanity --prompts 32
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from memscan.models.calls import CallCounter
from memscan.models.generator import Generator
from memscan.models.sanity import check_generator
from memscan.planted.world import read_truth, world_config
from pipelines.scan.sanity import references_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32, help="prompts that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.prompts), indent=2))


def measure(prompts: int) -> dict[str, Any]:
    """Seconds and denoiser rows of the check and of the census."""
    config = world_config()
    generator = Generator.load(config.generator)
    captions = [row["caption"] for row in read_truth().to_pylist()]
    references = references_of(config)
    generator.generate(captions[:1], [0])  # the first call of every kernel is slow
    check = _timed(
        generator,
        lambda: check_generator(
            generator, captions, [image for image, _ in references], [words for _, words in references]
        ),
    )
    samples = config.generator.samples
    some = [caption for caption in captions[:prompts] for _ in range(samples)]
    census = _timed(generator, lambda: generator.generate(some, range(len(some))))
    whole = {key: value * len(captions) / prompts for key, value in census.items()}
    return {
        "check": check,
        "census": {**whole, "prompts": len(captions), "samples": samples, "timed_prompts": prompts},
        "share_of_seconds": round(check["seconds"] / whole["seconds"], 4),
        "share_of_rows": round(check["rows"] / whole["rows"], 4),
    }


def _timed(generator: Generator, work: Any) -> dict[str, float]:
    with CallCounter(generator.checkpoint.unet) as calls:
        began = time.process_time()
        work()
        return {"seconds": round(time.process_time() - began, 3), "rows": calls.calls}


if __name__ == "__main__":
    main()
