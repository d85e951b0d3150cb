"""`memscan compare`: what a person would expect of two image files, and of a folder against an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from memscan.evaluation.pairs import Pair, draw_pairs
from memscan.records import Label
from pipelines.cli import app

SIZE = 64


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["compare", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Label, list[str]]:
    """Files of one pair a label, and the arguments that name them."""
    folder = tmp_path_factory.mktemp("pairs")
    return {pair.label: _files(folder, pair) for pair in draw_pairs(41, 1, size=SIZE)}


def _files(folder: Path, pair: Pair) -> list[str]:
    paths = []
    for name, picture in (("generated", pair.generated), ("reference", pair.reference)):
        stem = folder / f"{pair.label}-{name}"
        Image.fromarray(picture.image_HWC).save(f"{stem}.png")
        Image.fromarray(np.rint(picture.mask_HW * 255).astype(np.uint8)).save(f"{stem}-mask.png")
        paths.append(str(stem))
    own, other = paths
    masks = ["--generated-mask", f"{own}-mask.png", "--reference-mask", f"{other}-mask.png"]
    return [f"{own}.png", f"{other}.png", *masks, "--canvas", "128"]


@pytest.mark.parametrize("variant", ["region", "robust"])
@pytest.mark.parametrize("label", list(Label))
def test_labels(pairs: dict[Label, list[str]], variant: str, label: Label) -> None:
    code, out, _ = run(*pairs[label], "--variant", variant, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["label"] == label.value
    assert found["variant"] == variant
    assert set(found["scores"]) == {"foreground", "background", "whole"}
    assert (found["margin"] >= 0) == (label is not Label.NM)
    assert 0 < found["areas"]["generated_foreground"] < 1
    assert "shipped" in found["threshold_source"]
    over = found["scores"]["foreground"] >= found["threshold"]["foreground"]
    assert over == (label in (Label.VM, Label.FM))
    assert (found["probability"]["foreground"] > 0.5) == over


def test_a_figure_is_drawn(pairs: dict[Label, list[str]], tmp_path: Path) -> None:
    for variant in ("paper", "region", "robust"):
        target = tmp_path / f"{variant}.png"
        arguments = [argument for argument in pairs[Label.FM] if argument not in ("--canvas", "128")]
        canvas = "192" if variant == "paper" else "128"
        code, out, _ = run(*arguments, "--canvas", canvas, "--variant", variant, "--figure", str(target))
        assert code == 0
        assert variant in out
        with Image.open(target) as drawn:
            assert min(drawn.size) > 400


def test_a_copy_in_another_format_is_verbatim(pairs: dict[Label, list[str]], tmp_path: Path) -> None:
    """Other sizes, greyscale, alpha, CMYK, EXIF rotation, 16 bits, an animation: what a viewer shows is compared."""
    generated, _, _, mask, *_ = pairs[Label.VM]
    with Image.open(generated) as opened:
        image = opened.convert("RGB")
    alpha = image.convert("RGBA")
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    files = {
        "large.png": lambda path: image.resize((150, 150), Image.Resampling.BICUBIC).save(path),
        "alpha.webp": lambda path: alpha.save(path, lossless=True),
        "cmyk.jpg": lambda path: image.convert("CMYK").save(path, quality=95),
        "turned.jpg": lambda path: rotated.save(path, quality=95, exif=exif),
        "moving.gif": lambda path: image.convert("P", palette=Image.Palette.ADAPTIVE).save(
            path, save_all=True, append_images=[Image.new("P", image.size)]
        ),
    }
    for name, save in files.items():
        save(tmp_path / name)
        code, out, err = run(
            *(generated, str(tmp_path / name), "--generated-mask", mask, "--reference-mask", mask),
            *("--variant", "robust", "--canvas", "128", "--json"),
        )
        assert code == 0, (name, err)
        assert json.loads(out)["label"] == "VM", name


def test_greyscale_of_8_and_16_bits_are_one_picture(pairs: dict[Label, list[str]], tmp_path: Path) -> None:
    generated, _, _, mask, *_ = pairs[Label.VM]
    with Image.open(generated) as opened:
        grey = opened.convert("L")
    grey.save(tmp_path / "8.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "16.png")
    masks = ("--generated-mask", mask, "--reference-mask", mask, "--canvas", "128")
    code, out, _ = run(str(tmp_path / "8.png"), str(tmp_path / "16.png"), *masks, "--json")
    assert code == 0
    assert json.loads(out)["scores"]["whole"] == pytest.approx(1, abs=1e-3)


def test_mistakes_are_one_line(pairs: dict[Label, list[str]], tmp_path: Path) -> None:
    generated, reference, _, mask, *_ = pairs[Label.VM]
    text, wide = tmp_path / "text.png", tmp_path / "wide.png"
    text.write_text("no image")
    Image.new("L", (90, 30)).save(wide)
    for arguments, message in (
        ((str(tmp_path / "none.png"), reference), "none.png: cannot be read"),
        ((str(text), reference, "--generated-mask", mask, "--reference-mask", mask), "is not an image"),
        ((generated, reference), "no mask and no segmenter"),
        ((generated, reference, "--generated-mask", str(wide), "--reference-mask", mask), "is 90 x 30"),
        ((generated, reference, "--variant", "region", "--canvas", "200"), "thresholds ship for canvases 128"),
        ((str(tmp_path), "index"), "no segmenter and embedder"),
        ((str(tmp_path), "index", "--figure", "x.png"), "not to a folder"),
    ):
        code, out, err = run(*arguments)
        assert code == 2, arguments
        assert out == ""
        assert message in err
        assert err.count("\n") == 1


def test_the_segmenter_of_a_world_stands_in_for_masks(pairs: dict[Label, list[str]]) -> None:
    generated, reference, *_ = pairs[Label.VM]
    code, out, err = run(generated, reference, "--world", "shipped", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["label"] == "VM"
    assert found["canvas"] == 128
    assert found["threshold_source"].startswith("calibrated on planted world 2")


def test_a_folder_against_an_index(tiny_world: Any, in_process: None, tmp_path: Path) -> None:
    """Copies of indexed images find their original and are VM; a broken file is one rejected line and exit code 1."""
    settings = tiny_world.write_yaml(tmp_path / "census.yaml", tmp_path / "run")
    index = str(tmp_path / "index")
    source = str(tiny_world.folder / "references.parquet")
    built = CliRunner().invoke(app, ["index", "build", source, index, "--config", str(settings)])
    assert built.exit_code == 0, built.stderr
    folder = tmp_path / "made"
    folder.mkdir()
    rows = [row for row in pq.read_table(source).to_pylist() if row["reference_id"] != "truncated"][:3]
    for row in rows:
        (folder / f"{row['reference_id']}.png").write_bytes(row["image"])
    code, out, err = run(str(folder), index, "--config", str(settings), "--json")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [(row["reference"], row["label"]) for row in found] == [(row["reference_id"], "VM") for row in rows]
    assert all(row["margin"] == pytest.approx(0.2, abs=1e-3) for row in found)  # 1 less the published thresholds
    (folder / "zz-broken.png").write_text("no image")
    code, out, _ = run(str(folder), index, "--config", str(settings), "--json")
    assert code == 1
    last = json.loads(out.splitlines()[-1])
    assert (len(out.splitlines()), last["status"], last["reason"]) == (4, "rejected", "image_undecodable")


def _pairs_file(folder: Path, text: str) -> str:
    path = folder / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def _columns(arguments: list[str], base: Path) -> str:
    """A row of the file: generated, reference and both masks, relative to it."""
    generated, reference, _, own, _, other = arguments[:6]
    return ",".join(str(Path(path).relative_to(base)) for path in (generated, reference, own, other))


def test_a_file_of_pairs_gives_a_line_per_row_in_order_and_figures(pairs: dict[Label, list[str]]) -> None:
    folder = Path(pairs[Label.VM][0]).parent
    rows = [f"{_columns(arguments, folder)},{label}" for label, arguments in pairs.items()]
    broken = ["nowhere.png,nowhere.png,,,VM", f"{_columns(pairs[Label.NM], folder)},XX", "one cell"]
    head = "generated,reference,generated_mask,reference_mask,label"
    path = _pairs_file(folder, "\n".join([head, rows[0], broken[0], *rows[1:], *broken[1:]]))
    code, out, _ = run("--pairs", path, "--variant", "region", "--canvas", "128")
    *lines, figures = map(json.loads, out.splitlines())
    assert code == 1
    assert [line["row"] for line in lines] == list(range(1, len(rows) + len(broken) + 1))
    reasons = {line["row"]: line["reason"] for line in lines if line["status"] == "rejected"}
    assert reasons == {2: "image_missing", 6: "row_malformed", 7: "row_malformed"}
    done = [line for line in lines if line["status"] == "done"]
    alone = json.loads(run(*pairs[Label.VM], "--variant", "region", "--canvas", "128", "--json")[1])
    for key in ("label", "scores", "margin", "threshold", "copied"):
        assert done[0][key] == alone[key]
    assert (figures["rows"], figures["done"], figures["rejected"]) == (7, 4, 3)
    assert sum(sum(row.values()) for row in figures["confusion"].values()) == 4
    assert set(figures["f1"]) == {"VM", "FM", "BM", "NM"}
    assert figures["false_positives"]["low"] <= figures["false_positives"]["rate"] <= figures["false_positives"]["high"]
    assert figures["by_generation"]["total"] == 4


def test_pairs_without_labels_have_no_figures_and_without_a_mask_a_reason(pairs: dict[Label, list[str]]) -> None:
    folder = Path(pairs[Label.VM][0]).parent
    generated, reference, _, _, _, other = pairs[Label.VM][:6]
    names = [Path(path).name for path in (generated, reference, other)]
    path = _pairs_file(folder, f"generated,reference,reference_mask\n{','.join(names)}\n{names[0]},{names[1]},\n")
    code, out, _ = run("--pairs", path)  # under the reference's mask, so the generation needs none
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [line["status"] for line in lines] == ["done", "rejected"]
    assert lines[0]["label"] == "VM"
    assert lines[1]["reason"] == "segmentation_failed"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "has no column generated"), ("generated,reference\n", "holds no pairs"), ("generated\na.png\n", "no column")],
)
def test_a_file_that_holds_no_pairs_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    code, _, err = run("--pairs", _pairs_file(tmp_path, text))
    assert code == 2
    assert complaint in err
