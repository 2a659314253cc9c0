"""Finding picture files and decoding one. No torch here: decoding workers import this file and nothing heavier."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from smalto.data.archives import PictureFile, Skipped, folder_label, is_archive, members, open_file
from smalto.errors import DataError
from smalto.files import name_hash

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LONGER_SIDE = 768
NOT_AN_IMAGE = "not an image"  # the reason of files that nobody would take for a picture
HELD_OUT_SHARE = 0.1
MIN_PICTURES_TO_HOLD_OUT = 4
_ORIENTATION = 0x0112  # of EXIF


class BadPicture(Exception):
    """One file cannot be decoded; the message is the reason."""


def find_pictures(source: str | Path) -> tuple[list[PictureFile], list[Skipped]]:
    """All of ``walk_pictures``, sorted by name: what may be a picture, and what cannot be.

    Raises:
        DataError: there is no such file or folder, or nothing in it looks like a picture.
    """
    found: list[PictureFile] = []
    skipped: list[Skipped] = []
    for thing in walk_pictures(source):
        found.append(thing) if isinstance(thing, PictureFile) else skipped.append(thing)
    if not found:
        raise DataError(f"{source} holds no picture (PNG, JPEG, WebP, GIF, BMP or TIFF). {summary(skipped) or 'It is empty.'}")
    return sorted(found), sorted(skipped)


def walk_pictures(source: str | Path) -> Iterator[PictureFile | Skipped]:
    """All files below a folder (or the one file named) that may be pictures, and why others cannot be, one by one.

    Folders are followed through links, each once. Zip and tar archives count as folders, shards of WebDataset too; nothing is unpacked.
    Files and folders whose names begin with a dot are passed over. One folder's names are in memory at a time.

    Raises:
        DataError: there is no such file or folder.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of pictures, or a zip or tar of them.")
    if source.is_dir():
        things: Iterable[PictureFile | Skipped] = _walk(source)
    else:
        file = PictureFile("" if is_archive(str(source)) else source.name, str(source))
        things = [file]
    for thing in things:
        if isinstance(thing, PictureFile) and is_archive(thing.path) and os.path.isfile(thing.path):
            inside = members(thing._replace(modified=modified_ns(os.stat(thing.path))))
            yield from (_judged(member) if isinstance(member, PictureFile) else member for member in inside)
        else:
            yield _judged(thing) if isinstance(thing, PictureFile) else thing


def read_picture(picture: str | PictureFile, longer_side: int | None = LONGER_SIDE) -> numpy.ndarray:
    """Decode one file as it should be looked at: upright, RGB, alpha over white, the first frame.

    Args:
        picture: a PNG, JPEG, WebP, GIF, BMP or TIFF file, by its path or as ``find_pictures`` found it.
        longer_side: larger pictures are reduced to this many pixels on their longer side; None keeps the size.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadPicture: not a picture, empty, truncated, corrupt, or over Pillow's limit of pixels.
    """
    file = picture if isinstance(picture, PictureFile) else PictureFile(picture, picture)
    with bad_pictures_named(), open_file(file) as stream:
        return numpy.asarray(decode(stream, lambda width, height: reduced(width, height, longer_side))[0])


def decode(stream: BinaryIO, wanted: Callable[[int, int], tuple[int, int]]) -> tuple[Image.Image, int, int]:
    """Decode a file, upright and RGB, at a size that follows from its own.

    Args:
        stream: the file's bytes.
        wanted: (width, height) of the whole picture -> (width, height) to bring it to. It must treat both sides alike, since JPEG files
            are read at a half, quarter or eighth of their size where that suffices, before they are turned upright.

    Returns:
        The picture, and the width and height that it had.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            image.draft("RGB", wanted(width, height))  # JPEG: a half, quarter or eighth at once, not below this
            image.load()
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):  # lies on its side
                width, height = height, width
            colours, size = _to_rgb(ImageOps.exif_transpose(image)), wanted(width, height)
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):  # a thin strip whose shorter side is brought to a size
        raise Image.DecompressionBombError
    if colours.size != size:
        colours = colours.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return colours, width, height


@contextmanager
def bad_pictures_named() -> Iterator[None]:
    """Whatever goes wrong inside is a BadPicture with a reason."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"oversized: more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels") from None
    except UnidentifiedImageError:
        raise BadPicture(NOT_AN_IMAGE) from None
    except PermissionError:
        raise BadPicture("unreadable: permission denied") from None
    except MemoryError:
        raise BadPicture("too large for the memory") from None
    except Exception as error:  # decoders raise anything from struct.error to SyntaxError on a damaged file
        raise BadPicture(f"damaged: {' '.join(str(error).split())[:120] or type(error).__name__}") from None


