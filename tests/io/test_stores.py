"""Inputs in a store that is neither a disk nor S3, and what is refused there before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from memscan.census.policy import NightlyConfig
from memscan.config import CensusConfig
from memscan.errors import InputError, MemscanError, ModelError
from memscan.io import faults, storage
from memscan.models.local_copy import stage
from memscan.prompts.table import read_prompts
from pipelines.nightly.job import nightly
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table, write_table


def test_prompts_and_tables_are_read_from_any_store(request: pytest.FixtureRequest) -> None:
    base = f"memory://{request.node.name}"
    storage.write_atomic(f"{base}/lists/a.csv", b"caption\na red cube\na blue ball\n")
    write_table(f"{base}/lists/b.parquet", pa.table({"caption": ["a green cone"]}))
    assert read_table(f"{base}/lists/b.parquet")["caption"].to_pylist() == ["a green cone"]
    found = read_prompts(CensusConfig.model_validate({**MINIMAL, "prompts": {"paths": [f"{base}/lists"]}}).prompts)
    assert sorted(found.table["caption"].to_pylist()) == ["a blue ball", "a green cone", "a red cube"]


def test_a_model_folder_is_copied_from_any_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSCAN_CACHE", str(tmp_path))
    base = "memory://any-store/model"
    for name, data in {"config.json": b"{}", "unet/w.safetensors": b"weights", "notes.pkl": b"no"}.items():
        storage.write_atomic(f"{base}/{name}", data)
    first = stage(base)
    assert sorted(path.name for path in first.rglob("*") if path.is_file()) == ["config.json", "w.safetensors"]
    storage.write_atomic(f"{base}/unet/w.safetensors", b"another")
    second = stage(base)
    assert second != first
    assert (second / "unet" / "w.safetensors").read_bytes() == b"another"
    with pytest.raises(ModelError, match="no such model folder"):
        stage("memory://any-store/never")


MINIMAL = {
    "name": "stores",
    "prompts": {"paths": ["prompts.csv"]},
    "generator": {"path": "model"},
    "segmenter": {"path": "segmenter.onnx"},
    "embedder": {"path": "embedder.pt"},
    "index": {"source": "references.parquet"},
}


@pytest.mark.parametrize("out", ["hf://datasets/owner/name/run", "memory://somewhere/run"])
def test_runs_and_registries_are_refused_where_a_lease_is_not_safe(out: str) -> None:
    with pytest.raises(MemscanError, match="can be used for inputs only"):
        Run.prepare(CensusConfig.model_construct(out=out), {})
    with pytest.raises(MemscanError, match="can be used for inputs only"):
        nightly(NightlyConfig.model_construct(out=out))


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("403\nlong"), "cannot read: 403", "Google"),
        (type("AzureError", (Exception,), {"__module__": "azure.core"})("no account"), "no account", "AZURE_STORAGE"),
        (type("HubError", (Exception,), {"__module__": "huggingface_hub"})("gated"), "gated", "HF_TOKEN"),
        (PermissionError(13, "Permission denied"), "cannot read: Permission denied", ""),
    ],
)
def test_what_a_driver_says_is_one_line(error: Exception, said: str, hint: str) -> None:
    with pytest.raises(InputError) as caught, faults.one_line("gs://bucket/key", "read"):
        raise error
    assert said in str(caught.value)
    assert "gs://bucket/key" in str(caught.value)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value.what)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), faults.one_line("gs://bucket/key", "read"):
        raise KeyError("x")


@pytest.mark.parametrize("ask", [storage.exists, storage.is_dir, storage.remove_tree])
def test_a_store_that_does_not_answer_is_no_empty_place(
    ask: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(MemoryFileSystem):
        def info(self, path: str, **kwargs: object) -> None:
            raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr("memscan.io.remote._client", lambda scheme, account: Silent())
    with pytest.raises(MemscanError, match="Connection timed out"):
        ask("memory://silent/run.json")
