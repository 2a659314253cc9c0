"""Rows of a token store and the header that they share: what they mean, and how they lie in Arrow tables."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import numpy
import pyarrow
from pydantic import Field
from torch import Tensor

from smalto.core.config import Config, parse_config
from smalto.core.errors import InputError, RunError
from smalto.core.identity import TokenizerIdentity, token_dtype
from smalto.core.layout import TokenLayout
from smalto.images.transforms import Transform

NUMBERS = ("height", "width", "size", "modified")


class StoreHeader(Config):
    """What all tokens of a store share.

    Attributes:
        fingerprint: of the tokenizer; ``kind``: of its quantizer; ``tokenizer``: where it was.
        grids: the layout of every image; None where images keep their shape.
        transform: what was done to images first.
        precision: what the encoder computed in.
        source: where the images were.
    """

    format_version: Literal[1] = 1
    fingerprint: str
    kind: str
    codebook_size: int = Field(ge=1)
    grids: tuple[tuple[int, int], ...] | None
    transform: Transform | str
    precision: Literal["float32", "bf16"]
    tokenizer: str = ""
    source: str = ""

    @classmethod
    def of(
        cls,
        identity: TokenizerIdentity,
        *,
        layout: TokenLayout | None = None,
        transform: Transform | str = "",
        precision: str = "float32",
        path: str | Path = "",
        source: str = "",
    ) -> StoreHeader:
        """Return the header for tokens of one tokenizer.

        Args:
            identity: of the tokenizer: ``tokenizer.identity()``.
            layout: of every image; None: images keep their shape, and every row has its own.
            transform, precision: how images become tokens.
            path: the folder of the tokenizer, for later jobs to find it.
            source: the folder of the images.

        Raises:
            ConfigError: a value out of range.
        """
        metadata = {
            "fingerprint": identity.fingerprint,
            "kind": identity.kind,
            "codebook_size": identity.codebook_size,
            "grids": layout.grids if layout is not None else None,
            "transform": transform,
            "precision": precision,
            "tokenizer": str(Path(path).resolve()) if path else "",
            "source": source,
        }
        return parse_config(cls, metadata, "token store")

    @property
    def layout(self) -> TokenLayout | None:
        return TokenLayout(self.grids) if self.grids is not None else None

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """Of tokens on disk: the smaller of two that holds every index."""
        return token_dtype(self.codebook_size)

    def check_same(self, other: StoreHeader, path: Path) -> None:
        """Refuse tokens that may not be mixed with those of the store in ``path``.

        Raises:
            RunError: names what differs, with both values.
        """
        names = {"fingerprint": "tokenizer", "grids": "layout"}
        different = [
            f"{names.get(key, key)}: {_shown(getattr(self, key))} in the store, {_shown(getattr(other, key))} now"
            for key in ("fingerprint", "kind", "codebook_size", "grids", "transform", "precision")
            if getattr(self, key) != getattr(other, key)
        ]
        if different:
            raise RunError(
                f"{path} holds other tokens ({'; '.join(different)}). Tokens of two kinds do not mix: name another --out."
            )


class TokenRow(NamedTuple):
    """The tokens of one view of one image.

    Attributes:
        id: unique in the store; see ``row_id``.
        tokens: whole numbers [L].
        layout: of the tokens; None takes the store's.
        label: the class, or empty.
        height, width: of the original image in pixels.
        crop: (top, left, height, width) of the part that was tokenized, in pixels of the original.
        size, modified, digest: of the image's file: bytes, time in ns, 16 bytes of its contents' hash.
    """

    id: str
    tokens: Sequence[int] | numpy.ndarray | Tensor
    layout: TokenLayout | None = None
    label: str = ""
    height: int = 0
    width: int = 0
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    size: int = 0
    modified: int = 0
    digest: bytes = b""


def row_id(name: str, view: str = "") -> str:
    """The id of an image's row: its name, with ``%``, ``?``, control characters and bytes that are no UTF-8 percent-encoded, and the
    view (such as ``flip``) after a ``?``."""
    return _NEEDS_ENCODING.sub(_percent, name) + (f"?{view}" if view else "")


def split_id(id: str) -> tuple[str, str]:
    """(name, view) of an id: what ``row_id`` was given."""
    name, _, view = id.partition("?")
    return unquote(name, errors="surrogateescape"), view


def rows_to_table(rows: Sequence[TokenRow], header: StoreHeader) -> pyarrow.Table:
    """Rows as an Arrow table, checked.

    Raises:
        InputError: an id that is empty, a token outside the codebook, or another number of tokens than the layout's.
    """
    schema, fixed = store_schema(header), header.layout
    if not all(row.id for row in rows):
        raise InputError(f"every row needs an id; got {[row.id for row in rows][:5]} ...")
    if odd := [row.id for row in rows if _NO_ID.search(row.id)]:
        raise InputError(
            f"ids are texts without control characters; got {odd[0]!r}. row_id(name) makes one of any name."
        )
    arrays = [_as_array(row, fixed, header.codebook_size) for row in rows]
    flat = pyarrow.array(numpy.concatenate(arrays).astype(header.dtype, copy=False))
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "label": [_NO_UTF8.sub(_percent, row.label) or None for row in rows],
    }
    if fixed is not None:
        columns["tokens"] = pyarrow.FixedSizeListArray.from_arrays(flat, fixed.num_tokens)
    else:
        offsets = numpy.cumsum([0, *map(len, arrays)], dtype=numpy.int32)
        columns["tokens"] = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), flat)
        columns["grids"] = [
            [n for grid in row.layout.grids for n in grid] for row in rows if row.layout is not None
        ]
    columns |= {name: [getattr(row, name) for row in rows] for name in NUMBERS}
    columns |= {
        "crop": [list(row.crop) for row in rows],
        "digest": [row.digest.ljust(16, b"\0") if row.digest else None for row in rows],
    }
    columns["crc"] = [0] * len(rows)
    cells = [
        columns[f.name]
        if isinstance(columns[f.name], pyarrow.Array)
        else pyarrow.array(columns[f.name], f.type)
        for f in schema
    ]
    table = pyarrow.table(cells, schema=schema)
    return table.set_column(
        table.num_columns - 1,
        schema.field("crc"),
        pyarrow.array(checksums(table), pyarrow.uint32()),
    )


def checksums(table: pyarrow.Table) -> list[int]:
    """CRC-32 of each row, over all of its columns but ``crc``."""
    grids = (
        [_bytes_of(row) for row in _lists(table["grids"])]
        if "grids" in table.column_names
        else [b""] * table.num_rows
    )
    numbers = numpy.stack([table[name].to_numpy().astype(numpy.int64) for name in NUMBERS], axis=1)
    numbers = numpy.concatenate(
        [numbers, flat_values(table["crop"]).reshape(-1, 4).astype(numpy.int64)], axis=1
    )
    texts = zip(
        table["id"].to_pylist(),
        table["label"].to_pylist(),
        table["digest"].to_pylist(),
        grids,
        strict=True,
    )
    found = []
    for row, (tokens, (id, label, digest, grid)) in enumerate(
        zip(token_arrays(table), texts, strict=True)
    ):
        words = f"{id}\0{label or ''}\0".encode() + (digest or b"") + grid
        found.append(
            zlib.crc32(_bytes_of(tokens), zlib.crc32(numbers[row].tobytes(), zlib.crc32(words)))
        )
    return found


_NO_ID = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_NO_UTF8 = re.compile("[\ud800-\udfff]")
_NEEDS_ENCODING = re.compile("[%?\x00-\x1f\x7f\ud800-\udfff]")


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def _as_array(row: TokenRow, fixed: TokenLayout | None, codebook_size: int) -> numpy.ndarray:
    tokens = numpy.asarray(row.tokens).reshape(-1)
    layout = row.layout or fixed
    if layout is None:
        raise InputError(f"row {row.id!r} needs a layout: in this store images keep their shape.")
    if fixed is not None and layout != fixed:
        raise InputError(
            f"row {row.id!r} has the layout {layout}; all rows of this store have {fixed}."
        )
    if tokens.dtype.kind not in "iu" or len(tokens) != layout.num_tokens:
        raise InputError(
            f"row {row.id!r}: the layout {layout} has {layout.num_tokens} tokens, whole numbers; got {tokens.dtype} [{len(tokens)}]."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= codebook_size:
        raise InputError(
            f"row {row.id!r}: tokens lie in [0, {codebook_size}); got {int(tokens.min())} to {int(tokens.max())}."
        )
    return tokens


def store_schema(header: StoreHeader) -> pyarrow.Schema:
    kind, fixed = pyarrow.from_numpy_dtype(header.dtype), header.layout
    tokens = pyarrow.list_(kind, fixed.num_tokens) if fixed is not None else pyarrow.list_(kind)
    fields = [
        pyarrow.field("id", pyarrow.string(), nullable=False),
        pyarrow.field("tokens", tokens, nullable=False),
    ]
    if fixed is None:
        fields.append(pyarrow.field("grids", pyarrow.list_(pyarrow.int32()), nullable=False))
    fields += [
        pyarrow.field("label", pyarrow.string()),
        pyarrow.field("height", pyarrow.int32()),
        pyarrow.field("width", pyarrow.int32()),
        pyarrow.field("crop", pyarrow.list_(pyarrow.int32(), 4)),
        pyarrow.field("size", pyarrow.int64()),
        pyarrow.field("modified", pyarrow.int64()),
        pyarrow.field("digest", pyarrow.binary(16)),
        pyarrow.field("crc", pyarrow.uint32(), nullable=False),
    ]
    return pyarrow.schema(
        fields, {"smalto": json.dumps(header.model_dump(mode="json"), sort_keys=True)}
    )


def token_arrays(table: pyarrow.Table) -> numpy.ndarray | list[numpy.ndarray]:
    """The tokens of every row, as they are stored: [n, L], or a list of [L_i]."""
    column = table["tokens"]
    if pyarrow.types.is_fixed_size_list(column.type):
        return flat_values(column).reshape(-1, column.type.list_size)
    return _lists(column)


def flat_values(column: pyarrow.ChunkedArray) -> numpy.ndarray:
    """All values of a column of lists, one after the other."""
    flat = column.combine_chunks().flatten()
    return (flat.combine_chunks() if isinstance(flat, pyarrow.ChunkedArray) else flat).to_numpy(
        zero_copy_only=False
    )


def _lists(column: pyarrow.ChunkedArray) -> list[numpy.ndarray]:
    array = column.combine_chunks()
    if isinstance(array, pyarrow.ChunkedArray):  # no rows
        return []
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


def row_layouts(table: pyarrow.Table, header: StoreHeader) -> list[TokenLayout]:
    """The layout of every row of a table. Raises InputError where a grid makes no sense."""
    if header.layout is not None:
        return [header.layout] * table.num_rows
    return [
        TokenLayout(tuple((int(h), int(w)) for h, w in row.reshape(-1, 2)))
        for row in _lists(table["grids"])
    ]


def _bytes_of(array: numpy.ndarray) -> bytes:
    return numpy.ascontiguousarray(array).tobytes()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return str(TokenLayout(value))
    return "varying" if value is None else str(value)[:120]