def is_held_out(name: str) -> bool:
    """Whether a picture belongs to the 10 % that training never sees. It depends on the name alone."""
    return name_hash(name, "held out") < HELD_OUT_SHARE * 2**64


def held_out_order(names: list[str]) -> list[int]:
    """Positions of ``names`` in the order in which they are held out: the first are, and the next where none of them is readable."""
    return sorted(range(len(names)), key=lambda i: (name_hash(names[i], "held out"), names[i]))


def summary(skipped: list[Skipped], most: int = 8) -> str:
    """One sentence that counts and names what was left out; empty where nothing was."""
    if not skipped:
        return ""
    kinds = Counter(reason.split(":")[0] for _, reason in skipped)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    shown = "; ".join(f"{printable(name)} ({reason})" for name, reason in skipped[:most])
    more = f"; and {len(skipped) - most} more" if len(skipped) > most else ""
    return f"Skipped {len(skipped)} files ({counts}): {shown}{more}."


def printable(name: str) -> str:
    """A file name that any terminal can show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


_DEEPEST = 500


def _walk(folder: Path) -> Iterator[PictureFile | Skipped]:
    seen: set[tuple[int, int]] = set()
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        yield from _unreadable(unreadable, folder)
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder that was walked already
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if folders and os.path.relpath(parent, folder).count(os.sep) >= _DEEPEST:  # os.walk recurses, and Python's stack ends
            yield Skipped(os.path.relpath(parent, folder), f"unreadable folder: more than {_DEEPEST} folders deep")
            folders.clear()
        for file in sorted(files):
            if not file.startswith("."):
                path = os.path.join(parent, file)
                name = os.path.relpath(path, folder).replace(os.sep, "/")
                yield PictureFile(name, path, label=folder_label(name))
    yield from _unreadable(unreadable, folder)


def _unreadable(errors: list[OSError], folder: Path) -> Iterator[Skipped]:
    while errors:
        error = errors.pop()
        yield Skipped(os.path.relpath(error.filename, folder), f"unreadable folder: {error.strerror}")


def _judged(file: PictureFile) -> PictureFile | Skipped:
    """A file with its size and time, or why it cannot be a picture, judged by its kind, size and suffix."""
    if file.block >= 0:
        return file
    if file.member:
        known = os.path.splitext(file.member)[1].lower() in SUFFIXES
        return (file if file.size else Skipped(file.name, "empty")) if known else Skipped(file.name, NOT_AN_IMAGE)
    try:
        status = os.stat(file.path)
    except OSError as error:
        return Skipped(file.name, f"{'broken link' if os.path.islink(file.path) else 'unreadable'}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Skipped(file.name, "not a file")  # a pipe would block whoever opens it
    if not status.st_size:
        return Skipped(file.name, "empty")
    suffix = os.path.splitext(file.path)[1].lower()
    if file.path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return Skipped(file.name, "compressed tar: unpack it, or write it as a plain .tar")
    if suffix not in SUFFIXES and (suffix or not _has_magic(file.path)):
        return Skipped(file.name, NOT_AN_IMAGE)
    return file._replace(size=status.st_size, modified=modified_ns(status))


def modified_ns(status: os.stat_result) -> int:
    """When a file was last written, in ns; what does not fit into 64 bits (after the year 2262) as what just does."""
    return max(-(2**63), min(2**63 - 1, status.st_mtime_ns))


def _has_magic(path: str) -> bool:
    """Whether a file without a suffix begins like a picture."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    starts = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit whole numbers and floats to 8 bits. Floats up to 1 count as shares of white."""
    values = numpy.asarray(image, dtype=numpy.float64)
    values = numpy.where(numpy.isfinite(values), values, 0)
    top = values.max(initial=0)
    white = 65535.0 if image.mode != "F" or top > 255 else (255.0 if top > 1 else 1.0)
    return Image.fromarray(numpy.clip(numpy.rint(values * (255 / white)), 0, 255).astype(numpy.uint8)).convert("RGB")


def reduced(width: int, height: int, longer_side: int | None) -> tuple[int, int]:
    """The size of a picture whose longer side is ``longer_side`` at most."""
    if not longer_side or max(width, height) <= longer_side:
        return width, height
    scale = longer_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
