from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memscan.errors import Reason, RowReject
from memscan.io import images


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 12, width: int = 16) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3], axis=-1).astype(np.uint8)


def chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def png16(values_HWC: np.ndarray) -> bytes:
    """A 16-bit PNG, grey or RGB, written by hand: Pillow writes none in colour."""
    height, width, channels = values_HWC.shape
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_png_round_trip_is_exact(height: int, width: int, seed: int) -> None:
    image_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    decoded_HWC = images.decode(images.encode_png(image_HWC))
    np.testing.assert_array_equal(decoded_HWC, image_HWC)
    assert decoded_HWC.flags.writeable
    assert decoded_HWC.flags.c_contiguous


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_mask_round_trip_is_within_half_a_step(height: int, width: int, seed: int) -> None:
    mask_HW = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    decoded_HW = images.decode_mask(images.encode_mask(mask_HW))
    assert decoded_HW.dtype == np.float32
    np.testing.assert_allclose(decoded_HW, mask_HW, atol=0.5 / 255 + 1e-6)


def test_hard_masks_stay_hard() -> None:
    mask_HW = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    np.testing.assert_array_equal(images.decode_mask(images.encode_mask(mask_HW)), mask_HW)


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan), np.full((2, 2), 1.01), np.full((2, 2), -0.01), np.ones(4)])
def test_a_bad_mask_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mask"):
        images.encode_mask(bad)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(gradient()), kind, **options)), gradient())


def test_grey_and_bilevel() -> None:
    grey = gradient()[..., 0]
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, axis=2))
    bilevel = Image.fromarray(grey).convert("1")
    assert set(np.unique(images.decode(encoded(bilevel)))) == {0, 255}


def test_palette() -> None:
    palette = Image.fromarray(gradient()).quantize(256)
    np.testing.assert_array_equal(images.decode(encoded(palette)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_clipped(channels: int) -> None:
    values_HWC = np.linspace(0, 65535, 64 * channels).reshape(8, 8, channels).astype(np.uint16)
    error = np.abs(images.decode(png16(values_HWC)) - values_HWC / 257)
    assert error.max() <= (0.5 if channels == 1 else 1.0)  # Pillow itself cuts colour to 8 bits


def test_float_tiff() -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert images.decode(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(RowReject, match="finite"):
        images.decode(encoded(Image.fromarray(values * np.nan), "TIFF"))


def test_alpha_lies_over_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    np.testing.assert_allclose(images.decode(encoded(Image.fromarray(rgba)))[0, :, 0], [255, 127, 0], atol=1)
    grey_alpha = Image.fromarray(rgba).convert("LA")
    np.testing.assert_allclose(images.decode(encoded(grey_alpha))[0, :, 0], [255, 127, 0], atol=1)


def test_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    assert images.decode(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_a_phones_multi_picture_jpeg() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(images.decode(data)[8, 8], [255, 0, 0], atol=6)


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded_HWC = images.decode(encoded(red, "JPEG", quality=95))
    np.testing.assert_allclose(decoded_HWC[8, 8], [255, 0, 0], atol=6)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(images.decode(data)[4, 4], [255, 0, 0], atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int) -> None:
    upright = Image.fromarray(gradient())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(images.decode(encoded(stored, exif=exif)), gradient())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_image_is_rejected(kind: str, rng: np.random.Generator) -> None:
    data = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(RowReject) as caught:
        images.decode(data[: len(data) // 2])
    assert caught.value.reason is Reason.IMAGE_UNDECODABLE


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\x00", b"P6\n"]),
)
def test_noise_is_rejected_and_nothing_else_happens(data: bytes, start: bytes) -> None:
    with suppress(RowReject):
        assert images.decode(start + data, max_pixels=1_000_000).dtype == np.uint8


def test_too_many_pixels_are_refused_before_decoding() -> None:
    data = encoded(Image.new("L", (100, 50)))
    assert images.decode(data, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(RowReject, match="100 x 50") as caught:
        images.decode(data, max_pixels=4999)
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE


def test_a_bomb_is_too_large() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(RowReject) as caught:
        images.decode(data)
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE


def test_postscript_is_not_an_image() -> None:
    with pytest.raises(RowReject, match="known format"):
        images.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_resize() -> None:
    image_HWC = gradient()
    assert images.resize(image_HWC, (6, 9)).shape == (6, 9, 3)
    np.testing.assert_array_equal(images.resize(image_HWC, image_HWC.shape[:2]), image_HWC)
    flat = np.full((40, 30, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(images.resize(flat, (7, 50)), np.full((7, 50, 3), 77))
    with pytest.raises(ValueError, match="0 x 3"):
        images.resize(image_HWC, (0, 3))


def test_thumbnail() -> None:
    wide = images.decode(images.thumbnail_jpeg(np.zeros((50, 200, 3), dtype=np.uint8), 64))
    assert wide.shape == (16, 64, 3)
    small = images.decode(images.thumbnail_jpeg(np.zeros((5, 20, 3), dtype=np.uint8), 64))
    assert small.shape == (5, 20, 3)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        images.encode_png(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="float32"):
        images.encode_png(np.zeros((4, 4, 3), dtype=np.float32))
