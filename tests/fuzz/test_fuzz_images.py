"""Images of every format and mode, whole and damaged: pixels within bounds, or a reject of their own row."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from memscan.errors import Reason, RowReject
from memscan.io import images
from memscan.io.images import MAX_BYTES, decode, decode_mask
from tests.fuzz.damage import spoilt

# Modes that a format can be written in.
MODES: dict[str, tuple[str, ...]] = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "PPM": ("L", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
if not features.check("avif"):
    del MODES["AVIF"]
if not features.check_codec("jpg_2000"):
    del MODES["JPEG2000"]
SEVERAL = ("PNG", "GIF", "TIFF", "WEBP")
BOUND = 4096


def picture(kind: str, mode: str, width: int, height: int, frames: int = 1) -> bytes:
    """A gradient in a format and mode, of one frame or more."""
    values = np.linspace(0, 255, width * height).reshape(height, width)
    made = []
    for frame in range(frames):
        if mode == "I;16":
            one = Image.fromarray((values * 257).astype(np.uint16))
        elif mode == "F":
            one = Image.fromarray((values / 255).astype(np.float32))
        else:
            one = Image.fromarray(np.roll(values, frame).astype(np.uint8)).convert("RGB").convert(mode)
        made.append(one)
    out = io.BytesIO()
    several: dict[str, Any] = {"save_all": True, "append_images": made[1:]} if frames > 1 else {}
    made[0].save(out, kind, **several)
    return out.getvalue()


def read(data: bytes, most: int = BOUND) -> np.ndarray | None:
    """Pixels as promised, or None for a reject with a reason and one line."""
    try:
        image_HWC = decode(data, max_pixels=most)
    except RowReject as reject:
        assert reject.reason in (Reason.IMAGE_UNDECODABLE, Reason.IMAGE_TOO_LARGE)
        assert reject.message
        assert "\n" not in reject.message
        return None
    assert image_HWC.dtype == np.uint8
    assert image_HWC.shape[2] == 3
    assert 0 < image_HWC.shape[0] * image_HWC.shape[1] <= most
    return image_HWC


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_is_read_at_its_size(kind: str, mode: str) -> None:
    found = read(picture(kind, mode, 12, 7))
    assert found is not None
    assert found.shape == (7, 12, 3)
    assert int(found[0, 0].max()) < 40 < 200 < int(found[-1, -1].min())  # the gradient's ends, in 8 bits


@st.composite
def damaged_pictures(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    frames = draw(st.integers(1, 4)) if kind in SEVERAL and mode in ("RGB", "L") else 1
    whole = picture(kind, mode, draw(st.integers(1, 40)), draw(st.integers(1, 40)), frames)
    return draw(spoilt(whole))


@settings(max_examples=150)
@given(damaged_pictures() | st.binary(max_size=80))
def test_a_damaged_picture_is_read_or_rejected(data: bytes) -> None:
    read(data)
    try:
        mask_HW = decode_mask(data, max_pixels=BOUND)
    except RowReject:
        return
    assert mask_HW.dtype == np.float32
    assert mask_HW.min() >= 0
    assert mask_HW.max() <= 1


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_many_frames_only_the_first_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(kind, "RGB", 16, 16, frames=200)
    seeks: list[int] = []
    for plugin in {type(Image.open(io.BytesIO(data)))}:
        monkeypatch.setattr(plugin, "seek", lambda self, frame: seeks.append(frame))
    first = read(data)
    assert first is not None
    assert not [frame for frame in seeks if frame]
    alone = read(picture(kind, "RGB", 16, 16))
    assert alone is not None
    assert np.abs(first.astype(int) - alone).max() <= 16  # lossy formats, palettes


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, pixels: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", zlib.compress(pixels, 9)) + _chunk(b"IEND", b"")


SIDE = 60_000
TAGS = {256: SIDE, 257: SIDE, 262: 1, 273: 8}  # width, height, greyscale, where the strip is
BOMBS = {
    "png": _png(SIDE, SIDE, b"\0" * 10_000_000),
    "bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, *[0] * 6),
    "gif": (tiny := picture("GIF", "L", 1, 1))[:6] + struct.pack("<HH", SIDE, SIDE) + tiny[10:],
    "ppm": f"P6 {SIDE} {SIDE} 255\n".encode(),
    "tiff": b"II*\0\x08\0\0\0"
    + struct.pack("<H", len(TAGS))
    + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in TAGS.items())
    + b"\0\0\0\0",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_that_promises_billions_of_pixels_is_refused_before_them(kind: str) -> None:
    with pytest.raises(RowReject) as caught:
        decode(BOMBS[kind])
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE, caught.value.message
    assert "pixels" in caught.value.message


def test_text_that_unpacks_to_a_gigabyte_is_left_out() -> None:
    """The pixels are whole: they are read without it, and it is never unpacked."""
    whole = picture("PNG", "RGB", 4, 4)
    bomb = _chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"\0" * 2**28, 1))
    at = whole.index(b"IDAT") - 4
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(read(whole[:at] + bomb + whole[at:]), read(whole))
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_a_wrong_name_makes_no_difference_and_other_kinds_are_no_images() -> None:
    """The content decides, not the name; what would start other programs or parsers is not opened."""
    assert read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") is None
    assert read(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>") is None
    for kind in ("ICO", "PDF", "TGA", "SGI"):
        assert read(picture(kind, "RGB", 16, 16)) is None


def test_more_bytes_than_any_image_needs_are_not_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # no blocks on the disk
    monkeypatch.setattr(images.storage, "read_bytes", lambda path: pytest.fail("was read"))
    with pytest.raises(RowReject) as caught:
        images.read_image(str(tmp_path / "large.png"))
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE
