from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from memscan.config import load_config, parse_config
from memscan.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
MINIMAL: dict[str, Any] = {
    "prompts": {"paths": ["prompts.csv"]},
    "generator": {"path": "checkpoint"},
    "segmenter": {"path": "segmenter.onnx"},
    "embedder": {"path": "embedder.pt"},
    "index": {"source": "references.parquet"},
}


@pytest.fixture
def data() -> dict[str, Any]:
    return copy.deepcopy(MINIMAL)


def test_defaults_are_complete(data: dict[str, Any]) -> None:
    config = parse_config(data)
    assert config.generator.steps == 50
    assert (config.metric.variant, config.metric.canvas) == ("combined", 128)


def test_unknown_key_names_the_nearest(data: dict[str, Any]) -> None:
    data["generator"]["step"] = 20
    with pytest.raises(ConfigError, match=r"unknown key 'generator\.step', did you mean 'steps'\?"):
        parse_config(data)


def test_unknown_section_names_the_nearest(data: dict[str, Any]) -> None:
    data["segmentor"] = data.pop("segmenter")
    with pytest.raises(ConfigError, match="segment"):
        parse_config(data)


@pytest.mark.parametrize(
    ("path", "value", "pattern"),
    [
        ("generator.steps", 0, r"'generator\.steps'.*greater than or equal to 1"),
        ("metric.canvas", 64, r"'metric'.*176"),
        ("metric.foreground_threshold", 1.5, r"foreground_threshold"),
        ("prompts.paths", [], r"'prompts\.paths'"),
        ("generator.path", None, r"'generator\.path'"),
        ("index", {}, r"'index'.*path.*source"),
        ("name", "../evil", r"'name'"),
    ],
)
def test_bad_values_name_their_key(data: dict[str, Any], path: str, value: object, pattern: str) -> None:
    *parents, leaf = path.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    with pytest.raises(ConfigError, match=pattern) as caught:
        parse_config(data, where="job.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("job.yaml: ")


def test_missing_key_is_named(data: dict[str, Any]) -> None:
    del data["generator"]["path"]
    with pytest.raises(ConfigError, match=r"'generator\.path' is missing"):
        parse_config(data)


def test_every_mistake_is_in_one_message_with_its_place(tmp_path: Path, data: dict[str, Any]) -> None:
    """Wrong keys, wrong values and missing ones of several sections, one of them by an override: all in one line."""
    path = tmp_path / "job.yaml"
    path.write_text(
        "prompts: {paths: [p.csv]}\n"
        "generator:\n  path: m\n  step: 20\n  guidance: high\n"
        "segmenter: {path: s}\n"
        "embedder: {}\n"
        "index: {source: refs}\n"
        "metrik: {canvas: 256}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["prompts.limit=-1"])
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(f"{path}: 5 mistakes: (1) ")
    for mistake in (
        "unknown key 'generator.step', did you mean 'steps'? (line 4)",
        "'generator.guidance': Input should be a valid number, unable to parse string as a number (line 5)",
        "key 'embedder.path' is missing (line 7)",
        "unknown key 'metrik', did you mean 'metric'? (line 9)",
        "(--set prompts.limit)",
    ):
        assert mistake in told
    with pytest.raises(ConfigError) as caught:
        parse_config(data, ["generator.steps", "a=[open", "name=x", "name=y"])
    assert str(caught.value).startswith("--set: 3 mistakes: ")
    many = {f"key-{number}": 1 for number in range(30)}
    with pytest.raises(ConfigError, match=r"30 mistakes: .*; and 10 more$"):
        parse_config({**data, **many})


def test_aliases_are_walked_once(tmp_path: Path) -> None:
    """A few lines of aliases of aliases are millions of values: they are refused as quickly as any other file."""
    rows = ["a0: &a0 [x, x]", *(f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 12))]
    path = tmp_path / "job.yaml"
    path.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match=r"mistakes: .*line 1"):
        load_config(path)


def test_overrides_have_yaml_values(data: dict[str, Any]) -> None:
    config = parse_config(
        data, ["generator.steps=7", "prompts.paths=[a.txt, b.txt]", "generator.height=null", "metric.canvas=256"]
    )
    assert config.generator.steps == 7
    assert config.prompts.paths == ["a.txt", "b.txt"]
    assert config.generator.height is None
    assert config.metric.canvas == 256


