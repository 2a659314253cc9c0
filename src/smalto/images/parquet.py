"""Images in a column of a parquet file, as Hugging Face datasets store them. No torch here; pyarrow is imported only here."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

from smalto.core.errors import MissingExtra

MIXED_ROW_GROUPS = 4  # row groups whose images are mixed in training: a row group is read as a whole, so jumping about would read for ever
_LABELS = ("label", "labels", "class", "cls", "category", "fine_label")
_LIKELY = ("image", "img", "jpg", "jpeg", "png", "webp", "image", "photo", "bytes")


def cells(path: str) -> Iterator[tuple[int, int, int, str, str]]:
    """(row group, row in it, row in the file, column, label) of every image; the column is ``image`` or ``image.bytes``.

    Labels come from a column of that name, as text; without one they are empty.

    Raises:
        MissingExtra: pyarrow is not installed.
        ValueError: the file is damaged, or no column holds images.
    """
    parquet = _pyarrow()
    file = parquet.ParquetFile(path)
    column, number = _image_column(file.schema_arrow), 0
    labelled = next((name for name in _LABELS if name in file.schema_arrow.names), None)
    for row_group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(row_group).num_rows
        values = (
            file.read_row_group(row_group, columns=[labelled]).column(0).to_pylist()
            if labelled
            else [None] * rows
        )
        for row, value in enumerate(values):
            yield row_group, row, number, column, "" if value is None else str(value)
            number += 1


def read_cell(path: str, row_group: int, column: str, row: int) -> bytes:
    """The bytes of one image. Raises ValueError where the cell is empty."""
    status = os.stat(path)
    value = _column(path, status.st_mtime_ns, row_group, column)[row].as_py()
    if not value:
        raise ValueError("the cell is empty")
    return bytes(value)


@functools.lru_cache(maxsize=MIXED_ROW_GROUPS + 1)
def _column(path: str, modified: int, row_group: int, column: str) -> Any:
    """The image column of a row group, as bytes."""
    import pyarrow

    table = _pyarrow().ParquetFile(path).read_row_group(row_group, columns=[column])
    values = table.column(0).combine_chunks()
    return values.field("bytes") if isinstance(values, pyarrow.StructArray) else values


def _image_column(schema: Any) -> str:
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    structs = [
        f.name
        for f in schema
        if types.is_struct(f.type) and any(c.name == "bytes" and is_binary(c.type) for c in f.type)
    ]
    plain = [f.name for f in schema if is_binary(f.type)]
    candidates = [f"{name}.bytes" for name in structs] + plain
    # Likely names first; sorting keeps the order of the file among equals.
    candidates.sort(
        key=lambda name: (
            _LIKELY.index(low) if (low := name.split(".")[0].lower()) in _LIKELY else len(_LIKELY)
        )
    )
    if not candidates:
        raise ValueError(
            f"no column holds images as bytes; there are {', '.join(schema.names[:8])}"
        )
    return candidates[0]


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", "reading parquet files") from None
    return pyarrow.parquet
