"""This module makes the report's pictures.

They are small and encoded as data URIs. The picture is None for bytes that are not an image, and the page counts these.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from memscan.config import MetricConfig
from memscan.errors import RowReject
from memscan.io import images
from memscan.report.evidence import Exhibit

SIDE = 176  # pixels; shown at 112 CSS pixels, so still crisp on a dense display
_MAP_SIDE = 112
_MASK_SIDE = 112
# A canvas for looking: the metric's own of 512 would cost a tenth of a second a picture.
# Enlarged pictures are as they are stored up to this side: of the worst prompts first, and of no more once so many
# bytes are in the page, which has to open in a browser. `memscan export` writes all of them.
FULL_SIDE = 1024
FULL_BYTES = 24 * 2**20
_CANVAS = {"paper": 176, "release": 176, "region": 128, "robust": 128, "combined": 128}


Sources = dict[str, tuple[Callable[[bytes], str | None], bytes | None]]


class Pictures:
    """This makes all pictures for the exhibits of a page; `unreadable` counts images that could not be decoded."""

    def __init__(self, metric: MetricConfig) -> None:
        self.unreadable = 0
        self._metric = metric
        self._left = FULL_BYTES

    def of(self, exhibits: Sequence[Exhibit]) -> dict[str, Any]:
        """Return, by prompt id and by reference id, names of pictures to data URIs, without those that are missing."""
        prompts: dict[str, Any] = {}
        references: dict[str, Any] = {}
        for exhibit in exhibits:
            for match in (exhibit.match, *(pair.match for pair in exhibit.pairs)):
                if match and match.reference_id not in references:
                    sources: Sources = {"image": (photograph, match.image), "mask": (mask, match.mask)}
                    found = self._drawn(sources | {"hole": (hole, match.mask)})
                    references[match.reference_id] = found | _regions(found, match.image, match.mask)
            drawn: dict[str, Any] = dict(
                self._drawn(
                    {
                        "image": (photograph, exhibit.image),
                        "mask": (mask, exhibit.mask),
                        "hole": (hole, exhibit.mask),
                        "localization": (localization, exhibit.localization),
                    }
                )
            )
            drawn |= _regions(drawn, exhibit.image, exhibit.mask)
            similarity = self._similarity(exhibit)
            others = {
                str(pair.generation["sample"]): found
                for pair in exhibit.pairs[1:]
                if pair.image and (found := self._drawn({"image": (photograph, pair.image)}))
            }
            drawn |= ({"similarity": similarity} if similarity else {}) | ({"others": others} if others else {})
            prompts[str(exhibit.row["prompt_id"])] = drawn
        for exhibit in exhibits:  # all small pictures first: each is needed, however many bytes the large ones take
            self._enlarge(exhibit, prompts[str(exhibit.row["prompt_id"])], references)
        return {"prompts": prompts, "references": references}

    def _enlarge(self, exhibit: Exhibit, own: dict[str, Any], references: dict[str, Any]) -> None:
        """Add the stored sizes of a prompt's generations and of their training images, while there is room."""
        wanted = [(own, exhibit.image)]
        wanted += [
            (own.get("others", {}).get(str(one.generation["sample"]), {}), one.image) for one in exhibit.pairs[1:]
        ]
        wanted += [(references[one.match.reference_id], one.match.image) for one in exhibit.pairs if one.match]
        for drawn, data in wanted:
            if self._left <= 0 or not data or "image" not in drawn or "full" in drawn:
                continue
            uri = full(data)
            if uri:
                drawn["full"] = uri
                self._left -= len(uri)

    def _drawn(self, sources: Sources) -> dict[str, str]:
        found = {}
        for name, (draw, data) in sources.items():
            if data:
                uri = draw(data)
                self.unreadable += uri is None
                if uri:
                    found[name] = uri
        return found

    def _similarity(self, exhibit: Exhibit) -> str | None:
        match = exhibit.match
        if not (match and exhibit.image and exhibit.mask and match.image and match.mask):
            return None
        try:
            own = images.decode(exhibit.image), images.decode_mask(exhibit.mask)
            other = images.decode(match.image), images.decode_mask(match.mask)
            with _one_thread():
                map_HW = _map(self._metric, own, other)
        except (RowReject, ValueError):  # damaged pixels are counted where they are drawn; sizes may disagree
            return None
        return _coloured(map_HW, "viridis")


def _regions(drawn: Mapping[str, Any], image: bytes | None, mask_: bytes | None) -> dict[str, str]:
    """Foreground and background cut out, where image and mask could be drawn."""
    if not (image and mask_ and "image" in drawn and "mask" in drawn):
        return {}
    found = {name: cut_out(image, mask_, name == "foreground") for name in ("foreground", "background")}
    return {name: uri for name, uri in found.items() if uri}


