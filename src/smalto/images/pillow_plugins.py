"""Pillow plugins from optional packages: HEIC (pillow-heif) and JPEG XL (pillow-jxl-plugin).

They are imported here alone, when the first file of their format is read. Worker processes are
spawned without them and register them in the same way.
"""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from typing import Any, BinaryIO

from PIL import Image

_MODULES = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}

_JXL_CODESTREAM = b"\xff\x0a"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def is_installed(format: str) -> bool:
    """Return whether the plugin that a format needs is installed, without importing it."""
    return format not in _MODULES or find_spec(_MODULES[format]) is not None


@functools.cache
def register(format: str) -> bool:
    """Register the Pillow plugin that a format needs; return False if it cannot be imported."""
    if format not in _MODULES:
        return True
    try:
        module: Any = importlib.import_module(_MODULES[format])
    except ImportError:
        return False
    # Processes decode images in parallel, so each needs one thread.
    if format == "HEIF":
        module.register_heif_opener(thumbnails=False, decode_threads=1)
    else:
        module.JpegXLImagePlugin.DECODE_THREADS = 0
    return True


def check_jxl_size(stream: BinaryIO) -> None:
    """Apply Pillow's limit of pixels to a JPEG XL file before the plugin opens it.

    The plugin decodes all pixels on opening, before Pillow checks the size.

    Raises:
        Image.DecompressionBombError: the image has more than ``Image.MAX_IMAGE_PIXELS`` pixels.
        ValueError: the file has no image header.
    """
    width, height = _jxl_size(_jxl_header(stream))
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _jxl_header(stream: BinaryIO) -> bytes:
    """Return the first bytes of the codestream, out of its container if it has one."""
    stream.seek(0)
    head = stream.read(16)
    start = 0
    while not head.startswith(_JXL_CODESTREAM):
        size, kind, content = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:  # the size follows in 64 bits
            size, content = int.from_bytes(head[8:16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            stream.seek(start + content + (4 if kind == b"jxlp" else 0))
            return stream.read(16)
        if size < content or len(head) < 8:
            raise ValueError("invalid JPEG XL data")
        start += size
        stream.seek(start)
        head = stream.read(16)
    return head


def _jxl_size(header: bytes) -> tuple[int, int]:
    """Return width and height from a codestream's SizeHeader (ISO/IEC 18181-1, section D.2)."""
    if not header.startswith(_JXL_CODESTREAM):
        raise ValueError("invalid JPEG XL data")
    bits = int.from_bytes(header[2:], "little")

    def take(number: int) -> int:
        nonlocal bits
        value = bits & ((1 << number) - 1)
        bits >>= number
        return value

    def side(small: int) -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    height = side(small)
    ratio = take(3)
    if not ratio:
        return side(small), height
    across, down = _JXL_RATIOS[ratio - 1]
    return height * across // down, height
