"""Decoding images in background processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from smalto.core.allocator import keep_middle_sized_blocks
from smalto.core.errors import DataError
from smalto.images.image_file import ImageFile
from smalto.images.reading import BadImage
from smalto.images.shared_memory import Packed, SharedBuffers, packed, use_shared_buffers

T = TypeVar("T")
R = TypeVar("R")


class ReaderPool(Generic[T]):
    """Reads files in spawned worker processes, or on demand in this one with ``workers=0``.

    An image that kills its worker counts as bad; the others go on in fresh workers. Use as a context manager.

    Args:
        workers: number of processes.
        read: what turns a file into an image, such as ``read_image`` or the ``prepare`` of a Transform; raises BadImage.
    """

    def __init__(self, workers: int, read: Callable[[ImageFile], T]) -> None:
        self.workers, self._read = workers, read
        self._running: _Workers | None = None

    def submit(self, file: ImageFile) -> Future[list[T | BadImage]] | None:
        """Ask for one file; pass what comes back to ``result``."""
        return self._submit(_read_each, self._read, [file]) if self.workers else None

    def result(self, file: ImageFile, future: Future[list[T | BadImage]] | None) -> T:
        """The image asked for. Raises BadImage."""
        (image,) = self._outcomes([file], future)
        if isinstance(image, BadImage):
            raise image
        return image

    def in_order(
        self, files: Iterable[ImageFile], together: int = 1
    ) -> Iterator[tuple[ImageFile, T | BadImage]]:
        """Every file with its image, or with the reason why there is none.

        ``together`` files are one job of a worker; two jobs a worker are begun ahead.
        """
        waiting: deque[_Job] = deque()
        files = iter(files)
        while group := list(itertools.islice(files, together)):
            waiting.append(self._begin(group))
            if len(waiting) > 2 * self.workers:
                yield from self._finish(waiting.popleft())
        for job in waiting:
            yield from self._finish(job)

    def close(self) -> None:
        if self._running is not None:
            self._running.pool.shutdown(cancel_futures=True)
            self._running = None

    def __enter__(self) -> ReaderPool[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, files: list[ImageFile]) -> _Job:
        if not self.workers:
            return _Job(files, None, None)
        slots = self._start().slots
        slot = slots.take()
        return _Job(
            files,
            self._submit(packed, slot, _read_each, self._read, files),
            partial(slots.unpack, slot),
        )

    def _finish(self, job: _Job) -> Iterator[tuple[ImageFile, T | BadImage]]:
        outcomes = self._outcomes(job.files, job.future)
        if job.unpack and isinstance(outcomes, Packed):  # else it was done again here
            outcomes = job.unpack(outcomes)
        yield from zip(job.files, outcomes, strict=True)

    def _outcomes(
        self, files: list[ImageFile], future: Future[list[T | BadImage]] | None
    ) -> list[T | BadImage]:
        if future is None:
            return _read_each(self._read, files)
        try:
            return future.result()
        except (
            BrokenProcessPool,
            CancelledError,
        ):  # its worker died, or another job's did and took the pool along
            return [self._retry_alone(file) for file in files]

    def _start(self) -> _Workers:
        if self._running is None:
            context = multiprocessing.get_context(
                "spawn"
            )  # not forked: torch's threads do not survive a fork
            slots = SharedBuffers(context, 2 * self.workers + 1)
            pool = ProcessPoolExecutor(
                self.workers, context, initializer=_begin_worker, initargs=(slots.array,)
            )
            self._running = _Workers(pool, slots)
        return self._running

    def _submit(self, job: Callable[..., R], *arguments: Any) -> Future[R]:
        pool = self._start().pool
        with _interrupts_are_the_parents():  # submitting may start a worker
            try:
                return pool.submit(job, *arguments)
            except BrokenProcessPool:  # it broke since: this job, too, is done again alone
                broken: Future[R] = Future()
                broken.set_exception(BrokenProcessPool())
                return broken

    def _retry_alone(self, file: ImageFile) -> T | BadImage:
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
            return self._submit(_read_each, self._read, [file]).result()[0]
        except BrokenProcessPool:
            self.close()
            return BadImage("damaged: it crashed the decoder")


class _Workers(NamedTuple):
    pool: ProcessPoolExecutor
    slots: SharedBuffers


class _Job(NamedTuple):
    """Files that a worker reads together."""

    files: list[ImageFile]
    future: Future[Any] | None
    unpack: Callable[[Packed], Any] | None


def _begin_worker(shared: Any) -> None:
    use_shared_buffers(shared)
    keep_middle_sized_blocks()
    _end_with_the_parent()


def _end_with_the_parent() -> None:
    """In a worker: end when the process that started it has ended, even by SIGKILL. Of itself a worker would wait for jobs for ever."""
    parent = multiprocessing.parent_process()

    def end() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _read_each(read: Callable[[ImageFile], T], files: list[ImageFile]) -> list[T | BadImage]:
    found: list[T | BadImage] = []
    for file in files:
        try:
            found.append(read(file))
        except BadImage as bad:
            found.append(bad)
    return found


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
