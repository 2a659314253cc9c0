"""TokenStore: the tokens of a whole collection in one place, with what is needed to trust and decode them."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
import numpy
import pyarrow
import torch
from pyarrow import compute
from torch import Tensor

from smalto.core.config import parse_config
from smalto.core.errors import DataError, InputError, RunError
from smalto.core.files import atomic_path, remove_leftovers
from smalto.images.image_file import Skipped
from smalto.store.lance_table import ROWS_PER_FILE, LanceTable
from smalto.store.schema import (
    NUMBERS,
    StoreHeader,
    TokenRow,
    flat_values,
    row_id,
    row_layouts,
    rows_to_table,
    split_id,
    store_schema,
    token_arrays,
)

_ERRORS = "_errors"
_LOCK = ".lock"


class TokenStore:
    """Tokens on disk: one row per image (or view of one), committed in batches, never half-written.

    ``len(store)`` rows; ``store[i]`` is one, ``store.batch(indices)`` several. Opening reads no rows and writes nothing. Use ``create`` and
    ``open``.

    Attributes:
        path: the folder, a Lance dataset (https://lancedb.github.io/lance) that other programs can read too.
        header: what all rows share.
    """

    def __init__(self, path: Path, table: LanceTable, header: StoreHeader) -> None:
        self.path, self.header, self._table = path, header, table
        self._lock = filelock.FileLock(path / _LOCK, thread_local=False)

    @classmethod
    def create(cls, path: str | Path, header: StoreHeader) -> TokenStore:
        """Create an empty store.

        Args:
            path: a folder that does not exist yet, such as ``tokens.lance``.
            header: what all rows share: ``StoreHeader.of(tokenizer.identity(), layout=...)``.

        Raises:
            RunError: ``path`` exists.
        """
        path = Path(path)
        if path.exists():
            raise RunError(
                f"{path} exists already. Open it with TokenStore.open, or name another path."
            )
        try:
            with atomic_path(path) as folder:  # appears whole
                LanceTable.create(folder, store_schema(header))
                LanceTable.create(folder / _ERRORS, _ERROR_SCHEMA)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise RunError(f"{path} exists already: another process has just made it.") from None
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open a store as it is now; ``refresh`` looks again.

        Raises:
            DataError: there is none, it is of another format, or a part of it is missing or damaged.
        """
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path} does not exist: token stores are made by `smalto tokenize`.")
        if not path.is_dir() or not any(
            (path / name).exists() for name in ("head.json", "_versions", "data")
        ):
            raise DataError(
                f"{path} is no token store: that is a folder made by `smalto tokenize`."
            )
        table = LanceTable.open(path)
        try:
            header = parse_config(
                StoreHeader, json.loads((table.schema.metadata or {})[b"smalto"]), str(path)
            )
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{path} is a Lance table, but no token store of this smalto ({error})."
            ) from None
        return cls(path, table, header)

    def refresh(self) -> None:
        """See what other processes have committed since."""
        self._table.refresh()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index`` (negative counts from the end): as ``batch`` gives it, without the first dimension."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self):,} rows; there is no row {index}.")
        return {key: value[0] for key, value in self.batch([index % len(self)]).items()}

    @property
    def version(self) -> int:
        """Counts commits; the same number means the same contents."""
        return self._table.version

    @property
    def num_small_files(self) -> int:
        """About how many data files ``compact`` would join."""
        return self._table.num_fragments - len(self) // ROWS_PER_FILE

    def batch(self, indices: Sequence[int] | numpy.ndarray | Tensor) -> dict[str, Any]:
        """Rows by number, in the order asked for.

        Returns:
            ``id``, ``label``: lists of texts. ``tokens``: int64 [B, L], or a list of [L_i] where images keep their shape. ``layout``: a
            list of TokenLayout. ``height``, ``width``: int64 [B]; ``crop``: int64 [B, 4].

        Raises:
            InputError: a number out of range, or no whole number.
            DataError: a data file is missing or damaged.
        """
        asked = numpy.asarray(indices).reshape(-1)
        if asked.size and asked.dtype.kind not in "iu":
            raise InputError(f"rows are asked for by whole numbers; got {asked.dtype}.")
        asked = asked.astype(numpy.int64)
        if asked.size and (asked.min() < 0 or asked.max() >= len(self)):
            raise InputError(
                f"rows are numbered 0 to {len(self) - 1}; got {int(asked.min())} to {int(asked.max())}."
            )
        rising, places = numpy.unique(asked, return_inverse=True)
        return self._columns(self._table.take(rising.tolist(), self._read), places)

    def rows(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Rows [start, stop), as ``batch`` gives them, faster."""
        return self._columns(
            self._table.read(start, len(self) if stop is None else min(stop, len(self)), self._read)
        )

    def tokens(
        self, start: int, stop: int, classes: Sequence[str]
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Rows [start, stop) for training: tokens as they are stored, [n, L] or an array of [L_i], and the numbers of their labels in
        ``classes``, int64 [n], -1 for none."""
        return _tokens_and_labels(self._table.read(start, stop, ["tokens", "label"]), classes)

    def tokens_at(
        self, indices: numpy.ndarray, classes: Sequence[str]
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Like ``tokens``, of rows by number in any order."""
        rising, places = numpy.unique(indices, return_inverse=True)
        tokens, labels = _tokens_and_labels(
            self._table.take(rising.tolist(), ["tokens", "label"]), classes
        )
        return tokens[places], labels[places]

    def token_rows(self, start: int, stop: int) -> list[TokenRow]:
        """Rows [start, stop) as ``append`` takes them."""
        return self._token_rows(self._table.read(start, min(stop, len(self))))

    def token_rows_at(self, indices: numpy.ndarray) -> list[TokenRow]:
        """Like ``token_rows``, of rows by rising number."""
        return self._token_rows(self._table.take(indices.tolist()))

    def _token_rows(self, table: pyarrow.Table) -> list[TokenRow]:
        metadata = zip(
            *(table[name].to_pylist() for name in ("id", "label", "crop", "digest", *NUMBERS)),
            strict=True,
        )
        return [
            TokenRow(
                id,
                tokens,
                layout,
                label or "",
                height,
                width,
                tuple(crop),
                size,
                modified,
                digest or b"",
            )
            for tokens, layout, (id, label, crop, digest, height, width, size, modified) in zip(
                token_arrays(table), row_layouts(table, self.header), metadata, strict=True
            )
        ]

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        return [
            id for table in self._table.batches(["id"]) for id in _or_raise(table)["id"].to_pylist()
        ]

    def labels(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The label of every row in [start, stop)."""
        return [
            label or ""
            for label in self._table.read(start, len(self) if stop is None else stop, ["label"])[
                "label"
            ].to_pylist()
        ]

    def classes(self) -> list[str]:
        """All labels that occur, sorted."""
        found: set[str | None] = set()
        for table in self._table.batches(["label"]):
            found |= set(compute.unique(_or_raise(table)["label"]).to_pylist())
        return sorted(label for label in found if label)

    def known(self, ids: Sequence[str]) -> dict[str, tuple[int, int, bytes]]:
        """(size, modified, digest) of the files of those ids that are in the store."""
        found = self._table.find(ids, ["id", "size", "modified", "digest"]) if ids else None
        return (
            {
                row["id"]: (row["size"], row["modified"], row["digest"] or b"")
                for row in found.to_pylist()
            }
            if found is not None
            else {}
        )

    def lost_by_the_index(self, ids: Sequence[str]) -> list[str]:
        """Of ids that are in the store those that ``known`` does not find: the index of ids is damaged. Empty where there is none."""
        if not self._table.is_indexed:
            return []
        found = set(self._table.find(ids, ["id"])["id"].to_pylist())
        return [id for id in ids if id not in found]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one that writes; no other process can meanwhile. ``append`` does this itself where it is not done around it.

        Raises:
            RunError: another process writes to this store.
        """
        first = not self._lock.is_locked
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(
                f"another process is writing to {self.path}. Wait for it, or name another --out."
            ) from None
        try:
            if first:
                remove_leftovers(self.path)
                self._table.begin_writing()
                self._errors().begin_writing()
            yield
        finally:
            self._lock.release()

    def append(
        self,
        rows: Sequence[TokenRow],
        *,
        replace: bool = False,
        header: StoreHeader | None = None,
    ) -> None:
        """Add rows in one commit: after a crash all of them are there, or none.

        Args:
            rows: with ids that are new.
            replace: replace the rows whose ids exist.
            header: of the tokens, if the caller knows it; it must agree with the store's.

        Raises:
            RunError: the tokens are of another kind than the store's, or another process holds the
                writer lock.
            InputError: an id exists already, a token is outside the codebook, or a number of
                tokens is not the layout's.
        """
        if header is not None:
            self.header.check_same(header, self.path)
        if rows:
            self.append_table(rows_to_table(rows, self.header), replace=replace)

    def append_table(self, table: pyarrow.Table, *, replace: bool = False) -> None:
        """Like ``append``, of rows that ``rows_to_table`` has checked and laid out."""
        ids = table["id"].to_pylist()
        if len(set(ids)) < len(ids):
            raise InputError(
                f"every row needs an id of its own; {Counter(ids).most_common(1)[0][0]!r} is there more than once."
            )
        with self.writing():
            if not replace and (there := self.known(ids)):
                raise InputError(
                    f"{len(there)} of these ids are in {self.path} already, such as {min(there)!r}. replace=True redoes them."
                )
            (self._table.upsert if replace else self._table.append)(table)

    def add_errors(self, errors: Sequence[tuple[Skipped, int, int]]) -> None:
        """Note images that could not be used: each with the size and time of its file."""
        if not errors:
            return
        ids = [row_id(skipped.name) for skipped, _, _ in errors]
        columns = [
            ids,
            [s.reason for s, _, _ in errors],
            [size for _, size, _ in errors],
            [modified for _, _, modified in errors],
        ]
        arrays = [
            pyarrow.array(column, field.type)
            for column, field in zip(columns, _ERROR_SCHEMA, strict=True)
        ]
        with self.writing():
            self._errors().upsert(pyarrow.table(arrays, schema=_ERROR_SCHEMA))

    def forget_errors(self, names: Sequence[str]) -> None:
        """Remove images from the errors: they are good now."""
        with self.writing():
            self._errors().delete([row_id(name) for name in names])

    def errors(self) -> dict[str, tuple[str, int, int]]:
        """Images that could not be used, by name: (reason, size, modified)."""
        rows = [row for batch in self._errors().batches() for row in _or_raise(batch).to_pylist()]
        return {
            split_id(row["id"])[0]: (row["reason"], row["size"], row["modified"]) for row in rows
        }

    def compact(self, keep: timedelta = timedelta(0), *, lazily: bool = False) -> None:
        """Join small files, index the ids, remove what no version needs. Rows keep their numbers.

        Args:
            keep: leave what was replaced less than this ago, for those who have the store open.
            lazily: bring the index up to date only where much is missing in it.
        """
        with self.writing():
            self._table.compact(keep, lazily)
            self._errors().compact(keep, lazily)

    def tables(self) -> Iterator[pyarrow.Table | DataError]:
        """All rows as Arrow tables in order, or why some cannot be read."""
        return self._table.batches()

    def _errors(self) -> LanceTable:
        return LanceTable.open(self.path / _ERRORS)

    @property
    def _read(self) -> list[str]:
        return [
            "id",
            "tokens",
            "label",
            "height",
            "width",
            "crop",
            *([] if self.header.grids is not None else ["grids"]),
        ]

    def _columns(self, table: pyarrow.Table, order: numpy.ndarray | None = None) -> dict[str, Any]:
        order = numpy.arange(table.num_rows) if order is None else order
        tokens = token_arrays(table)
        ids, labels = table["id"].to_pylist(), table["label"].to_pylist()
        layouts = row_layouts(table, self.header)
        numbers = {
            name: torch.from_numpy(table[name].to_numpy().astype(numpy.int64)[order])
            for name in ("height", "width")
        }
        chosen: Tensor | list[Tensor]
        if isinstance(tokens, list):
            chosen = [torch.from_numpy(tokens[i].astype(numpy.int64)) for i in order]
        else:
            chosen = torch.from_numpy(tokens[order].astype(numpy.int64))
        return {
            "id": [ids[i] for i in order],
            "tokens": chosen,
            "layout": [layouts[i] for i in order],
            "label": [labels[i] or "" for i in order],
            **numbers,
            "crop": torch.from_numpy(
                flat_values(table["crop"]).reshape(-1, 4).astype(numpy.int64)[order]
            ),
        }


_ERROR_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("id", pyarrow.string(), nullable=False),
        pyarrow.field("reason", pyarrow.string(), nullable=False),
        pyarrow.field("size", pyarrow.int64()),
        pyarrow.field("modified", pyarrow.int64()),
    ]
)


def _or_raise(batch: pyarrow.Table | DataError) -> pyarrow.Table:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _tokens_and_labels(
    table: pyarrow.Table, classes: Sequence[str]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    numbers = compute.index_in(
        table["label"].combine_chunks(), pyarrow.array(list(classes), pyarrow.string())
    )
    tokens = token_arrays(table)
    if isinstance(tokens, list):
        each = numpy.empty(len(tokens), object)
        each[:] = tokens
        tokens = each
    return tokens, compute.fill_null(numbers, -1).to_numpy(zero_copy_only=False).astype(numpy.int64)
