"""This module tests whether a repair holds.

The repaired model is scanned, attacked and measured like the original, and both are compared.

    flagged prompts, paraphrases, ordinary panel        -> an ordinary scan of another generator    (`scan/job.py`)
    panel, training images, attacked images, pictures   -> workers                (`workers.py`)
    both models' examinations                           -> verify.json, table.json, report.html

    RUN/verified/original/    the scanned model: examined once for all repairs
    RUN/verified/NAME/        a repair
    RUN/verified/policy.json               the limits that they must keep, if a policy was given
    RUN/verified/table.json report.html    every repair that has been verified here, in one table
    RUN/verified/locality.json             by `evaluate/locality.py`, shown on the same page

What was examined is not examined again. A command that was stopped continues, and a folder that was made with other
settings is refused.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from memscan.config import CensusConfig, GeneratorConfig, PromptsConfig
from memscan.errors import MemscanError, ModelError
from memscan.io import storage
from memscan.mitigation.card import CARD, NAMES, SWITCHES, read_card
from memscan.mitigation.policy import RepairPolicy
from memscan.mitigation.settings import VerifySettings
from memscan.mitigation.switches import read_switches, write_switches
from memscan.mitigation.targets import own_images
from memscan.mitigation.verification import Rows
from memscan.records import alike, prompt_id
from pipelines.mitigate.job import Prepared, check_original, prepare
from pipelines.ray.session import cores, ray_session
from pipelines.run_folder.folder import RunFolder
from pipelines.run_folder.inputs import generator_id
from pipelines.run_folder.places import absolute, local_folder
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table, write_table
from pipelines.verify.choice import FIRST_TEMPLATES, Lists, choose
from pipelines.verify.page import FORMAT, ORIGINAL, POLICY, RESULT, write_table_and_page

Say = Callable[[str], None]
EXAMINED_RECORD = "examined.json"


@dataclass(frozen=True)
class Subject:
    """A subject is a model that is examined.

    Attributes:
        name: of its folder below RUN/verified.
        checkpoint: the repaired diffusers folder; "" for the original.
        card: of the repair; None for the original and for a folder that `memscan mitigate` did not write.
    """

    name: str
    generator: GeneratorConfig
    checkpoint: str
    card: dict[str, Any] | None


def verify(
    run_dir: str,
    checkpoint: str,
    settings: VerifySettings,
    out: str | None = None,
    workers: int | None = None,
    permanent: bool = False,
    say: Say = print,
    policy: RepairPolicy | None = None,
) -> dict[str, Any]:
    """Verify a repaired checkpoint against the reduced run that it was made from.

    Args:
        checkpoint: a diffusers folder, by `memscan mitigate` or by anyone.
        out: local folder of all verifications; by default RUN/verified.
        permanent: judge the folder's own weights, where the repair is one of switches.
        policy: the limits that every repair of the folder must keep, from now on; the one given last when not given.

    Returns:
        The content of verify.json.

    Raises:
        MemscanError: wrong inputs, or a verification of other settings in the folder. Nothing is overwritten.
    """
    ready = prepare(run_dir)
    place = local_folder(out or storage.join(run_dir, "verified"))
    checkpoint = absolute(checkpoint)
    repaired = _subject(ready, checkpoint, permanent)
    changed = _changed(ready, checkpoint)
    lists = choose(ready, settings)
    original = Subject(ORIGINAL, ready.config.generator, "", None)
    with ray_session(place / "logs") as machine:
        gpus = machine.gpus >= 1 and ready.config.resources.device != "cpu"
        count = workers or (int(machine.gpus) if gpus else cores())
        for subject in (original, repaired):
            _examine(ready, subject, lists, settings, place, (count, gpus), say)
    result = _result(ready, repaired, lists, settings, place, changed)
    storage.write_json(str(place / repaired.name / RESULT), result)
    if policy is not None:
        storage.write_json(str(place / POLICY), policy.model_dump(mode="json"))
    write_table_and_page(ready, place, say)
    return result


def _subject(ready: Prepared, checkpoint: str, permanent: bool) -> Subject:
    """Return the repair as it generates: by its weights, or by its switches over the original."""
    config = ready.config.generator
    path = Path(checkpoint)
    if not path.is_dir():
        raise ModelError("no such folder", where=checkpoint, hint="give a folder that memscan mitigate wrote")
    name = path.resolve().name
    if name in (ORIGINAL, "logs"):
        raise ModelError(f"a verification cannot be named {name}", where=checkpoint, hint="rename the folder")
    card = read_card(path) if (path / CARD).is_file() else None
    if card is not None:
        check_original(card, ready, checkpoint)
    if card is not None and card["scope"] != "all" and not permanent:
        switched = config.model_copy(update={"switches": storage.join(checkpoint, SWITCHES)})
        return Subject(name, switched, checkpoint, card)
    own = config.model_copy(update={"path": checkpoint, "revision": None, "switches": None})
    generator_id(own)  # says what a broken folder lacks
    return Subject(f"{name}-permanent" if permanent else name, own, checkpoint, card)


def _changed(ready: Prepared, checkpoint: str) -> dict[str, int]:
    """Number of weights of the UNet that are another than the original's. Raises ModelError for another UNet."""
    from memscan.mitigation.folder import load_original_unet
    from memscan.mitigation.patch import Patch
    from memscan.models.folders import resolve_folder

    config = ready.config.generator
    before = dict(load_original_unet(resolve_folder(config.path, config.revision)).named_parameters())
    after = dict(load_original_unet(Path(checkpoint)).named_parameters())
    odd = sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or before[name].shape != after[name].shape
    )
    if odd:
        raise ModelError(
            f"has another architecture: {len(odd)} tensors differ, such as {odd[0]}",
            where=checkpoint,
            hint="give a repair of the checkpoint that the run scanned",
        )
    patch = Patch.between(before, after)
    return {"weights": patch.changed_weights, "of": sum(one.numel() for one in before.values())}


