"""Settings of the whole process that hold for as long as somebody needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ProcessWideSetting:
    """``with it.hold():`` the first to come in calls ``begin``, the last to leave ``end``, whatever the threads and the depth.

    Attributes:
        inside: how many are in it.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end, self._lock = begin, end, threading.Lock()
        self.inside = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
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
