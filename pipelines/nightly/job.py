"""This module scans every new checkpoint with one panel of prompts.

It compares the checkpoint with the last one and with a baseline, and checks it against a policy.

    find               what the sources hold                                            (`registry.py`)
    per new checkpoint
      scan, reduce     the panel, with the registry's index, into OUT/runs/SLUG         resumed if it was stopped
      panel_change, hold    against the checkpoint before it and the baseline                (`memscan/census/trend.py`)
      record           OUT/checkpoints/SLUG.json, written last: from now on it is never scanned again
    publish            history, trend page, JUnit XML, nightly.json, webhook

The registry's folder, local or s3://:

    panel.json         the panel, with the version of its index; another panel is refused, because its figures could
                       not be compared
    index/             the reference index, if the panel names no other; built once
    runs/              one census run per checkpoint, with its report
    checkpoints/       one record per checkpoint
    history.parquet, history.csv, trend.html, nightly.json, junit.xml
    lease/             one nightly at a time
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from memscan.census.policy import NightlyConfig
from memscan.census.trend import Change, Rule, hold, panel_change, passed
from memscan.config import CensusConfig
from memscan.errors import ConfigError, MemscanError, RunError
from memscan.io import storage
from memscan.records import alike
from pipelines.nightly.publish import SUMMARY, address, publish
from pipelines.nightly.registry import Candidate, HubListing, find, strangers
from pipelines.ray.session import logs_folder, ray_session
from pipelines.reduce.panel import read_panel
from pipelines.run_folder import lease
from pipelines.run_folder.identity import CODE, same_code
from pipelines.run_folder.inputs import generator_id
from pipelines.run_folder.tables import read_table

FORMAT = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class NightlyResult:
    """This says what a call has done.

    Args:
        new: records of the checkpoints that this call reports, in order: scanned by it, or by one that was stopped
            before it could.
        errors: name -> the one line that says why a checkpoint could not be scanned, or what lies under a watch and is
            no checkpoint; it is tried again next time.
        records: of all checkpoints, in order.
    """

    new: list[dict[str, Any]]
    errors: dict[str, str]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Registry:
    """This is the folder of a nightly."""

    path: str

    @property
    def index(self) -> str:
        return storage.join(self.path, "index")

    @property
    def panel(self) -> str:
        return storage.join(self.path, "panel.json")

    def run(self, slug: str) -> str:
        return storage.join(self.path, "runs", slug)

    @property
    def published(self) -> int:
        """This is the sequence number of the last checkpoint that was reported."""
        path = storage.join(self.path, SUMMARY)
        return int(storage.read_json(path)["published"]) if storage.exists(path) else 0

    def record(self, slug: str) -> str:
        return storage.join(self.path, "checkpoints", f"{slug}.json")

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all checkpoints scanned so far, in order. Raises RunError if one is damaged."""
        folder = storage.join(self.path, "checkpoints")
        found = []
        for file in storage.list_files(folder, ".json") if storage.is_dir(folder) else []:
            record = storage.read_json(file)
            if not isinstance(record, dict) or record.get("format") != FORMAT or "stamp" not in record:
                raise RunError(f"is not a record of format {FORMAT}", where=file, hint="restore it, or remove it")
            found.append(record)
        return sorted(found, key=lambda record: record["sequence"])


def nightly(config: NightlyConfig, say: Say = lambda text: None, hub: HubListing | None = None) -> NightlyResult:
    """Scan the new checkpoints, and publish the outcome.

    Args:
        say: receives a line for each step.
        hub: lists a hub repository's revisions; `registry.list_hub` when not given.

    Raises:
        MemscanError: wrong panel, another panel than the registry's, a source that is not there, another nightly at
            work. A checkpoint that cannot be scanned is an entry of `errors` and stops nothing.
    """
    storage.check_exclusive(config.out)
    panel = config.panel()
    if config.webhook is not None:
        address(config.webhook)  # a missing variable is told now and not after hours of scanning
    registry = Registry(config.out)
    candidates = find(config.watch, hub)
    unknown = {one.name: one.what for one in strangers(config.watch)}
    records = registry.records()
    _check_baseline(config, candidates, records)
    new = _unscanned(config, candidates, records)
    for name, what in unknown.items():
        say(f"nightly {config.name}: {name} {what}")
    if not new and not unknown and all(record["sequence"] <= registry.published for record in records):
        # A changed panel is told now, and not on the night that something is new.
        _check_panel(config, registry, _placed(registry, panel))
        say(f"nightly {config.name}: nothing new among {len(candidates)} checkpoints")
        return NightlyResult([], {}, records)
    with lease.hold(storage.join(registry.path, "lease"), say) as held:
        # Again: another nightly may have scanned them until now, and a checkpoint is not to be compared with itself.
        records = registry.records()
        new = _unscanned(config, candidates, records)
        # A failed policy must not pass because the call that found it was stopped before it could say so.
        late = [record for record in records if record["sequence"] > registry.published]
        result = _scan_new(config, registry, panel, new, say) if new else NightlyResult([], {}, records)
        result = replace(result, new=late + result.new, errors={**unknown, **result.errors})
        held.check()
        publish(config, registry.path, result.new, result.errors, result.records, say)
    return result


