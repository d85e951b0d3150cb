"""memscan: a census of memorisation for text-to-image diffusion models.

The question: which prompts make a checkpoint reproduce which of its training images, and where in the image?

The concepts, in the order in which a job meets them:

* **prompt** (`prompts`, `records.PROMPTS`): a normalised caption. Its id is a hash of the caption, so the same caption
  in two files is one prompt with a count. One row is one prompt, all the way: what cannot be processed stays a row,
  with `status = rejected`, a stable code (`errors.Reason`) and a message, so that counts conserve.
* **generator, segmenter, embedder** (`models`): the checkpoint under census and the two instruments. Each is a batch
  function with a `ModelSpec` (name, hash of the weights, preprocessing), since a threshold holds for one of them only.
* **generation** (`records.GENERATION`): one image of a prompt at a seed that is derived from the prompt's id, with the
  signals that were hooked while it was sampled.
* **region**: whole, foreground or background. The segmenter's mask cuts an image into the last two.
* **reference index** (`index`): the training images, with embeddings of their three regions; finds candidates.
* **metric** (`metric`): FB-Mem (Di et al. 2025) compares a generation with a candidate by masked MS-SSIM and names the
  memorisation: `VM` verbatim, `FM` foreground, `BM` background, `NM` none (`records.Label`).
* **verdict** (`census`): what the labels of a prompt's generations say about the prompt; the flagged list; rates.
* **report** (`report`): one static page with the evidence.
* **planted world** (`planted`): a small world of images whose memorisation is known by construction, with real models
  trained on it: the demo, the test bed, and a benchmark with ground truth.
* **configuration** (`config`): one YAML file describes a run completely; its fingerprint names the run's content.

This package takes and gives arrays, tensors and tables and never imports ray; the jobs that run it on Ray are in
`pipelines`. Importing it is cheap: the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memscan.config import CensusConfig, load_config
    from memscan.errors import MemscanError, Reason, RowReject
    from memscan.index.store import ReferenceIndex, write_index
    from memscan.metric.fbmem import FbMem
    from memscan.models.embedder import load_embedder
    from memscan.models.generator import Generator
    from memscan.models.segmenter import load_segmenter
    from memscan.models.specification import ModelSpec
    from memscan.prompts.table import PromptTable, read_prompts
    from memscan.records import Label, Status, prompt_id, sample_seed

_HOMES = {
    "CensusConfig": "config",
    "FbMem": "metric.fbmem",
    "Generator": "models.generator",
    "Label": "records",
    "MemscanError": "errors",
    "ModelSpec": "models.specification",
    "PromptTable": "prompts.table",
    "Reason": "errors",
    "ReferenceIndex": "index.store",
    "RowReject": "errors",
    "Status": "records",
    "load_config": "config",
    "load_embedder": "models.embedder",
    "load_segmenter": "models.segmenter",
    "prompt_id": "records",
    "read_prompts": "prompts.table",
    "sample_seed": "records",
    "write_index": "index.store",
}

__all__ = [
    "CensusConfig",
    "FbMem",
    "Generator",
    "Label",
    "MemscanError",
    "ModelSpec",
    "PromptTable",
    "Reason",
    "ReferenceIndex",
    "RowReject",
    "Status",
    "__version__",
    "load_config",
    "load_embedder",
    "load_segmenter",
    "prompt_id",
    "read_prompts",
    "sample_seed",
    "write_index",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memscan' has no attribute {name!r}")
    return getattr(import_module(f"memscan.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
