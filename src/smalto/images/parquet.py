"""Images in a column of a parquet file, as Hugging Face datasets store them.

No torch here. Only this file imports pyarrow to read images.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from smalto.core.errors import MissingExtra

# Row groups whose images are mixed in training. A row group is read as a whole, so random access
# over all of them would read each one once per image.
MIXED_ROW_GROUPS = 4

_LABELS = ("label", "labels", "class", "cls", "category", "fine_label")
_LIKELY = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes"),
    *("images", "imgs", "pictures"),
)
_MOST_COLUMNS = 8  # named in an error


class NoImageColumn(ValueError):
    """A parquet file is whole, and none of its columns can hold images."""


class Cell(NamedTuple):
    """Where one image is in a parquet file.

    Attributes:
        row_group: the row group.
        row: within the row group; ``number`` within the file.
        column: ``image``, or ``image.bytes`` if the column is a struct.
        label: the class, as text; empty if there is none.
        element: the position in the row's list; -1 if the column holds one image per row.
    """

    row_group: int
    row: int
    number: int
    column: str
    label: str
    element: int


class _Column(NamedTuple):
    name: str
    is_list: bool


def cells(path: str) -> Iterator[Cell]:
    """Yield where each image is; every element of a list of images is an image of its own.

    Labels come from a column named ``label``, ``labels``, ``class``, ``cls``, ``category`` or
    ``fine_label``.

    Raises:
        MissingExtra: pyarrow is not installed.
        NoImageColumn: no column can hold images.
        ValueError: the file is damaged.
    """
    file = _pyarrow().ParquetFile(path)
    column = _image_column(file.schema_arrow)
    label_column = next((name for name in _LABELS if name in file.schema_arrow.names), None)
    number = 0
    for row_group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(row_group).num_rows
        labels = [None] * rows
        if label_column:
            table = file.read_row_group(row_group, columns=[label_column])
            labels = table.column(0).to_pylist()
        lengths = _list_lengths(file, row_group, column.name) if column.is_list else None
        for row, value in enumerate(labels):
            label = "" if value is None else str(value)
            for element in range(lengths[row] or 0) if lengths else (-1,):
                yield Cell(row_group, row, number, column.name, label, element)
            number += 1


def read_cell(path: str, row_group: int, column: str, row: int, element: int = -1) -> bytes:
    """Return the bytes of one image.

    Raises:
        ValueError: the cell is empty.
    """
    status = os.stat(path)
    value = _column(path, status.st_mtime_ns, row_group, column)[row]
    if element >= 0 and value.is_valid:
        value = value.values[element]
    if value.is_valid and hasattr(value, "keys"):  # a struct of bytes and path
        value = value["bytes"]
    data = value.as_py()
    if not data:
        raise ValueError("the cell is empty")
    return bytes(data)


@functools.lru_cache(maxsize=MIXED_ROW_GROUPS + 1)
def _column(path: str, modified: int, row_group: int, column: str) -> Any:
    """Return the image column of a row group."""
    table = _pyarrow().ParquetFile(path).read_row_group(row_group, columns=[column])
    return table.column(0)


def _list_lengths(file: Any, row_group: int, column: str) -> list[int | None]:
    """Return how many images each row of a row group has; None if it has no list.

    The lengths are in every part of the column, so the smallest is read: paths rather than bytes.
    """
    import pyarrow.compute

    paths = [file.schema.column(i).path for i in range(len(file.schema.names))]
    parts = [path for path in paths if path.startswith(f"{column}.")]
    smallest = min(parts, key=lambda path: (path.endswith(".bytes"), not path.endswith(".path")))
    table = file.read_row_group(row_group, columns=[smallest])
    return list(pyarrow.compute.list_value_length(table.column(0)).to_pylist())


def _image_column(schema: Any) -> _Column:
    """Return the column that holds images: one with a likely name, else the first that can."""
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def has_bytes(kind: Any) -> bool:
        return types.is_struct(kind) and any(f.name == "bytes" and is_binary(f.type) for f in kind)

    def is_list(kind: Any) -> bool:
        of_any_length = types.is_list(kind) or types.is_large_list(kind)
        return (of_any_length or types.is_fixed_size_list(kind)) and (
            is_binary(kind.value_type) or has_bytes(kind.value_type)
        )

    structs = [_Column(f"{f.name}.bytes", False) for f in schema if has_bytes(f.type)]
    plain = [_Column(f.name, False) for f in schema if is_binary(f.type)]
    lists = [_Column(f.name, True) for f in schema if is_list(f.type)]
    candidates = [*structs, *plain, *lists]
    if not candidates:
        columns = [f"{f.name} ({f.type})" for f in schema]
        more = len(columns) - _MOST_COLUMNS
        got = ", ".join(columns[:_MOST_COLUMNS]) + (f" and {more} more" if more > 0 else "")
        raise NoImageColumn(
            f"got the columns {got or 'none'}; expected one of type binary or "
            "struct<bytes: binary, path: string>, or a list of these"
        )
    return min(candidates, key=_unlikeliness)  # the first among equals


def _unlikeliness(column: _Column) -> int:
    name = column.name.split(".")[0].lower()
    return _LIKELY.index(name) if name in _LIKELY else len(_LIKELY)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", "reading parquet files") from None
    return pyarrow.parquet
