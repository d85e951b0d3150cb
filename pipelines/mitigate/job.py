"""This module makes a repaired checkpoint from flagged prompts.

    reduced run      flagged prompts with clusters, ordinary prompts (half of them), references     driver
    workers          search, prune or train                      (`search.py`, `finetune.py`)
    result           diffusers folder + card + patch             written beside its place and renamed

The workers' checkpoints are in a hidden folder beside the result. Its name holds the fingerprint of settings, model and
prompts, so the same command resumes what was stopped, and another one never does. The folder is removed when the result
is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from memscan.census import flagged as flagged_files
from memscan.config import CensusConfig
from memscan.errors import MemscanError, ModelError, RunError
from memscan.io import storage
from memscan.mitigation.card import CARD, PATCH, SWITCHES, read_card, write_card
from memscan.mitigation.settings import MitigationSettings
from memscan.mitigation.targets import Target, held_out, read_targets
from memscan.records import long_id
from pipelines.ray.session import Machine, cores, ray_session
from pipelines.ray.training import train
from pipelines.reduce.report import read_census
from pipelines.run_folder.inputs import generator_id
from pipelines.run_folder.places import absolute, local_folder
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """This is what a mitigation needs from the run.

    Attributes:
        ordinary: (prompt id, caption) of done prompts that are not flagged, in order of id.
    """

    run: Run
    config: CensusConfig
    targets: tuple[Target, ...]
    ordinary: tuple[tuple[str, str], ...]

    @property
    def calibration(self) -> tuple[str, ...]:
        """These are the captions of the half that a mitigation may use."""
        return tuple(caption for prompt, caption in self.ordinary if not held_out(prompt))

    @property
    def panel(self) -> tuple[str, ...]:
        """These are the captions of the half that only the verification uses."""
        return tuple(caption for prompt, caption in self.ordinary if held_out(prompt))

    @property
    def index(self) -> str:
        """This is the folder of the run's reference index."""
        return self.run.index


def prepare(run_dir: str) -> Prepared:
    """Read a reduced run.

    Raises:
        RunError: no run, not reduced, or no prompt of it is flagged.
        ModelError: the checkpoint is gone, is another one than was scanned, or is of a kind that repairs do not know.
    """
    run = Run.load(run_dir)
    path = storage.join(run_dir, "flagged", flagged_files.NAMES[0])
    if not storage.exists(path):
        raise RunError("the run has not been reduced (no flagged list)", where=run_dir, hint="run memscan reduce first")
    read_census(run)  # or the list is of another reduce than the rest
    rows = flagged_files.read_parquet(path).to_pylist()
    if not rows:
        raise RunError("no prompt is flagged: there is nothing to mitigate", where=run_dir)
    config = run.config()
    found, scanned = generator_id(config.generator), run.manifest["models"]["generator"]
    if found != scanned:
        raise ModelError(
            f"is {found}, but the run scanned {scanned}", where=config.generator.path, hint="restore the checkpoint"
        )
    _refuse_others(config)
    targets = tuple(read_targets(rows))
    return Prepared(run, config, targets, _ordinary(run, {target.prompt_id for target in targets}))


def _refuse_others(config: CensusConfig) -> None:
    """Raise ModelError for a model that repairs and attacks do not know."""
    from memscan.models.adapters import adapter_of
    from memscan.models.folders import is_double, read_config, resolve_folder

    where = config.generator.path
    if config.generator.base is not None or config.generator.loras:
        what = "generator.base" if config.generator.base is not None else "generator.loras"
        raise ModelError(
            f"was scanned with {what}: repairs and attacks work on one whole folder",
            where=where,
            hint="save the model as one diffusers folder (fuse the LoRAs), scan that, and repair it",
        )
    folder = resolve_folder(where, config.generator.revision)
    if is_double(read_config(folder / "model_index.json")):
        raise ModelError("has two text encoders (SD XL): repairs and attacks work only on models with one", where=where)
    adapter = adapter_of(config.generator)
    if adapter.kind != "own":
        raise ModelError(
            f"was sampled by {adapter.sampled_by}: repairs and attacks work only on Stable Diffusion 1.x and 2.x",
            where=where,
            hint="generator.adapter: auto, where the run says stock" if config.generator.adapter == "stock" else None,
        )


