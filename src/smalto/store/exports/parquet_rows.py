"""Export as Parquet: one row per image in ``rows/rows-00000.parquet`` and so on.

The folder ``rows`` holds nothing else: ``polars.scan_parquet`` refuses a folder with a file of
another extension, so the header lies outside it. The schema metadata of every file has the export
header as JSON under the key ``smalto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
from pyarrow import parquet

from smalto.store.exports.export_header import (
    METADATA_KEY,
    ROWS_AT_ONCE,
    ExportHeader,
    flat_grids,
    layout_of,
    split_into_shards,
)
from smalto.store.schema import TokenRow

ROWS_FOLDER = "rows"


def write_parquet(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    """Write rows as Parquet files."""
    (folder / ROWS_FOLDER).mkdir()
    if header.num_rows == 0:  # readers need one file to learn the schema
        _write_file([], header, folder, "00000")
    for number, group in split_into_shards(rows, header):
        _write_file(group, header, folder, number)


def read_parquet(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    """Yield the rows of a Parquet export."""
    names = ("id", "grids", "label", "height", "width", "crop")
    for path in sorted((folder / ROWS_FOLDER).glob("rows-*.parquet")):
        for batch in parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            columns = (batch.column(name).to_pylist() for name in names)
            for tokens, id, grids, label, height, width, crop in zip(
                batch.column("tokens"), *columns, strict=True
            ):
                row_tokens = tokens.values.to_numpy()
                yield TokenRow(id, row_tokens, layout_of(grids), label, height, width, tuple(crop))


def _write_file(group: list[TokenRow], header: ExportHeader, folder: Path, number: str) -> None:
    schema = _schema(header)
    columns = [
        [row.id for row in group],
        [numpy.asarray(row.tokens, header.store.dtype) for row in group],
        [flat_grids(row) for row in group],
        [row.label for row in group],
        [row.height for row in group],
        [row.width for row in group],
        [list(row.crop) for row in group],
    ]
    arrays = [pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    path = folder / ROWS_FOLDER / f"rows-{number}.parquet"
    parquet.write_table(pyarrow.table(arrays, schema), path, row_group_size=ROWS_AT_ONCE)


def _schema(header: ExportHeader) -> pyarrow.Schema:
    return pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("tokens", pyarrow.list_(pyarrow.from_numpy_dtype(header.store.dtype))),
            ("grids", pyarrow.list_(pyarrow.int32())),
            ("label", pyarrow.string()),
            ("height", pyarrow.int32()),
            ("width", pyarrow.int32()),
            ("crop", pyarrow.list_(pyarrow.int32())),
        ],
        {METADATA_KEY: header.to_json()},
    )
