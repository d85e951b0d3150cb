"""This module tests whether the memory of one image is in one place, by the workers of a Ray Train job.

    reduced run      one memorised image per cluster first, as a verification attacks them         driver
    workers          embeddings from many starts, what NeMo and Wanda choose for each            (`locality_workers.py`)
    result           RUN/verified/locality.json, and the verification's page written again

It analyses the scanned model. A repair that switches units or weights off can only last if there is such a place.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memscan.errors import MemscanError, RunError
from memscan.io import storage
from memscan.mitigation.settings import LocalitySettings
from memscan.mitigation.targets import Target
from pipelines.mitigate.job import Prepared, prepare
from pipelines.ray.session import cores, ray_session
from pipelines.ray.training import train
from pipelines.run_folder.places import local_folder
from pipelines.verify.page import LOCALITY, write_table_and_page

Say = Callable[[str], None]
FORMAT = "memscan-locality/1"


def evaluate_locality(
    run_dir: str, settings: LocalitySettings, out: str | None = None, workers: int | None = None, say: Say = print
) -> dict[str, Any]:
    """Return the three locality analyses of a reduced run's model.

    Args:
        out: local folder of the run's verifications; by default RUN/verified.
        workers: by default one per GPU, or one per core if there is no GPU.

    Returns:
        The content of locality.json: "images" (each with the label that every start's embedding draws), "searches",
        "found", and what `memscan.mitigation.locality.analyses` gives.

    Raises:
        RunError: fewer than two images can be attacked, or the run has no ordinary prompts.
        MemscanError: other inputs that do not fit, or analyses of other settings in the folder. Nothing is overwritten.
    """
    from pipelines.mitigate.finetune_data import open_references
    from pipelines.verify.choice import attacked

    ready = prepare(run_dir)
    place = local_folder(out or storage.join(run_dir, "verified"))
    if len(ready.calibration) < 2:
        raise RunError(
            f"{len(ready.calibration)} ordinary prompts to compare with",
            where=run_dir,
            hint="scan ordinary prompts too",
        )
    version = ready.run.manifest["index"].get("version")
    targets = attacked(ready.targets, open_references(ready.index, version), settings.images)
    if len(targets) < 2:
        raise RunError(f"{len(targets)} memorised images can be read: nothing to compare", where=run_dir)
    mark = settings.fingerprint(
        {"run": ready.run.manifest["fingerprint"], "targets": [asdict(target) for target in targets]}
    )
    file = place / LOCALITY
    if file.is_file():
        document: dict[str, Any] = storage.read_json(str(file))
        if document["fingerprint"] == mark:
            say(f"locality: complete already, in {file}")
            return document
        raise MemscanError(
            "was made with other settings, and is not overwritten", where=str(file), hint="choose another --out"
        )
    say(f"locality: {len(targets)} images, {settings.starts} starts each")
    document = _measured(ready, settings, targets, place, workers, mark)
    storage.write_json(str(file), document)
    write_table_and_page(ready, place, say)
    return document


def _measured(
    ready: Prepared,
    settings: LocalitySettings,
    targets: tuple[Target, ...],
    place: Path,
    workers: int | None,
    mark: str,
) -> dict[str, Any]:
    from pipelines.evaluate.locality_workers import LocalityJob, locality_loop, read_located
    from pipelines.mitigate.search import SearchJob

    started, work = time.monotonic(), place / ".locality.work"
    with ray_session(place / "logs") as machine:
        gpus = machine.gpus >= 1 and ready.config.resources.device != "cpu"
        count = workers or (int(machine.gpus) if gpus else cores())
        search = SearchJob(
            ready.config.generator, settings.search(), targets, ready.calibration, "cuda" if gpus else "cpu", 1
        )
        job = LocalityJob(ready.config, search, settings, ready.index, ready.run.manifest["index"].get("version"))
        _, checkpoint = train(
            locality_loop, {"job": job}, storage=work, name=f"locality-{mark}", workers=count, gpus=gpus
        )
    if checkpoint is None:
        raise MemscanError("the workers ended without a result", where=str(work))
    found = _analysed(*read_located(checkpoint), targets)
    shutil.rmtree(work, ignore_errors=True)
    return {
        "format": FORMAT,
        "fingerprint": mark,
        "run": {"name": ready.run.manifest["name"], "fingerprint": ready.run.manifest["fingerprint"]},
        "model": ready.run.manifest["models"]["generator"],
        "settings": settings.model_dump(mode="json"),
        **found,
        "seconds": round(time.monotonic() - started, 1),
        "workers": count,
    }


def _analysed(state: dict[str, Any], tensors: dict[str, Any], targets: tuple[Target, ...]) -> dict[str, Any]:
    from memscan.mitigation.locality import Located, analyses
    from memscan.mitigation.units import Layout, UnitSet
    from pipelines.evaluate.locality_workers import start_of

    layout = Layout(*(tuple(part) for part in state["layout"]))
    names = sorted(tensors)

    def located(key: str) -> Located:
        head = f"weights/{key}/"
        weights = {name.removeprefix(head): tensors[name] for name in names if name.startswith(head)}
        units = UnitSet.from_json(state["units"][key])
        return Located(tensors[f"found/{key}"], tensors[f"activations/{key}"], units, weights)

    def of(kind: str, image: int) -> list[str]:
        return [name for name in names if name.startswith(f"{kind}/{image:04d}.")]

    images = range(len(targets))
    starts = [[tensors[name] for name in of("start", image)] for image in images]
    found = [[located(name.partition("/")[2]) for name in of("found", image)] for image in images]
    return {
        "images": [
            {
                "prompt_id": target.prompt_id,
                "caption": target.caption,
                "label": target.label,
                "reference_id": target.match_ids[0],
                "draws": [{"start": start_of(number), "label": label} for number, label in enumerate(labels)],
            }
            for target, labels in zip(targets, state["labels"], strict=True)
        ],
        "searches": sum(map(len, starts)),
        "found": sum(map(len, found)),
        "units": layout.count,
        "threshold": state["threshold"],
        **analyses(starts, found, layout),
    }
