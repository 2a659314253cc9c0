"""Records of image files and of skipped files. No torch here."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

from smalto.core.text import printable

NOT_AN_IMAGE = "not an image"  # the reason for text files and the like
UNREADABLE = "unreadable"  # begins the reason if the system could not read a file
UNREAD_FORMAT = "an image format that smalto does not read"  # followed by ": " and the format


class ImageFile(NamedTuple):
    """A file that may be an image.

    Attributes:
        name: the name relative to the folder, with ``/``.
        path: the file itself, or the archive that contains it.
        member: the name inside the archive, or the column of a parquet file. Empty for a file of
            its own.
        offset: where the member's bytes start in a tar, or the row within its row group in a
            parquet file.
        size: in bytes; 0 if unknown.
        row_group: the row group in a parquet file, else -1.
        modified: when the file or its archive was last written, in ns.
        label: the class, from the folder, the shard or the table.
        element: the position in a parquet column that holds lists of images, else -1.
    """

    name: str
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0
    row_group: int = -1
    modified: int = 0
    label: str = ""
    element: int = -1

    @property
    def file_name(self) -> str:
        """The name that carries the suffix: of the member in an archive, else of the file."""
        return self.member or self.path


class Skipped(NamedTuple):
    """A file that was skipped, and why."""

    name: str
    reason: str

    @property
    def kind(self) -> str:
        """What ``summary`` counts: the reason without details, or the format, such as ``CR2``."""
        kind, _, detail = self.reason.partition(": ")
        return detail if kind == UNREAD_FORMAT else kind

    @property
    def is_unread_format(self) -> bool:
        """Whether the file has a known image format that no installation of smalto reads."""
        return self.reason.startswith(UNREAD_FORMAT)

    @property
    def is_unreadable(self) -> bool:
        """Whether the system could not read the file: it may be readable again by now.

        The errors of stores written by earlier versions hold such reasons with their errno.
        """
        return self.reason.startswith(UNREADABLE) or "[Errno " in self.reason


def folder_label(name: str) -> str:
    """Return the class of an image in a folder per class: the name of its parent folder."""
    parts = PurePosixPath(name).parts
    return parts[-2] if len(parts) > 1 and parts[-2] not in ("/", "..") else ""


def summary(skipped: list[Skipped], most: int = 8) -> str:
    """Return one sentence that counts the skipped files by kind and names at most ``most``.

    Every kind is named at least once if ``most`` allows. The sentence is empty if none was skipped.
    """
    if not skipped:
        return ""
    kinds = Counter(file.kind for file in skipped)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    names = "; ".join(f"{printable(name)} ({reason})" for name, reason in _examples(skipped, most))
    more = f"; and {len(skipped) - most} more" if len(skipped) > most else ""
    return f"Skipped {len(skipped)} files ({counts}): {names}{more}."


def _examples(skipped: list[Skipped], most: int) -> list[Skipped]:
    """Return at most ``most`` files in their order: the first of each kind, then the first ones."""
    first_of_kind: dict[str, int] = {}
    for position, file in enumerate(skipped):
        first_of_kind.setdefault(file.kind, position)
    positions = dict.fromkeys([*first_of_kind.values(), *range(min(most, len(skipped)))])
    return [skipped[position] for position in sorted(list(positions)[:most])]
