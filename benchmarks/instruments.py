"""Autoencoder, tokenizer, segmenter and embedder of the planted worlds, made from nothing; about an hour on two cores.

    python -m benchmarks.instruments OUT

The shipped world's were made so. `memscan planted build` takes them from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from memscan.planted import autoencoder, embedding, segmentation
from memscan.planted.layers import draw_layers
from memscan.planted.tokenizer import train_tokenizer

Progress = Callable[[str], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder that receives the models")
    train_general(parser.parse_args().out)


def train_general(
    out: str | Path,
    *,
    decoder_steps: int = 2400,
    segmenter_steps: int = 900,
    embedder_steps: int = 900,
    progress: Progress = print,
) -> None:
    """Make autoencoder, tokenizer, segmenter and embedder from nothing; about an hour on two cores."""
    folder = Path(out)
    train_tokenizer().save_pretrained(folder / "checkpoint" / "tokenizer")
    vae = autoencoder.build_autoencoder(autoencoder.sample_images(0, 3000))
    for step, error in autoencoder.train_decoder(vae, steps=decoder_steps):
        progress(f"decoder, step {step}: mean squared error {error:.4f}")
    vae.eval().half().save_pretrained(folder / "checkpoint" / "vae", safe_serialization=True)
    train_perception(folder, vae.float(), segmenter_steps, embedder_steps, progress)


def train_perception(
    folder: Path, vae: AutoencoderKL, segmenter_steps: int, embedder_steps: int, progress: Progress
) -> None:
    """Make segmenter and embedder for an autoencoder, and export them."""
    torch.manual_seed(0)
    vae = vae.eval().requires_grad_(False)
    layers = draw_layers(0)
    segmenter, embedder = segmentation.SmallUNet(), embedding.SmallEncoder()
    for step, overlap in segmentation.train_segmenter(segmenter, layers, vae, steps=segmenter_steps):
        progress(f"segmenter, step {step}: intersection over union {overlap:.4f}")
    segmentation.export_segmenter(segmenter, folder / "segmenter.onnx")
    for step, share in embedding.train_embedder(embedder, layers, vae, steps=embedder_steps):
        progress(f"embedder, step {step}: partner found {share:.4f}")
    embedding.export_embedder(embedder, folder / "embedder.pt")


if __name__ == "__main__":
    main()