def _ordinary(run: Run, flagged: set[str]) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for number in run.parts:
        for file in run.files(number):
            rows = read_table(file, ["prompt_id", "caption", "status"])
            rows = rows.filter(pc.equal(rows["status"], "done"))
            found += [(long_id(row["prompt_id"], row["caption"]), row["caption"]) for row in rows.to_pylist()]
    return tuple(sorted(item for item in found if item[0] not in flagged))


def mitigate(
    run_dir: str, settings: MitigationSettings, out: str | None = None, workers: int | None = None, say: Say = print
) -> dict[str, Any]:
    """Repair the model of a reduced run, or go on with a repair that was stopped.

    Args:
        out: folder of the result, local; by default RUN/mitigated/METHOD.
        workers: by default one per GPU, or one per core if there is no GPU.

    Returns:
        The card of the result.

    Raises:
        MemscanError: wrong inputs, a folder that is taken, or a training whose loss is not finite. Nothing is written.
    """
    ready = prepare(run_dir)
    place = local_folder(out or storage.join(run_dir, "mitigated", settings.method))
    mark = settings.fingerprint(_inputs(ready, settings))
    if place.exists():
        card = read_card(place) if (place / CARD).is_file() else {}
        if card.get("fingerprint") == mark:
            say(f"mitigate: complete already, in {place}")
            return card
        raise MemscanError("is there already, and is not overwritten", where=str(place), hint="choose another --out")
    if len(ready.calibration) < 2 and settings.method in ("nemo", "nemo_c"):
        raise RunError(
            f"{len(ready.calibration)} ordinary prompts to compare with",
            where=run_dir,
            hint="scan ordinary prompts too",
        )
    for note in _notes(ready, settings):
        say(f"mitigate: {note}")
    _check(ready, settings, workers)
    say(f"mitigate: {settings.method} for {len(ready.targets):,} flagged prompts into {place}")
    started = time.monotonic()
    work = place.with_name(f".{place.name}.work")
    if any(work.glob(f"{settings.method}-{mark}/checkpoint_*")):
        say("mitigate: continues from its last checkpoint")
    try:
        with ray_session(work / "logs") as machine:
            metrics, checkpoint = _run(ready, settings, machine, workers, work, mark)
    except MemscanError:
        if not any(work.glob("*/checkpoint_*")):  # nothing to go on from
            storage.remove_tree(str(work))
        raise
    if checkpoint is None:
        raise MemscanError("the workers ended without a result", where=str(work))
    facts = {
        "fingerprint": mark,
        "seconds": round(time.monotonic() - started, 1),
        "workers": metrics["workers"],
        "notes": _notes(ready, settings),
    }
    card = _write(ready, settings, checkpoint, place, facts)
    storage.remove_tree(str(work))
    return card


def _inputs(ready: Prepared, settings: MitigationSettings) -> dict[str, Any]:
    return {
        "run": ready.run.manifest["fingerprint"],
        "targets": [asdict(target) for target in ready.targets],
        "pruned": read_card(settings.pruned)["fingerprint"] if settings.pruned else None,
    }


def _notes(ready: Prepared, settings: MitigationSettings) -> list[str]:
    """Return what a reader of the result should know."""
    notes = []
    sizes: dict[str, int] = {}
    for target in ready.targets:
        sizes[target.cluster] = sizes.get(target.cluster, 0) + 1
    single = sum(size == 1 for size in sizes.values())
    if settings.method == "nemo_c" and single:
        notes.append(f"{single} of {len(sizes)} clusters have one prompt: their union is that prompt's own units")
    return notes


