"""Settings of the whole process that apply as long as at least one caller needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ProcessWideSetting:
    """Reference-counted setting of the process, safe for threads and for nesting.

    In ``with setting.hold():`` the first caller to enter calls ``begin``, and the last one to leave
    calls ``end``.

    Attributes:
        inside: number of callers inside ``hold``.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end
        self._lock = threading.Lock()
        self.inside = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Apply the setting for the duration of the block."""
        with self._lock:
            if not self.inside:
                self._begin()
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
                if not self.inside:
                    self._end()