def _examine(
    ready: Prepared,
    subject: Subject,
    lists: Lists,
    settings: VerifySettings,
    place: Path,
    workers: tuple[int, bool],
    say: Say,
) -> None:
    """Scan one model and let the workers examine it, unless that is done already."""
    from pipelines.ray.training import train
    from pipelines.scan.job import scan
    from pipelines.verify.workers import EXAMINED, OUTCOMES, verify_loop

    folder = place / subject.name
    model = generator_id(subject.generator)
    # The lists too: a run that was reduced again may have other flagged prompts, or the same ones in other clusters.
    mark = settings.fingerprint({"run": ready.run.manifest["fingerprint"], "model": model, "lists": asdict(lists)})
    record = folder / EXAMINED_RECORD
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8"))["fingerprint"] == mark:
            say(f"verify: {subject.name} was examined already")
            return
        raise MemscanError(
            "holds a verification of another model or other settings", where=str(folder), hint="choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    generator = _covering(subject.generator, lists, folder)
    config = _scan_config(ready, generator, lists, folder)
    counts = scan(config, lambda text: say(f"verify: {subject.name}, {text}"))
    scanned = time.monotonic()
    job = _job(ready, config, lists, settings, workers[1])
    say(f"verify: {subject.name}, {len(job.targets)} images attacked, {len(job.controls)} for control")
    _, checkpoint = train(
        verify_loop, {"job": job}, storage=folder / ".work", name=mark, workers=workers[0], gpus=workers[1]
    )
    if checkpoint is None:
        raise MemscanError("the workers ended without a result", where=str(folder))
    for file in (EXAMINED, OUTCOMES):
        shutil.copyfile(checkpoint / file, folder / file)
    shutil.rmtree(folder / ".work", ignore_errors=True)
    facts = {
        "fingerprint": mark,
        "model": model,
        "counts": counts.to_json(),
        "attacked": len(job.targets),
        "controls": len(job.controls),
        "seconds": {"scan": round(scanned - started, 1), "examination": round(time.monotonic() - scanned, 1)},
        "workers": workers[0],
    }
    storage.write_json(str(record), facts)


def _covering(generator: GeneratorConfig, lists: Lists, folder: Path) -> GeneratorConfig:
    """Switches that hold for the paraphrases too, as if a gate recognised them: tested are the units, not the gate."""
    if generator.switches is None:
        return generator
    groups, members = read_switches(generator.switches)
    same = alike(members)
    for caption, prompt in lists.paraphrases.items():
        if same(prompt) in members:
            members[same(prompt_id(caption))] = members[same(prompt)]
    path = str(folder / SWITCHES)
    write_switches(path, groups, members)
    return generator.model_copy(update={"switches": path})


def _scan_config(ready: Prepared, generator: GeneratorConfig, lists: Lists, folder: Path) -> CensusConfig:
    """Return the run's own configuration with other prompts and another generator, over its index."""
    file = str(folder / "prompts.parquet")
    # The same bytes for the same captions; others are another run to the scan, which refuses to mix them.
    write_table(file, pa.table({"caption": pa.array(lists.captions, pa.string())}))
    return ready.config.model_copy(
        update={
            "name": f"verify-{folder.name}"[:100],
            "out": str(folder / "scan"),
            "prompts": PromptsConfig(
                paths=[file], caption_column="caption", max_chars=ready.config.prompts.max_chars + 64
            ),
            "generator": generator,
            "index": ready.config.index.model_copy(update={"path": ready.index, "source": None}),
        }
    )


def _job(ready: Prepared, config: CensusConfig, lists: Lists, settings: VerifySettings, gpus: bool) -> Any:
    from pipelines.verify.workers import VerifyJob

    return VerifyJob(
        census=config,
        original=ready.config.generator,
        settings=settings,
        targets=lists.attacked,
        pictured=tuple((target.prompt_id, target.caption) for target in ready.targets[: settings.pictures]),
        panel=lists.panel,
        controls=lists.controls,
        references=lists.references,
        index=ready.index,
        version=lists.version,
        device="cuda" if gpus else "cpu",
        threads=1,
    )


def _result(
    ready: Prepared, subject: Subject, lists: Lists, settings: VerifySettings, place: Path, changed: dict[str, int]
) -> dict[str, Any]:
    """Return both examinations compared."""
    from safetensors.numpy import load_file

    from memscan.mitigation.utility import cost
    from memscan.mitigation.verification import attack_rates, repair_effect
    from pipelines.verify.workers import EXAMINED, OUTCOMES

    folders = {"before": place / ORIGINAL, "after": place / subject.name}
    rows = {when: scanned_rows(str(folder / "scan")) for when, folder in folders.items()}
    arrays = {when: load_file(str(folder / EXAMINED)) for when, folder in folders.items()}
    outcomes = {when: storage.read_json(str(folder / OUTCOMES)) for when, folder in folders.items()}
    records = {when: storage.read_json(str(folder / EXAMINED_RECORD)) for when, folder in folders.items()}
    panels = {
        "flagged": [target.prompt_id for target in lists.flagged],
        "paraphrases": [prompt_id(caption) for caption in lists.paraphrases],
        "ordinary": [prompt for prompt, _ in lists.panel],
    }
    rule, card = ready.config.verdict, subject.card
    own = own_images(lists.flagged)
    owned = {"flagged": own, "paraphrases": {prompt_id(text): own[of] for text, of in lists.paraphrases.items()}}
    pictured = ready.targets[: settings.pictures]
    return {
        "format": FORMAT,
        "name": subject.name,
        "method": card["method"] if card else None,
        "title": NAMES[card["method"]] if card else "not made by memscan",
        "scope": card["scope"] if card and subject.generator.switches else "all",
        "units": _units(card),
        "changed": changed,
        "mitigation_seconds": card["seconds"] if card else None,
        "run": {"name": ready.run.manifest["name"], "fingerprint": ready.run.manifest["fingerprint"]},
        "models": {when: record["model"] for when, record in records.items()},
        "settings": settings.model_dump(mode="json"),
        "prompts": {
            name: repair_effect(_only(rows["before"], ids), _only(rows["after"], ids), rule, owned.get(name))
            for name, ids in panels.items()
        },
        "attack": {when: attack_rates(outcomes[when]["attacks"]) for when in folders},
        "attacked": {key: records["after"][key] for key in ("attacked", "controls")},
        "utility": {"encoder": outcomes["after"]["encoder"], **cost(arrays["before"], arrays["after"])},
        "utility_off": _cost_off(arrays["before"], arrays["after"]),
        "seconds": {when: record["seconds"] for when, record in records.items()},
        "notes": _notes(subject),
        "captions": [target.caption for target in pictured],
        # The class of the generation that is shown: the scan drew it under the same seed.
        "pictured": {
            when: [rows[when].get(target.prompt_id, [(None, "")])[0][0] for target in pictured] for when in folders
        },
    }


def _units(card: dict[str, Any] | None) -> dict[str, Any] | None:
    """Units off in all, and the largest and the middle group of a repair by switches."""
    if card is None or not card.get("units"):
        return None
    units = card["units"]
    sizes = list(units.get("groups", {}).values())
    spread = {"largest": max(sizes), "median": median(sizes)} if sizes else {"largest": None, "median": None}
    return {**{key: units[key] for key in ("off", "of", "share")}, **spread}


def _cost_off(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any] | None:
    """Return the cost on the panel with a group's units off, if the repair consists of switches."""
    from memscan.mitigation.utility import cost

    if "panel_off_PSD" not in after:
        return None
    off = {**after, "panel_PSD": after["panel_off_PSD"], "alignment_PS": after["alignment_off_PS"]}
    return cost(before, off)


def _notes(subject: Subject) -> list[str]:
    notes = []
    if subject.card and subject.card["settings"].get("paraphrases", 0) > FIRST_TEMPLATES:
        notes.append("The repair has seen some of these paraphrases.")
    if subject.generator.switches is None:
        return notes
    return [
        *notes,
        (
            "Units are off while an image of a flagged prompt or of a paraphrase of it is generated, and the attack is "
            "on the model in that state. A gate that knows only the exact texts would let paraphrases pass."
        ),
        (
            "Images of ordinary prompts are generated with every unit on, so nothing changes for them. For the figures "
            "with units off, the units of one flagged prompt or cluster after the other are off for the same prompts."
        ),
    ]


def _only(rows: Rows, ids: list[str]) -> Rows:
    return {one: rows[one] for one in ids if one in rows}


def scanned_rows(folder: str) -> Rows:
    """Return labels and matches of a scan's processed prompts."""
    run = Run(RunFolder(folder), storage.read_json(RunFolder(folder).manifest))
    leaf = "generations.list.element."
    found: dict[str, list[tuple[str, str]]] = {}
    for number in run.parts:
        for file in run.files(number):
            for row in read_table(file, ["prompt_id", "status", f"{leaf}label", f"{leaf}match_id"]).to_pylist():
                if row["status"] == "done":
                    found[row["prompt_id"]] = [(one["label"], one["match_id"]) for one in row["generations"]]
    return found
