"""Decoding pictures in background processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import numpy

from smalto.data.images import LONGER_SIDE, BadPicture, PictureFile, read_picture
from smalto.errors import DataError


class Decoder:
    """Decodes files in spawned worker processes, or on demand in this one with ``workers=0``.

    A picture that kills its worker counts as bad; the others go on in fresh workers. Use as a context manager.

    Args:
        workers: number of processes.
        longer_side: see ``read_picture``.
    """

    def __init__(self, workers: int, longer_side: int | None = LONGER_SIDE) -> None:
        self.workers, self.longer_side = workers, longer_side
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, path: str) -> Future[numpy.ndarray] | None:
        """Ask for one file; pass what comes back to ``result``."""
        return self._start_pool().submit(read_picture, path, self.longer_side) if self.workers else None

    def result(self, path: str, future: Future[numpy.ndarray] | None) -> numpy.ndarray:
        """The picture asked for, uint8 [H, W, 3]. Raises BadPicture."""
        if future is None:
            return read_picture(path, self.longer_side)
        try:
            return future.result()
        except BrokenProcessPool:
            return self._retry_alone(path)

    def in_order(self, files: Iterable[PictureFile]) -> Iterator[tuple[PictureFile, numpy.ndarray | BadPicture]]:
        """Every file with its picture, or with the reason why there is none; a few are decoded ahead."""
        waiting: deque[tuple[PictureFile, Future[numpy.ndarray] | None]] = deque()
        for file in files:
            waiting.append((file, self.submit(file.path)))
            if len(waiting) > 2 * self.workers:
                yield self._outcome(*waiting.popleft())
        while waiting:
            yield self._outcome(*waiting.popleft())

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _outcome(self, file: PictureFile, future: Future[numpy.ndarray] | None) -> tuple[PictureFile, numpy.ndarray | BadPicture]:
        try:
            return file, self.result(file.path, future)
        except BadPicture as bad:
            return file, bad

    def _start_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: torch's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_leave_interrupts_to_the_parent)
        return self._pool

    def _retry_alone(self, path: str) -> numpy.ndarray:
        self.close()
        try:
            self._start_pool().submit(int).result()
        except BrokenProcessPool:
            self.close()
            raise DataError(
                "the decoding workers cannot start. In a script of your own put the call under `if __name__ == '__main__':`, "
                "because workers import the script; or pass workers=0."
            ) from None
        try:
            return self._start_pool().submit(read_picture, path, self.longer_side).result()
        except BrokenProcessPool:
            self.close()
            raise BadPicture("damaged: it crashed the decoder") from None


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
