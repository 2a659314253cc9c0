"""JPEG and WebP at the size of an image's tokens, to compare a tokenizer with image codecs."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

CODECS = ("JPEG", "WEBP")
_SETTINGS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}}
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}
_BEST = 95


class Compressed(NamedTuple):
    """An image after a codec, uint8 [3, H, W], and the bytes of its file."""

    image: Tensor
    size: int


def compress_to_size(original: Tensor, codec: str, size: float) -> Compressed | None:
    """Compress an image uint8 [3, H, W] at the highest quality that fits into ``size`` bytes.

    If no file is that small, return the image at the lowest quality. If the image is too large for
    the codec, return None.
    """
    if max(original.shape[1:]) > _LONGEST_SIDE[codec]:
        return None
    image = Image.fromarray(original.permute(1, 2, 0).contiguous().numpy())
    low = 1
    high = _BEST
    best = _encode(image, codec, low)
    while low < high:  # files grow with quality
        middle = (low + high + 1) // 2
        file = _encode(image, codec, middle)
        if len(file) <= size:
            low, best = middle, file
        else:
            high = middle - 1
    with Image.open(io.BytesIO(best)) as decoded:
        pixels = numpy.asarray(decoded.convert("RGB"))
    return Compressed(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), len(best))


def _encode(image: Image.Image, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, quality=quality, **_SETTINGS[codec])
    return buffer.getvalue()
