"""Names of image files: where they are, why some are left out. No torch here."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple


class ImageFile(NamedTuple):
    """A file that may be an image: its name relative to the folder (with ``/``), and where it is.

    ``member`` is its name inside the archive ``path``, empty for a file of its own; in a tar its bytes are at ``offset``. ``size`` is in
    bytes, 0 where it is not known. In a parquet file ``member`` is the column, ``row_group`` the row group and ``offset`` the row in it.
    ``modified`` is when the file, or the archive around it, was last written (ns); ``label`` the class that folder, shard or table says.
    """

    name: str
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0
    row_group: int = -1
    modified: int = 0
    label: str = ""


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    name: str
    reason: str


def folder_label(name: str) -> str:
    """The class of an image in folders by class: the folder that it lies in."""
    parts = PurePosixPath(name).parts
    return parts[-2] if len(parts) > 1 and parts[-2] not in ("/", "..") else ""


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
