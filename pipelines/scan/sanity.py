"""This module runs the generator's sanity check in a worker, before the index is built and GPUs are requested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc

from memscan.config import CensusConfig, GeneratorConfig
from memscan.errors import MemscanError
from memscan.models.adapters import adapter_of
from memscan.models.noise_schedules import SUPPORTED
from memscan.prompts.table import read_prompts
from memscan.records import Status
from memscan.sources.layouts import find_layout
from memscan.sources.reading import open_source
from memscan.sources.sample import Example, examples
from pipelines.ray.layout import ACTOR_CPUS, PoolLayout
from pipelines.ray.session import Machine
from pipelines.run_folder.inputs import check_folders
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table

CAPTIONS, REFERENCES = 4, 8  # as many as `memscan.models.sanity` looks at
OFF = "off"


def check_model(run: Run, config: CensusConfig, machine: Machine, say: Callable[[str], None]) -> None:
    """Check once per run whether its checkpoint makes images, and record the measurement in run.json; needs Ray.

    Raises:
        ModelError: it does not (`memscan.models.sanity.check_generator`).
    """
    known = run.manifest["generator"]
    if known.get("sanity"):
        return
    if config.generator.sanity == "off":
        run.set_generator({**known, "sanity": OFF})
        say("generator     not checked (generator.sanity: off)")
        return
    import ray

    layout = PoolLayout.of(config, machine, 1)
    options: Any = {"num_cpus": ACTOR_CPUS, "num_gpus": layout.gpus, "max_retries": 1}
    captions = some_captions(run)
    found, words = ray.get(
        ray.remote(**options)(measure).remote(config, captions, layout.device, layout.threads, run.models)
    )
    run.set_generator({**known, "sanity": found})
    say(f"generator     {words}")


def some_captions(run: Run) -> list[str]:
    """Return the first captions of a run's prompts that are no rejects."""
    table = read_table(run.folder.prompts_part(0), ["caption", "status"])
    good = table.filter(pc.not_equal(pc.fill_null(table["status"], ""), Status.REJECTED.value))
    return [str(caption) for caption in good["caption"].slice(0, CAPTIONS).to_pylist()]


def measure(
    config: CensusConfig, captions: list[str], device: str, threads: int, models: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """Load the generator and check it: what was measured as JSON, and in words. Raises as `check_generator`."""
    import torch

    from memscan.models.sanity import check_generator
    from memscan.worker.generation import load_adapter

    check_folders(config, models, ["generator"])
    if device == "cpu":
        torch.set_num_threads(threads)
    references = references_of(config)
    # What only speeds up would cost its start here.
    plain = config.resources.model_copy(update={"compile": "off", "probe_batch": False})
    generator = load_adapter(config.model_copy(update={"resources": plain, "generator": _seen(config)}), device)
    images, words = [image for image, _ in references], [caption for _, caption in references]
    sanity = check_generator(generator, captions, images, words)
    return sanity.to_json(), sanity.describe()


def _seen(config: CensusConfig) -> GeneratorConfig:
    """Yield the generator as it is checked: by our own loop if that knows it, even if the stock pipeline samples."""
    generator = config.generator
    scheduler = generator.scheduler if generator.scheduler in SUPPORTED else "auto"
    own = generator.model_copy(update={"adapter": "auto", "scheduler": scheduler})
    return own if generator.adapter == "stock" and adapter_of(own).kind == "own" else generator


def references_of(config: CensusConfig) -> list[Example]:
    """Return a few images of the census's references, if it names their source and the source has pixels."""
    if config.index.source is None:
        return []
    place = config.index.source
    try:
        layout = find_layout(place)
        # Of thousands of files one is enough, and the footers of the others are not read.
        one = layout.files[len(layout.files) // 2] if layout.kind in ("parquet", "webdataset") else place
        return examples(open_source(one, image_root=config.index.image_root), REFERENCES)
    except MemscanError:  # an index that is built already needs its source no more
        return []


def look(config: CensusConfig) -> str:
    """Run the check in this process, without a run, and return its result in words, for `memscan doctor`.

    Raises as `check_generator` does.
    """
    import torch

    cuda = config.resources.device != "cpu" and torch.cuda.is_available()
    table = read_prompts(config.prompts.model_copy(update={"limit": CAPTIONS})).table
    good = table.filter(pc.not_equal(pc.fill_null(table["status"], ""), Status.REJECTED.value))
    captions = [str(caption) for caption in good["caption"].to_pylist()]
    return measure(config, captions, "cuda" if cuda else "cpu", torch.get_num_threads(), {})[1]
