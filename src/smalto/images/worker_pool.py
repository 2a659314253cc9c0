"""Reading images in background processes."""

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
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from smalto.core.allocator import keep_middle_sized_blocks
from smalto.core.errors import DataError
from smalto.core.signals import STOP_SIGNALS
from smalto.images.image_file import ImageFile
from smalto.images.reading import BadImage
from smalto.images.retries import read_with_retries
from smalto.images.shared_memory import Packed, SharedBuffers, run_and_pack, use_shared_buffers

_TERMINAL_SIGNALS = set(STOP_SIGNALS) - {signal.SIGTERM}
# Spawned, not forked: torch's threads do not survive a fork.
_SPAWN = multiprocessing.get_context("spawn")

T = TypeVar("T")
R = TypeVar("R")


class ReaderPool(Generic[T]):
    """Reads files in spawned worker processes, or in this process with ``workers=0``.

    Arrays return through shared memory. An image that crashes its worker counts as bad; the other
    images are read by new workers. Use as a context manager.

    Args:
        workers: number of processes.
        read: turns a file into an image, such as ``read_image`` or the ``prepare`` of a Transform;
            raises BadImage.
    """

    def __init__(self, workers: int, read: Callable[[ImageFile], T]) -> None:
        self.workers = workers
        self._read = read
        self._running: _Workers | None = None
        self._alone: ProcessPoolExecutor | None = None  # reads files whose worker crashed

    def submit(self, files: list[ImageFile]) -> ReadJob[T]:
        """Start to read files in one worker; without workers ``ReadJob.result`` reads them."""
        if not self.workers:
            return ReadJob(self, files, None, None, None)
        workers = self._start()
        slot = workers.buffers.take()
        future = _submit(workers.pool, run_and_pack, slot, read_each, self._read, files)
        return ReadJob(self, files, future, workers.buffers, slot)

    def in_order(
        self, files: Iterable[ImageFile], together: int = 1
    ) -> Iterator[tuple[ImageFile, T | BadImage]]:
        """Yield every file with its image, or with the reason why it cannot be read.

        Args:
            files: to read.
            together: files per job of a worker; two jobs per worker are started ahead.
        """
        waiting: deque[ReadJob[T]] = deque()
        files = iter(files)
        while group := list(itertools.islice(files, together)):
            waiting.append(self.submit(group))
            if len(waiting) > 2 * self.workers:
                job = waiting.popleft()
                yield from zip(job.files, job.result(), strict=True)
        for job in waiting:
            yield from zip(job.files, job.result(), strict=True)

    def close(self) -> None:
        """Stop the workers."""
        if self._running is not None:
            self._running.pool.shutdown(cancel_futures=True)
            self._running = None
        self._close_alone()

    def __enter__(self) -> ReaderPool[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read_here(self, files: list[ImageFile]) -> list[T | BadImage]:
        """Read files in this process."""
        return read_each(self._read, files)

    def forget(self, buffers: SharedBuffers) -> None:
        """Start new workers for the next jobs, unless those of these buffers were replaced."""
        if self._running is not None and self._running.buffers is buffers:
            self._running.pool.shutdown(cancel_futures=True)
            self._running = None

    def retry_alone(self, file: ImageFile) -> T | BadImage:
        """Read a file whose worker crashed, or another one beside it, in a worker of its own.

        Raises:
            DataError: workers cannot start.
        """
        if self._alone is None:
            self._alone = _start_workers(1, None)
            try:
                _submit(self._alone, int).result()
            except BrokenProcessPool:
                self._close_alone()
                raise DataError(
                    "the reading workers cannot start. In a script of your own put the call under "
                    "`if __name__ == '__main__':`, because workers import the "
                    "script; or pass workers=0."
                ) from None
        try:
            return _submit(self._alone, read_each, self._read, [file]).result()[0]
        except BrokenProcessPool:
            self._close_alone()
            return BadImage("damaged: it crashed the reader")

    def _close_alone(self) -> None:
        if self._alone is not None:
            self._alone.shutdown(cancel_futures=True)
            self._alone = None

    def _start(self) -> _Workers:
        if self._running is None:
            with _signals_blocked():  # this may start the process that watches shared memory
                buffers = SharedBuffers(_SPAWN, 2 * self.workers + 1)
            self._running = _Workers(_start_workers(self.workers, buffers.array), buffers)
        return self._running


class ReadJob(Generic[T]):
    """Files that a worker reads together.

    Attributes:
        files: in order.
    """

    def __init__(
        self,
        pool: ReaderPool[T],
        files: list[ImageFile],
        future: Future[Packed] | None,
        buffers: SharedBuffers | None,
        slot: int | None,
    ) -> None:
        self.files = files
        self._pool = pool
        self._future = future
        self._buffers = buffers
        self._slot = slot
        self._outcomes: list[T | BadImage] | None = None

    def result(self) -> list[T | BadImage]:
        """Return the image of each file, or the reason why it cannot be read; may be called
        again.
        """
        if self._outcomes is None:
            self._outcomes = self._finish()
        return self._outcomes

    def _finish(self) -> list[T | BadImage]:
        if self._future is None or self._buffers is None:
            return self._pool.read_here(self.files)
        try:
            packed = self._future.result()
        except (BrokenProcessPool, CancelledError):  # a worker crashed, this job's or another's
            self._pool.forget(self._buffers)
            return [self._pool.retry_alone(file) for file in self.files]
        outcomes: list[T | BadImage] = self._buffers.unpack(self._slot, packed)
        return outcomes


class _Workers(NamedTuple):
    pool: ProcessPoolExecutor
    buffers: SharedBuffers


def read_each(read: Callable[[ImageFile], T], files: list[ImageFile]) -> list[T | BadImage]:
    """Read files one by one; a file that cannot be read gives its BadImage."""
    return [read_with_retries(read, file) for file in files]


def _start_workers(number: int, shared: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, _SPAWN, initializer=_begin_worker, initargs=(shared,))


def _submit(pool: ProcessPoolExecutor, job: Callable[..., R], *arguments: Any) -> Future[R]:
    with _signals_blocked():  # submitting may start a worker
        try:
            return pool.submit(job, *arguments)
        except BrokenProcessPool:  # it broke since: this job is retried too
            broken: Future[R] = Future()
            broken.set_exception(BrokenProcessPool())
            return broken


def _begin_worker(shared: Any) -> None:
    if shared is not None:
        use_shared_buffers(shared)
    keep_middle_sized_blocks()
    _exit_with_parent()


def _exit_with_parent() -> None:
    """In a worker: exit when the process that started it has ended, even by SIGKILL.

    A worker alone would wait for jobs without end.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGHUP: processes started inside never receive them, here they wait.

    A terminal sends both to all processes of a job. SIGTERM is how a pool ends its workers.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
