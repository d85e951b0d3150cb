"""The page: hostile text stays text, nothing is requested, everything that must be said is said."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from memscan.errors import Reason
from memscan.report import data, words
from memscan.report.figures import mix_bar, reach, round_up
from memscan.report.page import MAX_EXHIBITS, choose_exhibits
from pipelines.reduce.job import reduce_run

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "</style><style>body{display:none}</style>",
    "</script><script>alert(4)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(5)",
    "<svg/onload=alert(6)>&lt;b&gt;",
    "\u202eevil\u202c \u2066isolated",
    "]]><!-- --><iframe src=//evil.example>",
    "x" * 2000 + "<b>long</b>",
]
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Every element with its attributes, the text outside of scripts, and whether elements nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.blocks: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(source)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs), f"doubled attribute in {attrs}"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> does not nest"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["script"]:
            self.texts.append(data)
            return
        attributes = self.elements[-1][1]
        if attributes.get("type") == "application/json":
            self.blocks[str(attributes["id"])] = self.blocks.get(str(attributes["id"]), "") + data
        else:
            self.scripts.append(data)

    def block(self, name: str) -> Any:
        return json.loads(self.blocks[name])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(kit: Any, folder: Path, captions: list[str], evidence: bool = True, **options: Any) -> str:
    prompts = [kit.Planted(caption, "VM VM FM NM", ("ref-1", "ref-2")) for caption in captions]
    run_dir = kit.write_run(folder, [*prompts, kit.Planted("plain")], part_size=1000, evidence=evidence)
    reduce_run(str(run_dir), **options)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(kit, tmp_path_factory.mktemp("hostile") / "run", HOSTILE)


def test_hostile_captions_stay_text(hostile: str) -> None:
    page = Page(hostile)
    captions = page.block("data")["caption"]
    assert sorted(caption[:290] for caption in captions) == sorted(caption[:290] for caption in HOSTILE)
    for raw in ("<script>alert", "<img src=x", "<svg/onload", "<iframe", "</style><style>", "<b>long"):
        assert raw not in hostile
    for block in page.blocks.values():
        assert not set("<>&\u2028\u2029") & set(block)


def test_only_our_own_script_runs(hostile: str) -> None:
    page = Page(hostile)
    kinds = [script.get("type") for script in page.all("script")]
    assert kinds == ["application/json", "application/json", None]
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_nothing_is_requested(hostile: str) -> None:
    page = Page(hostile)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "poster", "data", "action", "background", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:"), f"<{tag} {name}>"
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    style = hostile[hostile.index("<style>") : hostile.index("</style>")]
    assert "url(" not in style.replace("url(data:", "")
    assert "@import" not in style


def test_links_are_http_and_give_nothing_away(hostile: str) -> None:
    for link in Page(hostile).all("a"):
        assert (link["href"] or "").startswith(("#", "https://example.org/"))
        if not (link["href"] or "").startswith("#"):
            assert "noreferrer" in (link["rel"] or "")


@pytest.mark.parametrize("url", ["http://a.example/x", "https://a.example/?q=<b>"])
def test_web_addresses_are_linked(url: str) -> None:
    assert data.link(url) == url


@pytest.mark.parametrize(
    "url",
    [None, "", "javascript:alert(1)", " https:evil", "data:text/html,x", "//a.example", "http://[", "file:///etc"],
)
def test_other_addresses_are_not_linked(url: str | None) -> None:
    assert data.link(url) is None


def test_page_structure(hostile: str) -> None:
    page = Page(hostile)
    assert len(page.all("h1")) == len(page.all("main")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in ids
    assert all(header.get("scope") for header in page.all("th"))


def test_blur_and_no_images(kit: Any, tmp_path: Path) -> None:
    blurred = page_of(kit, tmp_path / "blur", ["a fox"], images="blur")
    assert '<html lang="en" class="blur">' in blurred
    assert "data:image/" in blurred
    without = page_of(kit, tmp_path / "none", ["a fox"], images="none")
    assert "data:image/" not in without
    assert Page(without).block("pictures") == {"prompts": {}, "references": {}}


def test_every_prompt_is_in_the_page_and_pictures_of_some(kit: Any, tmp_path: Path) -> None:
    captions = [f"caption {number}" for number in range(MAX_EXHIBITS + 3)]
    page = page_of(kit, tmp_path / "run", captions, evidence=False)
    block = Page(page).block("data")
    assert len(block["id"]) == MAX_EXHIBITS + 3
    assert len(block["evidence"]) == MAX_EXHIBITS
    assert f"Pictures are here for {MAX_EXHIBITS} of {MAX_EXHIBITS + 3} prompts:" in page


def test_exhibits_are_the_worst_of_each_cluster_then_the_worst() -> None:
    clusters = pa.array([1, 1, 1, 2, 0, 3, 2], pa.int32())
    assert choose_exhibits(pa.table({"cluster": clusters}), 4) == [0, 1, 2, 3]
    assert choose_exhibits(pa.table({"cluster": clusters}), 6) == [0, 1, 2, 3, 4, 5]
    assert choose_exhibits(pa.table({"cluster": clusters[:0]}), 6) == []


def test_pictures_that_cannot_be_decoded_are_counted(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memscan.io.images.encode_png", lambda image: b"not a picture")
    page = page_of(kit, tmp_path / "run", ["a fox", "a hare"])
    assert re.search(r"[2-9] pictures could not be decoded\.", page)
    drawn = Page(page).block("pictures")["prompts"]
    assert [sorted(one) for one in drawn.values()] == [["hole", "mask"], ["hole", "mask"]]


def test_nothing_flagged(kit: Any, tmp_path: Path) -> None:
    page = page_of(kit, tmp_path / "run", [])
    assert "No prompt reproduces a training image" in page
    assert "None of 1 prompt made the model reproduce a training image" in page
    Page(page)


def test_every_reason_has_words() -> None:
    assert set(words.REASONS) == {reason.value for reason in Reason}


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.123, "12.3%"),
        (0.9999, ">99.9%"),
        (0.00421, "0.42%"),
        (0.000311, "0.031%"),
        (1e-9, "<0.001%"),
        (None, "n/a"),
    ],
)
def test_percent(share: float | None, text: str) -> None:
    assert words.percent(share) == text


def test_interval() -> None:
    assert words.interval(0.025, 0.041) == "2.5\u20134.1%"
    assert words.interval(0.0, 0.0001) == "0\u20130.010%"
    assert words.interval(1e-9, 0.01) == "<0.001%\u20131.0%"


def test_figures() -> None:
    assert [round_up(value) for value in (0.01, 0.011, 0.06, 0.21, 0.3, 1.0)] == [0.01, 0.02, 0.1, 0.25, 0.5, 1.0]
    rates = {"VM": 0.1, "FM": 0.0, "BM": 0.25, "NM": 0.65}
    bar = mix_bar({"classes": {label: {"rate": rate} for label, rate in rates.items()}})
    assert [(part["label"], part["x"], part["width"]) for part in bar] == [
        ("VM", 0, 100),
        ("BM", 100, 250),
        ("NM", 350, 650),
    ]
    bars = reach({"1": 4, "3": 2, "25": 1, "31": 1})
    assert [(one["images"], one["prompts"]) for one in bars if one["prompts"]] == [("1", 4), ("3", 2), ("20+", 2)]
    assert len(bars) == 20
    assert reach({}) == []


def test_nothing_on_the_page_needs_a_mask_that_printed_pages_lose(run_dir: Path) -> None:
    """Printed, Chromium's and Firefox's pages show a CSS mask's whole image: cut-outs are pictures of their own."""
    from memscan.report.page import read_part

    assert "mask-composite" not in read_part("report.css") + read_part("report.js")
    reduce_run(str(run_dir))
    page = (run_dir / "report.html").read_text()
    drawn = json.loads(page.split('id="pictures">')[1].split("</script>")[0])
    for pictures in (*drawn["prompts"].values(), *drawn["references"].values()):
        cuts = {name: pictures[name] for name in ("foreground", "background")}
        assert all(uri.startswith("data:image/webp") for uri in cuts.values())
        alphas = [np.asarray(opened(uri))[..., 3].astype(int) for uri in cuts.values()]
        assert abs(alphas[0] + alphas[1] - 255).max() <= 2  # each pixel is in one of both
        assert 0 < (alphas[0] > 127).mean() < 0.5


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_enlarged_pictures_are_as_they_are_stored_and_all_generations_are_there(run_dir: Path) -> None:
    reduce_run(str(run_dir))
    page = (run_dir / "report.html").read_text()
    drawn = json.loads(page.split('id="pictures">')[1].split("</script>")[0])
    columns = json.loads(page.split('id="data">')[1].split("</script>")[0])
    for prompt, evidence in columns["evidence"].items():
        labels = [one["label"] for one in evidence["generations"]]
        assert len(labels) == sum(label != "NM" for label in evidence["labels"])
        assert len(drawn["prompts"][prompt].get("others", {})) == len(labels) - 1
        assert opened(drawn["prompts"][prompt]["full"]).size == (64, 64)
        assert {one["match_id"] for one in evidence["generations"]} <= set(drawn["references"])


