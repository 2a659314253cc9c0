"""Finding image files. No torch here: decoding workers import this file and nothing heavier."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from smalto.core.errors import DataError
from smalto.images.archives import is_archive, members
from smalto.images.image_file import ImageFile, Skipped, folder_label, summary
from smalto.images.reading import NOT_AN_IMAGE

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


def find_images(source: str | Path) -> tuple[list[ImageFile], list[Skipped]]:
    """All of ``walk_images``, sorted by name: what may be an image, and what cannot be.

    Raises:
        DataError: there is no such file or folder, or nothing in it looks like an image.
    """
    found: list[ImageFile] = []
    skipped: list[Skipped] = []
    for thing in walk_images(source):
        found.append(thing) if isinstance(thing, ImageFile) else skipped.append(thing)
    if not found:
        raise DataError(
            f"{source} holds no image (PNG, JPEG, WebP, GIF, BMP or TIFF). {summary(skipped) or 'It is empty.'}"
        )
    return sorted(found), sorted(skipped)


def walk_images(source: str | Path) -> Iterator[ImageFile | Skipped]:
    """All files below a folder (or the one file named) that may be images, and why others cannot be, one by one.

    Folders are followed through links, each once. Zip and tar archives count as folders, shards of WebDataset too; nothing is unpacked.
    Files and folders whose names begin with a dot are passed over. One folder's names are in memory at a time.

    Raises:
        DataError: there is no such file or folder.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(
            f"{source} does not exist: name a folder of images, or a zip or tar of them."
        )
    if source.is_dir():
        things: Iterable[ImageFile | Skipped] = _walk(source)
    else:
        file = ImageFile("" if is_archive(str(source)) else source.name, str(source))
        things = [file]
    for thing in things:
        if isinstance(thing, ImageFile) and is_archive(thing.path) and os.path.isfile(thing.path):
            inside = members(thing._replace(modified=modified_ns(os.stat(thing.path))))
            yield from (
                _checked(member) if isinstance(member, ImageFile) else member for member in inside
            )
        else:
            yield _checked(thing) if isinstance(thing, ImageFile) else thing


_DEEPEST = 500


def _walk(folder: Path) -> Iterator[ImageFile | Skipped]:
    seen: set[tuple[int, int]] = set()
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        yield from _unreadable(unreadable, folder)
        status = os.stat(parent)
        if (
            status.st_dev,
            status.st_ino,
        ) in seen:  # a link back to a folder that was walked already
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (
            folders and os.path.relpath(parent, folder).count(os.sep) >= _DEEPEST
        ):  # os.walk recurses, and Python's stack ends
            yield Skipped(
                os.path.relpath(parent, folder),
                f"unreadable folder: more than {_DEEPEST} folders deep",
            )
            folders.clear()
        for file in sorted(files):
            if not file.startswith("."):
                path = os.path.join(parent, file)
                name = os.path.relpath(path, folder).replace(os.sep, "/")
                yield ImageFile(name, path, label=folder_label(name))
    yield from _unreadable(unreadable, folder)


def _unreadable(errors: list[OSError], folder: Path) -> Iterator[Skipped]:
    while errors:
        error = errors.pop()
        yield Skipped(
            os.path.relpath(error.filename, folder), f"unreadable folder: {error.strerror}"
        )


def _checked(file: ImageFile) -> ImageFile | Skipped:
    """A file with its size and time, or why it cannot be an image, judged by its kind, size and suffix."""
    if file.row_group >= 0:
        return file
    if file.member:
        known = os.path.splitext(file.member)[1].lower() in SUFFIXES
        return (
            (file if file.size else Skipped(file.name, "empty"))
            if known
            else Skipped(file.name, NOT_AN_IMAGE)
        )
    try:
        status = os.stat(file.path)
    except OSError as error:
        return Skipped(
            file.name,
            f"{'broken link' if os.path.islink(file.path) else 'unreadable'}: {error.strerror}",
        )
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
    """Whether a file without a suffix begins like an image."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    starts = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
