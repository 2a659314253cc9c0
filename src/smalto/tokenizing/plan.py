"""Which images of a source a store lacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from smalto.images.archives import open_file
from smalto.images.image_file import NOT_AN_IMAGE, ImageFile, Skipped
from smalto.images.reading import UnreadableImage, bad_image_errors
from smalto.images.retries import read_with_retries
from smalto.images.transforms import content_digest
from smalto.store.schema import row_id
from smalto.store.token_store import TokenStore

FILES_PER_LOOKUP = 1024


class FileError(NamedTuple):
    """An image that could not be used, with the size (bytes) and time (ns) of its file."""

    skipped: Skipped
    size: int = 0
    modified: int = 0


class Plan:
    """Iterates over the images that are not in the store, or have changed, and counts the others.

    Files are looked up in groups, so a source of any size needs bounded memory.

    Args:
        store: to compare with; the plan opens it for itself, beside the writer.
        files: of the source, and why others were left out.
        update: tokenize changed images again.

    Attributes:
        num_seen: images so far, and files that should be; ``num_passed``: those not tokenized.
        num_known: images that were in the store already.
        num_ignored: files that are not images.
        changed: names of images whose files have changed since they were tokenized.
        errors: new errors of files that cannot be images; the caller takes them out.
        known_errors: images that were bad before and have not changed;
            ``num_known_errors``: how many there were so far.
        recovered: names of images that were bad before and are in the store.
        after_group: called after each group of files was looked up, for jobs that find nothing
            missing for long.
    """

    def __init__(
        self, store: TokenStore, files: Iterable[ImageFile | Skipped], update: bool = False
    ) -> None:
        self._store = TokenStore.open(store.path)
        self._files = iter(files)
        self._update = update
        self._errors_before = self._store.errors()
        self._stopped = False
        self.num_seen = 0
        self.num_passed = 0
        self.num_known = 0
        self.num_ignored = 0
        self.changed: list[str] = []
        self.errors: list[FileError] = []
        self.known_errors: list[Skipped] = []
        self.num_known_errors = 0
        self.recovered: list[str] = []
        self.after_group: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """End the iteration before the next image."""
        self._stopped = True

    def was_bad(self, name: str) -> bool:
        """Return whether an image is in the store's table of errors."""
        return name in self._errors_before

    def is_recorded(self, error: FileError) -> bool:
        """Return whether the store's table of errors holds exactly this error."""
        recorded = self._errors_before.get(error.skipped.name)
        return recorded == (error.skipped.reason, error.size, error.modified)

    def __iter__(self) -> Iterator[ImageFile]:
        while group := list(itertools.islice(self._files, FILES_PER_LOOKUP)):
            files = []
            for item in group:
                if isinstance(item, ImageFile):
                    files.append(item)
                elif item.reason == NOT_AN_IMAGE:
                    self.num_ignored += 1
                else:
                    self.num_seen += 1
                    self.errors.append(FileError(item))
            self._store.refresh()
            known = self._store.known([row_id(file.name) for file in files])
            for file in files:
                if self._stopped:
                    return
                self.num_seen += 1
                if self._is_missing(file, known.get(row_id(file.name))):
                    yield file
                else:
                    self.num_passed += 1
            self.after_group()
            if self._stopped:
                return

    def _is_missing(self, file: ImageFile, stored: tuple[int, int, bytes] | None) -> bool:
        reason, *before = self._errors_before.get(file.name, ("", 0, 0))
        try:
            changed = stored is not None and has_changed(file, *stored)
        except UnreadableImage as bad:
            self.errors.append(FileError(Skipped(file.name, str(bad))))
            changed = False  # as far as can be told now
        if stored is not None and not changed:
            self.num_known += 1
            if reason:
                self.recovered.append(file.name)
            return False
        skipped = Skipped(file.name, reason)
        # A plugin may be installed by now, or a drive connected again.
        is_verdict = reason and not skipped.is_unread_format and not skipped.is_unreadable
        if is_verdict and before == [file.size, file.modified]:
            self.known_errors.append(skipped)
            self.num_known_errors += 1
            return False
        if stored is None:
            return True
        self.changed.append(file.name)
        return self._update


def has_changed(file: ImageFile, size: int, modified: int, digest: bytes) -> bool:
    """Return whether a file is not the one that was tokenized.

    Size and time decide; the contents are compared only if the time alone differs.

    Raises:
        UnreadableImage: they cannot be read now.
    """
    if not size and not digest:
        return False  # a row that was not made from a file
    if (file.size, file.modified) == (size, modified):
        return False
    if file.size != size:
        return True
    found = read_with_retries(_digest, file)
    if isinstance(found, UnreadableImage):
        raise found
    return found != digest


def _digest(file: ImageFile) -> bytes:
    with bad_image_errors(), open_file(file) as stream:
        return content_digest(stream)
