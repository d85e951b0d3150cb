"""A run's folder without Ray: parts, commit, resume after every kind of end, conservation, refusal of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.config import CensusConfig, parse_config
from memscan.errors import RunError
from memscan.prompts.table import PromptTable
from memscan.records import CENSUS, PROMPTS
from pipelines.run_folder.identity import code_hash, code_version, identity
from pipelines.run_folder.lease import hold
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts, read_table, write_table


def config(out: Path, **generator: Any) -> CensusConfig:
    return parse_config(
        {
            "out": str(out),
            "prompts": {"paths": ["p.csv"]},
            "generator": {"path": "g", **generator},
            "segmenter": {"path": "s"},
            "embedder": {"path": "e"},
            "index": {"path": "i"},
        }
    )


def open_run(out: Path, **generator: Any) -> Run:
    wanted = config(out, **generator)
    return Run.open(wanted, identity(wanted, {"models.generator": "g@123"}))


def prompts(rows: int, rejected: int = 0) -> PromptTable:
    """`rows` prompts, each of two input rows, the first `rejected` of them rejected at reading."""
    table = pa.Table.from_pylist(
        [
            {
                "prompt_id": f"{number:016x}",
                "caption": "" if number < rejected else f"caption {number}",
                "count": 2,
                "source": "p.csv",
                "row": number + 1,
                "status": "rejected" if number < rejected else "done",
                "reason": "caption_empty" if number < rejected else None,
            }
            for number in range(rows)
        ],
        schema=PROMPTS,
    )
    return PromptTable(table, 2 * rows, ())


def census(table: pa.Table, label: str = "VM") -> pa.Table:
    """Census rows of prompts, one generation each."""
    generation = {
        "sample": 0,
        "seed": 1,
        "label": label,
        "foreground": 0.9,
        "background": 0.9,
        "whole": 0.9,
        "match_id": "r",
        "foreground_area": 0.5,
        "similarity": 0.9,
        "candidates": [],
    }
    rows = [{**row, "generations": [] if row["status"] == "rejected" else [generation]} for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=CENSUS)


def write(run: Run, part: int, table: pa.Table, name: str = "a") -> Path:
    path = Path(run.folder.census_part(part)) / f"{name}.parquet"
    write_table(str(path), table)
    return path


def finished(out: Path) -> Run:
    run = open_run(out)
    run.write_prompts(prompts(10, rejected=2), part_size=4)
    for part in run.parts:
        write(run, part, census(run.todo(part)))
        run.commit(part)
    return run


def test_a_run_from_open_to_complete(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert [run.committed(part).rows for part in run.parts] == [4, 4, 2]  # type: ignore[union-attr]
    counts = run.finish()
    assert counts == Counts(20, 10, 8, 2, 8, {"VM": 8}, {"caption_empty": 2})
    assert Run.load(str(tmp_path / "run")).state == "complete"
    rejects = pq.read_table(tmp_path / "run" / "rejects")
    assert rejects["reason"].to_pylist() == ["caption_empty"] * 2


def test_what_is_written_is_not_done_again(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_prompts(prompts(10), part_size=10)
    write(run, 0, census(run.todo(0).slice(3, 4)))
    again = open_run(tmp_path / "run")
    assert again.todo(0)["row"].to_pylist() == [1, 2, 3, 8, 9, 10]


def test_what_is_left_stays_the_same_while_its_blocks_are_made(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_prompts(prompts(6), part_size=6)
    write(run, 0, census(run.todo(0).slice(0, 2)), "a")
    left = run.todo(0)
    assert left["row"].to_pylist() == [3, 4, 5, 6]
    write(run, 0, census(left.slice(0, 1)), "b")  # of a worker that was thought dead
    assert run.left(0).equals(left)


@given(st.integers(0, 400))
def test_a_file_that_a_killed_writer_left_is_done_again(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run = open_run(tmp_path_factory.mktemp("cut") / "run")
    run.write_prompts(prompts(4), part_size=4)
    path = write(run, 0, census(run.todo(0)))
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert run.todo(0).num_rows == 4
    write(run, 0, census(run.todo(0)), "b")
    assert run.commit(0).rows == 4
    assert not path.exists()


def test_a_writer_that_outlived_its_driver_doubles_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_prompts(prompts(4), part_size=4)
    rows = census(run.todo(0))
    write(run, 0, rows, "a")
    write(run, 0, rows.slice(1, 2), "b")
    assert run.todo(0).num_rows == 0
    assert run.commit(0).rows == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.slice(1), "1 of 4 prompts are missing"),
        (lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]), "4 of 4 prompts are missing; .*holds a prompt twice"),
    ],
)
def test_a_part_that_does_not_conserve_is_not_committed(tmp_path: Path, change: Any, message: str) -> None:
    run = open_run(tmp_path / "run")
    run.write_prompts(prompts(4), part_size=4)
    write(run, 0, change(census(run.todo(0))))
    with pytest.raises(RunError, match=message):
        run.commit(0)
    assert run.committed(0) is None
    with pytest.raises(RunError, match="part 0 is not committed"):
        run.finish()


def test_a_commit_record_that_does_not_add_up_stops_the_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    record = Path(run.folder.commit_record(1))
    content = json.loads(record.read_text())
    content["counts"]["done"] -= 1
    record.write_text(json.dumps(content))
    with pytest.raises(RunError, match="rows do not add up"):
        run.finish()
    assert Run.load(str(tmp_path / "run")).state == "running"


def test_prompts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    table = prompts(3)
    with pytest.raises(RunError, match="7 read, 6 kept"):
        open_run(tmp_path / "run").write_prompts(PromptTable(table.table, 7, ()), part_size=2)


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path / "run", steps=20).write_prompts(prompts(3), part_size=2)
    with pytest.raises(RunError) as caught:
        open_run(tmp_path / "run", steps=30)
    assert "generator.steps: 20 -> 30" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_came_to_nothing_is_no_obstacle(tmp_path: Path) -> None:
    open_run(tmp_path / "run", steps=20).stop("failed", "no caption column")
    assert open_run(tmp_path / "run", steps=30).config().generator.steps == 30


def test_other_model_files_are_another_run(tmp_path: Path) -> None:
    open_run(tmp_path / "run").write_prompts(prompts(3), part_size=2)
    wanted = config(tmp_path / "run")
    with pytest.raises(RunError, match=r"models\.generator: g@123 -> g@999"):
        Run.open(wanted, identity(wanted, {"models.generator": "g@999"}))


def begun_by(folder: Path, version: str) -> None:
    """Make the run of a folder one that another version of memscan began."""
    run = Run.load(str(folder))
    run._save(code_version=version, code_versions=None, identity={**run.manifest["identity"], "code.version": version})


def test_other_code_goes_on_only_with_what_it_would_have_made_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    open_run(folder).write_prompts(prompts(3), part_size=2)
    begun_by(folder, "0.1.0")  # which knew no hash; its rows are the same
    run = open_run(folder)
    assert run.manifest["code_versions"] == ["0.1.0", code_version()]
    begun_by(folder, "0.2.0+000000000000")
    with pytest.raises(RunError, match=r"other code began \(memscan 0\.2\.0\+000000000000, here is 0\.") as caught:
        open_run(folder)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("MEMSCAN_OTHER_CODE", "1")
    assert open_run(folder).manifest["code_versions"] == ["0.2.0+000000000000", code_version()]


def test_the_codes_hash_is_of_what_decides_and_of_nothing_else(tmp_path: Path) -> None:
    import memscan

    package = tmp_path / "memscan"
    shutil.copytree(Path(memscan.__file__).parent, package, ignore=shutil.ignore_patterns("shipped", "__pycache__"))
    shutil.copytree(Path(memscan.__file__).parent / "metric" / "shipped", package / "metric" / "shipped")

    def changed(file: str, old: str, new: str) -> bool:
        code_hash.cache_clear()
        before = code_hash(package)
        text = (package / file).read_text(encoding="utf-8")
        assert old in text
        (package / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        code_hash.cache_clear()
        after = code_hash(package)
        (package / file).write_text(text, encoding="utf-8")
        return after != before

    assert code_version().endswith(f"+{code_hash(package)}")
    assert changed("metric/ssim.py", "return", "return +")
    assert changed("metric/shipped/combined-128.json", "0.", "1.")
    assert not changed("metric/ssim.py", "\n\n\n", "\n\n# a comment\n\n")
    assert not changed("metric/ssim.py", "\n", "\r\n")
    assert not changed("report/words.py", "return", "return +")
    assert code_hash(package) == code_version().rpartition("+")[2]


def test_name_resources_and_verdict_may_change(tmp_path: Path) -> None:
    first = config(tmp_path / "run")
    Run.open(first, identity(first, {}))
    data = {**first.model_dump(), "name": "other", "resources": {"samplers": 3}, "verdict": {"min_share": 0.25}}
    other = parse_config(data)
    run = Run.open(other, identity(other, {}))
    assert run.config().verdict.min_share == 0.25


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty and not a run"):
        open_run(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_logs_of_an_earlier_failure_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "error.log").write_text("")
    assert open_run(tmp_path / "run").state == "running"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}'])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError) as caught:
        Run.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        Run.load(str(tmp_path))


def test_prompt_parts_keep_schema_and_order(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    table = prompts(7, rejected=1)
    run.write_prompts(table, part_size=3)
    parts = [read_table(run.folder.prompts_part(part)) for part in run.parts]
    assert pa.concat_tables(parts).equals(table.table)


def as_an_older_version_wrote_it(out: Path) -> Run:
    """The run without what came with epochs: state, hashes in commit records, keys of the manifest."""
    shutil.rmtree(out / "state")
    manifest = json.loads((out / "run.json").read_text())
    for key in ("revision", "epoch"):
        manifest.pop(key, None)
    manifest["prompts"].pop("sha256")
    (out / "run.json").write_text(json.dumps(manifest))
    for path in (out / "census").glob("_part-*.json"):
        record = json.loads(path.read_text())
        path.write_text(
            json.dumps({key: record[key] for key in ("part", "counts", "files", "fingerprint", "committed")})
        )
    return Run.load(str(out))


def test_a_run_of_an_older_version_opens_resumes_and_ends(tmp_path: Path) -> None:
    finished(tmp_path / "run").finish()
    run = as_an_older_version_wrote_it(tmp_path / "run")
    assert run.state == "complete"
    Path(run.folder.commit_record(1)).unlink()  # as its `retry` left it when it was killed: "complete", and not so
    run = Run.load(str(tmp_path / "run"))
    assert run.state == "interrupted"
    with hold(run.folder.leases, above=run.epoch) as lease:
        run = Run.open(run.config(), run.manifest["identity"], lease)
        assert run.todo(1).num_rows == 0
        run.commit(1)
        run.finish()
    again = Run.load(str(tmp_path / "run"))
    assert (again.state, again.progress().rows, again.epoch) == ("complete", 10, 1)
