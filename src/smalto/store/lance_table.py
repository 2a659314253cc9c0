"""Lance dataset that detects lost or damaged parts. The only file that imports lance.

Lance commits versions: a manifest lists the data files of a version and is written last. Lance does
not detect a manifest that is missing or damaged. It then reads an older one, and rows would be
missing without an error. Therefore ``head.json`` holds the newest version and the SHA-256 of its
manifest.

``head.json`` is written after every commit. So a newer version than that in ``head.json`` is valid
too. If it cannot be read, a power failure interrupted its commit before the commit was reported.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lance
import pyarrow
from lance.fragment import write_fragments
from lance.optimize import Compaction

from smalto.core.allocator import release_freed_memory
from smalto.core.errors import DataError, RunError, SmaltoError
from smalto.core.files import file_sha256, is_utf8, read_json, sync_folder, write_atomic
from smalto.core.text import printable

STORAGE_VERSION: Literal["2.1"] = "2.1"  # explicit, because Lance's default changes with releases
ROWS_PER_FILE = 2**20
_CACHE_BYTES = 2**26
FEW_ROWS = 2**17  # scanning this many rows without an index is acceptable
_PIECE_BYTES = 2**21
_HEAD = "head.json"
_FOLDERS = ("data", "_versions", "_indices", "_deletions", "_transactions")
TABLE_NAMES = frozenset({_HEAD, *_FOLDERS})  # all that a table's folder holds
# The names that Lance gives in each folder; a suffix such as #1 marks a file that is being written.
_NAMES = {
    folder: re.compile(rf"({names})(#\d+)?|\.tmp.*")
    for folder, names in {
        "data": r"[0-9a-f]{16,}\.lance",
        "_versions": r"\d+\.manifest|latest_version_hint\.json",
        "_indices": r"[0-9a-f-]{36}",
        "_deletions": r"\d+-\d+-\d+\.(arrow|bin)",
        "_transactions": r"\d+-[0-9a-f-]{36}\.txn",
    }.items()
}
# Footer of Lance's files: three offsets, numbers of buffers and columns, version, magic.
_FOOTER = struct.Struct("<QQQIIHH4s")


class MissingFile(DataError):
    """A file that the opened version needs is missing, perhaps because of a compaction."""


class LanceTable:
    """Lance table with the key ``id``.

    Any number of processes may read. Only one process at a time may write; the caller ensures this
    with a lock.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self._dataset = dataset

    @classmethod
    def create(cls, path: Path, schema: pyarrow.Schema) -> LanceTable:
        """Create an empty table in a folder that does not exist yet.

        Raises:
            RunError: Lance cannot hold a table in a folder of this name.
        """
        with _errors_named(path):
            dataset = lance.write_dataset(
                schema.empty_table(),
                _uri(path),
                schema=schema,
                data_storage_version=STORAGE_VERSION,
            )
        table = cls(path, dataset)
        table._write_head()
        return table

    @classmethod
    def open(cls, path: Path) -> LanceTable:
        """Open the newest version.

        Raises:
            DataError: a manifest is missing or damaged, or a part is a symbolic link.
        """
        _check_no_links(path)
        head = _read_head(path)  # first, because a concurrent commit only makes the table newer
        manifest = _manifest(path, head["version"])
        dataset = _newest(path)
        if dataset is None or dataset.version <= head["version"]:
            if not manifest.is_file() or file_sha256(manifest) != head["manifest"]:
                if _read_head(path) != head:  # another process has just committed
                    return cls.open(path)
                raise DataError(
                    f"{manifest} is missing or damaged, so {path} is incomplete; expected version "
                    f"{head['version']} with {head['rows']:,} rows. Restore that file from a copy. "
                    "The data files are unchanged."
                )
            if dataset is None or dataset.version < head["version"]:
                dataset = _opened(path, head["version"])
        return cls(path, dataset)

    def refresh(self) -> None:
        """Load the newest version, with the commits of other processes."""
        self._dataset = LanceTable.open(self.path)._dataset

    def begin_writing(self) -> None:
        """Load the newest version, and remove the manifest of an interrupted commit.

        The next commit reuses the version number of that manifest.
        """
        self.refresh()
        for folder in _FOLDERS:
            if (self.path / folder).is_dir():
                _check_no_links(self.path / folder)
        for manifest in (self.path / "_versions").glob("*.manifest"):
            version = _version_of(manifest)
            if version is not None and version > self.version:
                manifest.unlink()

    @property
    def version(self) -> int:
        """Return the version number, which increases with every commit."""
        return int(self._dataset.version)

    def foreign_files(self) -> list[str]:
        """Return the names in the table's folders that Lance does not give; they are left alone."""
        return foreign_files(self.path)

    @property
    def num_replacements(self) -> int:
        """Return how many commits have replaced or removed rows, which may change their order."""
        return int(_read_head(self.path)["replacements"])

    @property
    def schema(self) -> pyarrow.Schema:
        """Return the Arrow schema of the rows."""
        return self._dataset.schema

    @property
    def num_fragments(self) -> int:
        """Return the number of Lance fragments."""
        return len(self._dataset.get_fragments())

    def __len__(self) -> int:
        return int(self._dataset.count_rows())

    def append(self, rows: pyarrow.Table) -> None:
        """Add rows in one commit: either all of them or none."""
        self.commit(self.write(rows))

    def write(self, rows: pyarrow.Table) -> list[Any]:
        """Write rows to new data files, which are not part of the table until ``commit``.

        Raises:
            RunError: the table was removed.
        """
        if not (self.path / _HEAD).is_file():  # Lance would create the folder again
            raise RunError(
                f"{self.path} was removed while it was being written. Start the job again."
            )
        with _errors_named(self.path):
            fragments: list[Any] = write_fragments(
                rows,
                _uri(self.path),
                max_rows_per_file=ROWS_PER_FILE,
                data_storage_version=STORAGE_VERSION,
            )
        self._check_whole(fragments)
        return fragments

    def commit(self, fragments: list[Any]) -> None:
        """Add the rows of written fragments to the table in one commit."""
        with _errors_named(self.path):
            operation = lance.LanceOperation.Append(fragments)
            self._dataset = lance.LanceDataset.commit(
                self._dataset, operation, read_version=self._dataset.version
            )
        self._write_head()

    def upsert(self, rows: pyarrow.Table) -> None:
        """Replace rows with the same ids and add new rows, in one commit."""
        with _errors_named(self.path):
            merge = (
                self._dataset.merge_insert("id")
                .when_matched_update_all()
                .when_not_matched_insert_all()
            )
            transaction, _ = merge.execute_uncommitted(rows)
            operation = transaction.operation
            self._check_whole(operation.new_fragments)
            self._dataset = lance.LanceDataset.commit(self._dataset, transaction)
        self._write_head(
            replaces=bool(operation.updated_fragments + operation.removed_fragment_ids)
        )

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows by id, in one commit."""
        with _errors_named(self.path):
            self._dataset.delete(_is_one_of(ids))
            self._dataset.checkout_latest()
        self._write_head(replaces=True)

    def take(self, indices: Sequence[int], columns: list[str] | None = None) -> pyarrow.Table:
        """Return rows by index, for increasing indices."""
        with _errors_named(self.path):
            return self._dataset.take(indices, columns=columns)

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> pyarrow.Table:
        """Return the rows [start, stop)."""
        with _errors_named(self.path):
            found = self._dataset.scanner(
                columns=columns, offset=start, limit=stop - start
            ).to_table()
        assert found.num_rows == stop - start, (
            f"{self.path}: {found.num_rows} of {stop - start} rows"
        )
        return found

    def find(self, ids: Sequence[str], columns: list[str]) -> pyarrow.Table:
        """Return the existing rows of these ids, in any order.

        With an index of ids this reads only those rows, otherwise all.
        """
        with _errors_named(self.path):
            return self._dataset.scanner(columns=columns, filter=_is_one_of(ids)).to_table()

    @property
    def is_indexed(self) -> bool:
        """Return whether ids are found without scanning many rows.

        Raises:
            DataError: a file of the index is damaged.
        """
        indices = self._dataset.describe_indices()
        for file in self._index_files(indices[0]) if indices else ():
            _check_footer(file)
        return bool(indices) and len(self) - indices[0].num_rows_indexed <= _may_lag(
            indices[0].num_rows_indexed
        )

    def batches(self, columns: list[str] | None = None) -> Iterator[pyarrow.Table | DataError]:
        """Yield all rows in tables of at most 4,096.

        If a data file cannot be read, the error is yielded instead of its remaining rows.
        """
        for fragment in self._dataset.get_fragments():
            try:
                with _errors_named(self.path):
                    for file in fragment.data_files():
                        _check_footer(self.path / "data" / file.path)
                    batches = fragment.to_batches(columns=columns, batch_size=4096)
                while True:
                    with _errors_named(self.path):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    yield pyarrow.Table.from_batches([batch])
            except DataError as error:
                yield error

    def compact(self, keep: timedelta, lazily: bool = False) -> None:
        """Compact small data files, update the index of ids, and remove old versions.

        Files that were written and never committed are removed too. Rows keep their order. If there
        is nothing to do, the version does not change.

        Args:
            keep: keep the files of versions that are younger than this.
            lazily: update the index only if many rows are missing in it.
        """
        version = self.version
        with _errors_named(self.path), release_freed_memory():
            plan = Compaction.plan(self._dataset, self._join_options())
            done = [task.execute(self._dataset) for task in plan.tasks]
            for result in done:
                self._check_whole(result.new_fragments)
            if done:
                Compaction.commit(self._dataset, done)
                self._dataset.checkout_latest()
            self._index(lazily)
            self._dataset.checkout_latest()
        if self.version != version:
            self._write_head()
        # Lance cannot tell a foreign file from one that was written and never committed.
        is_ours = not self.foreign_files()
        with _errors_named(self.path):
            self._dataset.cleanup_old_versions(older_than=keep, delete_unverified=is_ours)

    def _join_options(self) -> Any:
        """Return options for compaction in small batches.

        By default Lance reads 1,024 rows at a time, however long they are, and prefetches 2 GiB.
        """
        size = sum(
            file.file_size_bytes or 0
            for fragment in self._dataset.get_fragments()
            for file in fragment.data_files()
        )
        rows = max(1, min(8192, _PIECE_BYTES * len(self) // max(1, size)))
        return {
            "target_rows_per_fragment": ROWS_PER_FILE,
            "num_threads": 1,
            "batch_size": rows,
            "io_buffer_size": 8 * _PIECE_BYTES,
        }

    def _index(self, lazily: bool) -> None:
        """Create or update the index of ids.

        Every update rewrites the whole index, so growing tables use ``lazily``. Rows outside the
        index are scanned.
        """
        indices = self._dataset.describe_indices()
        if indices and not self._is_whole(indices[0]):
            self._dataset.drop_index(indices[0].name)
            indices, lazily = [], False
        indexed = indices[0].num_rows_indexed if indices else 0
        if len(self) - indexed < (_may_lag(indexed) if lazily else 1):
            return
        if indices:
            self._dataset.optimize.optimize_indices()
        else:
            self._dataset.create_scalar_index("id", "BTREE")
        self._dataset.checkout_latest()
        (index,) = self._dataset.describe_indices()
        if not self._is_whole(index):
            self._dataset.drop_index(index.name)  # rows are also found without it
            raise _cut_short(self.path / "_indices")
        for file in self._index_files(index):
            _sync_file(file)

    def _is_whole(self, index: Any) -> bool:
        return (
            sum(file.stat().st_size for file in self._index_files(index)) == index.total_size_bytes
        )

    def _index_files(self, index: Any) -> list[Path]:
        return [
            file
            for segment in index.segments
            for file in (self.path / "_indices" / str(segment.uuid)).glob("*")
        ]

    def _check_whole(self, fragments: list[Any]) -> None:
        """Flush new data files to disk, and check their sizes.

        On a full disk Lance may truncate the last write without an error.

        Raises:
            OSError: a file is truncated.
        """
        for fragment in fragments:
            for file in fragment.files:
                path = self.path / "data" / file.path
                if path.stat().st_size != file.file_size_bytes:
                    raise _cut_short(path)
                _sync_file(path)

    def _write_head(self, replaces: bool = False) -> None:
        """Record the version just committed as the newest in ``head.json``.

        Args:
            replaces: whether the commit has replaced or removed rows.

        Raises:
            OSError: the version cannot be read; its manifest is removed.
        """
        manifest = _manifest(self.path, self.version)
        try:
            with _errors_named(self.path):
                whole = lance.dataset(_uri(self.path)).count_rows() == len(self)
        except DataError:
            whole = False
        if not whole:
            manifest.unlink(missing_ok=True)  # the previous version remains the newest
            raise _cut_short(manifest)
        _sync_file(manifest)
        sync_folder(manifest.parent)
        head: dict[str, Any] = {
            "version": self.version,
            "rows": len(self),
            "manifest": file_sha256(manifest),
        }
        before = _read_head(self.path)["replacements"] if self.version > 1 else 0
        if replaces or before:
            head["replacements"] = before + replaces
        write_atomic(self.path / _HEAD, json.dumps(head) + "\n")


def foreign_files(path: Path) -> list[str]:
    """Return the names, below the path of a table, that Lance does not give, sorted."""
    return sorted(
        f"{folder}/{entry.name}"
        for folder, own in _NAMES.items()
        if (path / folder).is_dir()
        for entry in os.scandir(path / folder)
        if not own.fullmatch(entry.name)
    )


def _uri(path: Path) -> str:
    """Return what names a folder to Lance.

    It is absolute: Lance takes a relative path with a colon, such as ``run:3.lance``, for a URL.

    Raises:
        RunError: the name holds control characters or bytes that are not UTF-8.
    """
    name = str(path.absolute())
    if not is_utf8(path) or any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise RunError(
            f"got the path {printable(str(path))}; expected UTF-8 without control characters, as "
            "Lance requires. Name another path."
        )
    return name


def _check_no_links(folder: Path) -> None:
    """Check that no entry of a folder is a symbolic link: writing would change another table.

    Raises:
        DataError: one is.
    """
    try:
        links = [entry.name for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError:
        return  # the next step names what is missing
    if links:
        raise DataError(
            f"{folder / links[0]} is a symbolic link; expected a store whose parts are all in its "
            "own folder. Replace the link by a copy of what it points to."
        )


def _check_footer(path: Path) -> None:
    """Check that the tables in the footer of a Lance file fit into the file.

    Lance allocates the memory that a footer claims, and aborts the process if it is too much.

    Raises:
        DataError: the file is truncated, or its footer is damaged.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _FOOTER.size))
            _, columns_at, buffers_at, buffers, columns, *_ = _FOOTER.unpack(file.read())
    except FileNotFoundError:
        return  # Lance raises an error that names the file
    except struct.error:
        raise DataError(
            f"{path} is damaged: it is truncated. Restore the file from a copy."
        ) from None
    if columns_at + 16 * columns > size or buffers_at + 16 * buffers > size:
        raise DataError(
            f"{path} is damaged: its footer has tables that exceed the file. "
            "Restore the file from a copy."
        )


