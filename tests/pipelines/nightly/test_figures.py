"""What is watched: sources, order, names, policies, comparisons, JUnit, and mistakes in a watch file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from typer.testing import CliRunner

from memscan.census.policy import NightlyConfig, PolicyConfig, SourceConfig, WebhookConfig, load_watch
from memscan.census.rates import rate
from memscan.census.trend import Panel, hold, mcnemar, panel_change, passed
from memscan.errors import ConfigError, InputError, RunError
from memscan.index.manifest import Manifest
from memscan.index.store import write_index
from memscan.io import storage
from memscan.models.specification import ModelSpec
from memscan.records import REFERENCES, REGIONS
from memscan.report.junit import junit
from memscan.report.trend import HEIGHT, chart, render_trend
from pipelines.cli import app
from pipelines.nightly.job import Registry, _panel_content, _placed, nightly
from pipelines.nightly.publish import body, history, post, summary, to_csv
from pipelines.nightly.registry import HubRevision, find, strangers

IDS = st.frozensets(st.sampled_from([f"p{number}" for number in range(12)]))


def make_checkpoint(folder: Path, weights: str = "w") -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_text(weights)


def test_folders_by_value_of_their_numbers(tmp_path: Path) -> None:
    for name in ("step-1000", "step-900", "other/step-20", "step-1000/optimizer"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "notes").mkdir()
    found = find([SourceConfig(path=str(tmp_path))])
    assert [one.name for one in found] == ["other/step-20", "step-900", "step-1000", "step-1000/optimizer"]
    assert [one.name for one in find([SourceConfig(path=str(tmp_path), match="step-9*")])] == ["step-900"]
    assert len({one.slug for one in found}) == 4
    assert not any("/" in one.slug for one in found)


def test_a_folder_that_is_a_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "final")
    (one,) = find([SourceConfig(path=f"{tmp_path}/final/")])
    assert (one.name, one.path) == ("final", f"{tmp_path}/final")


def test_a_stamp_follows_weights_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a")

    def stamp() -> str:
        return find([SourceConfig(path=str(tmp_path))])[0].stamp

    before = stamp()
    (tmp_path / "a" / "README.md").write_text("a card")
    assert stamp() == before
    (tmp_path / "a" / "unet" / "model.safetensors").write_text("other")
    assert stamp() != before


def test_a_prefix_on_s3(s3_bucket: str) -> None:
    for name in ("step-10", "step-9"):
        storage.write_atomic(f"{s3_bucket}/ckpt/{name}/model_index.json", b"{}")
        storage.write_atomic(f"{s3_bucket}/ckpt/{name}/unet/model.safetensors", name.encode())
    found = find([SourceConfig(path=f"{s3_bucket}/ckpt")])
    assert [one.path for one in found] == [f"{s3_bucket}/ckpt/step-9", f"{s3_bucket}/ckpt/step-10"]
    storage.write_atomic(f"{s3_bucket}/ckpt/step-10/unet/model.safetensors", b"step-99")  # of the same length
    assert [a.stamp == b.stamp for a, b in zip(find([SourceConfig(path=f"{s3_bucket}/ckpt")]), found, strict=True)] == [
        True,
        False,
    ]


def test_hub_revisions_come_from_the_listing() -> None:
    def listing(repository: str, refs: str) -> list[HubRevision]:
        assert (repository, refs) == ("org/model", "tags")
        return [HubRevision("v1", "a" * 40), HubRevision("v2-rc", "b" * 40), HubRevision("v2", "c" * 40)]

    found = find([SourceConfig(hub="org/model", match="v?")], listing)
    assert [(one.name, one.path, one.revision) for one in found] == [
        ("v1", "org/model", "a" * 40),
        ("v2", "org/model", "c" * 40),
    ]


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find([SourceConfig(path=str(tmp_path / "nowhere"))])


@given(IDS, IDS, IDS, IDS)
def test_what_changed_is_counted_over_common_prompts(
    done_a: frozenset[str], done_b: frozenset[str], flagged_a: frozenset[str], flagged_b: frozenset[str]
) -> None:
    before = Panel(done_a, dict.fromkeys(flagged_a & done_a, "VM"), 0.5)
    after = Panel(done_b, dict.fromkeys(flagged_b & done_b, "FM"), 0.25)
    change = panel_change("a", before, after)
    common = done_a & done_b
    assert change.common == len(common)
    # Flagged after = flagged before + new - gone, over the common prompts.
    assert len(flagged_b & common) == len(flagged_a & common) + len(change.new) - len(change.gone)
    assert set(change.relabelled) == flagged_a & flagged_b & common
    back = panel_change("b", after, before)
    assert (back.new, back.gone, back.p_value) == (change.gone, change.new, change.p_value)
    assert change.severity == -0.25


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (3, 1), (4, 4), (1, 9)])
def test_mcnemar_is_the_binomial_tail(gained: int, lost: int) -> None:
    n = gained + lost
    tail = min(1.0, 2 * float(binom.cdf(min(gained, lost), n, 0.5))) if n else 1.0
    assert mcnemar(gained, lost) == pytest.approx(tail)


def figures(
    vm: int = 1, total: int = 100, severity: float | None = 0.1, rejected: float | None = 0.0
) -> dict[str, Any]:
    one = {name: rate(vm, total).as_dict() for name in ("vm", "fm", "bm", "memorised")}
    return {**one, "severity": severity, "rejected": rejected, "prompts": total, "done": total, "flagged": vm}


def states(policy: dict[str, Any], **changes: Any) -> dict[str, str]:
    rules = hold(PolicyConfig(**{"max_rejected_rate": None, **policy}), figures(**changes), {})
    return {rule.name: rule.state for rule in rules}


def test_a_limit_itself_is_kept() -> None:
    assert states({"max_vm_rate": 0.01}) == {"max_vm_rate": "passed"}
    assert states({"max_vm_rate": 0.01}, vm=2) == {"max_vm_rate": "failed"}
    assert states({"max_vm_rate": 0.01, "judge": "upper"}) == {"max_vm_rate": "failed"}
    assert states({"max_memorised_rate": 0.0}, vm=0) == {"max_memorised_rate": "passed"}
    assert states({"max_rejected_rate": 0.01}, rejected=0.02) == {"max_rejected_rate": "failed"}


def test_a_scan_of_nothing_does_not_pass() -> None:
    assert states({"max_severity": 1.0}, severity=None) == {"max_severity": "failed"}
    assert states({"max_vm_rate": 1.0}, vm=0, total=0) == {"max_vm_rate": "failed"}


def test_comparisons_that_cannot_be_made_are_skipped() -> None:
    policy = PolicyConfig(max_new_flagged=0, max_severity_increase=0.0, max_rejected_rate=None)
    rules = hold(policy, figures(), {"previous": None, "baseline": None})
    assert {rule.state for rule in rules} == {"skipped"}
    assert passed(rules)
    before, after = Panel(frozenset("ab"), {"a": "VM"}, 0.2), Panel(frozenset("ab"), {"b": "VM"}, 0.2)
    rules = hold(policy, figures(), {"previous": panel_change("then", before, after), "baseline": None})
    assert [(rule.name, rule.against, rule.state, rule.ids) for rule in rules] == [
        ("max_new_flagged", "then", "failed", ("b",)),
        ("max_severity_increase", "then", "passed", ()),
        ("max_new_flagged", "baseline", "skipped", ()),
        ("max_severity_increase", "baseline", "skipped", ()),
    ]


def record(name: str, vm: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "sequence": 1,
        "name": name,
        "source": "s",
        "model": "m@1",
        "scanned": "2026-11-25T00:00:00+00:00",
        "passed": True,
        "run": "runs/x",
        "same_as": None,
        "figures": figures(vm),
        "changes": {"previous": None, "baseline": None},
        "policy": [],
        **changes,
    }


@given(st.text(max_size=30), st.text(max_size=30))
def test_junit_is_xml_whatever_stands_in_it(name: str, message: str) -> None:
    rule = {"name": "max_vm_rate", "limit": 0, "value": 1, "state": "failed", "message": message, "against": ""}
    document = junit(name, [record(name, policy=[rule, {**rule, "state": "skipped"}])], {"x": message})
    root = ElementTree.fromstring(document)
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
    }


def test_nothing_new_is_no_pass(tiny_world: Any) -> None:
    watch = NightlyConfig.model_validate({"out": "o", "census": tiny_world.settings, "watch": [{"path": "p"}]})
    assert summary(watch, [], {})["state"] == "nothing new"
    assert summary(watch, [record("a")], {})["state"] == "passed"
    root = ElementTree.fromstring(junit("n", [], {}))
    assert [case.get("name") for case in root.iter("testcase")] == ["nothing new"]
    assert (root.get("tests"), root.get("skipped")) == ("1", "1")


def test_one_checkpoint_twice_is_one_comparison_and_no_two_cases_have_one_name() -> None:
    policy = PolicyConfig(max_new_flagged=0, max_severity_increase=0.0, max_rejected_rate=None)
    before, after = Panel(frozenset("ab"), {"a": "VM"}, 0.2), Panel(frozenset("ab"), {"b": "VM"}, 0.2)
    same = panel_change("step-900", before, after)
    rules = hold(policy, figures(), {"previous": same, "baseline": same})
    assert [(rule.name, rule.against) for rule in rules] == [
        ("max_new_flagged", "step-900"),
        ("max_severity_increase", "step-900"),
    ]
    rule = {"name": "max_vm_rate", "limit": 0, "value": 1, "state": "failed", "message": "", "against": ""}
    names = ["a", "a", "a (2)", "b"]
    document = junit("n", [record(name, policy=[rule, rule]) for name in names], {"a": "x", "b\0": "y", "b\1": "z"})
    cases = [(case.get("classname"), case.get("name")) for case in ElementTree.fromstring(document).iter("testcase")]
    assert len(cases) == len(set(cases)) == 11


def test_a_message_for_a_chat(tiny_world: Any) -> None:
    hook = {"url_env": "HOOK", "link": "https://reports.example/nightly/"}
    content = {"name": "sd", "out": "o", "census": tiny_world.settings, "watch": [{"path": "p"}]}
    watch = NightlyConfig.model_validate({**content, "webhook": hook})
    failed = {"name": "max_vm_rate", "state": "failed", "message": "vm rate is 0.35, limit 0.1", "against": ""}
    document = summary(watch, [record("<a>"), record("step-200", passed=False, policy=[failed])], {"x": "no unet"})
    lines = document["text"].splitlines()
    assert lines[0] == "memscan nightly sd: error"
    assert lines[1] == "step-200 FAILED: vm rate is 0.35, limit 0.1"  # what failed comes first
    assert lines[-1] == "https://reports.example/nightly/trend.html"
    for kind in ("json", "slack", "teams"):
        webhook = WebhookConfig.model_validate({**hook, "format": kind})
        sent = body(webhook, document)
        assert "step-200 FAILED" in json.dumps(sent)
        if kind == "slack":
            assert set(sent) == {"text"}
            assert "<a>" not in sent["text"]
        if kind == "teams":
            assert sent["attachments"][0]["content"]["type"] == "AdaptiveCard"


def test_a_changed_panel_is_noticed_when_nothing_is_new(tmp_path: Path, tiny_world: Any) -> None:
    """What decides figures changed after the last checkpoint: the command says so, although nothing is new."""
    source, out = tmp_path / "checkpoints", tmp_path / "registry"
    source.mkdir()
    out.mkdir()
    index = tmp_path / "index"
    row = {**dict.fromkeys(REFERENCES.names), "reference_id": "a", "image": b"x"}
    rows = pa.Table.from_pylist([row], schema=REFERENCES)
    unit = np.ones((1, 4), np.float32) / 2
    spec = ModelSpec("embedder", "m", "0" * 64, "none")
    write_index(str(index), rows, dict.fromkeys(REGIONS, unit), "Flat", 1, spec, spec)
    settings = {key: value for key, value in tiny_world.settings.items() if key not in ("name", "generator")}
    census = {**settings, "index": {"path": str(index)}}
    watch = NightlyConfig.model_validate({"out": str(out), "census": census, "watch": [{"path": str(source)}]})
    registry = Registry(str(out))
    panel = _placed(registry, watch.panel())
    manifest = Manifest.load(str(index))
    facts = {"version": manifest.version, "hash": manifest.hash}
    storage.write_json(registry.panel, {"format": 1, "name": "n", "content": _panel_content(panel), "index": facts})
    assert nightly(watch).new == []
    changed = watch.model_copy(update={"census": {**census, "verdict": {"min_share": 1.0}}})
    with pytest.raises(RunError, match="the panel changed"):
        nightly(changed)


def test_the_trend_page_escapes_and_scales() -> None:
    records = [record("<b>one</b>", 0), record("two", 50)]
    page = render_trend("n", "two", records)
    assert "<b>one</b>" not in page
    assert "&lt;b&gt;one&lt;/b&gt;" in page
    drawn = chart(records)
    low, high = (point["y"] for point in drawn["lines"]["vm"])
    assert low == HEIGHT  # a rate of 0 lies on the axis
    assert high == pytest.approx(HEIGHT * (1 - 0.5 / drawn["top"]), abs=0.1)
    assert "No checkpoint has been scanned yet" in render_trend("n", None, [])


def test_history_for_spreadsheets() -> None:
    text = to_csv(history([record("=HYPERLINK(1)")])).decode()
    assert "'=HYPERLINK(1)" in text


def test_a_webhook_that_does_not_answer_is_told_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "http://127.0.0.1:9/services/secret")
    told = post(WebhookConfig(url_env="HOOK", timeout_seconds=2), {})
    assert told.startswith("not delivered (")
    assert "secret" not in told


BASE: dict[str, Any] = {"out": "r", "census": "c.yaml", "watch": [{"path": "p"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polcy": {}}, "unknown key 'polcy', did you mean 'policy'"),
        ({"watch": []}, "'watch'"),
        ({"watch": [{"path": "p", "hub": "a/b"}]}, "give either path or hub"),
        ({"policy": {"max_vm_rate": 2}}, "'policy.max_vm_rate'"),
        ({"webhook": {"url_env": "https://x/secret"}}, "'webhook.url_env'"),
        ({"out": None}, "'out'"),
    ],
)
def test_mistakes_in_a_watch_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "watch.yaml"
    path.write_text(yaml.safe_dump({**BASE, **change}))
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_watch(path)
    result = CliRunner().invoke(app, ["nightly", str(path)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_baseline_names_what_there_is(tmp_path: Path, tiny_world: Any) -> None:
    make_checkpoint(tmp_path / "ckpt" / "one")
    settings = {key: value for key, value in tiny_world.settings.items() if key != "generator"}
    path = tmp_path / "watch.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **BASE,
                "out": str(tmp_path / "r"),
                "census": settings,
                "watch": [{"path": str(tmp_path / "ckpt")}],
                "baseline": "eno",
            }
        )
    )
    result = CliRunner().invoke(app, ["nightly", str(path)])
    assert result.exit_code == 2
    assert "no checkpoint 'eno'; there are: one" in result.stderr
    assert not (tmp_path / "r").exists()


def test_what_a_stopped_call_had_scanned_is_told_by_the_next(tmp_path: Path, tiny_world: Any) -> None:
    """The record of a checkpoint is there, and its failed policy, but nobody has been told of it."""
    make_checkpoint(tmp_path / "ckpt" / "one")
    (found,) = find([SourceConfig(path=str(tmp_path / "ckpt"))])
    out = tmp_path / "r"
    known = {name: getattr(found, name) for name in ("name", "source", "stamp")}
    rule = {"name": "max_vm_rate", "limit": 0, "value": 1, "state": "failed", "message": "too many", "against": ""}
    left = record(passed=False, policy=[rule], format=1, **known)
    storage.write_json(str(out / "checkpoints" / f"{found.slug}.json"), left)
    settings = {key: value for key, value in tiny_world.settings.items() if key != "generator"}
    path = tmp_path / "watch.yaml"
    watch = {**BASE, "out": str(out), "census": settings, "watch": [{"path": str(tmp_path / "ckpt")}]}
    path.write_text(yaml.safe_dump(watch))
    first = CliRunner().invoke(app, ["nightly", str(path)])
    assert first.exit_code == 3, first.output
    assert "FAILED        one" in first.stdout
    assert "too many" in (out / "junit.xml").read_text()
    second = CliRunner().invoke(app, ["nightly", str(path)])
    assert (second.exit_code, "nothing new" in second.stdout) == (0, True)


def test_the_panel_needs_no_generator(tiny_world: Any) -> None:
    settings = {**tiny_world.settings}
    del settings["generator"]
    watch = NightlyConfig(**{**BASE, "census": settings})
    assert watch.panel().generator.path == "watched"
    with pytest.raises(ConfigError, match="prompts"):
        NightlyConfig(**{**BASE, "census": {"generator": {"steps": 3}}}).panel()


def test_summary_is_json(tiny_world: Any) -> None:
    from pipelines.nightly.publish import summary

    watch = NightlyConfig(**BASE)
    assert json.loads(json.dumps(summary(watch, [record("a", passed=False)], {})))["state"] == "failed"
    assert summary(watch, [record("a", passed=False)], {"b": "x"})["state"] == "error"


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "step-1")
    (tmp_path / "step-1" / "v1-5-pruned.safetensors").write_text("the same weights in another form")
    for file in (
        "train/checkpoint-500/unet/diffusion_pytorch_model.safetensors",
        "train/checkpoint-500/unet_ema/diffusion_pytorch_model.safetensors",
        "train/checkpoint-500/optimizer.bin",
        "step-1/checkpoint-9/unet/diffusion_pytorch_model.safetensors",
        "loras/pytorch_lora_weights.safetensors",
        "dreamshaper_8.safetensors",
        "old.ckpt",
        "notes.txt",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("w")
    found = {one.name: one.what for one in strangers([SourceConfig(path=str(tmp_path))])}
    assert sorted(found) == [
        "dreamshaper_8.safetensors",
        "loras/pytorch_lora_weights.safetensors",
        "old.ckpt",
        "step-1/checkpoint-9",
        "train/checkpoint-500",
    ]
    assert "training checkpoint" in found["train/checkpoint-500"]
    assert "LoRA" in found["loras/pytorch_lora_weights.safetensors"]
    assert "single file" in found["old.ckpt"]
    assert not strangers([SourceConfig(path=str(tmp_path), match="step-?")])
