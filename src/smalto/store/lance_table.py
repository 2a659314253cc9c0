"""A Lance dataset that says so when a part of it is lost. The only file that imports lance.

Lance commits versions: a manifest lists the data files that count, and comes last. What it does not notice is a manifest that is gone
or damaged: it then takes an older one, and rows would be missing in silence. ``head.json`` beside it names the newest version and its
manifest's SHA-256. It is written after every commit. So a version that is newer than it is as good, and where the newer one cannot be
read, a power failure cut its commit off before anybody was told.
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
from smalto.core.errors import DataError, SmaltoError
from smalto.core.files import file_sha256, sync_folder, write_atomic

STORAGE_VERSION: Literal["2.1"] = (
    "2.1"  # of Lance's files, said explicitly: the default changes with its releases
)
ROWS_PER_FILE = 2**20
_CACHE_BYTES = 2**26
_FEW_ROWS = 2**17  # so many are read through without an index
_PIECE_BYTES = 2**21
_HEAD = "head.json"
_FOOTER = struct.Struct(
    "<QQQIIHH4s"
)  # of Lance's files: three offsets, numbers of buffers and columns, version, magic


class LanceTable:
    """Rows under a key ``id``; one process at a time may write (the caller sees to that), any number may read.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path, self._dataset = path, dataset

    @classmethod
    def create(cls, path: Path, schema: pyarrow.Schema) -> LanceTable:
        """An empty table in a folder that does not exist yet."""
        with _errors_named(path):
            dataset = lance.write_dataset(
                schema.empty_table(), str(path), schema=schema, data_storage_version=STORAGE_VERSION
            )
        table = cls(path, dataset)
        table._write_head()
        return table

    @classmethod
    def open(cls, path: Path) -> LanceTable:
        """Open the newest version.

        Raises:
            DataError: a manifest is missing or damaged.
        """
        head = _read_head(path)  # first: whoever writes now makes the table newer, not older
        manifest = _manifest(path, head["version"])
        dataset = _newest(path)
        if dataset is None or dataset.version <= head["version"]:
            if not manifest.is_file() or file_sha256(manifest) != head["manifest"]:
                if _read_head(path) != head:  # another process has just replaced it
                    return cls.open(path)
                raise DataError(
                    f"{manifest} is missing or damaged, so {path} is not whole: version {head['version']} with {head['rows']:,} rows was "
                    "committed. Restore that file from a copy; the data files are untouched."
                )
            if dataset is None or dataset.version < head["version"]:
                dataset = _opened(path, head["version"])
        return cls(path, dataset)

    def refresh(self) -> None:
        """See what others have committed."""
        self._dataset = LanceTable.open(self.path)._dataset

    def begin_writing(self) -> None:
        """See what others have committed, and remove what is left of a commit that was cut off: the next one takes its number."""
        self.refresh()
        for manifest in (self.path / "_versions").glob("*.manifest"):
            if _version_of(manifest) > self.version:
                manifest.unlink()

    @property
    def version(self) -> int:
        return int(self._dataset.version)

    @property
    def schema(self) -> pyarrow.Schema:
        return self._dataset.schema

    @property
    def num_fragments(self) -> int:
        return len(self._dataset.get_fragments())

    def __len__(self) -> int:
        return int(self._dataset.count_rows())

    def append(self, rows: pyarrow.Table) -> None:
        """Add rows in one commit: all of them or none."""
        self.commit(self.write(rows))

    def write(self, rows: pyarrow.Table) -> list[Any]:
        """Write rows to files that do not count until ``commit``."""
        with _errors_named(self.path):
            fragments: list[Any] = write_fragments(
                rows,
                str(self.path),
                max_rows_per_file=ROWS_PER_FILE,
                data_storage_version=STORAGE_VERSION,
            )
        self._check_whole(fragments)
        return fragments

    def commit(self, fragments: list[Any]) -> None:
        """Let written rows count, all at once."""
        with _errors_named(self.path):
            operation = lance.LanceOperation.Append(fragments)
            self._dataset = lance.LanceDataset.commit(
                self._dataset, operation, read_version=self._dataset.version
            )
        self._write_head()

    def upsert(self, rows: pyarrow.Table) -> None:
        """Replace the rows of these ids and add new ones, in one commit."""
        with _errors_named(self.path):
            merge = (
                self._dataset.merge_insert("id")
                .when_matched_update_all()
                .when_not_matched_insert_all()
            )
            transaction, _ = merge.execute_uncommitted(rows)
            self._check_whole(transaction.operation.new_fragments)
            self._dataset = lance.LanceDataset.commit(self._dataset, transaction)
        self._write_head()

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows by id, in one commit."""
        with _errors_named(self.path):
            self._dataset.delete(_is_one_of(ids))
            self._dataset.checkout_latest()
        self._write_head()

    def take(self, indices: Sequence[int], columns: list[str] | None = None) -> pyarrow.Table:
        """Rows by number, in rising order."""
        with _errors_named(self.path):
            return self._dataset.take(indices, columns=columns)

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> pyarrow.Table:
        """Rows [start, stop)."""
        with _errors_named(self.path):
            found = self._dataset.scanner(
                columns=columns, offset=start, limit=stop - start
            ).to_table()
        assert found.num_rows == stop - start, (
            f"{self.path}: {found.num_rows} of {stop - start} rows"
        )
        return found

    def find(self, ids: Sequence[str], columns: list[str]) -> pyarrow.Table:
        """The rows of these ids, as many as there are, in no order. With an index this takes the time of those rows, not of all."""
        with _errors_named(self.path):
            return self._dataset.scanner(columns=columns, filter=_is_one_of(ids)).to_table()

    @property
    def is_indexed(self) -> bool:
        """Whether ids are found without reading through many rows. Raises DataError where the index is seen to be damaged."""
        indices = self._dataset.describe_indices()
        for file in self._index_files(indices[0]) if indices else ():
            _check_footer(file)
        return bool(indices) and len(self) - indices[0].num_rows_indexed <= _may_lag(
            indices[0].num_rows_indexed
        )

    def batches(self, columns: list[str] | None = None) -> Iterator[pyarrow.Table | DataError]:
        """All rows a few thousand at a time; for a data file that cannot be read the error instead of its remaining rows."""
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

    def compact(self, keep: timedelta = timedelta(0), lazily: bool = False) -> None:
        """Join small data files, bring the index of ids up to date, and remove what no version of the last ``keep`` needs.

        Files that were written and never committed go too. Rows keep their order. Does nothing where nothing is to be done.
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
        with _errors_named(self.path):
            self._dataset.cleanup_old_versions(older_than=keep, delete_unverified=True)

    def _join_options(self) -> Any:
        """In small pieces: of its own accord Lance takes 1,024 rows at a time, however long, and reads up to 2 GiB ahead."""
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
        """Index the ids. A whole index is merged anew each time, so for growing tables ``lazily``; rows outside it are read through."""
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
            self._dataset.drop_index(index.name)  # rows are found without it too
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
        """Flush new data files to disk, and see that they are as long as they should be: where a disk is full, Lance may cut the last
        write short without a word."""
        for fragment in fragments:
            for file in fragment.files:
                path = self.path / "data" / file.path
                if path.stat().st_size != file.file_size_bytes:
                    raise _cut_short(path)
                _sync_file(path)

    def _write_head(self) -> None:
        """Say that the version just committed is the newest, after a look whether it can be read."""
        manifest = _manifest(self.path, self.version)
        try:
            with _errors_named(self.path):
                whole = lance.dataset(str(self.path)).count_rows() == len(self)
        except DataError:
            whole = False
        if not whole:
            manifest.unlink(missing_ok=True)  # the version before is what counts
            raise _cut_short(manifest)
        _sync_file(manifest)
        sync_folder(manifest.parent)
        head = {"version": self.version, "rows": len(self), "manifest": file_sha256(manifest)}
        write_atomic(self.path / _HEAD, json.dumps(head) + "\n")


