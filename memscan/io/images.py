"""This module handles images and masks. It is the only place where bytes become pixels and pixels become bytes.

Images are uint8 arrays image_HWC in RGB; masks are float32 arrays mask_HW in [0, 1], 1 = foreground. Bytes from outside
are bounded before they are decoded: only raster formats, no more pixels than allowed, and what is truncated or damaged
rejects its row. Colour profiles are not applied.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from memscan.errors import Reason, RowReject
from memscan.io import storage
from memscan.io.content import HEAD, UNREADABLE, image_format

Uint8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20  # of an encoded image: 64 million pixels of 16-bit RGB take 384 MB before compression

# Raster formats only: Pillow also opens EPS, for which it starts Ghostscript. JPEG includes MPO, as phones write it.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_WHITE = (255, 255, 255, 255)
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_ORIENTATION = 0x0112  # EXIF 2.32, table 4
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Uint8Array:
    """Decode an image as a viewer would show it on a white page.

    EXIF rotation is applied; greyscale, palette, CMYK and 16-bit images become 8-bit RGB; transparency is laid over
    white; of an animation the first frame is taken, and no other is decoded.

    Args:
        data: the encoded image (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF).
        max_pixels: images with more pixels are refused before they are decoded.

    Returns:
        image_HWC uint8, three channels, contiguous and writable.

    Raises:
        RowReject: IMAGE_TOO_LARGE (more pixels, or more than `MAX_BYTES` bytes), or IMAGE_UNDECODABLE for what is no
            image, damaged or truncated.
    """
    return np.array(_load(data, max_pixels, _to_rgb), dtype=np.uint8)


def read_image(path: str) -> bytes:
    """Return the bytes of an image file, local or s3://; its size is checked before it is read.

    Raises:
        RowReject: IMAGE_TOO_LARGE, more than `MAX_BYTES`.
        InputError: it is missing or cannot be read.
    """
    _check_bytes(storage.file_size(path))
    return storage.read_bytes(path)


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise RowReject(Reason.IMAGE_TOO_LARGE, f"{size} bytes, at most {MAX_BYTES}")


def encode_png(image_HWC: Uint8Array) -> bytes:
    """Return a lossless PNG of an RGB image. Raises ValueError for another shape or dtype."""
    return _png(Image.fromarray(_checked(image_HWC)))


def encode_mask(mask_HW: npt.NDArray[np.floating]) -> bytes:
    """Return an 8-bit greyscale PNG of a mask, white = foreground. Raises ValueError unless it is 2-D and in [0, 1]."""
    if mask_HW.ndim != 2 or mask_HW.size == 0:
        raise ValueError(f"a mask has two dimensions, not shape {mask_HW.shape}")
    if not (np.min(mask_HW) >= 0 and np.max(mask_HW) <= 1):  # also false for NaN
        raise ValueError("a mask's values lie in [0, 1]")
    return _png(Image.fromarray(np.rint(np.asarray(mask_HW, dtype=np.float64) * 255).astype(np.uint8)))


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> FloatArray:
    """Return mask_HW float32 in [0, 1] of an encoded greyscale image. Raises RowReject as `decode` does."""
    return np.asarray(_load(data, max_pixels, _to_grey), dtype=np.float32) / np.float32(255)


def resize(image_HWC: Uint8Array, size: tuple[int, int]) -> Uint8Array:
    """Resample an RGB image to `size` = (height, width) with Lanczos; antialiased when it shrinks."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height} x {width}")
    if image_HWC.shape[:2] == (height, width):
        return _checked(image_HWC)
    image = Image.fromarray(_checked(image_HWC))
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)


def thumbnail_jpeg(image_HWC: Uint8Array, side: int) -> bytes:
    """Return a JPEG whose longer side is at most `side` pixels; a smaller image keeps its size."""
    image = Image.fromarray(_checked(image_HWC))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, optimize=True)
    return buffer.getvalue()


