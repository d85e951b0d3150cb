"""This module holds rules for a segmenter's input and output: those of rembg's sessions, and one of the user's own.

All of rembg's sessions divide an image by its own maximum. BiRefNet's give logits (sigmoid, then min-max); U2-Net's and
IS-Net's first output is a probability already (min-max only). IS-Net takes 0.5 from every channel, as it was trained;
rembg did so from 2.0.64 on (commit 451c10d), before that it took ImageNet's means, as its isnet-anime still does
(sessions/u2net.py, dis_general_use.py, dis_anime.py, birefnet_general.py, read at 684f8e9).
"""

from __future__ import annotations

from dataclasses import dataclass

from memscan.config import SegmenterConfig

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MaskRule:
    """This says how the input is prepared and the output is read.

    Args:
        name: for the specification, with the size after it.
        mean, std: of red, green and blue, in [0, 1].
        by_maximum: pixels are divided by the image's own maximum, otherwise by 255.
        sigmoid: the output are logits.
        output: number of the output that is the mask; negative from the end.
    """

    name: str = "rembg"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    by_maximum: bool = True
    sigmoid: bool = True
    output: int = -1


BIREFNET = MaskRule()
_PRESETS = {
    "birefnet": BIREFNET,
    "isnet": MaskRule("rembg2.0.64-isnet", mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), sigmoid=False, output=0),
    "u2net": MaskRule("rembg-u2net", sigmoid=False, output=0),
}


def rule_of(config: SegmenterConfig) -> MaskRule:
    """Return the configured rule."""
    if config.preset != "custom":
        return _PRESETS[config.preset]
    numbers = "_".join(f"{value:g}" for triple in (config.mean, config.std) for value in triple)
    output = -1 if config.output is None else config.output
    name = f"custom-{config.divide}-{numbers}-{config.activation}-output{output}-"
    return MaskRule(name, config.mean, config.std, config.divide == "max", config.activation == "sigmoid", output)