def _may_lag(indexed: int) -> int:
    """Return how many rows may be outside an index of this many rows."""
    return max(FEW_ROWS, indexed // 8)


def _cut_short(path: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = read_json(path / _HEAD)
        return {
            "version": int(head["version"]),
            "rows": int(head["rows"]),
            "manifest": str(head["manifest"]),
            "replacements": int(head.get("replacements", 0)),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path / _HEAD} is missing or damaged ({type(error).__name__}), so it is unknown "
            f"whether {path} is complete. Restore the file from a copy. Nothing was changed."
        ) from None


def _opened(path: Path, version: int | None = None) -> Any:
    with _errors_named(path):
        return lance.dataset(
            _uri(path),
            version,
            index_cache_size_bytes=_CACHE_BYTES,
            metadata_cache_size_bytes=_CACHE_BYTES,
        )


def _newest(path: Path) -> Any:
    """Return the newest version, or None if it cannot be read."""
    try:
        return _opened(path)
    except DataError:
        return None


def _manifest(path: Path, version: int) -> Path:
    """Return the path of a manifest.

    Lance numbers manifests downwards, so that the newest is the first in a listing.
    """
    return path / "_versions" / f"{2**64 - 1 - version:020d}.manifest"


def _version_of(manifest: Path) -> int | None:
    """Return the version of a manifest; None if the file is not one of Lance's."""
    return 2**64 - 1 - int(manifest.stem) if re.fullmatch("[0-9]{20}", manifest.stem) else None


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_one_of(ids: Sequence[str]) -> str:
    quoted = ",".join("'" + name.replace("'", "''") + "'" for name in ids)
    return f"id IN ({quoted})"


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Replace errors of Lance by smalto's errors for the duration of the block."""
    try:
        yield
    except SmaltoError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # Lance's own have none
            raise
        raise _explained(path, str(error)) from None
    except BaseException as error:
        # A panic in Rust arrives as PanicException, which does not derive from Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _explained(path, str(error)) from None


def _explained(path: Path, text: str) -> Exception:
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if f"(os error {number})" in text:
            return OSError(number, os.strerror(number), str(path))
    missing = re.search(
        r"[Nn]ot found: .*/((data|_versions|_indices|_deletions|_transactions)(/[\w-]+)+\.\w+)",
        text,
    )
    if missing and missing[2] == "_indices":
        return DataError(
            f"{path / missing[1]} is missing. No row is lost: `smalto store compact {path}` "
            "creates that index again."
        )
    if missing:
        return MissingFile(
            f"{path / missing[1]} is missing. If the store was compacted after it was opened, open "
            "it again. Otherwise the store is incomplete: restore that file from a copy."
        )
    return DataError(
        f"{path} cannot be read: it is damaged, or not a Lance table "
        f"({' '.join(text.split())[:300]}). Restore the folder from a copy."
    )