def _run(
    ready: Prepared, settings: MitigationSettings, machine: Machine, workers: int | None, work: Path, mark: str
) -> tuple[dict[str, Any], Path | None]:
    from pipelines.mitigate.finetune import finetune_loop
    from pipelines.mitigate.finetune_data import FinetuneJob, open_references, training_rows
    from pipelines.mitigate.search import SearchJob, nemo_loop, wanda_loop

    gpus = machine.gpus >= 1 and ready.config.resources.device != "cpu"
    count = workers or (int(machine.gpus) if gpus else cores())
    # One thread a worker, however many cores there are: with another number sums round differently, and a search that
    # compares with a threshold could end with another set of units for one worker than for two.
    device, threads = ("cuda" if gpus else "cpu"), 1
    common: dict[str, Any] = {"settings": settings, "targets": ready.targets, "device": device, "threads": threads}
    common["model"] = ready.run.manifest["models"]["generator"]
    if settings.method in ("finetune", "dedup"):
        pruned, switches = _pruned(settings, ready)
        job: Any = FinetuneJob(
            census=ready.config,
            ordinary=ready.calibration,
            index=ready.index,
            version=ready.run.manifest["index"].get("version"),
            pruned=pruned,
            switches=switches,
            **common,
        )
        _check_batch(settings, count)
        training_rows(
            open_references(job.index, job.version), job
        )  # what is wrong with the inputs is said before workers start
        loop: Any = finetune_loop
    else:
        job = SearchJob(generator=ready.config.generator, ordinary=ready.calibration, **common)
        loop = wanda_loop if settings.method == "wanda" else nemo_loop
    name = f"{settings.method}-{mark}"
    metrics, checkpoint = train(loop, {"job": job}, storage=work, name=name, workers=count, gpus=gpus)
    return {**metrics, "workers": count}, checkpoint


def _check(ready: Prepared, settings: MitigationSettings, workers: int | None) -> None:
    """Say what is wrong with a fine-tuning's inputs before Ray starts."""
    if settings.method not in ("finetune", "dedup"):
        return
    _pruned(settings, ready)
    if workers:
        _check_batch(settings, workers)


def _check_batch(settings: MitigationSettings, workers: int) -> None:
    from memscan.mitigation.finetune import FinetuneSettings, slices

    try:
        slices(FinetuneSettings(batch=settings.batch, micro_batch=settings.micro_batch), 0, workers)
    except ValueError as error:
        raise MemscanError(str(error), where="--batch", hint="choose a batch that divides evenly") from error


def _pruned(settings: MitigationSettings, ready: Prepared) -> tuple[str, str]:
    """Checkpoint and switch file of the model that draws the surrogates."""
    if settings.method == "dedup":
        return "", ""
    if settings.pruned is None:
        raise MemscanError(
            "adversarial fine-tuning needs a pruned model to draw surrogate images",
            where="--pruned",
            hint="run memscan mitigate with --method nemo_c or wanda, and give its folder",
        )
    card = read_card(settings.pruned)
    check_original(card, ready, settings.pruned)
    if card["scope"] != "all":
        return ready.config.generator.path, storage.join(absolute(settings.pruned), SWITCHES)
    return absolute(settings.pruned), ""


def check_original(card: Mapping[str, Any], ready: Prepared, where: str) -> None:
    """Raise ModelError for a repair of another checkpoint than the run scanned."""
    if card["original"]["id"] != ready.run.manifest["models"]["generator"]:
        raise ModelError(
            f"was made from {card['original']['id']}, the run scanned {ready.run.manifest['models']['generator']}",
            where=where,
            hint="give a repair of the checkpoint that was scanned",
        )