@functools.lru_cache(maxsize=64)  # many prompts match one training image
def photograph(data: bytes) -> str | None:
    """Return a thumbnail."""
    try:
        small = images.thumbnail_jpeg(images.decode(data), SIDE)
    except RowReject:
        return None
    return _uri("jpeg", small)


@functools.lru_cache(maxsize=64)
def mask(data: bytes) -> str | None:
    """Return a foreground mask, white = foreground; the page cuts both regions out by it."""
    try:
        mask_HW = images.decode_mask(data)
    except RowReject:
        return None
    return _uri("png", images.encode_mask(np.clip(_shrunk(mask_HW, _MASK_SIDE), 0, 1)))


def cut_out(data: bytes, mask: bytes, inside: bool) -> str | None:
    """Return a thumbnail of one region, with the rest transparent.

    It is drawn here and not by a CSS mask, because printed pages lose CSS masks.
    """
    try:
        image_HWC, mask_HW = images.decode(data), images.decode_mask(mask)
    except RowReject:
        return None
    small = Image.fromarray(image_HWC)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kept_HW = np.clip(mask_HW if inside else 1 - mask_HW, 0, 1)
    alpha = Image.fromarray(np.asarray(np.rint(kept_HW * 255), np.uint8)).resize(small.size, Image.Resampling.BILINEAR)
    small.putalpha(alpha)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return _uri("webp", buffer.getvalue())


def full(data: bytes) -> str | None:
    """Return the picture in its stored size: without loss where it is small, else as a JPEG of at most `FULL_SIDE`."""
    try:
        image_HWC = images.decode(data)
    except RowReject:
        return None
    if max(image_HWC.shape[:2]) <= 256:
        return _uri("png", images.encode_png(image_HWC))
    return _uri("jpeg", images.thumbnail_jpeg(image_HWC, FULL_SIDE))


@functools.lru_cache(maxsize=64)
def hole(data: bytes) -> str | None:
    """Return the background's mask, white = background, for the enlarged picture."""
    try:
        mask_HW = images.decode_mask(data)
    except RowReject:
        return None
    return _uri("png", images.encode_mask(1 - np.clip(_shrunk(mask_HW, _MASK_SIDE), 0, 1)))


def localization(data: bytes) -> str | None:
    """Return a localisation map in false colours, as large as the photograph that the page lays it over."""
    try:
        map_HW = images.decode_mask(data)
    except RowReject:
        return None
    scale = _MAP_SIDE / max(map_HW.shape)
    height, width = (max(1, round(edge * scale)) for edge in map_HW.shape)
    return _coloured(np.asarray(Image.fromarray(map_HW).resize((width, height), Image.Resampling.BILINEAR)), "magma")


Picture = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]


def _map(metric: MetricConfig, own: Picture, other: Picture) -> npt.NDArray[np.float32]:
    """Return the similarity (H, W) of two images where the metric looks: its map of each region inside the own mask."""
    comparer = _comparer(metric.variant)
    first, second = comparer.prepare(*own), comparer.prepare(*other)
    maps = [np.asarray(one.cpu().numpy(), np.float32) for one in comparer.maps(first, second).values()]
    if metric.variant == "region" or len(maps) < 2:
        return maps[0]
    inside_HW = np.asarray(Image.fromarray(own[1]).resize(maps[0].shape[::-1], Image.Resampling.BILINEAR))
    return np.asarray(inside_HW * maps[0] + (1 - inside_HW) * maps[1], np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: on canvases this small its threads mostly wait, and on a busy machine for very long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=4)
def _comparer(variant: str) -> Any:
    from memscan.metric import load_metric

    undecided = {"foreground_threshold": 0.5, "background_threshold": 0.5}
    return load_metric(MetricConfig.model_validate({"variant": variant, "canvas": _CANVAS[variant], **undecided}))


def _coloured(map_HW: npt.NDArray[np.float32], colours: str) -> str:
    from matplotlib import colormaps

    small_HW = _shrunk(np.nan_to_num(map_HW.astype(np.float32)), _MAP_SIDE)
    painted = colormaps[colours](np.clip(small_HW, 0, 1))[..., :3]
    return _uri("jpeg", images.thumbnail_jpeg(np.asarray(np.rint(painted * 255), np.uint8), _MAP_SIDE))


def _shrunk(map_HW: npt.NDArray[np.float32], side: int) -> npt.NDArray[np.float32]:
    scale = side / max(map_HW.shape)
    if scale >= 1:
        return map_HW
    height, width = (max(1, round(edge * scale)) for edge in map_HW.shape)
    resized = Image.fromarray(map_HW).resize((width, height), Image.Resampling.BOX)
    return np.asarray(resized, np.float32)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
