"""Runs the authors' code from clones of their repositories, on the inputs of `cases`."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.parity.cases import Cut, attention_case, cut_pairs, mask_image, small_network


def rembg(clone: Path) -> dict[str, Any]:
    """`predict` of rembg's sessions for ISNet, BiRefNet and U2-Net, over a small network in place of theirs."""
    import onnxruntime

    if importlib.util.find_spec("pooch") is None:  # only downloads
        sys.modules["pooch"] = types.ModuleType("pooch")
    sys.path.insert(0, str(clone))
    package = types.ModuleType("rembg")
    package.__path__ = [str(clone / "rembg")]  # without its __init__, which asks for matting
    sys.modules["rembg"] = package
    sessions = types.ModuleType("rembg.sessions")
    sessions.__path__ = [str(clone / "rembg" / "sessions")]  # without its __init__, which loads all of them
    sys.modules["rembg.sessions"] = sessions
    found = []
    for preset, module, name in (
        ("isnet", "dis_general_use", "DisSession"),
        ("birefnet", "birefnet_general", "BiRefNetSessionGeneral"),
        ("u2net", "u2net", "U2netSession"),
    ):
        kind = getattr(importlib.import_module(f"rembg.sessions.{module}"), name)
        session = kind.__new__(kind)
        data = small_network(logits=preset == "birefnet", side=320 if preset == "u2net" else 1024)
        session.inner_session = onnxruntime.InferenceSession(data)
        (mask,) = session.predict(Image.fromarray(mask_image()))
        found.append({"preset": preset, "mask": np.asarray(mask).tolist()})
    return {
        "repository": "https://github.com/danielgatis/rembg",
        "commit": commit_of(clone),
        "ran": "predict of sessions/dis_general_use.py, birefnet_general.py and u2net.py on benchmarks.parity.cases",
        "values": found,
    }


def attention(clone: Path) -> dict[str, Any]:
    """detect.py of MemAttn in both modes: its scores of single prompts, which it makes AUCs of."""
    shares_CLBT, ends_B = attention_case()
    array = np.swapaxes(shares_CLBT, 1, 2)[:, :, :, None]  # (steps, prompts, layers, 1, tokens), as it is stored
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for half, part in (("mem", slice(0, 3)), ("nomem", slice(3, None))):
            np.save(Path(name, f"{half}.npy"), array[:, part])
            np.save(Path(name, f"{half}_length.npy"), ends_B[part] + 1)
        for mode in ("D", "E"):
            arguments = ["detect.py", "--mode", mode, "--mem_input", "mem", "--nomem_input", "nomem"]
            with contextlib.chdir(name), mock.patch.object(sys, "argv", arguments):
                found[mode] = runpy.run_path(str(clone / "detect.py"))["scores"].tolist()
    return {
        "repository": "https://github.com/renjie3/MemAttn",
        "commit": commit_of(clone),
        "ran": "detect.py --mode D and --mode E on benchmarks.parity.cases",
        "values": found,
    }


def commit_of(clone: Path) -> str:
    """The commit that a clone is at."""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def load(path: Path) -> Any:
    """A script as a module."""
    specification = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def fbmem(clone: Path) -> dict[str, Any]:
    """5_compute_segments.py, archive/check_mem.py and 6_bg_scores.py, with masks that are given in place of rembg's.

    Every generation is compared with its training image twice, and the second comparison is kept: in the first one the
    scripts have not cached the generation's cut images yet, and take its foreground with its alpha.
    """
    alphas: dict[tuple[int, ...], Image.Image] = {}

    def remove(picture: Image.Image, **_settings: Any) -> Image.Image:
        """What rembg 2.0.67 gives where matting finds no foreground, as with these settings always: a plain cut."""
        return Image.composite(picture, Image.new("RGBA", picture.size, 0), alphas[_key(picture)])

    stub = types.ModuleType("rembg")
    stub.__dict__.update(new_session=lambda *_names, **_settings: None, remove=remove)
    sys.modules["rembg"] = stub
    try:
        import torchvision  # noqa: F401
    except ImportError:
        import torchmetrics.image  # noqa: F401 -- asks for torchvision when it is imported

        sys.modules["torchvision"] = types.ModuleType("torchvision")
        sys.modules["torchvision"].__dict__["transforms"] = types.SimpleNamespace(ToTensor=lambda: _to_tensor)
    segments, scores = load(clone / "5_compute_segments.py"), load(clone / "6_bg_scores.py")
    found = []
    for pair in cut_pairs():
        with tempfile.TemporaryDirectory() as name:
            memorised, generations = Path(name, "memorised"), Path(name, "generations")
            for folder in (memorised / "foreground", memorised / "background", generations):
                folder.mkdir(parents=True)
            # As PNG under the scripts' names: what JPEG does to the files is no matter of the scores.
            alphas.clear()
            for place in (0, 1):
                _put(pair.reference, memorised / f"{place}.jpg", alphas)
            segments.main(argparse.Namespace(mem_folder=memorised, start=0, end=2))
            _check_training_images(scores, memorised)
            _put(pair.generated, generations / "img_0000_00.jpg", alphas)
            settings = {
                "mem_folder": memorised,
                "gen_folder": generations,
                "num_clusters": 1,
                "num_prompts": 1,
                "num_samples": 1,
                "num_mem_images": 2,
                "top_k": 2,
                "ssim": False,
                "no_segment": False,
                "no_cluster_prefix": True,
            }
            scores.compute(argparse.Namespace(**settings))
            with (generations / "scores.csv").open(encoding="utf-8") as lines:
                (row,) = [row for row in csv.DictReader(lines) if row["original image"] == "1.png"]
        found.append(
            {
                "pair": pair.name,
                "foreground": float(row["Foreground Scores"]),
                "background": float(row["Background Scores"]),
            }
        )
    return {
        "repository": "https://github.com/Jimmy-di/localizing_memorization_in_diffusion_models",
        "commit": commit_of(clone),
        "ran": "5_compute_segments.py, archive/check_mem.py (its rule) and 6_bg_scores.py on benchmarks.parity.cases",
        "values": found,
    }


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    """torchvision's ToTensor of 8-bit images: (C, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _put(cut: Cut, path: Path, alphas: dict[tuple[int, ...], Image.Image]) -> None:
    picture = Image.fromarray(cut.image_HWC)
    picture.save(path, "PNG")
    alphas[_key(picture)] = Image.fromarray(cut.alpha_HW)


def _key(picture: Image.Image) -> tuple[int, ...]:
    return (*picture.size, hash(picture.convert("RGB").tobytes()))


def _check_training_images(scores: Any, folder: Path) -> None:
    """What archive/check_mem.py does: where a cut image is nearly empty, the whole image stands in its place."""
    for place in (0, 1):
        for name, white in (("background", True), ("foreground", False)):
            path = folder / name / f"{place}.png"
            grey = Image.open(path).convert("RGBA").convert("L")
            if scores.is_mostly_white(grey, white=white):
                Image.open(folder / f"{place}.jpg").convert("RGBA").save(path)
