"""This module has the stateful callables that Ray Data runs.

Tables go in and tables come out, with one row per prompt throughout.

    Census   PROMPTS -> CENSUS   sampling and judging in one actor: pixels never leave it
    Sample   PROMPTS -> SAMPLED  the first half, where judging has actors of its own (`resources.judges`)
    Judge    SAMPLED -> CENSUS   the second half

The work is done in `memscan.worker`. This module only converts rows to values and back, and reports progress. A stage
that cannot load says so on its first batch, because Ray keeps the kind of an exception that a call raises, but not of
one that a constructor raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from memscan.errors import Reason, RowReject
from memscan.io.images import decode, decode_mask, encode_mask, encode_png
from memscan.records import CENSUS, PROMPTS, REGIONS, Label, Status
from memscan.worker.overlap import chunks_of, flat, overlapped
from memscan.worker.prompt import Prompt
from pipelines.ray.metrics import CALLS, Meters
from pipelines.ray.stage import Report, Stage, StageSetup, silent
from pipelines.scan.waves import PART, columns_of, unpacked

if TYPE_CHECKING:  # the models come with torch, which only the workers need: they import it when they load
    from memscan.detection.decide import Decided
    from memscan.worker.classification import CopyClassifier
    from memscan.worker.encoder import RegionEncoder
    from memscan.worker.generated import Generated
    from memscan.worker.generation import GenerationWorker


DECISION = ("decision", "screen_score", "weight")

_GENERATED = pa.struct(
    [
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # PNG
        pa.field("mask", pa.binary(), nullable=False),  # PNG; masks have 8 bits, so nothing is lost
        pa.field("vectors", pa.list_(pa.float32()), nullable=False),  # whole, foreground, background, one after another
        pa.field("signals", pa.map_(pa.string(), pa.float32()), nullable=False),
        pa.field("map", pa.binary()),  # of localisation, PNG
    ]
)
SAMPLED = pa.schema(
    [
        *PROMPTS,
        pa.field("generated", pa.list_(_GENERATED), nullable=False),  # empty if the screen passed the prompt
        *(CENSUS.field(name) for name in DECISION),
    ]
)


class Census(Stage["tuple[GenerationWorker, CopyClassifier]"]):
    """This stage turns PROMPTS into CENSUS, with both halves of the work in one process."""

    worker = "census"

    def __init__(self, setup: StageSetup, report: Report = silent) -> None:
        super().__init__(setup, lambda: self._load(setup), report, "sample", "judge")
        self._journal = setup.open_journal()
        wanted = setup.config.resources.overlap
        self._overlap = wanted == "on" or (wanted == "auto" and setup.device != "cpu")
        self._device = setup.device

    @staticmethod
    def _load(setup: StageSetup) -> tuple[GenerationWorker, CopyClassifier]:
        from memscan.worker.generation import GenerationWorker

        setup.begin("generator", "segmenter", "embedder", "semantic")
        sampler = GenerationWorker(setup.config, setup.device, setup.threads)
        return sampler, open_classifier(setup, sampler.encoder)

    def __call__(self, table: pa.Table) -> pa.Table:
        table = unpacked(table)
        prompts = _prompts(table)
        with self._block():
            results = self._journal.run(
                "census", _ids(table), lambda places: self._results([prompts[at] for at in places])
            )
        return _census(table, _row_results(results), self._report, self._meters)

    def _results(self, prompts: list[Prompt | RowReject]) -> list[RowResult]:
        """Screen, sample those that do not pass, and go on with the suspicious ones where samples are adaptive."""
        sampler = self.work[0]
        with counted(sampler, self._meters):
            with self._meters.busy("sample", self._device):
                screened = sampler.screen(prompts)
            return self._scanned(screened)

    def _scanned(self, screened: list[Prompt | RowReject]) -> list[RowResult]:
        results: dict[int, list[dict[str, Any]] | RowReject] = {at: [] for at in range(len(screened))}
        left = [at for at, prompt in enumerate(screened) if isinstance(prompt, RowReject) or prompt.scanned]
        if len(left) < len(screened):
            self._report("sample", len(screened) - len(left), {})
            self._meters.rows("sample", len(screened) - len(left), {})
        for number, samples in enumerate(self.work[0].spans):
            judged = self._judged([screened[at] for at in left], samples, report=number == 0)
            for at, result in zip(left, judged, strict=True):
                before = results[at]
                both = isinstance(before, list) and isinstance(result, list)
                results[at] = before + result if both else result  # type: ignore[operator]
            left = [at for at, result in zip(left, judged, strict=True) if _is_suspicious(result)]
        return [RowResult(_decided(prompt), results[at]) for at, prompt in enumerate(screened)]

    def _judged(
        self, prompts: list[Prompt | RowReject], samples: range, *, report: bool
    ) -> list[list[dict[str, Any]] | RowReject]:
        sampler, classifier = self.work

        def draft(chunk: Sequence[Prompt | RowReject]) -> list[list[Generated] | RowReject]:
            with self._meters.busy("sample", self._device):
                drafts = sampler.draft(chunk, samples)
            if report:
                self._report("sample", len(drafts), {})
                self._meters.rows("sample", len(drafts), reasons(drafts))
            return drafts

        def judge(drafts: list[list[Generated] | RowReject]) -> list[list[dict[str, Any]] | RowReject]:
            with self._meters.busy("judge", self._device):
                return classifier(sampler.describe(drafts))

        chunks = chunks_of(prompts, sampler.chunk if self._overlap else len(prompts) or 1)
        parts = overlapped(chunks, draft, judge, device=self._device)
        return list(flat(parts))


class Sample(Stage["GenerationWorker"]):
    """This stage turns PROMPTS into SAMPLED."""

    worker = "sample"

    def __init__(self, setup: StageSetup, report: Report = silent) -> None:
        super().__init__(setup, lambda: self._load(setup), report, "sample")
        self._journal, self._device = setup.open_journal(), setup.device

    @staticmethod
    def _load(setup: StageSetup) -> GenerationWorker:
        from memscan.worker.generation import GenerationWorker

        setup.begin("generator", "segmenter", "embedder", "semantic")
        return GenerationWorker(setup.config, setup.device, setup.threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        table = unpacked(table)
        prompts = _prompts(table)
        with self._block(), counted(self.work, self._meters), self._meters.busy("sample", self._device):
            sampled = self._journal.run(
                "sample", _ids(table), lambda places: self._results([prompts[at] for at in places])
            )
        outcomes = _row_results(sampled)
        self._report("sample", len(sampled), {})
        self._meters.rows("sample", len(sampled), reasons([outcome.result for outcome in outcomes]))
        return _with_column(table, "generated", outcomes, SAMPLED)

    def _results(self, prompts: list[Prompt | RowReject]) -> list[RowResult]:
        screened = self.work.screen(prompts)
        left = [at for at, prompt in enumerate(screened) if isinstance(prompt, RowReject) or prompt.scanned]
        made = dict(zip(left, self.work([screened[at] for at in left]), strict=True))
        outcomes = []
        for at, prompt in enumerate(screened):
            row = made.get(at, [])
            encoded = row if isinstance(row, RowReject) else [_encode(item) for item in row]
            outcomes.append(RowResult(_decided(prompt), encoded))
        return outcomes


class Judge(Stage["CopyClassifier"]):
    """This stage turns SAMPLED into CENSUS."""

    worker = "judge"

    def __init__(self, setup: StageSetup, report: Report = silent) -> None:
        super().__init__(setup, lambda: self._load(setup), report, "judge")
        self._journal, self._device = setup.open_journal(), setup.device

    @staticmethod
    def _load(setup: StageSetup) -> CopyClassifier:
        from memscan.worker.encoder import RegionEncoder

        setup.begin("segmenter", "embedder", "semantic")
        # Only for their specifications, which the index is checked against.
        return open_classifier(setup, RegionEncoder(setup.config, "cpu", setup.threads))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows: list[list[Generated] | RowReject] = []
        for generated, reject in zip(table["generated"].to_pylist(), _rejects(table), strict=True):
            rows.append(reject or [_decode(item) for item in generated])
        with self._block(), self._meters.busy("judge", self._device):
            results = self._journal.run("judge", _ids(table), lambda places: self._results([rows[at] for at in places]))
        names = columns_of(table, [*PROMPTS.names, *DECISION])
        outcomes = [RowResult(None, result) for result in results]
        return _census(table.select(names), outcomes, self._report, self._meters)

    def _results(self, rows: list[list[Generated] | RowReject]) -> list[list[dict[str, Any]] | RowReject]:
        left = [at for at, row in enumerate(rows) if isinstance(row, RowReject) or row]
        judged = dict(zip(left, self.work([rows[at] for at in left]), strict=True))
        return [judged.get(at, []) for at in range(len(rows))]


def open_classifier(setup: StageSetup, encoder: RegionEncoder) -> CopyClassifier:
    """Open the classifier over the setup's index, and check that the index was made by this embedder."""
    from memscan.index.store import ReferenceIndex
    from memscan.worker.classification import CopyClassifier

    if setup.shards:
        from pipelines.scan.scatter import open_scattered

        index = open_scattered(setup.index, encoder.embedder.spec, setup.shards, setup.index_version)
    else:
        index = ReferenceIndex.open(
            setup.index,
            encoder.embedder.spec,
            nprobe=setup.config.index.nprobe,
            version=setup.index_version,
            verify="once",
            device=setup.device,
        )
    return CopyClassifier(setup.config, index, encoder, setup.device)


