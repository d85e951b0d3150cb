"""This module counts, once per run, captions that are longer than the tokens that the model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc

from memscan.config import CensusConfig, GeneratorConfig
from memscan.records import Status
from pipelines.ray.layout import ACTOR_CPUS
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table


def count_cut_off(run: Run, config: CensusConfig, say: Callable[[str], None]) -> None:
    """Note in run.json how many captions are longer than the tokens of our own loop's model; needs Ray.

    A stock pipeline's encoders are its own matter: nothing is noted of one.
    """
    known = run.manifest["generator"]
    if known.get("captions") or known["adapter"] != "own":
        return
    import ray

    files = [run.folder.prompts_part(number) for number in run.parts]
    found = ray.get(ray.remote(num_cpus=ACTOR_CPUS, max_retries=1)(cut_off).remote(config.generator, files))
    run.set_generator({**known, "captions": found, "warnings": [*known["warnings"], *words(found)]})
    for line in words(found):
        say(f"warning       {line}")


def words(found: dict[str, int] | None) -> list[str]:
    """Return the message about it: nothing if no caption is cut off."""
    if not found or not found["cut_off"]:
        return []
    line = (
        f"{found['cut_off']:,} of {found['captions']:,} captions are longer than the {found['tokens']} tokens that the "
        "model takes, with those of begin and end: it does not see what comes after, as in the stock pipeline"
    )
    return [line]


def cut_off(config: GeneratorConfig, files: list[str]) -> dict[str, int]:
    """Count how many captions of prompt parts are longer than the model's tokens: `tokens`, `captions`, `cut_off`."""
    from memscan.models.checkpoint import HUB_FILES, caption_limit
    from memscan.models.composition import resolve_checkpoint

    tokenizer, limit = caption_limit(resolve_checkpoint(config, HUB_FILES))
    count = total = 0
    for file in files:
        table = read_table(file, ["caption", "status"])
        good = table.filter(pc.not_equal(pc.fill_null(table["status"], ""), Status.REJECTED.value))
        captions = [str(caption) for caption in good["caption"].to_pylist()]
        total += len(captions)
        # A token is at least a byte, so that short captions need not be looked at.
        long = [caption for caption in captions if len(caption.encode()) > limit - 2]
        count += sum(len(ids) > limit for ids in _ids(tokenizer, long))
    return {"tokens": limit, "captions": total, "cut_off": count}


def _ids(tokenizer: Any, captions: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(captions, truncation=False, verbose=False).input_ids if captions else []
    return found