def _load(data: bytes, max_pixels: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """First frame, upright, converted; every failure of a decoder is the row's, not the job's."""
    _check_bytes(len(data))
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise RowReject(Reason.IMAGE_TOO_LARGE, f"{image.width} x {image.height} pixels, at most {max_pixels}")
        image.load()
        return convert(_upright(image))
    except (RowReject, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise RowReject(Reason.IMAGE_TOO_LARGE, str(error)) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        plain = without_metadata(data)
        if plain is not None:
            return _load(plain, max_pixels, convert)
        raise RowReject(Reason.IMAGE_UNDECODABLE, _describe(error, data)) from error


def without_metadata(data: bytes) -> bytes | None:
    """Return a PNG with nothing but what its pixels need: None if it is no PNG, breaks off, or held nothing else.

    Text and profiles of more than 1 MiB, and ancillary chunks with a wrong checksum, make Pillow refuse an image whose
    pixels are intact. PNG (ISO/IEC 15948), section 5: a decoder may leave out any ancillary chunk.
    """
    if not data.startswith(_PNG):
        return None
    kept, at, left_out = [_PNG], len(_PNG), False
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            return None
        whole = kind == b"eXIf" and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if kind in _PIXEL_CHUNKS or whole:
            kept.append(data[at:end])
        else:
            left_out = True
        at = end
        if kind == b"IEND":
            return b"".join(kept) if left_out else None
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Return the image as its EXIF orientation says. Where that cannot be read, as it stands: the pixels are whole.

    `ImageOps.exif_transpose` writes the other tags again, and fails on those that no standard knows.
    """
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # struct.error, SyntaxError, ValueError, TypeError, OSError ...: whatever its parser meets
        turn = None
    return image if turn is None else image.transpose(turn)


def _describe(error: Exception, data: bytes) -> str:
    if not data:
        return "no bytes"
    if (name := image_format(data[:HEAD])) in UNREADABLE:
        return f"a {name} image, which is not decoded here; convert it to PNG or JPEG"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({len(data)} bytes)"
    return f"{type(error).__name__}: {error}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_deep_to_uint8(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" else _to_rgb(image).convert("L")


def _deep_to_uint8(image: Image.Image) -> Uint8Array:
    """Greyscale of more than 8 bits by the range that its values say; Pillow would only clip.

    16-bit images have 65,535 as white, and floats within [0, 1] have 1. 32-bit integers, and other floats, have 255
    where the largest is from 16 to 255, and integers 65,535 where it is above that. All else has no known range.
    """
    deep_HW = np.asarray(image, dtype=np.float64)
    if not np.isfinite(deep_HW).all():
        raise RowReject(Reason.IMAGE_UNDECODABLE, "it has pixels that are not finite")
    white = 65535.0 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else _white_of(image, deep_HW)
    return np.rint(np.clip(deep_HW * (255.0 / white), 0, 255)).astype(np.uint8)


def _white_of(image: Image.Image, deep_HW: npt.NDArray[np.float64]) -> float:
    """Return the value that is white. Raises RowReject if nothing says which it is."""
    least, most = float(deep_HW.min()), float(deep_HW.max())
    floats = image.mode == "F"
    if least >= 0:
        if floats and most <= 1:
            return 1.0
        if 16 <= most <= 255 or (most == 0 and not floats):
            return 255.0
        if not floats and 255 < most <= 65535:
            return 65535.0
    kind = "floating-point" if floats else "32-bit"
    message = (
        f"{kind} pixels from {least:g} to {most:g}: which value is white is not known; convert them to 8 or 16 bits"
    )
    raise RowReject(Reason.IMAGE_UNDECODABLE, message)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _checked(image_HWC: Uint8Array) -> Uint8Array:
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.size == 0:
        raise ValueError(f"an image is uint8 of shape (height, width, 3), not {image_HWC.dtype} {image_HWC.shape}")
    return np.ascontiguousarray(image_HWC)
