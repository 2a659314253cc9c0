"""Files of a folder, and pictures inside its zip, tar and parquet files, named and opened alike. No torch here."""

from __future__ import annotations

import functools
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from smalto.data import parquet
from smalto.errors import MissingExtra

ARCHIVES = (".zip", ".tar", ".parquet")
LARGEST_MEMBER = 2**30  # bytes, unpacked: a picture is smaller, a bomb is not


class PictureFile(NamedTuple):
    """A file that may be a picture: its name relative to the folder (with ``/``), and where it is.

    ``member`` is its name inside the archive ``path``, empty for a file of its own; in a tar its bytes are at ``offset``. ``size`` is in
    bytes, 0 where it is not known. In a parquet file ``member`` is the column, ``block`` the row group and ``offset`` the row in it.
    """

    name: str
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0
    block: int = -1


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    name: str
    reason: str


def is_archive(path: str) -> bool:
    return path.lower().endswith(ARCHIVES)


def members(archive: PictureFile, skipped: list[Skipped]) -> Iterator[PictureFile]:
    """The files inside an archive, under ``archive.name``; links, encrypted and hidden ones are left out, and nothing is unpacked."""
    prefix = f"{archive.name}/" if archive.name else ""
    try:
        for member, reason in _MEMBERS[_suffix(archive.path)](archive):
            name = prefix + (member.name or member.member)
            parts = PurePosixPath(member.member).parts
            if any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts):
                continue
            if reason or member.size > LARGEST_MEMBER:
                skipped.append(Skipped(name, reason or f"oversized: {member.size:,} bytes"))
            else:
                yield member._replace(name=name)
    except MissingExtra:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, OSError, ValueError, EOFError, NotImplementedError) as error:
        skipped.append(Skipped(archive.name or archive.path, f"damaged archive: {error}"))


def open_file(file: PictureFile) -> BinaryIO:
    """The bytes of a file, wherever it is; of an archive's member all of them in memory."""
    if not file.member:
        return open(file.path, "rb")
    if file.block >= 0:
        return io.BytesIO(parquet.read_cell(file.path, file.block, file.member, file.offset))
    if _suffix(file.path) == ".zip":
        with _open_zip(file.path).open(file.member) as inside:
            return io.BytesIO(inside.read(LARGEST_MEMBER))
    with open(file.path, "rb") as archive:
        archive.seek(file.offset)
        return io.BytesIO(archive.read(file.size))


def _zip_members(archive: PictureFile) -> Iterator[tuple[PictureFile, str]]:
    for info in _open_zip(archive.path).infolist():
        if not info.is_dir():
            reason = "encrypted" if info.flag_bits & 1 else ""
            yield PictureFile("", archive.path, info.filename, 0, info.file_size), reason


def _tar_members(archive: PictureFile) -> Iterator[tuple[PictureFile, str]]:
    # Not compressed: its members are found by their place, as in the shards of WebDataset.
    with tarfile.open(archive.path, "r:") as tar:
        for info in tar:
            if not info.isdir():
                reason = "" if info.isreg() and not info.issparse() else "not a file"
                yield PictureFile("", archive.path, info.name, info.offset_data, info.size), reason


def _parquet_members(archive: PictureFile) -> Iterator[tuple[PictureFile, str]]:
    for block, row, number, column in parquet.cells(archive.path):
        yield PictureFile(f"{number:08d}", archive.path, column, row, 0, block), ""


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


_MEMBERS = {".zip": _zip_members, ".tar": _tar_members, ".parquet": _parquet_members}


def _open_zip(path: str) -> zipfile.ZipFile:
    status = os.stat(path)
    return _opened(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _opened(path: str, modified: int, size: int) -> zipfile.ZipFile:
    """One list of contents per process: reading it again for every member would take longer than the pictures."""
    return zipfile.ZipFile(path)
