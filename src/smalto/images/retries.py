"""Reading from drives and networks that fail for a moment, or for good. No torch here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from smalto.core.errors import DataError
from smalto.images.archives import open_file
from smalto.images.image_file import NOT_AN_IMAGE, UNREADABLE, ImageFile
from smalto.images.patience import PAUSES
from smalto.images.reading import PERMISSION_DENIED, BadImage, UnreadableImage, bad_image_errors

T = TypeVar("T")

UNREADABLE_IN_A_ROW = 32  # images: by then the source may be gone

SHORT = f"{UNREADABLE}: the drive returned less than the whole file"
_hopeless: set[str] = set()  # in this process: reasons for which pauses have not helped


def read_with_retries(read: Callable[[ImageFile], T], file: ImageFile) -> T | BadImage:
    """Read a file; return its BadImage if it cannot be read.

    What the system cannot read is tried again after growing pauses. If that failed for a file, the
    following ones with the same reason are tried once each until one is read: their drive is away.
    A permission that is missing once is not waited for again. A damaged file is read twice, because
    a drive may return part of a file without an error.
    """
    pauses = iter(PAUSES)
    first: BadImage | None = None
    while True:
        try:
            image = read(file)
        except UnreadableImage as bad:
            pause = next(pauses, None)
            if pause is None or str(bad) in _hopeless:
                _hopeless.add(str(bad))
                return bad
            time.sleep(pause)
        except BadImage as bad:
            _hopeless.intersection_update({PERMISSION_DENIED})
            if first is None and str(bad).startswith("damaged"):
                first = bad
                continue
            may_be_short = first is not None or str(bad) == NOT_AN_IMAGE
            return UnreadableImage(SHORT) if may_be_short and _is_short(file) else bad
        else:
            _hopeless.intersection_update({PERMISSION_DENIED})
            return image


def _is_short(file: ImageFile) -> bool:
    """Return whether reading a file gives fewer bytes than the file system says it has."""
    if file.member:
        return False
    try:
        size = os.stat(file.path).st_size
        with open_file(file) as stream:
            return sum(map(len, iter(lambda: stream.read(2**20), b""))) < size
    except OSError:
        return True


class SourceCheck:
    """Counts the images in a row that cannot be read, to tell when their source is gone.

    Attributes:
        is_gone: whether so many images in a row could not be read, and neither could one that was
            read before.
    """

    def __init__(self) -> None:
        self.is_gone = False
        self._in_a_row = 0
        self._reason = ""
        self._read_before: ImageFile | None = None

    def add(self, file: ImageFile, unreadable: str = "") -> None:
        """Take what became of the next image: the reason why it could not be read, or none."""
        if self.is_gone:
            return
        if not unreadable:
            self._in_a_row = 0
            self._read_before = file
            return
        self._in_a_row += 1
        self._reason = unreadable
        if self._in_a_row % UNREADABLE_IN_A_ROW == 0:
            before = self._read_before
            self.is_gone = before is None or not _can_be_opened(before)

    def error(self, advice: str) -> DataError:
        """Return the error to stop with."""
        return DataError(
            f"stopped: {self._in_a_row} images in a row could not be read ({self._reason}). Check "
            f"that their drive or network is connected. {advice}"
        )


def _can_be_opened(file: ImageFile) -> bool:
    try:
        with bad_image_errors(), open_file(file) as stream:
            return bool(stream.read(1))
    except BadImage:
        return False
