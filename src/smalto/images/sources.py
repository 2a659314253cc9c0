"""What a user may name as images, and which of them were held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from smalto.core.errors import DataError
from smalto.images import emoji
from smalto.images.bundled import HELD_OUT, SOURCE, bundled_photographs
from smalto.images.finding import find_images, modified_ns, walk_images
from smalto.images.image_file import ImageFile, Skipped, printable


@dataclass(frozen=True)
class Source:
    """Image files, what was left out, and the names that are always held out (None: the hash of the name decides)."""

    name: str
    files: list[ImageFile]
    skipped: list[Skipped]
    held_out: tuple[str, ...] | None = None

    @property
    def digest(self) -> str:
        """Of the names and sizes of all files: by it a run knows its images again where they have moved."""
        lines = "\n".join(f"{file.name}\t{file.size}" for file in self.files)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def walk_source(source: str | Path | list[ImageFile]) -> Iterator[ImageFile | Skipped]:
    """The files of a source one by one, with sizes and times, and why others are no images: for collections of any size.

    Raises:
        DataError: it does not exist.
    """
    if isinstance(source, list):
        files = source
    elif str(source) == SOURCE:
        files = bundled_photographs()
    elif str(source) == emoji.SOURCE:
        files, _ = emoji.emoji()
    else:
        yield from walk_images(source)
        return
    for file in files:
        status = os.stat(file.path)
        yield file._replace(size=file.size or status.st_size, modified=modified_ns(status))


def locate(source: str | Path, names: Collection[str]) -> Iterator[ImageFile]:
    """Those files of a source that have these names; folders are looked into directly, archives are read through."""
    wanted = set(names)
    if Path(source).is_dir():
        for name in sorted(wanted):
            path = Path(source) / name
            if path.is_file():
                wanted.discard(name)
                yield ImageFile(name, str(path))
    if wanted:
        for file in walk_source(source):
            if isinstance(file, ImageFile) and file.name in wanted:
                wanted.discard(file.name)
                yield file
                if not wanted:
                    return


def source_name(source: str | Path | list[ImageFile]) -> str:
    """A source as a store or run remembers it."""
    if isinstance(source, list):
        return ""
    return str(source) if str(source) in (SOURCE, emoji.SOURCE) else str(Path(source).resolve())


def open_source(source: str | Path) -> Source:
    """A folder (with zip, tar and parquet files in it), one image, or a name: ``"bundled"``, the photographs that come with scikit-image
    and scikit-learn, or ``"emoji"``, Twemoji by group.

    Raises:
        DataError: nothing there is an image.
    """
    if str(source) == SOURCE:
        return Source(SOURCE, bundled_photographs(), [], HELD_OUT)
    if str(source) == emoji.SOURCE:
        files, held_out = emoji.emoji()
        return Source(emoji.SOURCE, files, [], held_out)
    files, skipped = find_images(source)
    name = str(Path(source).resolve())
    if name != printable(name):
        raise DataError(
            f"the name of the folder {printable(name)} is not plain text, so a run could not remember it. Rename it, or name a link to it."
        )
    return Source(name, files, skipped)
