"""Image sources that a user can name: folders, archives, ``bundled`` and ``emoji``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from smalto.core.errors import DataError
from smalto.core.text import printable
from smalto.images import emoji
from smalto.images.bundled import CREDITS, HELD_OUT, SOURCE, bundled_photographs
from smalto.images.finding import find_images, modified_ns, walk_images
from smalto.images.image_file import UNREADABLE, ImageFile, Skipped
from smalto.images.splits import is_held_out


@dataclass(frozen=True)
class Source:
    """Image files of a source.

    Attributes:
        name: the absolute path, or ``"bundled"`` or ``"emoji"``.
        files: that may be images.
        skipped: files that were skipped, and why.
        held_out: names that are always held out; None: the hash of the name decides.
    """

    name: str
    files: list[ImageFile]
    skipped: list[Skipped]
    held_out: tuple[str, ...] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the names and sizes of all files.

        A run recognizes its images by it after they have moved.
        """
        lines = "\n".join(f"{file.name}\t{file.size}" for file in self.files)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def walk_source(source: str | Path | list[ImageFile]) -> Iterator[ImageFile | Skipped]:
    """Yield the files of a source with sizes and times, and skipped files, without a list of all.

    Raises:
        DataError: the source does not exist.
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
        try:
            status = os.stat(file.path)
        except OSError as error:
            yield Skipped(file.name, f"{UNREADABLE}: {(error.strerror or '').lower()}")
            continue
        yield file._replace(size=file.size or status.st_size, modified=modified_ns(status))


def locate(source: str | Path, names: Collection[str]) -> Iterator[ImageFile]:
    """Yield the files of a source that have these names.

    Names are looked up directly in a folder; archives are searched from start to end.
    """
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
    """Return the name of a source as stores and runs record it; empty for a list of files."""
    if isinstance(source, list):
        return ""
    return str(source) if str(source) in (SOURCE, emoji.SOURCE) else str(Path(source).resolve())


def held_out_rule(source: str) -> Callable[[str], bool]:
    """Return the rule that holds out images of a source by their names, as in training.

    Args:
        source: its name, as ``source_name`` returned it. Its images need not be there.
    """
    rules = {SOURCE: HELD_OUT.__contains__, emoji.SOURCE: emoji.is_held_out_emoji}
    return rules.get(source, is_held_out)


def credits_of(source: str) -> str:
    """Return the authors of the images of a source that comes with packages; empty for others."""
    if source == SOURCE:
        return "; ".join(f"{name}: {author}" for name, author in CREDITS.items())
    return emoji.CREDIT if source == emoji.SOURCE else ""


def open_source(source: str | Path) -> Source:
    """List the images of a source.

    Args:
        source: a folder (with zip, tar and parquet files in it), one image, ``"bundled"`` (the
            photographs that come with scikit-image and scikit-learn), or ``"emoji"`` (Twemoji by
            group).

    Raises:
        DataError: the source does not exist, contains no image, or has a name that is not text.
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
            f"the name of the folder {printable(name)} is not plain text, so a run cannot record "
            "it. Rename the folder, or name a link to it."
        )
    return Source(name, files, skipped)
