"""This module recognises a file by its first bytes: an image that can be decoded, another image, or no image.

The signatures are those of the formats' specifications; `HEAD` bytes are enough for all of them.
"""

from __future__ import annotations

HEAD = 32
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "Photoshop",
}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes that the header of a bitmap can have
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# Formats that `images.decode` does not take.
UNREADABLE = ("HEIC", "JPEG XL", "Photoshop")


def image_format(head: bytes) -> str | None:
    """Return the format of the image that begins with these bytes, by its usual name; None if it is no image."""
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIC" if brand in _HEIF else None
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3] in (b" ", b"\t", b"\n", b"\r", b"#"):
        return "PPM"
    return None