def test_overrides_begin_a_section_that_a_written_configuration_says_is_not_there(data: dict[str, Any]) -> None:
    written = parse_config(data).model_dump(mode="json")
    assert written["screen"] is None
    config = parse_config(written, ["screen.threshold=4.4", "screen.timestep=500", "signals.semantic.path=clip.pt"])
    assert config.screen is not None
    assert (config.screen.threshold, config.screen.timestep) == (4.4, 500)
    with pytest.raises(ConfigError, match=r"^configuration: screen\.detector noise_norm needs guidance"):
        parse_config(written, ["screen.threshold=4.4", "generator.guidance=1"])
    with pytest.raises(ConfigError, match="'signals' is a section: give it keys and values"):
        parse_config(written, ["signals=5"])


def test_overrides_leave_the_given_mapping_alone(data: dict[str, Any]) -> None:
    parse_config(data, ["generator.steps=7"])
    assert data == MINIMAL


@pytest.mark.parametrize("override", ["generator.steps", "=3", "generator.path.deeper=1", "name=[unclosed"])
def test_bad_override_is_one_line(data: dict[str, Any], override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, [override])
    assert "\n" not in str(caught.value)


def test_override_of_unknown_key_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'guidance'"):
        parse_config(data, ["generator.guidence=3"])


def test_fingerprint_is_of_content_only(data: dict[str, Any]) -> None:
    base = parse_config(data).fingerprint()
    same = ["out=elsewhere", "name=other", "resources.samplers=7", "resources.device=cpu", "verdict.min_share=0.9"]
    assert parse_config(data, same).fingerprint() == base
    assert parse_config(dict(reversed(data.items()))).fingerprint() == base
    for override in ["generator.steps=7", "generator.base_seed=1", "metric.canvas=256", "prompts.limit=3"]:
        assert parse_config(data, [override]).fingerprint() != base, override


def test_yaml_round_trip(tmp_path: Path, data: dict[str, Any]) -> None:
    config = parse_config(data)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("content", [b"", b"- a list", b"a: [unclosed", b"\xff\xfe\x00", b"just text"])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"job\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        load_config(tmp_path / "no.yaml")


# What 853164d gave: a run folder of then is resumed and compared under the same fingerprint.
FINGERPRINTS = {
    "examples/local-folder.yaml": "f6c6d9d73c08ada5",
    "examples/private-finetune.yaml": "f915678bbd51e5c2",
    "examples/sd14-laion-s3.yaml": "3eb7a329e9213860",
    "memscan/planted/shipped/census.yaml": "343623d1966e0a57",
}


@pytest.mark.parametrize("path", FINGERPRINTS)
def test_fingerprints_outlive_the_code(path: str) -> None:
    assert load_config(ROOT / path).fingerprint() == FINGERPRINTS[path]


def models_of_the_project() -> set[type[BaseModel]]:
    """Return every pydantic model of the project that a person fills in.

    The modules that define one are found by the names of base classes in their source, and imported. Models whose names
    begin with an underscore are of files that memscan itself writes.
    """
    defined: dict[str, list[tuple[str, str]]] = {}
    for room in ("memscan", "pipelines"):
        for path in sorted((ROOT / room).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for name, bases in re.findall(r"^ *class (\w+)\(([^)]*)\)", path.read_text(encoding="utf-8"), re.MULTILINE):
                for base in re.findall(r"\w+", bases):
                    defined.setdefault(base, []).append((name, module))
    waiting, modules = ["BaseModel"], set()
    while waiting:
        for name, module in defined.pop(waiting.pop(), []):
            waiting.append(name)
            modules.add(module)
    for module in sorted(modules):
        import_module(module)
    return {one for one in subclasses(BaseModel) if one.__module__ in modules and not one.__name__.startswith("_")}


def subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for one in model.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_key_is_described_in_a_sentence() -> None:
    models = models_of_the_project()
    assert {"CensusConfig", "LoraConfig", "NightlyConfig", "RepairPolicy", "MitigationSettings", "VerifySettings"} <= {
        model.__name__ for model in models
    }
    described = {
        f"{model.__name__}.{name}": field.description or ""
        for model in models
        for name, field in model.model_fields.items()
    }
    assert len(described) > 150
    assert not [key for key, text in described.items() if not is_sentence(text)]
    assert not [model.__name__ for model in models if model.model_config.get("extra") != "forbid"]


def test_every_key_is_on_the_page_of_keys() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)}
    sections = set(re.findall(r"^## `([\w.]+)`$", page, re.MULTILINE))
    known = listed | {part for name in sections for part in name.split(".")}
    assert not {name for model in models_of_the_project() for name in model.model_fields} - known


def is_sentence(text: str) -> bool:
    """Check a text as far as a program can: it begins with a capital or a quoted value, and ends with a period."""
    return len(text.split()) >= 4 and (text[0].isupper() or text[0] == '"') and text.endswith(".")