def _write(
    ready: Prepared, settings: MitigationSettings, checkpoint: Path, place: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the result's folder from what the workers left, and return it."""
    from memscan.mitigation.folder import load_original_unet, write_folder
    from memscan.mitigation.patch import Patch
    from memscan.mitigation.switches import write_switches
    from memscan.models.folders import resolve_folder
    from memscan.models.specification import hash_folder
    from pipelines.run_folder.inputs import GENERATOR_PARTS

    original = resolve_folder(ready.config.generator.path, ready.config.generator.revision)
    unet = load_original_unet(original)
    result = _outcome(ready, settings, checkpoint, unet)
    patch = Patch.between(dict(unet.named_parameters()), result.changed)
    patch.apply(unet)
    card = {
        "method": settings.method,
        "scope": settings.scope if result.groups else "all",
        "settings": settings.model_dump(mode="json"),
        "run": {"name": ready.run.manifest["name"], "fingerprint": ready.run.manifest["fingerprint"]},
        "original": {
            "name": original.name,
            "id": ready.run.manifest["models"]["generator"],
            "sha256": hash_folder(original, GENERATOR_PARTS),
        },
        "targets": [asdict(target) for target in ready.targets],
        "changed": {
            "tensors": len(patch.new),
            "weights": patch.changed_weights,
            "of": sum(parameter.numel() for parameter in unet.parameters()),
        },
        "units": result.units,
        "evidence": result.evidence,
        **facts,
    }

    def more(folder: Path) -> None:
        patch.save(str(folder / PATCH), {"original": card["original"]["sha256"], "method": settings.method})
        if result.groups and settings.scope != "all":
            write_switches(str(folder / SWITCHES), result.groups, result.members)
        write_card(folder, card)

    write_folder(original, unet, place, more)
    return read_card(place)


@dataclass(frozen=True)
class _Outcome:
    changed: dict[str, Any]
    units: dict[str, Any] | None
    groups: dict[str, Any]
    members: dict[str, str]
    evidence: dict[str, Any]


def _outcome(ready: Prepared, settings: MitigationSettings, checkpoint: Path, unet: Any) -> _Outcome:
    from safetensors.torch import load_file

    from memscan.mitigation.union import group_of, scoped
    from memscan.mitigation.units import UnitSet, union, zeroed_rows
    from pipelines.mitigate.finetune import averaged
    from pipelines.mitigate.search import found_units
    from pipelines.ray.training import read_state

    if settings.method == "wanda":
        return _Outcome(load_file(str(checkpoint / "changed.safetensors")), None, {}, {}, {})
    if settings.method in ("finetune", "dedup"):
        weights, state = averaged(checkpoint)
        return _Outcome(weights, None, {}, {}, {"losses": state["losses"], "surrogates": state["surrogates"]})
    state = read_state(checkpoint)
    clusters = {target.prompt_id: target.cluster for target in ready.targets}
    found = scoped(found_units(state, ready.targets), clusters, settings.scope)
    groups = found | {name: UnitSet.from_json(layers) for name, layers in state["unions"].items()}
    everything = union(groups.values())
    if not everything:
        raise MemscanError(
            "no units were found: no flagged prompt shows memorisation in its first noise prediction",
            where="mitigate",
            hint="try the other timestep of the score (--set convention=...), or use --method finetune",
        )
    units = {
        "off": len(everything),
        "of": state["units"],
        "share": len(everything) / state["units"],
        "groups": {name: len(one) for name, one in groups.items()},
        "before_prune": {name: len(one) for name, one in found.items()} if settings.prune else None,
        "by_layer": {layer: len(rows) for layer, rows in everything.to_json().items()},
    }
    members = {prompt: group_of(prompt, clusters, settings.scope) for prompt in clusters}
    searches = {key: {k: v for k, v in one.items() if k != "units"} for key, one in state["found"].items()}
    evidence = {"threshold": state["threshold"], "ordinary_captions": state["statistics"], "searches": searches}
    return _Outcome(zeroed_rows(unet, everything), units, groups, members, evidence)
