"""Token store: tokens of a collection of images, with the metadata to verify and decode them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy
import pyarrow
import torch
from pyarrow import compute
from torch import Tensor

from smalto.core.config import parse_config
from smalto.core.errors import DataError, InputError, RunError
from smalto.core.files import (
    atomic_path,
    check_replaceable,
    check_writable,
    exclusive,
    foreign_names,
    parse_json,
    remove_folder,
    remove_leftovers,
    set_aside,
)
from smalto.core.identity import TokenizerIdentity
from smalto.core.layout import TokenLayout
from smalto.images.image_file import Skipped
from smalto.images.transforms import Transform
from smalto.store.lance_table import ROWS_PER_FILE, TABLE_NAMES, LanceTable, foreign_files
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
KEEP_REPLACED = timedelta(hours=1)  # replaced files stay this long for processes that read them
_OWN_NAMES = TABLE_NAMES | {_ERRORS, _LOCK}
_ERROR_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("id", pyarrow.string(), nullable=False),
        pyarrow.field("reason", pyarrow.string(), nullable=False),
        pyarrow.field("size", pyarrow.int64()),
        pyarrow.field("modified", pyarrow.int64()),
    ]
)


TokensAndLabels = tuple[numpy.ndarray, numpy.ndarray]


class HasIdentity(Protocol):
    """Anything whose tokens can be told from those of others, such as an ImageTokenizer."""

    def identity(self) -> TokenizerIdentity:
        """Return what files record of it."""


class TokenStore:
    """Token store on Lance: one row per image, or per view of an image, with atomic commits.

    The store has ``len(store)`` rows. ``store[i]`` returns one, ``store.batch(indices)`` several.
    Use ``create`` and ``open`` instead of the constructor. Opening reads no rows and writes no
    files.

    Attributes:
        path: the folder, a Lance dataset (https://lancedb.github.io/lance) that other programs can
            read too.
        header: properties that all rows share.
    """

    def __init__(self, path: Path, table: LanceTable, header: StoreHeader) -> None:
        self.path = path
        self.header = header
        self._table = table
        self._lock = filelock.FileLock(path / _LOCK, thread_local=False)

    @classmethod
    def create(
        cls,
        path: str | Path,
        tokenizer: HasIdentity | StoreHeader,
        *,
        layout: TokenLayout | None = None,
        transform: Transform | str = "",
        precision: str = "float32",
    ) -> TokenStore:
        """Create an empty store.

        Args:
            path: a folder that does not exist yet, such as ``tokens.lance``.
            tokenizer: the ImageTokenizer whose tokens it will hold, or a complete header.
            layout: of every image; None: images keep their shape, and every row has its own.
            transform, precision: how images become tokens.

        Raises:
            ConfigError: an argument is out of range.
            RunError: ``path`` exists.
        """
        header = tokenizer
        if not isinstance(header, StoreHeader):
            identity = header.identity()
            header = StoreHeader.of(
                identity, layout=layout, transform=transform, precision=precision
            )
        path = Path(path)
        if path.exists():
            raise RunError(
                f"{path} exists already. Open it with TokenStore.open({str(path)!r}), or name "
                "another path."
            )
        check_writable(path)
        remove_leftovers(path.parent, path.name)
        with atomic_path(path) as folder:  # the store appears complete
            LanceTable.create(folder, store_schema(header))
            LanceTable.create(folder / _ERRORS, _ERROR_SCHEMA)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open the newest version of a store; ``refresh`` loads later versions.

        Raises:
            DataError: the store does not exist, has another format, or is missing parts or damaged.
        """
        path = Path(path)
        if not path.exists():
            raise DataError(
                f"{path} does not exist; expected a token store. Create one with `smalto tokenize`."
            )
        if not is_store(path):
            raise DataError(
                f"{path} is not a token store; expected a folder created by `smalto tokenize`. "
                "Name such a folder."
            )
        table = LanceTable.open(path)
        try:
            header = parse_config(
                StoreHeader, parse_json((table.schema.metadata or {})[b"smalto"]), str(path)
            )
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{path} is a Lance table, but not a token store of this version of smalto: "
                f"{error}. Name a folder created by `smalto tokenize`."
            ) from None
        return cls(path, table, header)

    def refresh(self) -> None:
        """Load the newest version, with the commits of other processes."""
        self._table.refresh()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row ``index`` like ``batch``, without the first dimension.

        A negative index counts from the end.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"got row index {index}; expected {-len(self)} to {len(self) - 1} in {self.path}."
            )
        return {key: value[0] for key, value in self.batch([index % len(self)]).items()}

    @property
    def version(self) -> int:
        """Return the version number, which increases with every commit.

        The same number means the same contents.
        """
        return self._table.version

    @property
    def num_replacements(self) -> int:
        """Return how many commits have replaced rows, which may change the order of rows."""
        return self._table.num_replacements

    @property
    def num_small_files(self) -> int:
        """Return the approximate number of data files that ``compact`` would join."""
        return self._table.num_fragments - len(self) // ROWS_PER_FILE

    def batch(self, indices: Sequence[int] | numpy.ndarray | Tensor) -> dict[str, Any]:
        """Return rows by index, in the order of the indices.

        Returns:
            A dict with ``id`` and ``label``: lists of strings; ``tokens``: int64 [B, L], or a list
            of [L_i] if images keep their shape; ``layout``: list of TokenLayout; ``height`` and
            ``width``: int64 [B]; ``crop``: int64 [B, 4].

        Raises:
            InputError: an index is out of range, or not an integer.
            DataError: a data file is missing or damaged.
        """
        asked = numpy.asarray(indices).reshape(-1)
        if asked.size and asked.dtype.kind not in "iu":
            raise InputError(
                f"got row indices of {asked.dtype}; expected integers. Convert a mask with "
                "mask.nonzero()."
            )
        asked = asked.astype(numpy.int64)
        if asked.size and (asked.min() < 0 or asked.max() >= len(self)):
            raise InputError(
                f"got row indices from {int(asked.min())} to {int(asked.max())}; expected 0 to "
                f"{len(self) - 1}. Call store.refresh() to see rows that were added later."
            )
        rising, places = numpy.unique(asked, return_inverse=True)
        return self._columns(self._table.take(rising.tolist(), self._read), places)

    def rows(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Return the rows [start, stop) like ``batch``, but faster."""
        stop = len(self) if stop is None else min(stop, len(self))
        return self._columns(self._table.read(start, stop, self._read))

    def tokens(self, start: int, stop: int, classes: Sequence[str]) -> TokensAndLabels:
        """Return the rows [start, stop) for training.

        Returns:
            The tokens in the stored dtype, [n, L] or an array of n arrays [L_i], and the indices of
            their labels in ``classes``, int64 [n], -1 for none.
        """
        return _tokens_and_labels(self._table.read(start, stop, ["tokens", "label"]), classes)

    def tokens_at(self, indices: numpy.ndarray, classes: Sequence[str]) -> TokensAndLabels:
        """Return rows by index in any order, like ``tokens``."""
        rising, places = numpy.unique(indices, return_inverse=True)
        tokens, labels = _tokens_and_labels(
            self._table.take(rising.tolist(), ["tokens", "label"]), classes
        )
        return tokens[places], labels[places]

    def token_rows(self, start: int, stop: int) -> list[TokenRow]:
        """Return the rows [start, stop) in the form that ``append`` accepts."""
        return self._token_rows(self._table.read(start, min(stop, len(self))))

    def token_rows_at(self, indices: numpy.ndarray) -> list[TokenRow]:
        """Return rows by increasing index, like ``token_rows``."""
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
        """Return the ids of all rows, in order."""
        return list(self.iterate_ids())

    def iterate_ids(self) -> Iterator[str]:
        """Yield the ids of all rows, in order, without a list of all."""
        for table in self._table.batches(["id"]):
            yield from _or_raise(table)["id"].to_pylist()

    def labels(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the label of every row in [start, stop), empty for none."""
        table = self._table.read(start, len(self) if stop is None else stop, ["label"])
        return [label or "" for label in table["label"].to_pylist()]

    def classes(self) -> list[str]:
        """Return all labels that occur, sorted."""
        found: set[str | None] = set()
        for table in self._table.batches(["label"]):
            found |= set(compute.unique(_or_raise(table)["label"]).to_pylist())
        return sorted(label for label in found if label)

    def known(self, ids: Sequence[str]) -> dict[str, tuple[int, int, bytes]]:
        """Return (size, modified, digest) of the image's file for those ids that exist."""
        if not ids:
            return {}
        found = self._table.find(ids, ["id", "size", "modified", "digest"])
        return {
            row["id"]: (row["size"], row["modified"], row["digest"] or b"")
            for row in found.to_pylist()
        }

    def lost_by_the_index(self, ids: Sequence[str]) -> list[str]:
        """Return those of the existing ids that ``known`` does not find.

        If there are any, the index of ids is damaged. Returns an empty list without an index.
        """
        if not self._table.is_indexed:
            return []
        found = set(self._table.find(ids, ["id"])["id"].to_pylist())
        return [id for id in ids if id not in found]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer lock for the duration of the block.

        The lock is reentrant. ``append`` acquires it automatically.

        Raises:
            RunError: another process holds the writer lock.
        """
        first = not self._lock.is_locked
        with _held(self._lock, self.path):
            if first:
                remove_leftovers(self.path)
                self._table.begin_writing()
                self._errors().begin_writing()
            yield

    def other_files(self) -> list[str]:
        """Return the names in the store's folder that are not of the store; they are left alone."""
        return _other_files(self.path)

    @staticmethod
    def remove(path: str | Path) -> None:
        """Remove a store from disk, even if it is damaged.

        Raises:
            RunError: it is not a store, another process writes to it, or its folder holds other
                files.
        """
        path = Path(path)
        with _removable(path):
            remove_folder(path)

    @staticmethod
    @contextmanager
    def replaced(path: str | Path) -> Iterator[None]:
        """Move a store away for the duration of the block, even if it is damaged.

        At the end it is removed if a new one is at its place, and otherwise put back.

        Raises:
            RunError: like ``remove``.
        """
        path = Path(path)
        with _removable(path), set_aside(path):
            yield

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
            header: header of the tokens; if given, it must match the store's.

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
        """Add the rows of a table from ``rows_to_table``, like ``append``."""
        ids = table["id"].to_pylist()
        if len(set(ids)) < len(ids):
            raise InputError(
                f"got the id {Counter(ids).most_common(1)[0][0]!r} more than once; expected a "
                "unique id for every row. Add a view to the ids with row_id(name, view)."
            )
        with self.writing():
            if not replace and (there := self.known(ids)):
                raise InputError(
                    f"got ids that are in {self.path} already ({len(there)}, such as "
                    f"{min(there)!r}); expected new ids. Replace the rows with replace=True."
                )
            (self._table.upsert if replace else self._table.append)(table)

    def add_errors(self, errors: Sequence[tuple[Skipped, int, int]]) -> None:
        """Record images that could not be used, with size and modification time of their files."""
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
        """Remove images, which can be used now, from the recorded errors."""
        with self.writing():
            self._errors().delete([row_id(name) for name in names])

    def errors(self) -> dict[str, tuple[str, int, int]]:
        """Return the images that could not be used, by name: (reason, size, modified)."""
        rows = [row for batch in self._errors().batches() for row in _or_raise(batch).to_pylist()]
        return {
            split_id(row["id"])[0]: (row["reason"], row["size"], row["modified"]) for row in rows
        }

    def compact(self, keep: timedelta = KEEP_REPLACED, *, lazily: bool = False) -> None:
        """Join small files, index the ids, and remove old versions. Rows keep their order.

        Args:
            keep: keep files that were replaced less than this ago, for processes that have the
                store open.
            lazily: update the index only if many rows are missing in it.
        """
        with self.writing():
            self._table.compact(keep, lazily)
            self._errors().compact(keep, lazily)

    def merge_small_files(self, most: int) -> None:
        """Compact while the store is being written, if it has more small files than ``most``."""
        if self.num_small_files > most:
            self.compact(lazily=True)

    def tables(self) -> Iterator[pyarrow.Table | DataError]:
        """Yield all rows as Arrow tables in order; an error instead of rows that cannot be read."""
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


def _or_raise(batch: pyarrow.Table | DataError) -> pyarrow.Table:
    if isinstance(batch, DataError):
        raise batch
    return batch


def is_store(path: Path) -> bool:
    """Return whether a folder looks like a token store, even if it is damaged."""
    parts = ("head.json", "_versions", "data")
    return path.is_dir() and any((path / name).exists() for name in parts)


def _tokens_and_labels(table: pyarrow.Table, classes: Sequence[str]) -> TokensAndLabels:
    numbers = compute.index_in(
        table["label"].combine_chunks(), pyarrow.array(list(classes), pyarrow.string())
    )
    tokens = token_arrays(table)
    if isinstance(tokens, list):
        each = numpy.empty(len(tokens), object)
        each[:] = tokens
        tokens = each
    return tokens, compute.fill_null(numbers, -1).to_numpy(zero_copy_only=False).astype(numpy.int64)


@contextmanager
def _removable(path: Path) -> Iterator[None]:
    """Hold the writer lock of a store that may be removed; raise RunError if it may not."""
    if not path.is_dir() or not any((path / name).exists() for name in TABLE_NAMES):
        raise DataError(
            f"{path} is not a token store, so --overwrite does not replace it. Name another --out."
        )
    with _held(filelock.FileLock(path / _LOCK, thread_local=False), path):
        remove_leftovers(path)
        check_replaceable(path, _other_files(path), "token store")
        yield


def _other_files(path: Path) -> list[str]:
    """Return the names in a store's folders that are not of the store."""
    errors = [f"{_ERRORS}/{name}" for name in foreign_files(path / _ERRORS)]
    return foreign_names(path, _OWN_NAMES) + foreign_files(path) + errors


@contextmanager
def _held(lock: filelock.BaseFileLock, path: Path) -> Iterator[None]:
    """Hold a store's writer lock for the duration of the block."""
    message = (
        f"another process is writing to {path}. Wait until it has finished, or name another --out."
    )
    with exclusive(lock, message):
        yield
