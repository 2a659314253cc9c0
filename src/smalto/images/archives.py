"""Files in folders, and images inside zip, tar and parquet files, named and opened alike.

No torch here.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import tarfile
import threading
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO

from smalto.core.errors import MissingExtra
from smalto.core.files import parse_json
from smalto.images import parquet
from smalto.images.image_file import UNREADABLE, ImageFile, Skipped, folder_label

ARCHIVES = (".zip", ".tar", ".parquet")
LARGEST_MEMBER = 2**30  # bytes, unpacked: larger than any image, smaller than a bomb
_LARGEST_LABEL = 1024  # bytes
_LARGEST_JSON = 2**20  # bytes
# Errors of the system that a damaged file causes: a position in it before or beyond all bytes.
OF_THE_FILE = (errno.EINVAL, errno.EOVERFLOW)
_BUFFER = 2**18  # bytes
_JSON_LABELS = ("label", "cls", "class", "class_id", "category")


class _WatchedFile(io.RawIOBase):
    """File that remembers an error of the system: zipfile and Pillow report it as damage."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def readinto(self, buffer: Any) -> int:
        with _remembered():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _remembered():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


_hidden = threading.local()  # error: the last one of the system in this thread


@contextmanager
def _remembered() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            _hidden.error = error
        raise


def take_read_error() -> OSError | None:
    """Return the last error of the system in this thread, and forget it.

    Its ``errno`` tells whether a file that looks damaged could not be read.
    """
    error: OSError | None = getattr(_hidden, "error", None)
    _hidden.error = None
    return error


def _watched(path: str) -> BinaryIO:
    """Open a file so that ``take_read_error`` sees errors of the system."""
    with _remembered():
        return io.BufferedReader(_WatchedFile(open(path, "rb")), _BUFFER)


def is_archive(path: str) -> bool:
    """Return whether a path has the suffix of a zip, tar or parquet file."""
    return path.lower().endswith(ARCHIVES)


def members(archive: ImageFile) -> Iterator[ImageFile | Skipped]:
    """Yield the files inside an archive, named under ``archive.name``, without unpacking it.

    Links and encrypted members are skipped; hidden ones are ignored. If several members share a
    name, the last one counts, as in unpacking.

    Raises:
        MissingExtra: pyarrow, which parquet files need, is not installed.
    """
    prefix = f"{archive.name}/" if archive.name else ""
    take_read_error()
    try:
        found = {
            member.name or member.member: (member, reason)
            for member, reason in _MEMBERS[_suffix(archive.path)](archive)
        }
        for member, reason in found.values():
            name = prefix + (member.name or member.member)
            parts = PurePosixPath(member.member).parts
            if any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts):
                continue
            if reason or member.size > LARGEST_MEMBER:
                yield Skipped(name, reason or f"oversized: {member.size:,} bytes")
            else:
                label = member.label or folder_label(member.member) or folder_label(archive.name)
                yield member._replace(name=name, label=label, modified=archive.modified)
    except MissingExtra:
        raise
    except parquet.NoImageColumn as error:
        yield Skipped(archive.name or archive.path, f"no image column: {error}")
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,  # from zipfile, on unknown compression methods
    ) as error:
        hidden = take_read_error()
        is_of_the_system = isinstance(error, OSError) and error.errno not in (None, *OF_THE_FILE)
        kind = UNREADABLE if is_of_the_system or hidden else "damaged"
        yield Skipped(archive.name or archive.path, f"{kind} archive: {error}")


def open_file(file: ImageFile) -> BinaryIO:
    """Open a file wherever it is; a member of an archive is read into memory."""
    if not file.member:
        return _watched(file.path)
    if file.row_group >= 0:
        return io.BytesIO(
            parquet.read_cell(file.path, file.row_group, file.member, file.offset, file.element)
        )
    if _suffix(file.path) == ".zip":
        try:
            with _open_zip(file.path).open(file.member) as inside:
                return io.BytesIO(inside.read(LARGEST_MEMBER))
        except (OSError, zipfile.BadZipFile):  # a drive that was away leaves files that always fail
            _opened.cache_clear()
            raise
    with _watched(file.path) as archive:
        archive.seek(file.offset)
        return io.BytesIO(archive.read(file.size))


def _zip_members(archive: ImageFile) -> Iterator[tuple[ImageFile, str]]:
    for info in _open_zip(archive.path).infolist():
        if not info.is_dir():
            reason = "encrypted" if info.flag_bits & 1 else ""
            yield ImageFile("", archive.path, info.filename, 0, info.file_size), reason


def _tar_members(archive: ImageFile) -> Iterator[tuple[ImageFile, str]]:
    """Yield the members of a tar without compression, with labels as in WebDataset shards."""
    cls_labels: dict[str, str] = {}
    json_labels: dict[str, str] = {}
    found = []
    with _watched(archive.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if info.isdir():
                continue
            plain = info.isreg() and not info.issparse()
            if plain and info.name.endswith(".cls") and info.size <= _LARGEST_LABEL:
                text = _content(tar.extractfile(info)).decode("utf-8", "replace")
                cls_labels[_key(info.name)] = text.strip()
            elif plain and info.name.endswith(".json") and info.size <= _LARGEST_JSON:
                json_labels[_key(info.name)] = _json_label(_content(tar.extractfile(info)))
            member = ImageFile("", archive.path, info.name, info.offset_data, info.size)
            found.append((member, "" if plain else "not a file"))
    for member, reason in found:
        key = _key(member.member)
        yield member._replace(label=cls_labels.get(key) or json_labels.get(key, "")), reason


def _content(member: IO[bytes] | None) -> bytes:
    if member is None:
        return b""
    with member:
        return member.read()


def _json_label(data: bytes) -> str:
    """Return the label in a JSON object, as text; empty if it has none."""
    try:
        sample = parse_json(data)
    except ValueError:
        return ""
    if not isinstance(sample, dict):
        return ""
    for key in _JSON_LABELS:
        value = sample.get(key)
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            text = str(value).strip()
            if text and len(text) <= _LARGEST_LABEL:
                return text
    return ""


def _key(name: str) -> str:
    """Return what the files of one WebDataset sample share: the name up to the first dot."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.')[0]}"


def _parquet_members(archive: ImageFile) -> Iterator[tuple[ImageFile, str]]:
    for cell in parquet.cells(archive.path):
        name = f"{cell.number:08d}" + (f"/{cell.element}" if cell.element >= 0 else "")
        file = ImageFile(
            name,
            archive.path,
            member=cell.column,
            offset=cell.row,
            row_group=cell.row_group,
            label=cell.label,
            element=cell.element,
        )
        yield file, ""


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


_MEMBERS = {".zip": _zip_members, ".tar": _tar_members, ".parquet": _parquet_members}


def _open_zip(path: str) -> zipfile.ZipFile:
    status = os.stat(path)
    return _opened(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _opened(path: str, modified: int, size: int) -> zipfile.ZipFile:
    """Open a zip once per process: its directory takes longer to read than an image."""
    file = _watched(path)
    try:
        archive = zipfile.ZipFile(file)
    except BaseException:
        file.close()
        raise
    weakref.finalize(archive, file.close)
    return archive
