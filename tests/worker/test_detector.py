"""The copy detector on the planted world's own instruments: what is a copy, what is none, and what cannot be said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import memscan
from memscan.errors import ConfigError, IndexLoadError, InputError, Reason
from memscan.io.images import decode
from memscan.records import Label
from memscan.worker.detector import CopyDetector, Detection
from memscan.worker.indexing import index_images
from memscan.worker.pair import compare_images

CONFIG = memscan.world_config()


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    rows = pq.read_table(CONFIG.index.source, columns=["reference_id", "image"]).slice(1000, 8).to_pylist()
    return {row["reference_id"]: row["image"] for row in rows}


@pytest.fixture(scope="module")
def detector(images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> CopyDetector:
    """An index of six of the images."""
    encoder = memscan.RegionEncoder(CONFIG, "cpu", threads=1)
    folder = tmp_path_factory.mktemp("index")
    index = index_images(folder, dict(list(images.items())[:6]), CONFIG, encoder=encoder)
    assert len(index) == 6
    return CopyDetector(CONFIG, index, encoder=encoder)


def test_every_form_of_a_copy_is_found_and_a_stranger_is_not(
    detector: CopyDetector, images: dict[str, bytes], tmp_path: Path
) -> None:
    names = list(images)
    (tmp_path / "copy.png").write_bytes(images[names[3]])
    asked: list[Any] = [decode(images[names[1]]), images[names[2]], tmp_path / "copy.png", str(tmp_path / "copy.png")]
    *copies, stranger = detector([*asked, images[names[7]]])
    for name, found in zip((names[1], names[2], names[3], names[3]), copies, strict=True):
        assert isinstance(found, Detection)
        assert (found.label, found.best.reference_id, found.best.label) == (Label.VM, name, Label.VM)
        assert found.similarity == pytest.approx(1, abs=1e-4)
        assert found.margin > 0
    assert isinstance(stranger, Detection)
    assert stranger.label is Label.NM
    assert stranger.margin < 0
    assert len(stranger.matches) >= CONFIG.index.top_k


def test_the_first_match_decides_and_the_others_are_in_order(detector: CopyDetector, images: dict[str, bytes]) -> None:
    for found in detector(list(images.values())[4:]):
        assert isinstance(found, Detection)
        scores = [detector.metric.match([match.scores for match in found.matches])]
        assert scores == [(0, found.label)]
        assert found.margin == detector.metric.margin(found.best.scores)
        assert len({match.row for match in found.matches}) == len(found.matches)


def test_what_is_no_image_does_not_stop_the_others(
    detector: CopyDetector, images: dict[str, bytes], tmp_path: Path
) -> None:
    good = next(iter(images.values()))
    earlier = memscan.RowReject(Reason.GENERATION_FAILED, "no image")
    floats = decode(good).astype(np.float32)
    found = detector([b"no image", good, str(tmp_path / "none.png"), floats, np.zeros((0, 4, 3), np.uint8), earlier])
    assert [one.reason if isinstance(one, memscan.RowReject) else one.label for one in found] == [
        Reason.IMAGE_UNDECODABLE,
        Label.VM,
        Reason.IMAGE_MISSING,
        Reason.IMAGE_UNDECODABLE,
        Reason.IMAGE_UNDECODABLE,
        Reason.GENERATION_FAILED,
    ]
    assert detector([]) == []


def test_a_prompt_is_judged_by_its_detections(detector: CopyDetector, images: dict[str, bytes]) -> None:
    names = list(images)
    found = detector([images[names[0]], images[names[7]], images[names[0]]])
    generations = [one.generation(at) for at, one in enumerate(found) if isinstance(one, Detection)]
    verdict = memscan.verdict(generations, CONFIG.verdict, CONFIG.metric)
    assert (verdict.label, verdict.share, verdict.match_ids) == (Label.VM, 2 / 3, (names[0],))
    assert memscan.verdict(generations[1:2], CONFIG.verdict, CONFIG.metric).label is Label.NM


def test_mistakes_are_told(detector: CopyDetector, images: dict[str, bytes], tmp_path: Path) -> None:
    encoder = detector.encoder
    with pytest.raises(ConfigError, match=r"index\.path"):
        CopyDetector(CONFIG, encoder=encoder)
    with pytest.raises(IndexLoadError):
        CopyDetector(CONFIG, tmp_path / "nothing", encoder=encoder)
    with pytest.raises(InputError, match="no reference images"):
        index_images(tmp_path / "index", {}, CONFIG, encoder=encoder)
    for bad, message in ((b"no image", "'bad'.*image_undecodable"), ("no/where.png", "'bad' cannot be read")):
        with pytest.raises(InputError, match=message):
            index_images(tmp_path / "index", {**images, "bad": bad}, CONFIG, encoder=encoder)
    with pytest.raises(InputError, match="is not an image"):
        compare_images(b"no image", next(iter(images.values())), CONFIG)


def test_a_pair_is_compared_as_the_detector_compares(detector: CopyDetector, images: dict[str, bytes]) -> None:
    one, other = list(images.values())[:2]
    (found,) = detector([one])
    assert isinstance(found, Detection)
    by_id = {match.reference_id: match for match in found.matches}
    for name in by_id.keys() & images.keys():
        pair = compare_images(one, images[name], CONFIG)
        assert pair.label is by_id[name].label
        # The index keeps a mask as 8-bit PNG.
        assert pair.scores.foreground == pytest.approx(by_id[name].scores.foreground, abs=2e-3)
        assert pair.scores.background == pytest.approx(by_id[name].scores.background, abs=2e-3)
    assert compare_images(one, other, CONFIG).probability is None
