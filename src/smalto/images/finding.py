"""Finding image files. No torch here: reader workers import this file and nothing heavier."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from smalto.core.errors import DataError
from smalto.core.files import named_path
from smalto.images.archives import is_archive, members
from smalto.images.image_file import (
    UNREADABLE,
    ImageFile,
    Skipped,
    folder_label,
    summary,
)
from smalto.images.image_formats import (
    HEAD_BYTES,
    READABLE,
    reason_by_head,
    reason_by_suffix,
    suffix_of,
)
from smalto.images.patience import patiently

_DEEPEST = 500
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_images(source: str | Path) -> tuple[list[ImageFile], list[Skipped]]:
    """Return everything that ``walk_images`` yields, sorted by name: images, and skipped files.

    Raises:
        DataError: the source does not exist, or contains no file that may be an image.
    """
    found: list[ImageFile] = []
    skipped: list[Skipped] = []
    for file in walk_images(source):
        if isinstance(file, ImageFile):
            found.append(file)
        else:
            skipped.append(file)
    if not found and any(file.is_unreadable for file in skipped):
        raise DataError(
            f"{source} cannot be read now. {summary(skipped)} Check its drive or network."
        )
    if not found:
        raise DataError(
            f"{source} holds no image; expected {READABLE}. {summary(skipped) or 'It is empty.'}"
        )
    return sorted(found), sorted(skipped)


def walk_images(source: str | Path) -> Iterator[ImageFile | Skipped]:
    """Yield the files below a folder (or the one file named) that may be images, and skipped files.

    Links to folders are followed, each folder once. Zip, tar and parquet files, WebDataset shards
    included, count as folders; nothing is unpacked. Files and folders whose names begin with a dot
    are ignored. The names of one folder are in memory at a time.

    Raises:
        DataError: the source does not exist.
    """
    source = named_path(source, "the source of images")
    if not source.exists():
        raise DataError(
            f"{source} does not exist. Name a folder of images, an image, or a zip, tar or parquet "
            "file of images."
        )
    files: Iterable[ImageFile | Skipped] = (
        _walk(source)
        if source.is_dir()
        else [ImageFile("" if is_archive(str(source)) else source.name, str(source))]
    )
    for file in files:
        if isinstance(file, Skipped):
            yield file
        elif is_archive(file.path) and os.path.isfile(file.path):
            yield from _walk_archive(file)
        else:
            yield _checked(file)


def modified_ns(status: os.stat_result) -> int:
    """Return when a file was last written, in ns, clamped to 64 bits (the year 2262)."""
    return max(-(2**63), min(2**63 - 1, status.st_mtime_ns))


def _walk(folder: Path) -> Iterator[ImageFile | Skipped]:
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        parent = waiting.pop()
        try:
            status = patiently(partial(os.stat, parent))
            if (status.st_dev, status.st_ino) in seen:  # a link back to a folder
                continue
            seen.add((status.st_dev, status.st_ino))
            folders, files = patiently(partial(_list, parent))
        except OSError as error:
            place = os.path.relpath(parent, folder)
            yield Skipped(place, f"{UNREADABLE} folder: {error.strerror}")
            continue
        if folders and os.path.relpath(parent, folder).count(os.sep) >= _DEEPEST:
            yield Skipped(
                os.path.relpath(parent, folder),
                f"folder nested more than {_DEEPEST} levels deep",
            )
            folders = []
        for file in files:
            path = os.path.join(parent, file)
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            yield ImageFile(name, path, label=folder_label(name))
        waiting += [os.path.join(parent, name) for name in reversed(folders)]


def _list(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and files in a folder that are not hidden, sorted."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else files).append(entry.name)
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself; ``_checked`` names it
        return False


def _walk_archive(archive: ImageFile) -> Iterator[ImageFile | Skipped]:
    try:
        status = patiently(partial(os.stat, archive.path))
    except OSError as error:
        yield Skipped(archive.name or archive.path, f"{UNREADABLE} archive: {error.strerror}")
        return
    for member in members(archive._replace(modified=modified_ns(status))):
        yield _checked(member) if isinstance(member, ImageFile) else member


def _checked(file: ImageFile) -> ImageFile | Skipped:
    """Return a file with its size and time, or why it cannot be an image.

    Files without a suffix are judged by their first bytes, others by suffix and size.
    """
    if file.row_group >= 0:
        return file
    if not file.member:
        return _checked_on_disk(file)
    reason = reason_by_suffix(suffix_of(file.member)) or ("" if file.size else "empty")
    return Skipped(file.name, reason) if reason else file


def _checked_on_disk(file: ImageFile) -> ImageFile | Skipped:
    try:
        status = patiently(partial(os.stat, file.path))
    except OSError as error:
        kind = "broken link" if os.path.islink(file.path) else UNREADABLE
        return Skipped(file.name, f"{kind}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Skipped(file.name, "not a file")  # opening a pipe would block
    if not status.st_size:
        return Skipped(file.name, "empty")
    if file.path.lower().endswith(_COMPRESSED_TARS):
        return Skipped(file.name, "compressed tar: unpack it, or write it as a plain .tar")
    suffix = suffix_of(file.path)
    try:
        reason = reason_by_suffix(suffix) if suffix else reason_by_head(_head(file.path))
    except OSError as error:
        return Skipped(file.name, f"{UNREADABLE}: {error.strerror}")
    if reason:
        return Skipped(file.name, reason)
    return file._replace(size=status.st_size, modified=modified_ns(status))


def _head(path: str) -> bytes:
    """Return the first bytes of a file."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)

    return patiently(read)