def _prompts(table: pa.Table) -> list[Prompt | RowReject]:
    names = zip(table["prompt_id"].to_pylist(), table["caption"].to_pylist(), strict=True)
    return [reject or Prompt(*name) for name, reject in zip(names, _rejects(table), strict=True)]


def _ids(table: pa.Table) -> list[str]:
    return list(table["prompt_id"].to_pylist())


def _rejects(table: pa.Table) -> list[RowReject | None]:
    """Return what an earlier stage, or the reading, rejected: these rows pass untouched."""
    columns = (table[name].to_pylist() for name in ("status", "reason", "message"))
    return [
        RowReject(Reason(reason), message or "") if status == Status.REJECTED.value else None
        for status, reason, message in zip(*columns, strict=True)
    ]


@dataclass(frozen=True)
class RowResult:
    """This is what became of a row.

    It has the screen's decision, if there was one, and its generations or why there are none.
    """

    decided: Decided | None
    result: list[dict[str, Any]] | RowReject


def _row_results(results: Sequence[RowResult | RowReject]) -> list[RowResult]:
    """Rows that the journal rejected have no decision."""
    return [RowResult(None, result) if isinstance(result, RowReject) else result for result in results]


def _decided(prompt: Prompt | RowReject) -> Decided | None:
    return None if isinstance(prompt, RowReject) else prompt.decided


