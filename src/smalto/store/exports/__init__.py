"""Token stores in the formats of other libraries, and back.

An export is a folder with a ``_header.json``. ``import_store`` makes a token store with the same
rows from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smalto.core.errors import ConfigError, DataError, RunError
from smalto.core.files import (
    atomic_path,
    check_writable,
    named_path,
    remove_leftovers,
    sync_tree,
)
from smalto.core.progress import Progress
from smalto.store.exports.export_header import (
    HEADER,
    ROWS_AT_ONCE,
    ExportFormat,
    ExportHeader,
    default_rows_per_shard,
    group_rows,
    read_header,
)
from smalto.store.exports.numpy_arrays import read_numpy, write_numpy
from smalto.store.exports.parquet_rows import read_parquet, write_parquet
from smalto.store.exports.var_tensors import read_var, write_var
from smalto.store.exports.webdataset_shards import read_webdataset, write_webdataset
from smalto.store.schema import TokenRow
from smalto.store.token_store import TokenStore
from smalto.store.writer import MANY_SMALL_FILES, SOME_SMALL_FILES

__all__ = ["FORMATS", "ExportFormat", "ExportHeader", "export_store", "import_store"]

FORMATS = {
    "numpy": ExportFormat(write_numpy, read_numpy),
    "var": ExportFormat(write_var, read_var, max_rows_per_shard=10_000, needs_fixed_layout=True),
    "parquet": ExportFormat(write_parquet, read_parquet, max_rows_per_shard=100_000),
    "webdataset": ExportFormat(write_webdataset, read_webdataset, max_rows_per_shard=10_000),
}


def export_store(
    store: TokenStore,
    format: str,
    out: str | Path,
    *,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write all rows of a token store in another format.

    Args:
        store: the token store.
        format: ``"numpy"``: arrays, with ``tokens.npy`` for ``numpy.load(mmap_mode="r")``.
            ``"var"``: safetensors shards with one int64 tensor per scale and class numbers, for
            training a next-scale model. ``"parquet"``: one row per image in the folder ``rows``.
            ``"webdataset"``: tar shards.
        out: a folder that does not exist yet.
        rows_per_shard: rows in every shard but the last, for all formats but numpy. The rows of
            one shard are held in memory. Default: at most 10,000 (parquet: 100,000), and for 64
            rows or more at most an eighth of the rows, rounded up, which gives at least 8 shards.
        progress: receives the number of rows written.

    Returns:
        ``out``.

    Raises:
        ConfigError: the format is unknown, it needs rows of one layout and the store has several,
            or ``rows_per_shard`` does not fit.
        RunError: ``out`` exists.
    """
    out = named_path(out, "the export")
    progress = progress or Progress()
    header = _export_header(store, format, rows_per_shard)
    _check_new(out)
    check_writable(out)
    remove_leftovers(out.parent, out.name)
    progress.start(f"exporting as {format}", len(store), "rows")
    with atomic_path(out) as folder:
        folder.mkdir()
        FORMATS[format].write(_rows(store, progress), header, folder)
        (folder / HEADER).write_text(header.to_json(indent=2) + "\n", encoding="utf-8")
        sync_tree(folder)
    progress.finish()
    return out


def import_store(
    export: str | Path, out: str | Path, *, progress: Progress | None = None
) -> TokenStore:
    """Make a token store from an export.

    Args:
        export: a folder that ``export_store`` wrote.
        out: a folder that does not exist yet.
        progress: receives the number of rows read.

    Raises:
        DataError: ``export`` is not an export, has another format version, or is damaged.
        RunError: ``out`` exists.
    """
    export = Path(export)
    out = named_path(out, "the store")
    progress = progress or Progress()
    header = read_header(export)
    if header.format not in FORMATS:
        raise DataError(
            f"{export}: got the export format {header.format!r}; expected one of "
            f"{', '.join(FORMATS)}. Export the token store again in one of them."
        )
    _check_regular_files(export)
    _check_new(out)
    check_writable(out)
    remove_leftovers(out.parent, out.name)
    progress.start("importing", header.num_rows, "rows")
    with atomic_path(out) as folder:  # an incomplete store never appears
        store = TokenStore.create(folder, header.store)
        num_rows = _append_rows(store, export, header, progress)
        if num_rows != header.num_rows:
            raise DataError(
                f"{export} is incomplete: got {num_rows:,} rows; expected {header.num_rows:,}, "
                f"the number in {HEADER}. Export the token store again."
            )
    progress.finish()
    return TokenStore.open(out)


def _export_header(store: TokenStore, format: str, rows_per_shard: int | None) -> ExportHeader:
    if format not in FORMATS:
        raise ConfigError(
            f"got the format {format!r}; expected one of {', '.join(FORMATS)}. Choose one of them."
        )
    if FORMATS[format].needs_fixed_layout and store.header.grids is None:
        raise ConfigError(
            f"got a token store whose images have different layouts; expected one layout for the "
            f"format {format}. Tokenize with --size, or export with --format numpy."
        )
    return ExportHeader(
        format=format,
        num_rows=len(store),
        rows_per_shard=_shard_size(format, len(store), rows_per_shard),
        classes=store.classes(),
        store=store.header,
    )


def _shard_size(format: str, num_rows: int, rows_per_shard: int | None) -> int | None:
    max_rows = FORMATS[format].max_rows_per_shard
    if max_rows is None:
        if rows_per_shard is not None:
            raise ConfigError(
                f"got {rows_per_shard} rows per shard; expected none, because the format {format} "
                "has no shards. Omit --rows-per-shard, or export with --format webdataset."
            )
        return None
    if rows_per_shard is None:
        return default_rows_per_shard(num_rows, max_rows)
    if rows_per_shard < 1:
        raise ConfigError(
            f"got {rows_per_shard} rows per shard; expected at least 1. "
            "Omit --rows-per-shard for the default."
        )
    return rows_per_shard


def _check_new(out: Path) -> None:
    if out.exists():
        raise RunError(f"got {out}, which exists already; expected a new folder. Choose another.")


def _check_regular_files(export: Path) -> None:
    """Raise DataError if a file is a pipe or a device, from which reading may never end."""
    for path in sorted(export.rglob("*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(
                f"{path} is a pipe or a device; expected a file. Export the token store again."
            )


def _rows(store: TokenStore, progress: Progress) -> Iterator[TokenRow]:
    for start in range(0, len(store), ROWS_AT_ONCE):
        rows = store.token_rows(start, start + ROWS_AT_ONCE)
        yield from rows
        progress.advance(len(rows))


def _append_rows(store: TokenStore, export: Path, header: ExportHeader, progress: Progress) -> int:
    """Append the rows of an export and return their number."""
    num_rows = 0
    for group in group_rows(_read_rows(export, header), ROWS_AT_ONCE):
        try:
            store.append(group)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise _damaged(export, error) from None
        store.merge_small_files(MANY_SMALL_FILES)
        num_rows += len(group)
        progress.advance(len(group))
    store.merge_small_files(SOME_SMALL_FILES)
    return num_rows


def _read_rows(export: Path, header: ExportHeader) -> Iterator[TokenRow]:
    """Yield the rows of an export. Its files may hold anything, so any error of reading counts."""
    try:
        yield from FORMATS[header.format].read(header, export)
    except Exception as error:
        raise _damaged(export, error) from None


def _damaged(export: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{export} cannot be read: {reason}. Check its drive, then try again.")
    return DataError(f"{export} is damaged: {reason}. Export the token store again.")
