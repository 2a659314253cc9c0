"""Token stores in the formats of others, and back: each export is a folder with a ``header.json``, and re-imports to the same rows."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import safetensors.numpy
from pydantic import Field

from smalto.core.config import Config, parse_config
from smalto.core.errors import ConfigError, DataError, RunError
from smalto.core.files import atomic_path, check_writable, sync_tree
from smalto.core.layout import TokenLayout
from smalto.core.progress import Progress
from smalto.store.schema import StoreHeader, TokenRow
from smalto.store.token_store import TokenStore

HEADER = "header.json"
ROWS_PER_SHARD = 10_000
_AT_ONCE = 4096


class ExportHeader(Config):
    """``header.json`` of an export: the format, the number of rows, the classes, and the header of the store."""

    format: str
    format_version: int = Field(1, ge=1, le=1)
    num_rows: int = Field(ge=0)
    classes: list[str]
    store: StoreHeader


def export_store(
    store: TokenStore, format: str, out: str | Path, *, progress: Progress | None = None
) -> Path:
    """Write all rows of a store in another format.

    Args:
        format: ``"numpy"``: ``tokens.npy`` for ``numpy.load(mmap_mode="r")``. ``"var"``: safetensors shards of one tensor per scale and
            class numbers, for training a next-scale model. ``"parquet"``. ``"webdataset"``: tar shards.
        out: a folder that does not exist yet.

    Raises:
        ConfigError: an unknown format, or one that does not take images of varying shape (var).
        RunError: ``out`` exists.
    """
    out, progress = Path(out), progress or Progress()
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    if format == "var" and store.header.grids is None:
        raise ConfigError(
            "VAR takes images of one layout; this store keeps their shapes. Tokenize with --size, or export as numpy."
        )
    if out.exists():
        raise RunError(f"{out} exists already. Name another place.")
    check_writable(out)
    header = ExportHeader(
        format=format, num_rows=len(store), classes=store.classes(), store=store.header
    )
    progress.start(f"exporting as {format}", len(store), "rows")
    with atomic_path(out) as folder:
        folder.mkdir()
        FORMATS[format].write(_rows(store, progress), header, folder)
        (folder / HEADER).write_text(
            json.dumps(header.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8"
        )
        sync_tree(folder)
    progress.finish()
    return out


def import_store(
    export: str | Path, out: str | Path, *, progress: Progress | None = None
) -> TokenStore:
    """Make a store of an export.

    Raises:
        DataError: ``export`` is none, or it is damaged.
        RunError: ``out`` exists.
    """
    export, progress = Path(export), progress or Progress()
    try:
        header = parse_config(
            ExportHeader,
            json.loads((export / HEADER).read_text(encoding="utf-8")),
            str(export / HEADER),
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{export} is no export of a token store ({error}).") from None
    if header.format not in FORMATS:
        raise DataError(f"{export} has the unknown format {header.format!r}.")
    progress.start("importing", header.num_rows, "rows")
    out, rows = Path(out), 0
    if out.exists():
        raise RunError(f"{out} exists already. Name another place.")
    with atomic_path(out) as folder:  # a store that is not whole never appears
        store = TokenStore.create(folder, header.store)
        try:
            for group in _groups(FORMATS[header.format].read(header, export), _AT_ONCE):
                store.append(group)
                rows += len(group)
                progress.advance(len(group))
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            tarfile.TarError,
            safetensors.SafetensorError,
        ) as error:
            raise DataError(f"{export} is damaged after {rows:,} rows: {error}") from None
        if rows != header.num_rows:
            raise DataError(
                f"{export} holds {rows:,} rows; its header says {header.num_rows:,}. A part of it is missing."
            )
    progress.finish()
    return TokenStore.open(out)


class Format(NamedTuple):
    """How rows are written to a folder, and read from one."""

    write: Callable[[Iterator[TokenRow], ExportHeader, Path], None]
    read: Callable[[ExportHeader, Path], Iterator[TokenRow]]


def _rows(store: TokenStore, progress: Progress) -> Iterator[TokenRow]:
    for start in range(0, len(store), _AT_ONCE):
        rows = store.token_rows(start, start + _AT_ONCE)
        yield from rows
        progress.advance(len(rows))


def _groups(rows: Iterable[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    group: list[TokenRow] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _grids(row: TokenRow) -> list[int]:
    assert row.layout is not None
    return [n for grid in row.layout.grids for n in grid]


def _layout(flat: Iterable[int]) -> TokenLayout:
    numbers = [int(n) for n in flat]
    return TokenLayout(tuple(zip(numbers[::2], numbers[1::2], strict=True)))


# numpy: tokens.npy [N, L]; where images keep their shape [sum of L_i], with offsets.npy [N + 1] and grids.npy [N, G, 2]


def _write_numpy(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    fixed, number = header.store.layout, header.num_rows
    images = numpy.lib.format.open_memmap(folder / "images.npy", "w+", numpy.int32, (number, 6))
    offsets, grids, longest = [0], [], 0
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "ids.txt", "w", encoding="utf-8") as ids,
        open(folder / "labels.txt", "w", encoding="utf-8") as labels,
    ):
        for i, row in enumerate(rows):
            tokens.write(numpy.asarray(row.tokens, header.store.dtype).tobytes())
            ids.write(row.id + "\n")  # control characters are encoded in ids, so a line is one id
            labels.write(json.dumps(row.label, ensure_ascii=False) + "\n")
            images[i] = (row.height, row.width, *row.crop)
            offsets.append(offsets[-1] + len(row.tokens))
            if fixed is None:
                grids.append(_grids(row))
                longest = max(longest, len(grids[-1]))
    images.flush()
    shape = (number, fixed.num_tokens) if fixed is not None else (offsets[-1],)
    _to_npy(folder / "tokens.bin", folder / "tokens.npy", shape, header.store.dtype)
    if fixed is None:
        numpy.save(folder / "offsets.npy", numpy.array(offsets, numpy.int64))
        padded = numpy.zeros((number, longest), numpy.int32)
        for i, grid in enumerate(grids):
            padded[i, : len(grid)] = grid
        numpy.save(
            folder / "grids.npy",
            padded.reshape(number, -1, 2) if number else padded.reshape(0, 0, 2),
        )


def _to_npy(flat: Path, out: Path, shape: tuple[int, ...], kind: Any) -> None:
    """Put the header of the .npy format in front of plain numbers."""
    with open(out, "wb") as file, open(flat, "rb") as numbers:
        description = {
            "descr": numpy.lib.format.dtype_to_descr(numpy.dtype(kind)),
            "fortran_order": False,
            "shape": shape,
        }
        numpy.lib.format.write_array_header_1_0(file, description)
        while block := numbers.read(2**22):
            file.write(block)
    flat.unlink()


def _read_numpy(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    fixed = header.store.layout
    tokens, images = (
        numpy.load(folder / "tokens.npy", mmap_mode="r"),
        numpy.load(folder / "images.npy", mmap_mode="r"),
    )
    if fixed is None:
        offsets, grids = (
            numpy.load(folder / "offsets.npy"),
            numpy.load(folder / "grids.npy", mmap_mode="r"),
        )
    with (
        open(folder / "ids.txt", encoding="utf-8", newline="\n") as ids,
        open(folder / "labels.txt", encoding="utf-8") as labels,
    ):
        for i, (id, label) in enumerate(zip(ids, labels, strict=True)):
            layout = fixed or _layout(grids[i][grids[i, :, 0] > 0].reshape(-1))
            row = tokens[i] if fixed is not None else tokens[offsets[i] : offsets[i + 1]]
            height, width, *crop = images[i].tolist()
            yield TokenRow(
                id.removesuffix("\n"),
                numpy.asarray(row),
                layout,
                json.loads(label),
                height,
                width,
                tuple(crop),
            )


# var: shard-00000.safetensors with idx_0 [n, L_0], idx_1, ..., label_B [n] (-1: none) and images [n, 6]; shard-00000.ids.txt


def _write_var(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    number_of = {label: i for i, label in enumerate(header.classes)}
    assert header.store.layout is not None
    cuts = numpy.cumsum(header.store.layout.lengths)[:-1]
    for shard, group in enumerate(_groups(rows, ROWS_PER_SHARD)):
        tokens = numpy.stack([numpy.asarray(row.tokens, header.store.dtype) for row in group])
        tensors = {
            f"idx_{k}": numpy.ascontiguousarray(part)
            for k, part in enumerate(numpy.split(tokens, cuts, axis=1))
        }
        tensors["label_B"] = numpy.array(
            [number_of.get(row.label, -1) for row in group], numpy.int64
        )
        tensors["images"] = numpy.array(
            [(row.height, row.width, *row.crop) for row in group], numpy.int32
        )
        safetensors.numpy.save_file(tensors, folder / f"shard-{shard:05d}.safetensors")
        (folder / f"shard-{shard:05d}.ids.txt").write_text(
            "".join(f"{row.id}\n" for row in group), encoding="utf-8", newline="\n"
        )


def _read_var(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    fixed = header.store.layout
    assert fixed is not None
    for path in sorted(folder.glob("shard-*.safetensors")):
        tensors = safetensors.numpy.load_file(path)
        tokens = numpy.concatenate([tensors[f"idx_{k}"] for k in range(len(fixed.grids))], axis=1)
        ids = (
            path.with_suffix("")
            .with_suffix(".ids.txt")
            .read_text(encoding="utf-8")
            .split("\n")[:-1]
        )
        for id, row, label, image in zip(
            ids, tokens, tensors["label_B"].tolist(), tensors["images"].tolist(), strict=True
        ):
            height, width, *crop = image
            yield TokenRow(
                id,
                row,
                fixed,
                header.classes[label] if label >= 0 else "",
                height,
                width,
                tuple(crop),
            )


# parquet: rows-00000.parquet with the columns of the store


def _write_parquet(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    from pyarrow import parquet

    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("tokens", pyarrow.list_(pyarrow.from_numpy_dtype(header.store.dtype))),
            ("grids", pyarrow.list_(pyarrow.int32())),
            ("label", pyarrow.string()),
            ("height", pyarrow.int32()),
            ("width", pyarrow.int32()),
            ("crop", pyarrow.list_(pyarrow.int32())),
        ],
        {"smalto": json.dumps(header.store.model_dump(mode="json"), sort_keys=True)},
    )
    for shard, group in enumerate(_groups(rows, 10 * ROWS_PER_SHARD)):
        columns = [
            [row.id for row in group],
            [numpy.asarray(row.tokens, header.store.dtype) for row in group],
            [_grids(row) for row in group],
            [row.label for row in group],
            [row.height for row in group],
            [row.width for row in group],
            [list(row.crop) for row in group],
        ]
        table = pyarrow.table(
            [pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
        )
        parquet.write_table(table, folder / f"rows-{shard:05d}.parquet", row_group_size=_AT_ONCE)


def _read_parquet(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    from pyarrow import parquet

    for path in sorted(folder.glob("rows-*.parquet")):
        for batch in parquet.ParquetFile(path).iter_batches(_AT_ONCE):
            tokens = batch.column("tokens")
            names = ("id", "grids", "label", "height", "width", "crop")
            for i, (id, grids, label, height, width, crop) in enumerate(
                zip(*(batch.column(n).to_pylist() for n in names), strict=True)
            ):
                yield TokenRow(
                    id,
                    tokens[i].values.to_numpy(),
                    _layout(grids),
                    label,
                    height,
                    width,
                    tuple(crop),
                )


# webdataset: shard-00000.tar with NUMBER.tokens.npy, NUMBER.json and, where there is a label, its number NUMBER.cls


def _write_webdataset(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    number, number_of = 0, {label: i for i, label in enumerate(header.classes)}
    for shard, group in enumerate(_groups(rows, ROWS_PER_SHARD)):
        with tarfile.open(folder / f"shard-{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for row in group:
                tokens = io.BytesIO()
                numpy.save(tokens, numpy.asarray(row.tokens, header.store.dtype))
                metadata = {
                    "id": row.id,
                    "label": row.label,
                    "grids": _grids(row),
                    "height": row.height,
                    "width": row.width,
                    "crop": row.crop,
                }
                members = {
                    "tokens.npy": tokens.getvalue(),
                    "json": json.dumps(metadata, ensure_ascii=False).encode(),
                }
                if row.label:
                    members["cls"] = str(number_of[row.label]).encode()
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{number:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1


def _read_webdataset(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path, "r:") as tar:
            tokens = numpy.zeros(0, header.store.dtype)
            for info in tar:
                data = tar.extractfile(info)
                assert data is not None
                if info.name.endswith(".tokens.npy"):
                    tokens = numpy.load(io.BytesIO(data.read()), allow_pickle=False)
                elif info.name.endswith(".json"):
                    metadata = json.loads(data.read())
                    layout, crop = _layout(metadata["grids"]), tuple(metadata["crop"])
                    yield TokenRow(
                        metadata["id"],
                        tokens,
                        layout,
                        metadata["label"],
                        metadata["height"],
                        metadata["width"],
                        crop,
                    )


FORMATS = {
    "numpy": Format(_write_numpy, _read_numpy),
    "var": Format(_write_var, _read_var),
    "parquet": Format(_write_parquet, _read_parquet),
    "webdataset": Format(_write_webdataset, _read_webdataset),
}