def _is_suspicious(result: list[dict[str, Any]] | RowReject) -> bool:
    return not isinstance(result, RowReject) and any(record["label"] != Label.NM.value for record in result)


@contextmanager
def counted(sampler: GenerationWorker, meters: Meters) -> Iterator[None]:
    """Count the denoiser calls of a `with` block."""
    before = sampler.generator.calls
    yield
    meters.add(CALLS, sampler.generator.calls - before)


def reasons(results: Sequence[Any]) -> Counter[str]:
    """Count the rejects among results, by reason."""
    return Counter(result.reason.value for result in results if isinstance(result, RowReject))


def _census(table: pa.Table, results: Sequence[RowResult], report: Report, meters: Meters) -> pa.Table:
    notes = reasons([outcome.result for outcome in results])
    for outcome in results:
        if not isinstance(outcome.result, RowReject):
            notes.update(record["label"] for record in outcome.result)
    meters.rows("judge", len(results), notes)
    del notes[Label.NM.value]  # is no news
    report("judge", len(results), notes)
    return _with_column(table, "generations", results, CENSUS)


def _with_column(table: pa.Table, name: str, outcomes: Sequence[RowResult], schema: pa.Schema) -> pa.Table:
    """`table` with a nested column of results and, where made, decisions; a reject becomes the row's status."""
    rows = table.to_pylist()
    for row, outcome in zip(rows, outcomes, strict=True):
        result = outcome.result
        if outcome.decided is not None:
            decided = outcome.decided
            row.update(decision=decided.decision.value, screen_score=decided.score, weight=decided.weight)
        row[name] = [] if isinstance(result, RowReject) else result
        if isinstance(result, RowReject) and row["status"] != Status.REJECTED.value:
            row.update(status=Status.REJECTED.value, reason=result.reason.value, message=result.message)
    made = pa.Table.from_pylist(rows, schema=schema)
    # The part goes along with its row as far as the writer.
    return made.append_column(table.schema.field(PART), table[PART]) if PART in table.column_names else made


def _encode(item: Generated) -> dict[str, Any]:
    assert item.mask_HW is not None
    assert item.vectors_RD is not None
    return {
        "sample": item.sample,
        "seed": item.seed,
        "image": encode_png(item.image_HWC),
        "mask": encode_mask(item.mask_HW),
        "vectors": item.vectors_RD.ravel(),
        "signals": list(item.signals.items()),
        "map": None if item.map_HW is None else encode_mask(item.map_HW),
    }


def _decode(item: Mapping[str, Any]) -> Generated:
    from memscan.worker.generated import Generated

    vectors_RD = np.asarray(item["vectors"], dtype=np.float32).reshape(len(REGIONS), -1)
    image, mask = decode(item["image"]), decode_mask(item["mask"])
    where = None if item["map"] is None else decode_mask(item["map"])
    return Generated(item["sample"], item["seed"], image, dict(item["signals"]), mask, vectors_RD, where)
