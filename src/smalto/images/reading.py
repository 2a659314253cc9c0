"""Reading one image file. No torch here: reader workers import this file and nothing heavier."""

from __future__ import annotations

import errno
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal, NamedTuple

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from smalto.images.archives import OF_THE_FILE, open_file, take_read_error
from smalto.images.image_file import NOT_AN_IMAGE, UNREADABLE, ImageFile
from smalto.images.image_formats import FORMAT_NAMES, HEAD_BYTES, pillow_formats, suffix_of
from smalto.images.pillow_plugins import check_jxl_size

LONGER_SIDE = 768
DeepGray = Literal["full", "range"]

PERMISSION_DENIED = f"{UNREADABLE}: {os.strerror(errno.EACCES).lower()}"
_ORIENTATION = 0x0112  # of EXIF
_DARK = 1 / 16  # an image that stays below this share of white: 12 of 16 bits, or fewer


class BadImage(Exception):
    """One file cannot be read; the message is the reason."""


class UnreadableImage(BadImage):
    """One file cannot be read now: an error of the drive, the network or the memory.

    The image itself may be fine, so this is never recorded as a verdict.
    """


class ReadImage(NamedTuple):
    """An image as it was read.

    Attributes:
        image: upright, RGB, at the size that was asked for.
        width, height: of the whole image, upright, before it was resized.
        note: what a user should know about its brightness; usually empty.
    """

    image: Image.Image
    width: int
    height: int
    note: str


def read_image(
    image: str | ImageFile,
    longer_side: int | None = LONGER_SIDE,
    deep_gray: DeepGray = "full",
) -> numpy.ndarray:
    """Read one file for viewing: upright, RGB, alpha over white, the first frame.

    Args:
        image: an image file, by its path or as ``find_images`` returns it.
        longer_side: larger images are reduced to this many pixels on their longer side; None keeps
            the size.
        deep_gray: how 16-bit, 32-bit and float gray becomes 8-bit gray. ``"full"`` maps the whole
            range of the type to black and white, ``"range"`` the image's own minimum and maximum.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadImage: not an image, empty, truncated, corrupt, over Pillow's limit of pixels, or of a
            format that the installed packages do not read.
        UnreadableImage: the system cannot read the file now.
    """
    return read_image_with_note(image, longer_side, deep_gray)[0]


def read_image_with_note(
    image: str | ImageFile,
    longer_side: int | None = LONGER_SIDE,
    deep_gray: DeepGray = "full",
) -> tuple[numpy.ndarray, str]:
    """Read one file as ``read_image`` does; return its pixels and the note of ``ReadImage``.

    Raises:
        BadImage: see ``read_image``.
    """
    file = image if isinstance(image, ImageFile) else ImageFile(image, image)
    with bad_image_errors(), open_file(file) as stream:
        read = read_stream(
            stream,
            lambda width, height: reduced(width, height, longer_side),
            suffix=suffix_of(file.file_name),
            deep_gray=deep_gray,
        )
        return numpy.asarray(read.image), read.note


