"""Header of an export, and the helpers that every export format uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import Field

from smalto.core.config import Config, parse_config
from smalto.core.errors import DataError
from smalto.core.files import read_json
from smalto.core.layout import TokenLayout
from smalto.store.schema import StoreHeader, TokenRow

HEADER = "_header.json"  # pyarrow and pandas skip names with a leading underscore
METADATA_KEY = "smalto"
FORMAT_VERSION: Final = 2
ROWS_AT_ONCE = 4096
_HEADER_OF_VERSION_1 = "header.json"
_MIN_SHARDS = 8
_MIN_ROWS_PER_SHARD = 8


class ExportHeader(Config):
    """Contents of ``_header.json`` in an export.

    Attributes:
        format: a key of ``FORMATS``.
        num_rows: number of rows in all shards.
        rows_per_shard: rows in every shard but the last; None if the format is not sharded.
        classes: names of the classes; the class number is the index in this list.
        store: header of the token store.
    """

    format: str
    format_version: Literal[2] = FORMAT_VERSION
    num_rows: int = Field(ge=0)
    rows_per_shard: int | None = Field(None, ge=1)
    classes: list[str]
    store: StoreHeader

    def to_json(self, indent: int | None = None) -> str:
        """Return the header as ASCII JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=indent)

    def class_numbers(self, rows: Iterable[TokenRow]) -> list[int]:
        """Return the class number of every row, -1 for a row without a label."""
        number_of = {label: number for number, label in enumerate(self.classes)}
        return [number_of[row.label] if row.label else -1 for row in rows]

    def label(self, class_number: int) -> str:
        """Return the label of a class number, empty for -1.

        Raises:
            ValueError: the header has no such class.
        """
        if not -1 <= class_number < len(self.classes):
            raise ValueError(
                f"got class number {class_number}; expected -1 to {len(self.classes) - 1}"
            )
        return self.classes[class_number] if class_number >= 0 else ""


class ExportFormat(NamedTuple):
    """Format of an export: how to write rows to a folder and read them back.

    Attributes:
        write: writes the rows, which the header describes, to an empty folder.
        read: yields the rows of a folder in the order in which they were written.
        max_rows_per_shard: limit for the default shard size; None if the format is not sharded.
        needs_fixed_layout: True if all rows must have the same layout.
    """

    write: Callable[[Iterator[TokenRow], ExportHeader, Path], None]
    read: Callable[[ExportHeader, Path], Iterator[TokenRow]]
    max_rows_per_shard: int | None = None
    needs_fixed_layout: bool = False


def read_header(export: Path) -> ExportHeader:
    """Read the header of an export.

    Raises:
        DataError: ``export`` is not an export, or it has another format version.
    """
    path = export / HEADER
    if not path.exists() and (export / _HEADER_OF_VERSION_1).exists():
        path = export / _HEADER_OF_VERSION_1
    try:
        fields = read_json(path)
        _check_version(fields, export)
        return parse_config(ExportHeader, fields, str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{export} is not an export of a token store: got {error}; expected a folder with a "
            f"readable {HEADER}. Make one with: smalto store export STORE --out FOLDER"
        ) from None


def _check_version(fields: object, export: Path) -> None:
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise DataError(
            f"{export}: got export format version {version}; expected version {FORMAT_VERSION}. "
            "Export the token store again with this version of smalto: "
            "smalto store export STORE --out FOLDER"
        )


def default_rows_per_shard(num_rows: int, max_rows: int) -> int:
    """Return a shard size that gives at least 8 shards, of at least 8 rows each.

    Data loaders distribute whole shards over their workers, so one shard keeps one worker busy.
    """
    rows = -(-num_rows // _MIN_SHARDS)
    return min(max_rows, max(_MIN_ROWS_PER_SHARD, rows))


def split_into_shards(
    rows: Iterable[TokenRow], header: ExportHeader
) -> Iterator[tuple[str, list[TokenRow]]]:
    """Yield the number and the rows of every shard.

    The numbers have leading zeros, so that sorted file names are in the order of the rows.
    """
    assert header.rows_per_shard is not None
    num_shards = -(-header.num_rows // header.rows_per_shard)
    digits = max(5, len(str(num_shards - 1)))
    for shard, group in enumerate(group_rows(rows, header.rows_per_shard)):
        yield f"{shard:0{digits}d}", group


def group_rows(rows: Iterable[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    """Yield lists of ``size`` consecutive rows; the last list may be shorter."""
    group: list[TokenRow] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def flat_grids(row: TokenRow) -> list[int]:
    """Return the layout of a row as (rows, columns, rows, columns, ...)."""
    assert row.layout is not None
    return [n for grid in row.layout.grids for n in grid]


def layout_of(flat: Iterable[int]) -> TokenLayout:
    """Return the layout that ``flat_grids`` flattened."""
    numbers = [int(n) for n in flat]
    return TokenLayout(tuple(zip(numbers[::2], numbers[1::2], strict=True)))
