"""Reading one image file. No torch here: decoding workers import this file and nothing heavier."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from smalto.images.archives import open_file
from smalto.images.image_file import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LONGER_SIDE = 768
NOT_AN_IMAGE = "not an image"  # the reason of files that nobody would take for an image
_ORIENTATION = 0x0112  # of EXIF


class BadImage(Exception):
    """One file cannot be decoded; the message is the reason."""


def read_image(image: str | ImageFile, longer_side: int | None = LONGER_SIDE) -> numpy.ndarray:
    """Decode one file as it should be looked at: upright, RGB, alpha over white, the first frame.

    Args:
        image: a PNG, JPEG, WebP, GIF, BMP or TIFF file, by its path or as ``find_images`` found it.
        longer_side: larger images are reduced to this many pixels on their longer side; None keeps the size.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadImage: not an image, empty, truncated, corrupt, or over Pillow's limit of pixels.
    """
    file = image if isinstance(image, ImageFile) else ImageFile(image, image)
    with bad_image_errors(), open_file(file) as stream:
        return numpy.asarray(
            decode(stream, lambda width, height: reduced(width, height, longer_side))[0]
        )


def decode(
    stream: BinaryIO, wanted: Callable[[int, int], tuple[int, int]]
) -> tuple[Image.Image, int, int]:
    """Decode a file, upright and RGB, at a size that follows from its own.

    Args:
        stream: the file's bytes.
        wanted: (width, height) of the whole image -> (width, height) to bring it to. It must treat both sides alike, since JPEG files
            are read at a half, quarter or eighth of their size where that suffices, before they are turned upright.

    Returns:
        The image, and the width and height that it had.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            image.draft(
                "RGB", wanted(width, height)
            )  # JPEG: a half, quarter or eighth at once, not below this
            image.load()
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):  # lies on its side
                width, height = height, width
            colors, size = _to_rgb(ImageOps.exif_transpose(image)), wanted(width, height)
    if size[0] * size[1] > (
        Image.MAX_IMAGE_PIXELS or math.inf
    ):  # a thin strip whose shorter side is brought to a size
        raise Image.DecompressionBombError
    if colors.size != size:
        colors = colors.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return colors, width, height


@contextmanager
def bad_image_errors() -> Iterator[None]:
    """Whatever goes wrong inside is a BadImage with a reason."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"oversized: more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels") from None
    except UnidentifiedImageError:
        raise BadImage(NOT_AN_IMAGE) from None
    except PermissionError:
        raise BadImage("unreadable: permission denied") from None
    except MemoryError:
        raise BadImage("too large for the memory") from None
    except (
        Exception
    ) as error:  # decoders raise anything from struct.error to SyntaxError on a damaged file
        raise BadImage(
            f"damaged: {' '.join(str(error).split())[:120] or type(error).__name__}"
        ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit whole numbers and floats to 8 bits. Floats up to 1 count as shares of white."""
    values = numpy.asarray(image, dtype=numpy.float64)
    values = numpy.where(numpy.isfinite(values), values, 0)
    top = values.max(initial=0)
    white = 65535.0 if image.mode != "F" or top > 255 else (255.0 if top > 1 else 1.0)
    return Image.fromarray(
        numpy.clip(numpy.rint(values * (255 / white)), 0, 255).astype(numpy.uint8)
    ).convert("RGB")


def reduced(width: int, height: int, longer_side: int | None) -> tuple[int, int]:
    """The size of an image whose longer side is ``longer_side`` at most."""
    if not longer_side or max(width, height) <= longer_side:
        return width, height
    scale = longer_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
