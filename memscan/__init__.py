"""memscan takes a census of memorisation in text-to-image diffusion models.

It answers the question: which prompts make a checkpoint reproduce which of its training images, and where in the image?

These are the concepts, in the order in which a job uses them:

* **prompt** (`prompts`, `records.PROMPTS`): a normalised caption. Its id is a hash of the caption, so the same caption
  in two files is one prompt with a count. One row is one prompt in every table. A prompt that cannot be processed
  stays a row, with `status = rejected`, a stable code (`errors.Reason`) and a message, so that counts conserve.
* **generator, segmenter, embedder** (`models`): the checkpoint under census and the two instruments. Each is a batch
  function with a `ModelSpec` (name, hash of the weights, preprocessing), since a threshold holds for one of them only.
* **generation** (`records.GENERATION`): one image of a prompt at a seed that is derived from the prompt's id, with the
  signals that hooks computed while it was sampled.
* **region**: whole, foreground or background. The segmenter's mask cuts an image into the last two.
* **reference index** (`index`): the training images, with embeddings of their three regions; it finds candidates.
* **metric** (`metric`): FB-Mem (Di et al. 2025) compares a generation with a candidate by masked MS-SSIM and names the
  memorisation: `VM` verbatim, `FM` foreground, `BM` background, `NM` none (`records.Label`).
* **worker** (`worker`): what one worker does with all of these; its copy detector takes images and an index, and
  returns matches with labels and scores.
* **verdict** (`census`): what the labels of a prompt's generations say about the prompt. Verdicts give the flagged
  list and the rates.
* **report** (`report`): one static page with the evidence.
* **planted world** (`planted`): a small world of images whose memorisation is known by construction, with real models
  trained on it: the demo, the test bed, and a benchmark with ground truth.
* **configuration** (`config`): one YAML file describes a run completely; its fingerprint names the run's content.

This package takes and returns arrays, tensors and tables, and never imports ray. The jobs that run it on Ray are in
`pipelines`. Importing it is cheap, because the names below are loaded when they are first used. They are what a
notebook needs (docs/library.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from memscan.census.verdict import Verdict, verdict
    from memscan.config import CensusConfig, PromptsConfig, load_config, parse_config
    from memscan.errors import MemscanError, Reason, RowReject
    from memscan.index.store import ReferenceIndex, write_index
    from memscan.metric.comparison import Comparison, Picture, compare_pictures
    from memscan.metric.variants import load_metric
    from memscan.models.embedder import load_embedder
    from memscan.models.generator import Generator
    from memscan.models.segmenter import load_segmenter
    from memscan.models.specification import ModelSpec
    from memscan.models.stock import StockGenerator
    from memscan.planted.world import shipped_world, world_config
    from memscan.prompts.table import PromptTable, normalise, read_prompts
    from memscan.records import Label, Status, prompt_id, sample_seed
    from memscan.worker.detector import CopyDetector, Detection, Match
    from memscan.worker.encoder import RegionEncoder
    from memscan.worker.generation import load_generator
    from memscan.worker.indexing import index_images
    from memscan.worker.pair import compare_images

_HOMES = {
    "CensusConfig": "config",
    "Comparison": "metric.comparison",
    "CopyDetector": "worker.detector",
    "Detection": "worker.detector",
    "Generator": "models.generator",
    "Label": "records",
    "Match": "worker.detector",
    "MemscanError": "errors",
    "ModelSpec": "models.specification",
    "Picture": "metric.comparison",
    "PromptTable": "prompts.table",
    "PromptsConfig": "config",
    "Reason": "errors",
    "ReferenceIndex": "index.store",
    "RegionEncoder": "worker.encoder",
    "RowReject": "errors",
    "Status": "records",
    "StockGenerator": "models.stock",
    "Verdict": "census.verdict",
    "compare_images": "worker.pair",
    "compare_pictures": "metric.comparison",
    "index_images": "worker.indexing",
    "load_config": "config",
    "load_embedder": "models.embedder",
    "load_generator": "worker.generation",
    "load_metric": "metric.variants",
    "load_segmenter": "models.segmenter",
    "normalise": "prompts.table",
    "parse_config": "config",
    "prompt_id": "records",
    "read_prompts": "prompts.table",
    "sample_seed": "records",
    "shipped_world": "planted.world",
    "verdict": "census.verdict",
    "world_config": "planted.world",
    "write_index": "index.store",
}

__all__ = [
    "CensusConfig",
    "Comparison",
    "CopyDetector",
    "Detection",
    "Generator",
    "Label",
    "Match",
    "MemscanError",
    "ModelSpec",
    "Picture",
    "PromptTable",
    "PromptsConfig",
    "Reason",
    "ReferenceIndex",
    "RegionEncoder",
    "RowReject",
    "Status",
    "StockGenerator",
    "Verdict",
    "__version__",
    "compare_images",
    "compare_pictures",
    "index_images",
    "load_config",
    "load_embedder",
    "load_generator",
    "load_metric",
    "load_segmenter",
    "normalise",
    "parse_config",
    "prompt_id",
    "read_prompts",
    "sample_seed",
    "shipped_world",
    "verdict",
    "world_config",
    "write_index",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memscan' has no attribute {name!r}")
    return getattr(import_module(f"memscan.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
