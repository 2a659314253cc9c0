"""Decoding pictures in background processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import numpy

from smalto.data.archives import PictureFile
from smalto.data.images import LONGER_SIDE, BadPicture, read_picture
from smalto.errors import DataError

T = TypeVar("T")


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

    def submit(self, file: PictureFile) -> Future[numpy.ndarray] | None:
        """Ask for one file; pass what comes back to ``result``."""
        return self._submit(read_picture, file, self.longer_side) if self.workers else None

    def result(self, file: PictureFile, future: Future[numpy.ndarray] | None) -> numpy.ndarray:
        """The picture asked for, uint8 [H, W, 3]. Raises BadPicture."""
        if future is None:
            return read_picture(file, self.longer_side)
        try:
            return future.result()
        except (BrokenProcessPool, CancelledError):  # its worker died, or another picture's did and took the pool along
            return self._retry_alone(file)

    def in_order(self, files: Iterable[PictureFile]) -> Iterator[tuple[PictureFile, numpy.ndarray | BadPicture]]:
        """Every file with its picture, or with the reason why there is none; a few are decoded ahead."""
        waiting: deque[tuple[PictureFile, Future[numpy.ndarray] | None]] = deque()
        for file in files:
            waiting.append((file, self.submit(file)))
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
            return file, self.result(file, future)
        except BadPicture as bad:
            return file, bad

    def _submit(self, job: Callable[..., T], *arguments: Any) -> Future[T]:
        if self._pool is None:
            # Spawned, not forked: torch's threads do not survive a fork.
            self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        with _interrupts_are_the_parents():  # submitting may start a worker
            try:
                return self._pool.submit(job, *arguments)
            except BrokenProcessPool:  # it broke since: this job, too, is done again alone
                broken: Future[T] = Future()
                broken.set_exception(BrokenProcessPool())
                return broken

    def _retry_alone(self, file: PictureFile) -> numpy.ndarray:
        self.close()
        try:
            self._submit(int).result()
        except BrokenProcessPool:
            self.close()
            raise DataError(
                "the decoding workers cannot start. In a script of your own put the call under `if __name__ == '__main__':`, "
                "because workers import the script; or pass workers=0."
            ) from None
        try:
            return self._submit(read_picture, file, self.longer_side).result()
        except BrokenProcessPool:
            self.close()
            raise BadPicture("damaged: it crashed the decoder") from None


@contextmanager
def _interrupts_are_the_parents() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, from their first moment on; here it waits until the block ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