def read_stream(
    stream: BinaryIO,
    wanted: Callable[[int, int], tuple[int, int]],
    *,
    suffix: str = "",
    deep_gray: DeepGray = "full",
) -> ReadImage:
    """Read a file, upright and RGB, at a size that follows from its own.

    Args:
        stream: the file's bytes.
        wanted: maps (width, height) of the whole image to the (width, height) to resize it to. It
            must treat both sides alike, because JPEG files are read at a half, quarter or eighth of
            their size if that suffices, before they are turned upright.
        suffix: of the file name; only TGA needs it, which has no magic bytes.
        deep_gray: see ``read_image``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _opened(stream, suffix) as image:
            width, height = image.size
            is_jpeg = isinstance(image, JpegImageFile)
            if is_jpeg:
                image.draft("RGB", wanted(width, height))  # never below the wanted size
            deep_color = _is_deep_color(image)
            image.load()
            if not is_jpeg:  # icons, HEIC: the size in the header may be wrong
                width, height = image.size
            upright, is_turned = _turned_upright(image)
            if is_turned:
                width, height = height, width
            colors, note = _to_rgb(upright, deep_gray)
            size = wanted(width, height)
    if deep_color:
        note = _deep_color_note(colors)
    # The shorter side of a thin strip may be enlarged to a huge image.
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    if colors.size != size:
        colors = colors.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return ReadImage(colors, width, height, note)


@contextmanager
def bad_image_errors() -> Iterator[None]:
    """Turn every exception inside the block into a BadImage with a reason.

    Errors of the system, which have an ``errno``, become an UnreadableImage, also if a library has
    turned them into its own. Decoders raise OSError without one.
    """
    take_read_error()
    try:
        yield
    except UnreadableImage:
        raise
    except BadImage:
        if (error := take_read_error()) is not None:
            raise UnreadableImage(f"{UNREADABLE}: {(error.strerror or '').lower()}") from None
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"oversized: more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels") from None
    except MemoryError:
        raise UnreadableImage(f"{UNREADABLE}: not enough memory") from None
    except Exception as raised:  # on a damaged file, anything from struct.error to SyntaxError
        cause: Exception = take_read_error() or raised
        if isinstance(cause, OSError) and cause.errno not in (None, *OF_THE_FILE):
            reason = (cause.strerror or type(cause).__name__).lower()
            raise UnreadableImage(f"{UNREADABLE}: {reason}") from None
        if isinstance(raised, UnidentifiedImageError):
            raise BadImage(NOT_AN_IMAGE) from None
        message = " ".join(str(raised).split())[:120] or type(raised).__name__
        raise BadImage(f"damaged: {message}") from None


def reduced(width: int, height: int, longer_side: int | None) -> tuple[int, int]:
    """Return the size of an image whose longer side is reduced to ``longer_side`` if larger."""
    if not longer_side or max(width, height) <= longer_side:
        return width, height
    scale = longer_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _opened(stream: BinaryIO, suffix: str) -> Image.Image:
    """Open an image in one of the formats that smalto reads; its bytes override its suffix."""
    head = stream.read(HEAD_BYTES)
    formats, reason = pillow_formats(head, suffix)
    if reason:
        raise BadImage(reason)
    try:
        if formats == ("JXL",):
            check_jxl_size(stream)
        stream.seek(0)
        return Image.open(stream, formats=formats)
    except (UnidentifiedImageError, RuntimeError):  # the latter asks to rebuild libjxl
        if len(formats) > 1:
            raise
        raise BadImage(f"damaged: invalid {FORMAT_NAMES[formats[0]]} data") from None


def _turned_upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Apply the EXIF orientation; return the image, and whether its sides changed places.

    The pixels of a JPEG XL file are upright already (ISO/IEC 18181-1), whatever its EXIF says. Only
    those of a JPEG file that is packed in one are not.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return image, False
    is_sideways = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return ImageOps.exif_transpose(image), is_sideways


def _to_rgb(image: Image.Image, deep_gray: DeepGray) -> tuple[Image.Image, str]:
    """Return an RGB image, and a note on deep gray."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_gray(image, deep_gray)
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(white, colors).convert("RGB"), ""
    return image.convert("RGB"), ""


def _from_deep_gray(image: Image.Image, deep_gray: DeepGray) -> tuple[Image.Image, str]:
    """Map integers of more than 8 bits, and floats, to 8 bits; return the image and a note.

    ``"full"`` maps floats up to 1 as shares of white. ``"range"`` falls back to it for an image of
    one value.
    """
    values = numpy.asarray(image, dtype=numpy.float64)
    finite = values[numpy.isfinite(values)]
    low = float(finite.min(initial=math.inf)) if finite.size else 0.0
    top = float(finite.max(initial=-math.inf)) if finite.size else 0.0
    if deep_gray == "range" and low < top:
        black, white, note = low, top, ""
    else:
        black = 0.0
        white = 65535.0 if image.mode != "F" or top > 255 else (255.0 if top > 1 else 1.0)
        note = _deep_gray_note(image.mode, low, top, white)
    values = numpy.where(numpy.isfinite(values), values, black)
    gray = numpy.clip(numpy.rint((values - black) * (255 / (white - black))), 0, 255)
    return Image.fromarray(gray.astype(numpy.uint8)).convert("RGB"), note


def _deep_gray_note(mode: str, low: float, top: float, white: float) -> str:
    """Return what is lost if black is 0 and white is ``white``; empty if nothing."""
    kind = {"I": "integer", "F": "float"}.get(mode, "16-bit")
    losses = []
    if 0 < top < white * _DARK:
        losses.append(f"uses values up to {_number(top)} of {_number(white)} and comes out dark")
    if top > white:
        losses.append(f"uses values up to {_number(top)} and is white above {_number(white)}")
    if low < -white / 255:  # at least one of the 256 levels
        losses.append(f"uses values from {_number(low)} and is black below 0")
    if not losses:
        return ""
    return f'{kind} image {", ".join(losses)}; scale by range with deep_gray = "range"'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def _is_deep_color(image: Image.Image) -> bool:
    """Return whether an image that is not loaded yet has 16 bits in each of several channels."""
    return image.mode in ("RGB", "RGBA", "LA") and any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", None) or ()
    )


def _deep_color_note(image: Image.Image) -> str:
    """Return a note on 16-bit color, of which Pillow keeps the upper 8 bits; usually empty."""
    top = int(numpy.asarray(image).max())
    if top >= 256 * _DARK:
        return ""
    return (
        f"16-bit color image uses values up to at most {top * 256 + 255:,} of 65,535 and comes out "
        "dark; convert it to 8 bits per channel"
    )
