"""Files of a folder, and images inside its zip, tar and parquet files, named and opened alike. No torch here."""

from __future__ import annotations

import functools
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from smalto.core.errors import MissingExtra
from smalto.images import parquet
from smalto.images.image_file import ImageFile, Skipped, folder_label

ARCHIVES = (".zip", ".tar", ".parquet")
LARGEST_MEMBER = 2**30  # bytes, unpacked: an image is smaller, a bomb is not
_LARGEST_LABEL = 1024


def is_archive(path: str) -> bool:
    return path.lower().endswith(ARCHIVES)


def members(archive: ImageFile) -> Iterator[ImageFile | Skipped]:
    """The files inside an archive, under ``archive.name``; links, encrypted and hidden ones are left out, and nothing is unpacked.

    Of members with one name the last one counts, as in unpacking.
    """
    prefix = f"{archive.name}/" if archive.name else ""
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
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
    ) as error:
        yield Skipped(
            archive.name or archive.path, f"damaged archive: {error}"
        )  # zipfile raises NotImplementedError for odd compressions


def open_file(file: ImageFile) -> BinaryIO:
    """The bytes of a file, wherever it is; of an archive's member all of them in memory."""
    if not file.member:
        return open(file.path, "rb")
    if file.row_group >= 0:
        return io.BytesIO(parquet.read_cell(file.path, file.row_group, file.member, file.offset))
    if _suffix(file.path) == ".zip":
        with _open_zip(file.path).open(file.member) as inside:
            return io.BytesIO(inside.read(LARGEST_MEMBER))
    with open(file.path, "rb") as archive:
        archive.seek(file.offset)
        return io.BytesIO(archive.read(file.size))


def _zip_members(archive: ImageFile) -> Iterator[tuple[ImageFile, str]]:
    for info in _open_zip(archive.path).infolist():
        if not info.is_dir():
            reason = "encrypted" if info.flag_bits & 1 else ""
            yield ImageFile("", archive.path, info.filename, 0, info.file_size), reason


def _tar_members(archive: ImageFile) -> Iterator[tuple[ImageFile, str]]:
    # Not compressed: its members are found by their place, as in the shards of WebDataset.
    labels: dict[str, str] = {}
    found = []
    with tarfile.open(archive.path, "r:") as tar:
        for info in tar:
            if info.isdir():
                continue
            plain = info.isreg() and not info.issparse()
            if plain and info.name.endswith(".cls") and info.size <= _LARGEST_LABEL:
                inside = tar.extractfile(info)
                labels[_key(info.name)] = (
                    inside.read().decode("utf-8", "replace").strip() if inside else ""
                )
            found.append(
                (
                    ImageFile("", archive.path, info.name, info.offset_data, info.size),
                    "" if plain else "not a file",
                )
            )
    for member, reason in found:
        yield member._replace(label=labels.get(_key(member.member), "")), reason


def _key(name: str) -> str:
    """What the files of one sample share in a shard of WebDataset: all before the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.')[0]}"


def _parquet_members(archive: ImageFile) -> Iterator[tuple[ImageFile, str]]:
    for row_group, row, number, column, label in parquet.cells(archive.path):
        yield ImageFile(f"{number:08d}", archive.path, column, row, 0, row_group, label=label), ""


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


_MEMBERS = {".zip": _zip_members, ".tar": _tar_members, ".parquet": _parquet_members}


def _open_zip(path: str) -> zipfile.ZipFile:
    status = os.stat(path)
    return _opened(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _opened(path: str, modified: int, size: int) -> zipfile.ZipFile:
    """One list of contents per process: reading it again for every member would take longer than the images."""
    return zipfile.ZipFile(path)
