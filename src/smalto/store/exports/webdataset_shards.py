"""Export as WebDataset shards: ``shard-00000.tar`` and so on, with one sample per row.

A sample has the members:

- ``.tokens.npy``: the tokens, [L], uint16, or uint32 above 65,536 codes;
- ``.cls``: the class number, -1 for a row without a label;
- ``.json``: id, label, grids, height, width and crop.

Every shard has the export header as JSON in its global pax comment, which readers of samples skip:
``tarfile.open(shard).pax_headers["comment"]``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from smalto.core.files import parse_json
from smalto.store.exports.export_header import (
    ExportHeader,
    flat_grids,
    layout_of,
    split_into_shards,
)
from smalto.store.schema import TokenRow


def write_webdataset(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    """Write rows as tar shards."""
    comment = {"comment": header.to_json()}
    key = 0
    for number, group in split_into_shards(rows, header):
        path = folder / f"shard-{number}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=comment) as tar:
            for row, class_number in zip(group, header.class_numbers(group), strict=True):
                _add_sample(tar, f"{key:09d}", row, class_number, header.store.dtype)
                key += 1


def read_webdataset(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    """Yield the rows of a WebDataset export."""
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path, "r:") as tar:
            tokens = numpy.zeros(0, header.store.dtype)
            for member in tar:
                file = tar.extractfile(member)
                if file is None or member.issparse() or member.size > path.stat().st_size:
                    raise ValueError(f"{path.name}: {member.name} is not a whole file")
                if member.name.endswith(".tokens.npy"):
                    tokens = numpy.load(io.BytesIO(file.read()), allow_pickle=False)
                elif member.name.endswith(".json"):  # the last member of a sample
                    yield _to_row(tokens, parse_json(file.read()))


def _add_sample(
    tar: tarfile.TarFile, key: str, row: TokenRow, class_number: int, dtype: numpy.dtype[Any]
) -> None:
    tokens = io.BytesIO()
    numpy.save(tokens, numpy.asarray(row.tokens, dtype))
    metadata = {
        "id": row.id,
        "label": row.label,
        "grids": flat_grids(row),
        "height": row.height,
        "width": row.width,
        "crop": row.crop,
    }
    members = {
        "tokens.npy": tokens.getvalue(),
        "cls": str(class_number).encode(),
        "json": json.dumps(metadata, ensure_ascii=False).encode(),
    }
    for extension, data in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _to_row(tokens: numpy.ndarray, metadata: dict[str, Any]) -> TokenRow:
    return TokenRow(
        metadata["id"],
        tokens,
        layout_of(metadata["grids"]),
        metadata["label"],
        metadata["height"],
        metadata["width"],
        tuple(metadata["crop"]),
    )
