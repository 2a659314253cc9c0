"""Rows of a token store, their shared header, and their representation in Arrow tables."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
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
from smalto.pretrained import recorded_name

NUMBERS = ("height", "width", "size", "modified")
_NO_ID = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_NO_UTF8 = re.compile("[\ud800-\udfff]")
_NEEDS_ENCODING = re.compile("[%?\x00-\x1f\x7f\ud800-\udfff]")


_Side = Annotated[int, Field(ge=1, le=2**14)]  # of a grid, in tokens


class StoreHeader(Config):
    """Header of a token store: properties that all its tokens share.

    Attributes:
        fingerprint: fingerprint of the tokenizer.
        kind: kind of its quantizer, or the name of a preset.
        codebook_size: every token is in [0, codebook_size).
        grids: layout of every image; None if images keep their shape.
        transform: transform of the images before they were encoded.
        precision: precision of the encoder.
        tokenizer: path or name of the tokenizer when the store was created, or empty.
        source: path of the images when the store was created, or empty.
    """

    format_version: Literal[1] = 1
    fingerprint: str
    kind: str
    codebook_size: int = Field(ge=1, le=2**32)
    grids: tuple[tuple[_Side, _Side], ...] | None
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
            identity: identity of the tokenizer: ``tokenizer.identity()``.
            layout: layout of every image; None: images keep their shape, and every row has its own.
            transform: transform of the images before they are encoded.
            precision: precision of the encoder, ``"float32"`` or ``"bf16"``.
            path: folder or name of the tokenizer, from which later jobs load it.
            source: folder of the images.

        Raises:
            ConfigError: a value is out of range.
        """
        metadata = {
            "fingerprint": identity.fingerprint,
            "kind": identity.kind,
            "codebook_size": identity.codebook_size,
            "grids": layout.grids if layout is not None else None,
            "transform": transform,
            "precision": precision,
            "tokenizer": recorded_name(path) if path else "",
            "source": source,
        }
        return parse_config(cls, metadata, "token store")

    @property
    def layout(self) -> TokenLayout | None:
        """Return the layout of every image; None if images keep their shape."""
        return TokenLayout(self.grids) if self.grids is not None else None

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """Return the dtype of tokens on disk: uint16 if it holds every index, otherwise uint32."""
        return token_dtype(self.codebook_size)

    def check_same(self, other: StoreHeader, path: Path) -> None:
        """Raise an error if tokens under ``other`` must not be added to the store in ``path``.

        Raises:
            RunError: the message gives the differences with both values.
        """
        names = {"fingerprint": "tokenizer", "grids": "layout"}
        different = []
        for key in ("fingerprint", "kind", "codebook_size", "grids", "transform", "precision"):
            stored = getattr(self, key)
            now = getattr(other, key)
            if stored != now:
                name = names.get(key, key)
                different.append(f"{name}: {_shown(stored)} in the store, {_shown(now)} now")
        if different:
            raise RunError(
                f"{path} holds other tokens ({'; '.join(different)}). A store holds tokens of one "
                "kind. Name another --out."
            )


class TokenRow(NamedTuple):
    """Tokens of one view of one image.

    Attributes:
        id: unique in the store; see ``row_id``.
        tokens: integers [L] in [0, codebook_size).
        layout: layout of the tokens; None: the store's.
        label: name of the class, or empty.
        height, width: size of the original image in pixels.
        crop: (top, left, height, width) of the part that was tokenized, in pixels of the original.
        size: size of the image's file in bytes.
        modified: when the image's file was last written, in ns.
        digest: 16 bytes of the hash of the image's file, or empty.
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
    """Return the id of an image's row: its name, and the view (such as ``flip``) after a ``?``.

    In the name, ``%``, ``?``, control characters and bytes that are not UTF-8 are percent-encoded.
    """
    return _NEEDS_ENCODING.sub(_percent, name) + (f"?{view}" if view else "")


def split_id(id: str) -> tuple[str, str]:
    """Return (name, view) of an id, the arguments of ``row_id``."""
    name, _, view = id.partition("?")
    return unquote(name, errors="surrogateescape"), view


def rows_to_table(rows: Sequence[TokenRow], header: StoreHeader) -> pyarrow.Table:
    """Validate rows and return them as an Arrow table.

    Raises:
        InputError: an id is empty or has control characters, a token is outside the codebook, or
            the layout or the number of tokens does not match.
    """
    schema = store_schema(header)
    fixed = header.layout
    if not all(row.id for row in rows):
        raise InputError(
            f"got the ids {[row.id for row in rows][:5]}, ...; expected an id for every row. "
            "Make one with row_id(name)."
        )
    if odd := [row.id for row in rows if _NO_ID.search(row.id)]:
        raise InputError(
            f"got the id {odd[0]!r}; expected text without control characters. Make a valid id "
            "from any name with row_id(name)."
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
    """Return the CRC-32 of each row, over all columns except ``crc``."""
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


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def _as_array(row: TokenRow, fixed: TokenLayout | None, codebook_size: int) -> numpy.ndarray:
    tokens = numpy.asarray(row.tokens).reshape(-1)
    layout = row.layout or fixed
    if layout is None:
        raise InputError(
            f"row {row.id!r}: got layout=None; expected a layout, because images in this store "
            "keep their shape. Pass TokenRow(..., layout=...)."
        )
    if fixed is not None and layout != fixed:
        raise InputError(
            f"row {row.id!r}: got the layout {layout}; expected {fixed}, the layout of this store. "
            "Use a store whose header has layout=None for images that keep their shape."
        )
    if tokens.dtype.kind not in "iu" or len(tokens) != layout.num_tokens:
        raise InputError(
            f"row {row.id!r}: got {tokens.dtype} [{len(tokens)}]; expected integers "
            f"[{layout.num_tokens}] for the layout {layout}. Pass all tokens of one image."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= codebook_size:
        raise InputError(
            f"row {row.id!r}: got tokens from {int(tokens.min())} to {int(tokens.max())}; expected "
            f"[0, {codebook_size}). Pass the tokens of the store's tokenizer."
        )
    return tokens


def store_schema(header: StoreHeader) -> pyarrow.Schema:
    """Return the Arrow schema of a token store, with its header as metadata."""
    kind = pyarrow.from_numpy_dtype(header.dtype)
    fixed = header.layout
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
    """Return the tokens of every row in the stored dtype: [n, L], or a list of [L_i]."""
    column = table["tokens"]
    if pyarrow.types.is_fixed_size_list(column.type):
        return flat_values(column).reshape(-1, column.type.list_size)
    return _lists(column)


def flat_values(column: pyarrow.ChunkedArray) -> numpy.ndarray:
    """Return all values of a column of lists as one flat array."""
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
    """Return the layout of every row of a table.

    Raises:
        InputError: a grid is invalid.
    """
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
