"""Calls of the system that may fail for a moment, as on a network drive. No torch here."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PAUSES = (0.1, 0.4, 1.5)  # seconds before each further attempt
_LASTING = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
_hopeless: set[int | None] = set()  # errors for which pauses have not helped, until a call succeeds


def patiently(call: Callable[[], T]) -> T:
    """Return what a call of the system returns; after an error try again with growing pauses.

    Raises:
        OSError: it failed each time, or with an error that stays.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            result = call()
        except OSError as error:
            pause = next(pauses, None)
            if pause is None or error.errno in _LASTING or error.errno in _hopeless:
                _hopeless.add(error.errno)
                raise
            time.sleep(pause)
        else:
            _hopeless.clear()
            return result
