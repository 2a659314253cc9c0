"""Reading from drives and networks that fail for a moment, or for good. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from smalto.core.errors import DataError
from smalto.images.image_file import ImageFile, Skipped
from smalto.images.reading import BadImage, UnreadableImage

T = TypeVar("T")

PAUSES = (0.1, 0.4, 1.5)  # seconds before each further attempt
UNREADABLE_IN_A_ROW = 32  # images: by then the source is gone

_is_away = False  # in this process: the last file could not be read even with pauses


def read_with_retries(read: Callable[[ImageFile], T], file: ImageFile) -> T | BadImage:
    """Read a file; return its BadImage if it cannot be read.

    What the system cannot read is tried again after growing pauses. If that failed for a file, the
    following ones are tried once each until one is read: their drive is away. A damaged file is
    read twice, because a drive may return part of a file without an error.
    """
    global _is_away
    pauses = iter(() if _is_away else PAUSES)
    first: BadImage | None = None
    while True:
        try:
            image = read(file)
        except UnreadableImage as bad:
            pause = next(pauses, None)
            if pause is None:
                _is_away = True
                return bad
            time.sleep(pause)
        except BadImage as bad:
            _is_away = False
            if first is not None or not str(bad).startswith("damaged"):
                return bad
            first = bad
        else:
            _is_away = False
            return image


class SourceCheck:
    """Counts the images in a row that cannot be read, to tell when their source is gone."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.reason = ""

    def add(self, unreadable: list[Skipped], num_others: int) -> None:
        """Take what became of some images that were read together."""
        self.in_a_row = 0 if num_others else self.in_a_row + len(unreadable)
        if unreadable:
            self.reason = unreadable[-1].reason

    @property
    def is_gone(self) -> bool:
        """Whether so many images in a row could not be read that no further one will be."""
        return self.in_a_row >= UNREADABLE_IN_A_ROW

    def error(self, advice: str) -> DataError:
        """Return the error to stop with."""
        return DataError(
            f"stopped: {self.in_a_row} images in a row could not be read ({self.reason}). Check "
            f"that their drive or network is connected. {advice}"
        )