def test_first_lines_say_what_is_claimed_and_what_is_not(run_dir: Path) -> None:
    reduce_run(str(run_dir))
    text = " ".join((run_dir / "report.html").read_text().split())
    for said in (
        "of prompts reproduce training images",
        "a technical finding, not a legal one",
        "seeds that were not tried",
        "How to read this",
        "Words used on this page",
    ):
        assert said in text
    assert "This world is synthetic" not in text


def test_thresholds_in_words() -> None:
    found = {"foreground": 0.714, "background": 0.782, "source": "calibrated on a set"}
    known = {"rate": 0.0017, "bound": 0.0044, "ordinary": 1760}
    text = words.thresholds({"thresholds": {**found, "false_positive_rate": known}})
    assert "at least 0.714" in text
    assert "calibrated on a set" in text
    assert (
        "Of 1,760 pairs there that are no copies, 0.17% were called alike (at most 0.44% with 95% confidence)" in text
    )
    assert "is not recorded" in words.thresholds({"thresholds": found})
    assert "authors published" in words.thresholds({"thresholds": {**found, "source": "published"}})


def test_the_demo_says_that_its_world_is_synthetic() -> None:
    from memscan.planted.world import planted_world_of, shipped_world

    assert planted_world_of(str(shipped_world() / "checkpoint")) == "planted world 1"
    assert planted_world_of("models/sd14") is None
    assert planted_world_of("checkpoint") is None


def test_shipped_thresholds_bring_their_false_positive_rate() -> None:
    from memscan.config import MetricConfig, shipped_rate

    metric = MetricConfig.model_validate({"variant": "region", "canvas": 128})
    assert shipped_rate(metric)["ordinary"] > 100
    assert shipped_rate(metric.model_copy(update={"foreground_threshold": 0.5})) is None
    paper = {"variant": "paper", "canvas": 512, "foreground_threshold": 0.8, "background_threshold": 0.8}
    assert shipped_rate(MetricConfig.model_validate(paper)) is None