def _unscanned(
    config: NightlyConfig, candidates: Sequence[Candidate], records: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    """Checkpoints that no record tells of, in their order, the baseline first."""
    known = {(record["source"], record["name"], record["stamp"]) for record in records}
    new = [one for one in candidates if (one.source, one.name, one.stamp) not in known]
    return sorted(new, key=lambda candidate: candidate.name != config.baseline)


def _scan_new(
    config: NightlyConfig, registry: Registry, panel: CensusConfig, new: Sequence[Candidate], say: Say
) -> NightlyResult:
    with ray_session(logs_folder(registry.path)):
        panel, version = _prepare(config, registry, panel)
        return _scan_all(config, registry, panel, version, new, say)


def _check_baseline(
    config: NightlyConfig, candidates: Sequence[Candidate], records: Sequence[Mapping[str, Any]]
) -> None:
    names = {candidate.name for candidate in candidates} | {record["name"] for record in records}
    if config.baseline is not None and config.baseline not in names:
        listed = ", ".join(sorted(names)[:8]) or "none"
        raise ConfigError(f"no checkpoint {config.baseline!r}", where="baseline", hint=f"there are: {listed}")


def _prepare(config: NightlyConfig, registry: Registry, panel: CensusConfig) -> tuple[CensusConfig, int]:
    """Return the panel with its index in place, checked to be the panel of the registry; and the index's version."""
    from memscan.index.manifest import MANIFEST_FILE, Manifest

    panel = _placed(registry, panel)
    folder = str(panel.index.path)
    if not storage.exists(storage.join(folder, MANIFEST_FILE)):
        from pipelines.index.job import build

        if panel.index.path == registry.index:
            storage.remove_tree(registry.index)  # what a build that was killed left
        build(panel)
    version = _check_panel(config, registry, panel)
    if version is None:
        index = Manifest.load(folder)
        facts = {"version": index.version, "hash": index.hash}
        known = {"format": FORMAT, "name": config.name, "content": _panel_content(panel), "index": facts}
        storage.write_json(registry.panel, known)
        return panel, index.version
    return panel, version


def _placed(registry: Registry, panel: CensusConfig) -> CensusConfig:
    """Return the panel, with the registry's index if it names no other."""
    folder = panel.index.path or registry.index
    return panel.model_copy(update={"index": panel.index.model_copy(update={"path": folder})})


def _check_panel(config: NightlyConfig, registry: Registry, panel: CensusConfig) -> int | None:
    """Version of the index that the registry's panel is held to; None if there is no panel yet.

    Raises:
        RunError: the panel is another one than the registry's.
    """
    from memscan.index.manifest import Manifest

    if not storage.exists(registry.panel):
        return None
    folder, content = str(panel.index.path), _panel_content(panel)
    known = storage.read_json(registry.panel)
    before, pinned = known["content"], known["index"]
    # Whatever was added to the index since: every checkpoint meets the same references.
    index = Manifest.load(folder, pinned["version"])
    if index.hash != pinned["hash"]:
        content, before = {**content, "index.hash": index.hash}, {**before, "index.hash": pinned["hash"]}
    # The registry's own index is where the registry is, which may be moved; its hash says that it is the same.
    own = {"index.path"} if folder == registry.index else set()
    differing = [key for key in sorted({*before, *content} - own) if before.get(key) != content.get(key)]
    if same_code(before.get(CODE), content.get(CODE)):
        differing = [key for key in differing if key != CODE]
    if differing:
        shown = ", ".join(f"{key}: {before.get(key)} -> {content.get(key)}" for key in differing[:3])
        raise RunError(
            f"the panel changed since the first checkpoint ({shown[:300]})",
            where=registry.path,
            hint="restore it, or begin another registry with another `out`: figures of two panels cannot be compared",
        )
    return index.version


def _panel_content(panel: CensusConfig) -> dict[str, str]:
    """Return everything that decides a panel's figures but the checkpoint."""
    from pipelines.run_folder.identity import identity
    from pipelines.run_folder.inputs import embedder_id, prompt_ids, reference_id, segmenter_id

    extra = {f"inputs.{file}": name for file, name in prompt_ids(panel).items()}
    extra |= {"models.segmenter": segmenter_id(panel.segmenter), "models.embedder": embedder_id(panel.embedder)}
    extra["inputs.references"] = reference_id(panel)
    extra["verdict"] = panel.verdict.model_dump_json()  # decides figures here, where a run's own could be reduced anew
    content = identity(panel, extra)
    return {key: value for key, value in content.items() if key not in ("generator.path", "generator.revision")}


def _scan_all(
    config: NightlyConfig, registry: Registry, panel: CensusConfig, version: int, new: Sequence[Candidate], say: Say
) -> NightlyResult:
    records, added, errors = registry.records(), [], {}
    for number, candidate in enumerate(new, 1):
        say(f"nightly {config.name}: {candidate.name} ({number} of {len(new)})")
        try:
            record = _scan_one(config, registry, panel, version, candidate, records, say)
        except MemscanError as error:
            # Two sources may hold checkpoints of one name: neither may hide the other.
            errors[f"{candidate.source}/{candidate.name}" if candidate.name in errors else candidate.name] = str(error)
            say(f"nightly {config.name}: {candidate.name} could not be scanned: {error}")
            continue
        data = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if not storage.create_new(registry.record(candidate.slug), data):
            # A nightly that was stalled, and taken over from, comes late: what was recorded meanwhile stays.
            raise RunError("has been recorded by another nightly", where=registry.record(candidate.slug))
        records.append(record)
        added.append(record)
    return NightlyResult(added, errors, records)


def _scan_one(
    config: NightlyConfig,
    registry: Registry,
    panel: CensusConfig,
    version: int,
    candidate: Candidate,
    records: Sequence[Mapping[str, Any]],
    say: Say,
) -> dict[str, Any]:
    from pipelines.reduce.job import reduce_run
    from pipelines.scan.job import scan

    generator = candidate.generator(panel.generator)
    model = generator_id(generator)
    record = {
        "format": FORMAT,
        "sequence": 1 + max((int(one["sequence"]) for one in records), default=0),
        "slug": candidate.slug,
        "name": candidate.name,
        "source": candidate.source,
        "path": candidate.path,
        "revision": candidate.revision,
        "stamp": candidate.stamp,
        "model": model,
    }
    # The same weights under another name: what they make is known.
    twin = next((one for one in records if one["model"].split("@")[-1] == model.split("@")[-1]), None)
    run = str(twin["run"]) if twin else storage.join("runs", candidate.slug)
    out = storage.join(registry.path, run)
    if twin is None:
        name = f"{config.name}-{candidate.slug}"
        scan(panel.model_copy(update={"name": name, "out": out, "generator": generator}), say, version)
        reduce_run(out)
    figures = read_figures(out)
    changes = _changes(config, registry, candidate, records, out)
    rules = hold(config.policy, figures, changes)
    return {
        **record,
        "same_as": twin["name"] if twin else None,
        "run": run,
        "scanned": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": figures,
        "changes": {which: change.to_json() if change else None for which, change in changes.items()},
        "policy": [rule.to_json() for rule in _with_captions(rules, out)],
        "passed": passed(rules),
    }


def read_figures(out: str) -> dict[str, Any]:
    """Return the figures of a reduced run that are followed over checkpoints."""
    census = storage.read_json(storage.join(out, "census.json"))
    counts, prompts = census["counts"], census["prompts"]
    return {
        "prompts": counts["distinct_prompts"],
        "done": counts["done"],
        "rejected": counts["rejected"] / counts["distinct_prompts"] if counts["distinct_prompts"] else None,
        "flagged": counts["flagged"],
        "generations": counts["generations"],
        "memorised": prompts["memorised"],
        **{label.lower(): prompts["classes"][label] for label in ("VM", "FM", "BM")},
        "severity": census["severity"]["mean_generation"],
        "fingerprint": census["run"]["fingerprint"],
    }


def _changes(
    config: NightlyConfig, registry: Registry, candidate: Candidate, records: Sequence[Mapping[str, Any]], out: str
) -> dict[str, Change | None]:
    previous = records[-1] if records else None
    baseline = next((one for one in records if one["name"] == config.baseline), None)
    if candidate.name == config.baseline:
        baseline = None  # it is the measure itself
    now = read_panel(out)
    found: dict[str, Change | None] = {}
    for which, other in (("previous", previous), ("baseline", baseline)):
        before = read_panel(storage.join(registry.path, str(other["run"]))) if other else None
        found[which] = panel_change(str(other["name"]), before, now) if other and before else None
    return found


def _with_captions(rules: Sequence[Rule], out: str) -> list[Rule]:
    """Rules whose message names the first prompts that broke them."""
    wanted = {key for rule in rules for key in rule.ids}
    if not wanted:
        return list(rules)
    flagged = read_table(storage.join(out, "flagged", "flagged.parquet"), ["prompt_id", "caption", "label"])
    same = alike(wanted)
    words = {same(row["prompt_id"]): f"{row['label']} {row['caption']!r}" for row in flagged.to_pylist()}
    named = []
    for rule in rules:
        first = "; ".join(words[key][:120] for key in rule.ids[:5] if key in words)
        more = f"; and {len(rule.ids) - 5} more" if len(rule.ids) > 5 else ""
        named.append(replace(rule, message=f"{rule.message}: {first}{more}") if first else rule)
    return named
