"""Model folders and files from outside: what is loaded is hashed, and nothing of them is code."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from memscan.errors import ModelError
from memscan.models.folders import check_weights, refuse_foreign_code
from memscan.models.onnx_data import refuse_external_data

STEM = "model"


def folder_with(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": np.ones(3, np.float32)}, file)
    listing = {"metadata": {}, "weight_map": {"a": name}}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(listing))
    return folder


@pytest.mark.parametrize("name", [".w.safetensors", "w.bin", "w.SAFETENSORS", "sub/w.safetensors", "w.safetensors.bin"])
def test_a_weight_map_names_hashed_files_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="weight_map does not name safetensors files"):
        check_weights(folder_with(tmp_path / "m", name), STEM)


def test_a_second_listing_that_a_library_might_prefer_is_looked_at_too(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", "w.safetensors")
    check_weights(folder, STEM)
    (folder / "other.bin.index.json").write_text(json.dumps({"weight_map": {"a": "w.bin"}}))
    with pytest.raises(ModelError, match=r"first 'w\.bin'"):
        check_weights(folder, STEM)


@given(st.text(min_size=1, max_size=20).filter(lambda name: "\0" not in name))
def test_no_name_but_a_plain_one_passes(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("m")
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError):  # none of these files is there; a wrong name is told first
        check_weights(folder, STEM)


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "someone/kernel:fast"},
        {"vision_config": {"layers": [{"_attn_implementation_internal": "a/b"}]}},
        {"experts_implementation": "a/b"},
    ],
)
def test_kernels_from_a_hub_are_refused(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code on a hub"):
        refuse_foreign_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_attn_implementation": "sdpa", "name": "a/b"}))
    refuse_foreign_code(tmp_path)


def onnx_model(place: str | None, deep: bool) -> bytes:
    """A model with a tensor, in a branch of an If where it is deep; the tensor lies in the file `place` where given."""
    import onnx
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    if place is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    if deep:
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        branch = helper.make_graph([node], "branch", [], [out])
        made = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [1])
        graph = helper.make_graph([made], "g", [condition], [out])
    else:
        node = helper.make_node("Identity", ["w"], ["y"])
        graph = helper.make_graph([node], "g", [], [out], initializer=[tensor])
    data: bytes = onnx.ModelProto.SerializeToString(helper.make_model(graph))
    return data


@pytest.mark.parametrize("deep", [False, True])
def test_onnx_weights_in_another_file_are_refused_wherever_they_are(deep: bool) -> None:
    refuse_external_data(onnx_model(None, deep), "m.onnx")
    for place in ("weights.bin", "../../etc/passwd"):
        with pytest.raises(ModelError, match="keeps weights in another file, which its hash does not cover"):
            refuse_external_data(onnx_model(place, deep), "m.onnx")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_rubbish_is_one_line(noise: bytes, cut: int) -> None:
    for data in (noise, onnx_model(None, True)[:cut] + noise):
        with suppress(ModelError):
            refuse_external_data(data, "m.onnx")


def test_no_call_of_a_library_that_loads_folders_may_ask_whether_code_is_run() -> None:
    """Each transformers `Auto` class is called with `trust_remote_code` given, so that it never asks on stdin."""
    import ast

    root = Path(__file__).parents[2] / "memscan" / "models"
    for file in sorted(root.glob("*.py")):
        text = file.read_text()
        if not re.search(r"\bAuto[A-Z]", text):
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained":
                given = {word.arg for word in call.keywords}
                assert "trust_remote_code" in given or None in given, f"{file.name}:{call.lineno}"


def test_transformers_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    from memscan.models.quiet import quiet_libraries

    def asked(*_: object) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    with quiet_libraries(), pytest.raises(ValueError, match="trust_remote_code"):
        resolve_trust_remote_code(None, "folder", has_local_code=False, has_remote_code=True)


def test_the_working_directory_is_not_searched(tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        Path("weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
        with pytest.raises(ModelError):
            refuse_external_data(onnx_model("weights.bin", False), "m.onnx")
    finally:
        os.chdir(before)
