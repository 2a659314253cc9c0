"""Finding picture files and decoding one. No torch here: decoding workers import this file and nothing heavier."""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from smalto.data.archives import PictureFile, Skipped, is_archive, members, open_file
from smalto.errors import DataError
from smalto.files import name_hash

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LONGER_SIDE = 768
HELD_OUT_SHARE = 0.1
MIN_PICTURES_TO_HOLD_OUT = 4


class BadPicture(Exception):
    """One file cannot be decoded; the message is the reason."""


def find_pictures(source: str | Path) -> tuple[list[PictureFile], list[Skipped]]:
    """All files below a folder (or the one file named) that may be pictures, sorted by name, and those that cannot be.

    Folders are followed through links, each once. Zip and tar archives count as folders, shards of WebDataset too; nothing is unpacked.
    Files and folders whose names begin with a dot are passed over.

    Raises:
        DataError: there is no such file or folder, or nothing in it looks like a picture.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of pictures, or a zip or tar of them.")
    found: list[PictureFile] = []
    skipped: list[Skipped] = []
    for file in _files(source, skipped):
        reason = _not_a_picture(file)
        if reason:
            skipped.append(Skipped(file.name, reason))
        else:
            found.append(file if file.member else file._replace(size=os.path.getsize(file.path)))
    if not found:
        raise DataError(f"{source} holds no picture (PNG, JPEG, WebP, GIF, BMP or TIFF). {summary(skipped) or 'It is empty.'}")
    return sorted(found), sorted(skipped)


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = picture if isinstance(picture, PictureFile) else PictureFile(picture, picture)
            with open_file(file) as stream, Image.open(stream, formats=FORMATS) as image:
                if longer_side:
                    image.draft("RGB", _reduced_size(image, longer_side))  # JPEG: a half, quarter or eighth at once, not below this
                image.load()
                return numpy.asarray(_reduce(_to_rgb(ImageOps.exif_transpose(image)), longer_side))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"oversized: more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels") from None
    except UnidentifiedImageError:
        raise BadPicture("not an image") from None
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


def _files(source: Path, skipped: list[Skipped]) -> Iterator[PictureFile]:
    """The files below a folder or inside an archive, or the one file."""
    if not source.is_dir():
        file = PictureFile(source.name, str(source))
        yield from members(file._replace(name=""), skipped) if is_archive(file.path) else [file]
        return
    for file in _walk(source, skipped):
        yield from members(file, skipped) if is_archive(file.path) and os.path.isfile(file.path) else [file]


def _walk(folder: Path, skipped: list[Skipped]) -> Iterator[PictureFile]:
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(os.path.relpath(error.filename, folder), f"unreadable folder: {error.strerror}"))

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder that was walked already
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            if not file.startswith("."):
                path = os.path.join(parent, file)
                yield PictureFile(os.path.relpath(path, folder).replace(os.sep, "/"), path)


def _not_a_picture(file: PictureFile) -> str:
    """Why a file cannot be a picture, judged by its kind, size and suffix; empty where it may be one."""
    if file.block >= 0:
        return ""
    if file.member:
        known = os.path.splitext(file.member)[1].lower() in SUFFIXES
        return ("" if file.size else "empty") if known else "not an image"
    try:
        status = os.stat(file.path)
    except OSError as error:
        return f"broken link: {error.strerror}" if os.path.islink(file.path) else f"unreadable: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "not a file"  # a pipe would block whoever opens it
    if not status.st_size:
        return "empty"
    suffix = os.path.splitext(file.path)[1].lower()
    if file.path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return "compressed tar: unpack it, or write it as a plain .tar"
    return "" if suffix in SUFFIXES or (not suffix and _has_magic(file.path)) else "not an image"


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


def _reduce(image: Image.Image, longer_side: int | None) -> Image.Image:
    if not longer_side or max(image.size) <= longer_side:
        return image
    return image.resize(_reduced_size(image, longer_side), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _reduced_size(image: Image.Image, longer_side: int) -> tuple[int, int]:
    scale = longer_side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))
