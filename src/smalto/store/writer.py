"""Writer that commits rows to a token store in a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import pyarrow

from smalto.images.image_file import Skipped
from smalto.store.schema import TokenRow, rows_to_table
from smalto.store.token_store import TokenStore

ROWS_PER_COMMIT = 4096
SECONDS_PER_COMMIT = 10.0
MANY_SMALL_FILES = 64
SOME_SMALL_FILES = 16
_WAITING = 8  # items in the queue


class _Item(NamedTuple):
    rows: Sequence[TokenRow]
    replace: bool
    error: tuple[Skipped, int, int] | None


class StoreWriter:
    """Background writer that commits rows at least every 4,096 rows or 10 seconds.

    Rows of one ``put`` are committed together. Small files are compacted when there are more than
    64.

    Use it as a context manager. Queued rows are committed at its end, even after an error in the
    block. An error of the writer thread is raised by the next ``put``, or at the end.
    """

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        self._queue: queue.Queue[_Item | None] = queue.Queue(_WAITING)
        self._failure: BaseException | None = None
        self._ended = False  # the end of the queue was received
        self._thread = threading.Thread(target=self._run, name="store writer", daemon=True)

    def put(self, rows: Sequence[TokenRow], *, replace: bool = False) -> None:
        """Queue rows for a commit; blocks while the queue is full.

        Args:
            rows: the rows.
            replace: replace the rows whose ids exist. Otherwise an existing id is an error.
        """
        self._put(_Item(rows, replace, None))

    def put_error(self, skipped: Skipped, size: int, modified: int) -> None:
        """Queue an image that could not be used, with size and modification time of its file."""
        self._put(_Item((), False, (skipped, size, modified)))

    def __enter__(self) -> StoreWriter:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._failure is not None and error is not self._failure:
            raise self._failure

    def _put(self, item: _Item) -> None:
        if self._failure is not None:
            raise self._failure
        self._queue.put(item)

    def _run(self) -> None:
        try:
            self._write_until_the_end()
        except BaseException as error:
            self._failure = error
            while not self._ended:  # keep emptying the queue, so that `put` does not block
                self._ended = self._queue.get() is None

    def _write_until_the_end(self) -> None:
        # Tables are in Arrow's own memory pool. Rows among tensors would fragment the heap.
        tables: list[pyarrow.Table] = []
        errors: list[tuple[Skipped, int, int]] = []
        replace = False
        due = 0.0
        while True:
            waiting = bool(tables or errors)
            try:
                item = self._queue.get(
                    timeout=max(0.0, due - time.monotonic()) if waiting else None
                )
                self._ended = item is None
            except queue.Empty:
                item = None
            if item is not None:
                due = due if waiting else time.monotonic() + SECONDS_PER_COMMIT
                tables += [rows_to_table(item.rows, self._store.header)] if item.rows else []
                errors += [item.error] if item.error else []
                replace |= item.replace
            if (
                self._ended
                or sum(map(len, tables)) >= ROWS_PER_COMMIT
                or (waiting and time.monotonic() >= due)
            ):
                self._commit(tables, errors, replace)
                tables = []
                errors = []
                replace = False
            if self._ended:
                return

    def _commit(
        self, tables: list[pyarrow.Table], errors: list[tuple[Skipped, int, int]], replace: bool
    ) -> None:
        if tables:
            self._store.append_table(pyarrow.concat_tables(tables), replace=replace)
        self._store.add_errors(errors)
        if tables:
            self._store.merge_small_files(MANY_SMALL_FILES)