def _check_footer(path: Path) -> None:
    """See that the tables at the end of a Lance file fit into it: Lance asks for the memory that they claim, and aborts the process."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _FOOTER.size))
            _, columns_at, buffers_at, buffers, columns, *_ = _FOOTER.unpack(file.read())
    except FileNotFoundError:
        return  # Lance says so
    except struct.error:
        raise DataError(f"{path} is damaged: it is cut short.") from None
    if columns_at + 16 * columns > size or buffers_at + 16 * buffers > size:
        raise DataError(f"{path} is damaged: its end claims tables that do not fit into it.")


def _may_lag(indexed: int) -> int:
    """So many rows may be outside an index of this size."""
    return max(_FEW_ROWS, indexed // 8)


def _cut_short(path: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads((path / _HEAD).read_text(encoding="utf-8"))
        return {
            "version": int(head["version"]),
            "rows": int(head["rows"]),
            "manifest": str(head["manifest"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path / _HEAD} is missing or damaged ({type(error).__name__}), so nobody can say whether {path} is whole. "
            "Restore the file from a copy. Nothing was changed."
        ) from None


def _opened(path: Path, version: int | None = None) -> Any:
    with _errors_named(path):
        return lance.dataset(
            str(path),
            version,
            index_cache_size_bytes=_CACHE_BYTES,
            metadata_cache_size_bytes=_CACHE_BYTES,
        )


def _newest(path: Path) -> Any:
    """The newest version, if it can be read."""
    try:
        return _opened(path)
    except DataError:
        return None


def _manifest(path: Path, version: int) -> Path:
    """Lance numbers manifests downwards, so that the newest comes first in a listing."""
    return path / "_versions" / f"{2**64 - 1 - version:020d}.manifest"


def _version_of(manifest: Path) -> int:
    return 2**64 - 1 - int(manifest.stem)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_one_of(ids: Sequence[str]) -> str:
    quoted = ",".join("'" + name.replace("'", "''") + "'" for name in ids)
    return f"id IN ({quoted})"


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """What Lance raises, in the words of this project."""
    try:
        yield
    except SmaltoError:
        raise
    except Exception as error:
        raise _explained(path, str(error)) from None
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # how a panic in Rust arrives; it is no Exception
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
            f"{path / missing[1]} is missing. No row is lost: `smalto store compact {path}` makes that index anew."
        )
    if missing:
        return DataError(
            f"{path / missing[1]} is missing, so {path} is not whole. Rows in other files can be read; restore that one from a copy, or "
            "tokenize the images anew with --overwrite."
        )
    return DataError(
        f"{path} cannot be read: it is damaged, or no Lance table ({' '.join(text.split())[:300]})."
    )
