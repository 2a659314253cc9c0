"""What a user may name as pictures, and which of them were held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from smalto.data import emoji
from smalto.data.archives import PictureFile, Skipped
from smalto.data.bundled import HELD_OUT, SOURCE, bundled_photographs
from smalto.data.images import find_pictures, printable
from smalto.errors import DataError


@dataclass(frozen=True)
class Source:
    """Picture files, what was left out, and the names that are always held out (None: the hash of the name decides)."""

    name: str
    files: list[PictureFile]
    skipped: list[Skipped]
    held_out: tuple[str, ...] | None = None

    @property
    def digest(self) -> str:
        """Of the names and sizes of all files: by it a run knows its pictures again where they have moved."""
        lines = "\n".join(f"{file.name}\t{file.size}" for file in self.files)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def open_source(source: str | Path) -> Source:
    """A folder (with zip, tar and parquet files in it), one picture, or a name: ``"bundled"``, the photographs that come with scikit-image
    and scikit-learn, or ``"emoji"``, Twemoji by group.

    Raises:
        DataError: nothing there is a picture.
    """
    if str(source) == SOURCE:
        return Source(SOURCE, bundled_photographs(), [], HELD_OUT)
    if str(source) == emoji.SOURCE:
        files, held_out = emoji.emoji()
        return Source(emoji.SOURCE, files, [], held_out)
    files, skipped = find_pictures(source)
    name = str(Path(source).resolve())
    if name != printable(name):
        raise DataError(
            f"the name of the folder {printable(name)} is not plain text, so a run could not remember it. Rename it, or name a link to it."
        )
    return Source(name, files, skipped)
